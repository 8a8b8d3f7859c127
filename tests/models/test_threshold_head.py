"""The threshold network's two distributions against their formulas and against samples."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax.models.threshold_head import ThresholdHead, pool_prompt

WIDTH = 6
NORMAL = ThresholdHead(hidden=5, gamma_min=0.05, gamma_max=8.0, gamma_init=1.0, std_init=0.7)
CATEGORICAL = dataclasses.replace(NORMAL, distribution="categorical", grid_size=5)
FEATURES = jax.random.normal(jax.random.key(0), (4, WIDTH))


def params_of(head, scale=1.0):
    """Parameters that make the rows differ, with scale > 1."""
    params = head.init(jax.random.key(1), WIDTH)
    return params | {"out": params["out"] | {"kernel": params["out"]["kernel"] * scale}}


def out_of(params, features):
    """The network in NumPy: LayerNorm, SiLU, linear."""
    x = np.asarray(features, np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    params = jax.tree.map(np.asarray, params)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return x / (1 + np.exp(-x)) @ params["out"]["kernel"] + params["out"]["bias"]


def test_pool_prompt_by_hand():
    hidden = jnp.asarray([[[1.0, 2.0], [3.0, 4.0], [5.0, 8.0], [100.0, 100.0]], [[jnp.nan, 9.0], [7.0, 7.0], [1.0, 3.0], [100.0, 100.0]]])
    mask = jnp.asarray([[1, 1, 1], [0, 1, 1]], bool)  # the last position is the response's
    np.testing.assert_allclose(pool_prompt(hidden, mask), [[3.0, 14 / 3], [4.0, 5.0]], rtol=1e-6)
    assert pool_prompt(hidden.astype(jnp.bfloat16), mask).dtype == jnp.float32
    np.testing.assert_array_equal(pool_prompt(hidden, jnp.zeros((2, 3), bool)), 0.0)


@pytest.mark.parametrize("head", [NORMAL, CATEGORICAL], ids=lambda head: head.distribution)
def test_log_prob_entropy_and_mode_are_the_formulas(head):
    params = params_of(head, 200.0)
    out = out_of(params, FEATURES)
    assert np.ptp(out, axis=0).max() > 0.3
    draw = head.mode(params, FEATURES)
    if head is NORMAL:
        std, action = 0.7, jnp.asarray([-1.0, 0.3, 2.0, 5.0])
        expected = -0.5 * ((np.asarray(action) - out[:, 0]) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
        entropy = np.full(4, 0.5 * math.log(2 * math.pi * math.e * std**2))
        best, gamma = out[:, 0], 0.05 * 160 ** (1 / (1 + np.exp(-out[:, 0])))
    else:
        probs = np.exp(out) / np.exp(out).sum(1, keepdims=True)
        action = jnp.asarray([0.0, 4.0, 2.0, 1.0])
        expected = np.log(probs[np.arange(4), [0, 4, 2, 1]])
        entropy = -(probs * np.log(probs)).sum(1)
        best = probs.argmax(1)
        gamma = np.geomspace(0.05, 8.0, 5)[best]
    np.testing.assert_allclose(head.log_prob(params, FEATURES, action), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(head.entropy(params, FEATURES), entropy, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(draw.action, best, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(draw.gamma, gamma, rtol=1e-4)
    np.testing.assert_allclose(draw.log_prob, head.log_prob(params, FEATURES, draw.action), rtol=1e-6)
    np.testing.assert_array_equal(draw.features, FEATURES)


@pytest.mark.parametrize("head", [NORMAL, CATEGORICAL], ids=lambda head: head.distribution)
def test_samples_have_the_distribution(head):
    params, rows = params_of(head, 200.0), 20_000
    features = jnp.repeat(FEATURES[:1], rows, axis=0)
    draw = jax.jit(head.sample)(params, features, jax.random.split(jax.random.key(2), rows))
    np.testing.assert_allclose(draw.log_prob, head.log_prob(params, features, draw.action), rtol=1e-5, atol=1e-5)
    gamma, action = np.asarray(draw.gamma, np.float64), np.asarray(draw.action, np.float64)
    out = np.asarray(out_of(params, FEATURES[:1])[0])
    assert np.all((gamma >= 0.05) & (gamma <= 8.0 * (1 + 1e-6)))
    if head is NORMAL:
        assert action.mean() == pytest.approx(out[0], abs=4.5 * 0.7 / math.sqrt(rows))
        assert action.std() == pytest.approx(0.7, rel=4.5 / math.sqrt(2 * rows))
        np.testing.assert_allclose(gamma, 0.05 * 160 ** (1 / (1 + np.exp(-action))), rtol=1e-4)
    else:
        expected = np.exp(out) / np.exp(out).sum()
        seen = np.bincount(action.astype(int), minlength=5) / rows
        np.testing.assert_allclose(seen, expected, atol=4.5 * 0.5 / math.sqrt(rows))
        np.testing.assert_allclose(gamma, np.geomspace(0.05, 8.0, 5)[action.astype(int)], rtol=1e-4)
    assert -float(draw.log_prob.mean()) == pytest.approx(float(head.entropy(params, features[:1])[0]), abs=0.03)


def test_gamma_at_init():
    for gamma_init in (0.1, 1.0, 7.0):
        head = dataclasses.replace(NORMAL, gamma_init=gamma_init)
        np.testing.assert_allclose(head.mode(head.init(jax.random.key(0), WIDTH), FEATURES).gamma, gamma_init, rtol=0.1)
        grid = dataclasses.replace(CATEGORICAL, gamma_init=gamma_init)
        nearest = min(np.geomspace(0.05, 8.0, 5), key=lambda g, to=gamma_init: abs(math.log(g / to)))
        np.testing.assert_allclose(grid.mode(grid.init(jax.random.key(0), WIDTH), FEATURES).gamma, nearest, rtol=1e-5)
    assert math.exp(NORMAL.init(jax.random.key(0), WIDTH)["log_std"]) == pytest.approx(0.7)


def test_extreme_actions_stay_in_range():
    params = params_of(NORMAL)
    for shift, limit in ((100.0, 8.0), (-100.0, 0.05)):
        pushed = params | {"out": params["out"] | {"bias": jnp.asarray([shift])}}
        np.testing.assert_allclose(NORMAL.mode(pushed, FEATURES).gamma, limit, rtol=1e-5)


@pytest.mark.parametrize("head", [NORMAL, CATEGORICAL], ids=lambda head: head.distribution)
def test_gradient_of_log_prob_raises_the_action(head):
    params = params_of(head)
    actions = jnp.asarray([1.0, 3.0, 2.0, 0.0])
    grads = jax.grad(lambda p: jnp.mean(head.log_prob(p, FEATURES, actions)))(params)
    better = jax.tree.map(lambda p, g: p + 0.05 * g, params, grads)
    assert jnp.mean(head.log_prob(better, FEATURES, actions)) > jnp.mean(head.log_prob(params, FEATURES, actions)) + 1e-3
    assert ("log_std" in grads) == (head is NORMAL)


@pytest.mark.parametrize("fields, message", [
    ({"distribution": "beta"}, "'beta'.*normal, categorical"),
    ({"gamma_init": 9.0}, "0.05, 9.0, 8.0"),
    ({"gamma_min": 0.0}, "0 < gamma_min"),
    ({"std_init": 0.0}, "std_init > 0"),
    ({"grid_size": 1}, "grid_size >= 2"),
])  # fmt: skip
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NORMAL, **fields)
