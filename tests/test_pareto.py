"""Curves, their comparison, intervals; constants by hand."""

import numpy as np
import pytest

from diffpo_jax import pareto


def flat_curve(accuracies, nfes, n=10):
    """A curve with these exact accuracies (multiples of 1/n) and the same NFE on all problems; gammas fall as NFE rises."""
    correct = np.arange(n)[None] < np.round(np.array(accuracies)[:, None] * n)
    return pareto.Curve(np.arange(len(nfes), 0, -1.0), correct, np.repeat(np.array(nfes, float)[:, None], n, 1))


@pytest.fixture
def dented():
    """(2, 0.2) (4, 0.6) (6, 0.5) (10, 0.9), given out of order."""
    return flat_curve([0.6, 0.2, 0.9, 0.5], [4, 2, 10, 6])


@pytest.mark.parametrize(("nfe", "accuracy"), [(1, 0.2), (2, 0.2), (3, 0.4), (5, 0.55), (9, 0.8), (10, 0.9), (16, 0.9)])
def test_accuracy_at_nfe(dented, nfe, accuracy):
    assert pareto.accuracy_at_nfe(dented, nfe) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(("accuracy", "nfe"), [(0.1, 2), (0.2, 2), (0.3, 2.5), (0.55, 3.75), (0.6, 4), (0.7, 8), (0.9, 10)])
def test_nfe_at_accuracy_is_the_first_crossing(dented, accuracy, nfe):
    assert pareto.nfe_at_accuracy(dented, accuracy) == pytest.approx(nfe, abs=1e-12)


def test_nfe_at_an_accuracy_never_reached_is_nan(dented):
    assert np.isnan(pareto.nfe_at_accuracy(dented, 0.95))


def test_points_of_equal_nfe_become_one():
    x, y = pareto.points(flat_curve([0.2, 0.4, 0.9], [1, 1, 3]))
    np.testing.assert_allclose(x, [1, 3])
    np.testing.assert_allclose(y, [0.3, 0.9])


def test_curve_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"gammas \(2,\), correct \(3, 4\), nfe \(3, 4\)"):
        pareto.Curve(np.ones(2), np.ones((3, 4)), np.ones((3, 4)))


def test_accuracy_interval_matches_the_binomial():
    correct = np.repeat([1.0, 0.0], [300, 700])
    low, high = pareto.accuracy_interval(correct, samples=4000)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)  # 0.0284
    assert low == pytest.approx(0.3 - half, abs=0.003) and high == pytest.approx(0.3 + half, abs=0.003)
    assert pareto.accuracy_interval(correct) == pareto.accuracy_interval(correct)  # the seed decides
    assert pareto.accuracy_interval(np.ones(5)) == (1.0, 1.0)


def test_bootstrap_is_over_problems_and_keeps_infinite_values_apart():
    draws = []
    interval = pareto.bootstrap(lambda problems: draws.append(problems) or [problems.mean(), -np.inf], n=7, samples=50)
    assert interval.shape == (2, 2) and len(draws) == 50
    assert all(d.shape == (7,) and d.min() >= 0 and d.max() <= 6 for d in draws)
    assert interval[0, 0] < 3 < interval[1, 0] and np.all(interval[:, 1] == -np.inf)


def test_bootstrap_coverage_of_the_gain():
    """The 95% interval of a paired gain holds the true one in about 95% of test sets, and is narrower than an unpaired one."""
    rng = np.random.default_rng(0)
    covered, widths = [], []
    for trial in range(200):
        difficulty = rng.uniform(size=100)
        base = pareto.Curve(np.array([2.0, 1.0]), difficulty < np.array([[0.3], [0.5]]), np.tile([[2.0], [6.0]], 100))
        low, high = pareto.compare(base, difficulty < 0.6, np.full(100, 4.0), seed=trial, samples=200)["gain_interval"]
        covered.append(low <= 0.2 <= high)  # 0.6 against (0.3 + 0.5) / 2
        widths.append(high - low)
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.mean(widths) < 2 * 1.96 * np.sqrt((0.6 * 0.4 + 0.4 * 0.6) / 100)


