"""Advantages, weights and losses on constants worked by hand, jitted and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax import objectives, reductions

LOG = np.log


@pytest.fixture(params=["plain", "jit"])
def variant(request):
    """Runs a function as it is, or jitted with its keyword arguments static."""
    if request.param == "plain":
        return lambda function: function
    return lambda function: lambda *args, **kwargs: jax.jit(lambda *a: function(*a, **kwargs))(*args)


REWARDS = [[1.0, 0.0, 0.0, 1.0], [2.0, 4.0, 6.0, 8.0]]


def test_advantages_by_hand(variant):
    rewards = jnp.asarray(REWARDS)
    np.testing.assert_allclose(variant(objectives.mean_only_advantages)(rewards), [[0.5, -0.5, -0.5, 0.5], [-3, -1, 1, 3]], rtol=1e-6)
    std = np.array([[0.5 + 1e-4], [np.sqrt(5.0) + 1e-4]])  # population standard deviations 1/2 and sqrt 5
    np.testing.assert_allclose(
        variant(objectives.grpo_advantages)(rewards), [[0.5, -0.5, -0.5, 0.5], [-3, -1, 1, 3]] / std, rtol=1e-5
    )
    # leave one out: 1 - 1/3, 0 - 2/3, ...; 2 - 6, 4 - 16/3, ...
    expected = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-4, -4 / 3, 4 / 3, 4]]
    np.testing.assert_allclose(variant(objectives.rloo_advantages)(rewards), expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(objectives.ADVANTAGES))
def test_equal_rewards_give_exactly_no_advantage(variant, name):
    function = variant(objectives.ADVANTAGES[name])
    for value in (0.1, 0.3, 1 / 3, 0.7, 1e-8):  # the mean of three or seven such numbers rounds
        for group in (3, 7):
            np.testing.assert_array_equal(function(jnp.full((2, group), value)), 0.0)
    mixed = function(jnp.asarray([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]]))  # groups do not see each other
    assert np.all(mixed[0] == 0) and np.all(mixed[1] != 0)
    np.testing.assert_allclose(np.sum(mixed, axis=1), 0.0, atol=1e-6)
    with pytest.raises(AssertionError):
        function(jnp.ones(3))


def test_reward_shapes_by_hand(variant):
    rewards, nfe = jnp.asarray([1.0, 0.0, 0.5]), jnp.asarray([8, 2, 4])
    np.testing.assert_allclose(variant(objectives.multiplicative_reward)(rewards, nfe, 16, 0.5), [0.75, 0.0, 0.4375], rtol=1e-6)
    np.testing.assert_allclose(variant(objectives.additive_reward)(rewards, nfe, 16, 0.5), [0.75, -0.0625, 0.375], rtol=1e-6)
    for shape in objectives.REWARD_SHAPES.values():
        np.testing.assert_array_equal(shape(rewards, nfe, 16, 0.0), rewards)


def test_importance_weights_by_hand(variant):
    gap = jnp.asarray([[LOG(0.2 / 0.4), 0.0, LOG(0.9 / 0.1)]])
    np.testing.assert_allclose(variant(objectives.truncated_importance_weights)(gap, 2.0), [[0.5, 1.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(variant(objectives.truncated_importance_weights)(gap, jnp.inf), [[0.5, 1.0, 9.0]], rtol=1e-5)
    np.testing.assert_array_equal(variant(objectives.unit_importance_weights)(gap, 2.0), [[1.0, 1.0, 1.0]])
    extreme = variant(objectives.truncated_importance_weights)(jnp.full((1, 1), 200.0), 2.0)
    np.testing.assert_allclose(extreme, [[2.0]], rtol=1e-6)  # capped before it can overflow
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(objectives.truncated_importance_weights(x, 2.0)))(gap), 0.0)


def test_effective_sample_size():
    assert objectives.effective_sample_size(jnp.asarray(6.0), jnp.asarray(12.0), jnp.asarray(3)) == pytest.approx(1.0)  # 2, 2, 2
    assert objectives.effective_sample_size(jnp.asarray(3.0), jnp.asarray(9.0), jnp.asarray(3)) == pytest.approx(1 / 3)  # 3, 0, 0
    assert objectives.effective_sample_size(jnp.asarray(4.0), jnp.asarray(10.0), jnp.asarray(2)) == pytest.approx(0.8)  # 1, 3
    assert objectives.effective_sample_size(jnp.asarray(0.0), jnp.asarray(0.0), jnp.asarray(0)) == 0.0


# (ratio, advantage, value, gradient in log rho, clipped): eps_low = 0.2, eps_high = 0.4
CLIPPING = [
    (1.0, 2.0, 2.0, 2.0, False),
    (1.0, -2.0, -2.0, -2.0, False),
    (1.3, 2.0, 2.6, 2.6, False),
    (1.5, 2.0, 2.8, 0.0, True),  # gone up enough
    (1.5, -2.0, -3.0, -3.0, False),  # gone up where it should go down: the pessimist's bound
    (0.9, -2.0, -1.8, -1.8, False),
    (0.5, -2.0, -1.6, 0.0, True),  # gone down enough
    (0.5, 2.0, 1.0, 1.0, False),
    (1.5, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize("ratio, advantage, value, gradient, clipped", CLIPPING)
def test_clipped_surrogate(variant, ratio, advantage, value, gradient, clipped):
    log_ratio, a = jnp.asarray([LOG(ratio)]), jnp.asarray([advantage])
    assert variant(objectives.clipped_surrogate)(log_ratio, a, 0.2, 0.4)[0] == pytest.approx(value, rel=1e-5)
    grad = jax.grad(lambda x: jnp.sum(variant(objectives.clipped_surrogate)(x, a, 0.2, 0.4)))(log_ratio)
    assert grad[0] == pytest.approx(gradient, rel=1e-5)
    assert bool(variant(objectives.is_clipped)(log_ratio, a, 0.2, 0.4)[0]) == clipped


def test_k1_and_k2(variant):
    log_probs, ref = jnp.asarray([LOG(0.5), LOG(0.25)]), jnp.asarray([LOG(0.25), LOG(0.5)])
    np.testing.assert_allclose(variant(objectives.k1_kl)(log_probs, ref), [LOG(2.0), -LOG(2.0)], rtol=1e-6)
    np.testing.assert_allclose(variant(objectives.k2_kl)(log_probs, ref), [LOG(2.0) ** 2 / 2] * 2, rtol=1e-6)
    p, q = jnp.asarray([0.7, 0.2, 0.1]), jnp.log(jnp.asarray([0.3, 0.3, 0.4]))
    logits = jnp.log(p)
    log_softmax = jax.nn.log_softmax
    exact = jax.grad(lambda x: jnp.sum(jnp.exp(log_softmax(x)) * (log_softmax(x) - q)))(logits)
    mean = {name: jax.grad(lambda x: jnp.sum(p * kl(log_softmax(x), q)))(logits) for name, kl in objectives.KL_ESTIMATORS.items()}  # noqa: B023
    np.testing.assert_allclose(mean["k2"], exact, atol=1e-6)  # over samples of pi, the gradient of KL(pi || ref)
    np.testing.assert_allclose(mean["k1"], 0.0, atol=1e-6)


def test_k3(variant):
    log_probs, ref = jnp.asarray([LOG(0.5), LOG(0.5), LOG(0.25)]), jnp.asarray([LOG(0.5), LOG(0.25), LOG(0.5)])
    expected = [0.0, 0.5 + LOG(2.0) - 1, 2.0 - LOG(2.0) - 1]
    np.testing.assert_allclose(variant(objectives.k3_kl)(log_probs, ref), expected, atol=1e-7)
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    k3 = variant(objectives.k3_kl)(jnp.asarray(LOG(p)), jnp.asarray(LOG(q)))
    assert np.all(np.asarray(k3) > 0) and np.sum(p * k3) == pytest.approx(np.sum(p * LOG(p / q)), rel=1e-5)  # unbiased under pi
    grad = jax.grad(lambda x: jnp.sum(objectives.k3_kl(x, ref)))(log_probs)
    np.testing.assert_allclose(grad, [0.0, 0.5, -1.0], atol=1e-6)  # 1 - ref / pi


MASK = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0]], bool)


def test_normalisations_by_hand(variant):
    by_hand = {
        "row": [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0]],
        "token_mean": [[1 / 4, 1 / 4, 1 / 4, 0], [1 / 4, 0, 0, 0]],
        "constant": [[1 / 8, 1 / 8, 1 / 8, 0], [1 / 8, 0, 0, 0]],
    }
    assert set(by_hand) == set(objectives.NORMALISATIONS)
    for name, expected in by_hand.items():
        np.testing.assert_allclose(variant(objectives.NORMALISATIONS[name])(MASK), expected, rtol=1e-6)
        np.testing.assert_array_equal(objectives.NORMALISATIONS[name](jnp.zeros((2, 3), bool)), 0.0)


def estimate(new, old, importance=None, reads=None, normalisation=None):
    """Of [N, L], or of [N, R, L] with `reads`; normalised by rows where nothing is said."""
    new, old = (jnp.asarray(x) if reads is not None else jnp.asarray(x)[:, None] for x in (new, old))
    importance = jnp.ones_like(new) if importance is None else jnp.asarray(importance).reshape(new.shape)
    reads = jnp.ones_like(new) if reads is None else jnp.asarray(reads)
    rows, length = new.shape[0], new.shape[-1]
    normalisation = jnp.full((rows, length), 1 / rows / length) if normalisation is None else jnp.asarray(normalisation)
    return objectives.Estimate(new, old, importance, normalisation, reads)


def test_model_objective_by_hand(variant):
    # position: rho 1.5 clipped to 1.2, w 0.5 | rho 0.5, w 2 | padding that is not finite
    new, old = jnp.asarray([[LOG(0.6), LOG(0.2), jnp.nan]]), jnp.asarray([[LOG(0.4), LOG(0.4), -jnp.inf]])
    ref, w = jnp.asarray([[[LOG(0.3), LOG(0.2), jnp.nan]]]), [0.5, 2.0, jnp.nan]
    normalisation, advantages = jnp.asarray([[0.5, 0.25, 0.0]]), jnp.asarray([3.0])
    options = dict(objective="clipped", clip=(0.2, 0.2))

    def objective(new, old, ref, w=w, beta=0.0, **more):
        return objectives.model_objective(estimate(new, old, w, None, normalisation), ref, advantages, kl_weight=beta, **options, **more)

    expected = 0.5 * 0.5 * 1.2 * 3 + 0.25 * 2.0 * 0.5 * 3
    got, log_ratio = variant(objective)(new, old, ref)
    assert got == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(log_ratio, [[[LOG(1.5), LOG(0.5), 0.0]]], rtol=1e-5)
    kl = 0.5 * (0.5 - LOG(0.5) - 1)  # ref / pi = 1/2 at the first position, 1 at the second
    assert variant(objective)(new, old, ref, beta=0.1)[0] == pytest.approx(expected - 0.1 * kl, rel=1e-5)
    squared = 0.5 * LOG(2.0) ** 2 / 2
    assert variant(objective)(new, old, ref, beta=0.1, kl_estimator="k2")[0] == pytest.approx(expected - 0.1 * squared, rel=1e-5)
    assert variant(objective)(new, old, ref, w=None)[0] == pytest.approx(0.5 * 1.2 * 3 + 0.25 * 0.5 * 3, rel=1e-5)

    grads = jax.grad(lambda *args: objective(*args, beta=0.1)[0], argnums=(0, 1, 2))(new, old, ref)
    # clipped: only the KL's 1 - ref / pi is left | 1/4 * w 2 * rho 1/2 * A 3 | nothing from padding
    np.testing.assert_allclose(grads[0], [[-0.1 * 0.5 * 0.5, 0.75, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(grads[1], 0.0)
    np.testing.assert_array_equal(grads[2], 0.0)


def test_each_read_of_a_position_has_its_own_ratio():
    new, old = [[[LOG(0.6), LOG(0.2)], [LOG(0.3), 7.0]]], [[[LOG(0.4), LOG(0.2)], [LOG(0.2), 5.0]]]
    got, _ = objectives.model_objective(
        estimate(new, old, None, [[[0.5, 1.0], [0.25, 0.0]]], [[0.5, 0.5]]), None, jnp.asarray([2.0]), objective="clipped", clip=(0.2, 0.6),
        kl_weight=0.0,
    )  # fmt: skip
    assert got == pytest.approx(0.5 * 2 * (0.5 * 1.5 + 1.0 * 1.0 + 0.25 * 1.5), rel=1e-5)


def test_sequence_ratio_by_hand(variant):
    """ESPO: two rows of two positions; ratios exp of half the difference of log-likelihoods."""
    new, old = jnp.asarray([[LOG(0.6), LOG(0.5)], [LOG(0.1), LOG(0.4)]]), jnp.asarray([[LOG(0.3), LOG(0.5)], [LOG(0.2), LOG(0.4)]])
    w, advantages = [[4.0, 1.0], [1.0, 1.0]], jnp.asarray([1.0, -1.0])

    def objective(new):
        return objectives.model_objective(estimate(new, old, w), None, advantages, objective="sequence", clip=(0.4, 0.2), kl_weight=0.0)

    (value, log_ratio), up = variant(objective)(new), 2.0**0.5
    np.testing.assert_allclose(log_ratio[:, 0, 0], [LOG(up), -LOG(up)], rtol=1e-5)
    assert value == pytest.approx(0.5 * 2.0 * 1.2 - 0.5 / up, rel=1e-5)  # up to 1.2; weights' geometric mean 2; down to 0.707
    grads = jax.grad(lambda new: objective(new)[0])(new)
    np.testing.assert_allclose(grads, [[0.0, 0.0], [-0.25 / up, -0.25 / up]], atol=1e-6)  # d rho = rho / 2 a position


def test_sandwiched_bounds_by_hand(variant):
    """SPG: one position read twice, another once, a third never; the bound depends on the advantage's sign."""
    p = np.asarray([[0.5, 0.2, 0.9], [0.1, 0.7, 0.3]])
    reads, normalisation = np.asarray([[[0.5, 0.8, 0.0], [0.25, 0.0, 0.0]]]), [[0.5, 0.25, 0.25]]

    def objective(log_probs, advantage):
        return objectives.model_objective(
            estimate(log_probs, log_probs, None, reads, normalisation), None, jnp.asarray([advantage]), objective="sandwiched",
            clip=(0.2, 0.2), kl_weight=0.0,
        )[0]  # fmt: skip

    log_probs, beta = jnp.asarray(LOG(p))[None], objectives.SPG_BETA
    lower = 0.5 * (0.5 * LOG(0.5) + 0.25 * LOG(0.1)) + 0.25 * 0.8 * LOG(0.2)
    upper = (0.5 * LOG(0.5 * 0.5**beta + 0.25 * 0.1**beta) + 0.25 * LOG(0.8 * 0.2**beta)) / beta
    mixed = objectives.SPG_MIX * upper + (1 - objectives.SPG_MIX) * lower
    assert variant(lambda x: objective(x, 2.0))(log_probs) == pytest.approx(2 * lower, rel=1e-5)
    assert variant(lambda x: objective(x, -2.0))(log_probs) == pytest.approx(-2 * mixed, rel=1e-5)
    grads = jax.grad(objective)(log_probs, -1.0)[0]
    share = 0.5 * 0.5**beta / (0.5 * 0.5**beta + 0.25 * 0.1**beta)  # of the first read in the upper bound
    np.testing.assert_allclose(grads[0, 0], -(0.5 * 0.5 * share + 0.5 * 0.5 * 0.5), rtol=1e-5)
    np.testing.assert_array_equal(grads[:, 2], 0.0)


