"""The summary's parts and the printed table."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from diffpo_jax import pareto, report


def make_summary():
    base_correct, base_nfe = np.arange(10) < np.array([[2], [6], [8]]), np.tile([[2.0], [4.0], [8.0]], 10)
    base = pareto.Curve(np.array([4.0, 1.0, 0.1]), base_correct, base_nfe)
    correct, nfe, tokens = np.arange(10) < 7, np.full(10, 3.0), np.full(10, 12)
    curve = [{"gamma": g} | report.point(c, t, tokens, 2.0) for g, c, t in zip(base.gammas, base_correct, base_nfe, strict=True)]
    operating = report.point(correct, nfe, tokens, 1.5) | {"thresholds": report.threshold_statistics(np.geomspace(0.5, 2.0, 10))}
    return {
        "task": "sudoku",
        "seed": 3,
        "base": {"curve": curve},
        "trained": {"curve": curve, "operating_point": operating},
        "comparison": pareto.compare(base, correct, nfe, base),
        "denoiser_calls": 1234567,
        "seconds": {"sft": 61.2, "rl": 300.0},
    }


def printed(summary):
    console = Console(file=io.StringIO(), width=120)
    report.print_report(summary, console)
    return console.file.getvalue()


def test_point():
    entry = report.point(np.array([1, 0, 1, 1]), np.array([2, 4, 4, 6]), np.array([8, 8, 8, 16]), 1.25)
    assert (entry["accuracy"], entry["nfe"], entry["tokens_per_call"], entry["seconds"]) == (0.75, 4.0, 2.5, 1.25)
    assert entry["interval"] == [0.25, 1.0]


def test_threshold_statistics():
    statistics = report.threshold_statistics([1.0, 2.0, 4.0, 256.0])
    assert statistics["mean"] == 65.75
    np.testing.assert_allclose(statistics["quantiles"][2], 3.0)  # the median
    np.testing.assert_allclose(statistics["histogram"]["edges"], 2.0 ** np.arange(9))  # eight octaves
    assert statistics["histogram"]["counts"] == [1, 1, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("gammas", [np.full(5, 0.3), np.geomspace(0.05, 8.0, 777), np.float32([0.7, 0.7001])])
def test_histogram_loses_no_threshold(gammas):
    assert sum(report.threshold_statistics(gammas)["histogram"]["counts"]) == len(gammas)


def test_summary_is_valid_json(tmp_path):
    summary = make_summary()
    summary["comparison"]["base_nfe_at_same_accuracy"] = float("nan")
    path = report.write_summary(tmp_path / "run", summary)
    assert path == tmp_path / "run" / "summary.json"
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["comparison"]["base_nfe_at_same_accuracy"] == "NaN"
    assert read["base"]["curve"][1]["accuracy"] == 0.6 and read["denoiser_calls"] == 1234567


def test_table_shows_before_and_after():
    text = printed(make_summary())
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    rows = {name: values for name, *values in cells}
    assert rows["base, γ = 1"][1:] == ["4.00", "3.00", "2.0 s"]  # NFE 4 is nearer to 3 than 2 is, in ratio
    assert rows["base, at the same NFE"][:2] == ["40.0%", "3.00"]
    assert rows["trained, learned γ"][0].startswith("70.0% (") and rows["trained, learned γ"][1:] == ["3.00", "4.00", "1.5 s"]
    assert "accuracy at the same NFE: +30.0 points (" in text
    assert "NFE saved at the same accuracy: 50.0% (" in text and "the base model needs 6.00" in text
    assert "denoiser calls in training: 1,234,567; wall time: sft 61 s, rl 300 s" in text
    assert text.count("█" * 30) == 2  # ten thresholds over eight bins: the fullest bins hold two


def test_table_says_when_the_base_never_gets_there():
    summary = make_summary()
    summary["comparison"] |= {"base_reaches_accuracy": False, "nfe_saving_at_base_accuracy": float("nan")}
    text = printed(summary)
    assert "at least 50.0%" in text and "the base model never gets there" in text and "at the base model's accuracy" not in text


def test_table_of_a_base_model_alone_is_its_curve():
    summary = {name: value for name, value in make_summary().items() if name in ("task", "seed", "base")}
    text = printed(summary)
    assert [f"base, γ = {g}" in text for g in ("4", "1", "0.1")] == [True] * 3 and "trained" not in text


def test_a_summary_read_back_prints_the_same(tmp_path):
    summary = make_summary()
    hopeless = {"nfe_saving_at_base_accuracy": float("nan"), "nfe_saving_at_same_accuracy_interval": [float("-inf"), 0.5]}
    for changes in ({}, hopeless):
        summary["comparison"] |= changes
        assert printed(json.loads(report.write_summary(tmp_path, summary).read_text())) == printed(summary)
