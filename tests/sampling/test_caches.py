"""The sampler with keys and values kept from call to call: against itself without, and against a plain Python loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.sampling import queues
from diffpo_jax.sampling.denoise import VIEWS, denoise
from tests.reference import make_prompts, python_denoise, tiny_policy

VOCAB, EOS, LENGTH, ROWS = 6, 0, 8, 6
HEAD = ThresholdHead(hidden=4, gamma_min=0.05, gamma_max=8.0, gamma_init=1.0, std_init=1.0)
both = pytest.mark.parametrize("cache", VIEWS)


def make(**sizes):
    policy, params = tiny_policy(vocab=VOCAB, seed=3, sharpness=40.0, **sizes)
    return policy, params, make_prompts(ROWS, 4, VOCAB, padding=(0, 1, 3))


@pytest.fixture(scope="module")
def model():
    return make(layers=2)


def sample(model, key=0, **options):
    policy, params, prompts = model
    return denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(key), **{"length": LENGTH, "block_length": 4} | options)


def assert_same(a, b, but=()):
    """Whatever is not a float must be equal, floats nearly."""
    a, b = (x.replace(**dict.fromkeys(but)) for x in (a, b))
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        exact = not jnp.issubdtype(x.dtype, jnp.floating)
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if exact else 2e-5, err_msg=jax.tree_util.keystr(path))


@both
@pytest.mark.parametrize("lanes", [0, 2])
def test_a_cache_that_is_renewed_at_every_call_changes_nothing(model, cache, lanes):
    options = {"lanes": lanes, "threshold": 0.4, "eos_id": EOS}
    assert_same(sample(model, cache=cache, refresh=1, **options), sample(model, **options))


@both
@pytest.mark.parametrize("sizes, refresh", [({"shift": True}, 0), ({"count_positions": "valid", "kv_heads": 1}, 2)])
def test_with_one_layer_the_keys_elsewhere_are_the_same(cache, sizes, refresh):
    model = make(**sizes)
    exact = sample(model, rule="entropy")
    found = sample(model, rule="entropy", cache=cache, refresh=refresh)
    assert_same(found, exact, but=("whole_calls", "first_step", "last_step"))
    np.testing.assert_array_equal(found.whole_calls, 4 if refresh else 2)
    np.testing.assert_array_equal(exact.whole_calls, 8)


LOOPS = [
    ("entropy_bounded", {"threshold": 0.4}, 0),
    ("entropy_bounded", {"threshold": 0.2, "eos_id": EOS, "temperature": 0.7}, 2),
    ("low_confidence", {"steps": 8, "block_length": 8, "temperature": 0.0}, 3),
    ("top_probability", {"steps": 8, "block_length": 2}, 0),
]


@both
@pytest.mark.parametrize("rule, options, refresh", LOOPS)
def test_while_loop_is_a_python_loop(model, cache, rule, options, refresh):
    options = {"block_length": 4, "rule": rule, "cache": cache, "refresh": refresh} | options
    found = sample(model, key=7, **options)
    expected = python_denoise(model, jax.random.key(7), length=LENGTH, **options)
    for name, value in zip(("tokens", "unmask_step", "log_prob", "entropy", "nfe", "whole_calls"), expected, strict=True):
        np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=2e-5, err_msg=name)
    exact = sample(model, key=7, **options | {"cache": "none", "refresh": 0})
    assert not np.allclose(found.entropy, exact.entropy, atol=1e-3)  # it is an approximation


@both
def test_lanes_change_nothing_but_when_rows_run(model, cache):
    options = {"cache": cache, "refresh": 3, "threshold": jnp.linspace(0.0, 3.0, ROWS), "eos_id": EOS}
    learned = {"threshold_fn": HEAD.sample, "threshold_params": HEAD.init(jax.random.key(1), 8)}
    for more in ({}, learned):
        lockstep, found = sample(model, **options, **more), sample(model, lanes=2, **options, **more)
        assert_same(found, lockstep, but=("first_step", "last_step"))
        assert len(set(np.asarray(lockstep.nfe).tolist())) > 1
        order = np.argsort(found.first_step, kind="stable")
        np.testing.assert_array_equal(order, np.arange(ROWS))
        assert np.all(found.last_step - found.first_step + 1 >= found.nfe)  # a lane may wait


def test_lanes_wait_for_each_other_before_a_call_over_whole_rows(model):
    # Calls in the two blocks: 4 and 4, or 1 and 1. Whole calls are made where both rows need one, or the other one is finished.
    policy, params, prompts = model
    prompts = jax.tree.map(lambda x: x[:3], prompts)
    options = {"cache": "dual", "threshold": jnp.array([0.0, jnp.inf, 0.0])}
    found = sample((policy, params, prompts), **options)
    np.testing.assert_array_equal(found.nfe, [8, 2, 8])
    np.testing.assert_array_equal(found.whole_calls, [2, 2, 2])
    np.testing.assert_array_equal(found.last_step, [7, 4, 7])
    assert queues.utilisation(found.first_step, found.last_step, found.nfe) == pytest.approx(18 / 24)
    refilled = sample((policy, params, prompts), lanes=2, **options)
    np.testing.assert_array_equal(refilled.first_step, [0, 0, 8])
    np.testing.assert_array_equal(refilled.last_step, [7, 4, 15])


@both
def test_nan_ends(model, cache):
    policy, params, prompts = model
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    found = sample((policy, broken, prompts), cache=cache, threshold=0.0)
    assert np.all(found.nfe <= LENGTH)


def test_rows_do_not_depend_on_the_rows_beside_them(model):
    policy, params, prompts = model
    options = {"cache": "prefix", "threshold": jnp.linspace(0.0, 3.0, ROWS)}
    whole = sample(model, **options)
    for i in range(ROWS):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], prompts)
        alone = sample((policy, params, one), row_ids=jnp.array([i]), **options | {"threshold": options["threshold"][i]})
        mine = jax.tree.map(lambda x, i=i: x[i : i + 1], dataclasses.replace(whole))
        assert_same(alone, mine, but=("first_step", "last_step"))


def test_errors(model):
    with pytest.raises(ValueError, match="cache 'full' is unknown; known: none, prefix, dual"):
        sample(model, cache="full")