def test_sampler_objective_by_hand(variant):
    log_prob, old = jnp.asarray([LOG(0.3), LOG(0.1), LOG(0.2)]), jnp.asarray([LOG(0.2), LOG(0.2), LOG(0.2)])
    args = (log_prob, old, jnp.asarray([2.0, 2.0, -1.0]), jnp.asarray([1.0, 2.0, 3.0]))
    got = variant(objectives.sampler_objective)(*args, clip=0.2, entropy_bonus=0.1)
    np.testing.assert_allclose(got, [1.2 * 2 + 0.1, 0.5 * 2 + 0.2, -1.0 + 0.3], rtol=1e-5)


def test_reductions_ignore_what_is_masked(variant):
    values, mask = jnp.asarray([[1.0, 3.0, jnp.nan], [5.0, jnp.inf, -jnp.inf]]), jnp.asarray([[1, 1, 0], [1, 0, 0]], bool)
    assert variant(reductions.masked_sum)(values, mask) == 9.0
    np.testing.assert_allclose(variant(reductions.masked_mean)(values, mask, axis=1), [2.0, 5.0])
    np.testing.assert_allclose(variant(reductions.masked_max)(values, mask, axis=1), [3.0, 5.0])
    empty = jnp.zeros_like(mask)
    assert reductions.masked_mean(values, empty) == 0.0 and reductions.masked_sum(values, empty) == 0.0
    assert reductions.masked_max(values, empty) == -jnp.inf


def test_wd1_by_hand():
    # r - mean = (-1/2, 1/2): softmax = (1, e) / (1 + e)
    share = np.e / (1 + np.e)
    advantages = objectives.wd1_advantages(jnp.asarray([[0.0, 1.0], [2.0, 2.0]]))
    np.testing.assert_allclose(advantages, [[2 * (1 - 2 * share), 2 * (2 * share - 1)], [0.0, 0.0]], atol=1e-6)
    new = jnp.asarray([[-1.0, -3.0], [-2.0, -4.0]])

    def objective(new):
        return objectives.model_objective(
            estimate(new, new - 5.0), None, advantages[0], objective="log_likelihood", clip=(0.2, 0.2), kl_weight=0.0
        )[0]  # fmt: skip

    # -w- of the worse, w+ of the better, times the mean of their log-likelihoods; no ratio and no clip
    a = 2 * (2 * share - 1)
    value, gradient = jax.value_and_grad(objective)(new)
    assert value == pytest.approx(0.25 * a * (4 - 6))
    np.testing.assert_allclose(gradient, 0.25 * np.asarray([[-a, -a], [a, a]]), atol=1e-6)