def test_compare_by_hand():
    base = flat_curve([0.2, 0.6, 0.8], [2, 4, 8])
    trained = flat_curve([0.3, 0.7, 0.8], [2, 3, 5])
    correct, nfe = np.arange(10) < 7, np.full(10, 3.0)
    result = pareto.compare(base, correct, nfe, trained)
    assert result["accuracy"] == pytest.approx(0.7) and result["nfe"] == pytest.approx(3)
    assert result["base_accuracy_at_same_nfe"] == pytest.approx(0.4)  # half-way from 0.2 to 0.6
    assert result["gain"] == pytest.approx(0.3)
    assert result["base_nfe_at_same_accuracy"] == pytest.approx(6)  # half-way from 4 to 8
    assert result["nfe_saving_at_same_accuracy"] == pytest.approx(0.5)  # 3 instead of 6
    assert result["nfe_for_base_accuracy"] == pytest.approx(2.25)  # 0.4 is a quarter of the way from 0.3 to 0.7
    assert result["nfe_saving_at_base_accuracy"] == pytest.approx(0.25)  # 2.25 instead of 3
    assert result["base_reaches_accuracy"] is True
    for name in ("gain", "nfe_saving_at_same_accuracy", "nfe_saving_at_base_accuracy"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high and low < high


def test_compare_where_the_base_never_gets_there_understates_the_saving():
    result = pareto.compare(flat_curve([0.2, 0.6], [2, 8]), np.arange(10) < 9, np.full(10, 2.0))
    assert result["base_reaches_accuracy"] is False and np.isnan(result["base_nfe_at_same_accuracy"])
    assert result["nfe_saving_at_same_accuracy"] == pytest.approx(0.75)  # 2 instead of its largest, 8
    assert "nfe_for_base_accuracy" not in result


def test_compare_where_the_trained_curve_never_gets_there_is_nan():
    result = pareto.compare(flat_curve([0.5, 0.9], [2, 8]), np.arange(10) < 9, np.full(10, 8.0), flat_curve([0.1, 0.2], [2, 8]))
    assert np.isnan(result["nfe_for_base_accuracy"]) and np.isnan(result["nfe_saving_at_base_accuracy"])
    assert result["nfe_saving_at_base_accuracy_interval"][0] == -np.inf


def test_compare_of_the_base_with_itself_is_zero():
    base = flat_curve([0.2, 0.6, 0.8], [2, 4, 8])
    result = pareto.compare(base, base.correct[1], base.nfe[1], base)
    assert result["gain_interval"] == [0.0, 0.0] and result["gain"] == 0
    for name in ("nfe_saving_at_same_accuracy", "nfe_saving_at_base_accuracy"):
        assert result[name] == pytest.approx(0)


def test_compare_needs_the_same_problems():
    with pytest.raises(ValueError, match="same problems"):
        pareto.compare(flat_curve([0.2], [2]), np.ones(9), np.ones(9))


def test_plot_writes_a_picture(tmp_path, dented):
    operating = {"accuracy": 0.7, "interval": (0.7, 0.9), "nfe": 3.0}
    pareto.plot(tmp_path / "new" / "pareto.png", dented, flat_curve([0.3, 0.7], [2, 3]), operating, title="sudoku")
    assert (tmp_path / "new" / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pareto.plot(tmp_path / "base.png", dented)
    assert (tmp_path / "base.png").stat().st_size > 10_000


@pytest.mark.parametrize(("at_most", "accuracy"), [(2, 0.2), (3, 0.4), (4, 0.6), (5, 0.6), (7, 0.6), (9, 0.8), (10, 0.9), (16, 0.9)])
def test_best_accuracy_with_at_most_so_many_calls(at_most, accuracy):
    nfe, accuracies = [4, 2, 10, 6], [0.6, 0.2, 0.9, 0.5]  # on the way down to (6, 0.5) nothing is better than (4, 0.6)
    assert pareto.best_accuracy(nfe, accuracies, at_most) == pytest.approx(accuracy, abs=1e-12)


def test_best_accuracy_below_the_fewest_calls_is_nan():
    assert np.isnan(pareto.best_accuracy([2, 3], [0.5, 0.6], 1.9))


@pytest.mark.parametrize(
    ("nfe", "accuracy", "share"),
    [
        ([1], [1.0], 1.0),
        ([1], [0.5], 0.5),
        ([6], [0.8], 0.4),  # half of the calls with nothing right
        ([11], [1.0], 0.0),
        ([2, 4, 10], [0.2, 0.6, 0.9], 0.49),  # (2 x 0.2 + 6 x 0.6 + 1 x 0.9) / 10
        ([10, 6, 2, 4], [0.9, 0.5, 0.2, 0.6], 0.49),  # in any order, and a dominated point
        ([2, 2, 4, 10], [0.2, 0.1, 0.6, 0.9], 0.49),
        ([2, 4, 10, 12], [0.2, 0.6, 0.9, 1.0], 0.49),  # beyond the most calls
    ],
)
def test_hypervolume_by_hand(nfe, accuracy, share):
    assert pareto.hypervolume(nfe, accuracy, 11) == pytest.approx(share, abs=1e-12)


def test_t_interval_against_the_table():
    for n, quantile in ((2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)):
        values = np.arange(n, dtype=float)
        mean, half = pareto.t_interval(values)
        assert mean == (n - 1) / 2 and half == pytest.approx(quantile * values.std(ddof=1) / n**0.5, rel=1e-3)
    assert pareto.t_interval([3.0])[0] == 3 and np.isnan(pareto.t_interval([3.0])[1])
