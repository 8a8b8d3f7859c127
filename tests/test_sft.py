"""Masks of supervised training, its loss against an exhaustive expectation, and that it learns."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.default import get_config
from diffpo_jax import sft
from diffpo_jax.structs import Prompts
from tests.reference import LOGITS, log_softmax, make_prompts, tiny_policy

MASK_TOKENS = jax.jit(jax.vmap(sft.mask_tokens, (0, None, None)), static_argnums=(1, 2))


def test_mask_counts_are_stratified_and_positions_uniform():
    masked, t = MASK_TOKENS(jax.random.split(jax.random.key(0), 300), 8, 4)  # [300, 8, 4]: two rows of each count
    counts = np.asarray(masked).sum(-1)
    np.testing.assert_array_equal(np.sort(counts, axis=1), [[1, 1, 2, 2, 3, 3, 4, 4]] * 300)
    np.testing.assert_allclose(t, counts / 4)
    assert len({tuple(row) for row in counts.tolist()}) > 200  # in another order each time
    for count in (1, 2, 3):
        sets = np.asarray(masked)[counts == count] @ [1, 2, 4, 8]
        expected = 600 / math.comb(4, count)
        seen = np.unique(sets, return_counts=True)[1]
        assert len(seen) == math.comb(4, count) and np.all(np.abs(seen - expected) < 4.5 * math.sqrt(expected))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_mask_counts_are_uniform_whatever_the_batch(rows):
    """Also where the response length does not divide the batch."""
    masked, _ = MASK_TOKENS(jax.random.split(jax.random.key(1), 6000 // rows), rows, 3)
    seen = np.bincount(np.asarray(masked).sum(-1).reshape(-1), minlength=4)
    assert seen[0] == 0
    np.testing.assert_allclose(seen[1:] / 6000, 1 / 3, atol=4.5 * math.sqrt(2 / 9 / 6000))


def test_masked_cross_entropy_is_the_expectation_over_all_masks():
    policy, params = tiny_policy(vocab=4, sharpness=32.0)
    prompts, length, rows = make_prompts(3, 2, 4, padding=(0, 1)), 3, 3
    response = jnp.asarray([[0, 1, 2], [2, 2, 0], [1, 0, 1]])
    bound = 0.0
    for masked in itertools.product([0, 1], repeat=length):
        count = sum(masked)
        if count:
            z = jnp.where(jnp.asarray(masked), policy.config.mask_id, response)
            attend = jnp.concatenate([prompts.mask, jnp.ones((rows, length), bool)], 1)
            log_probs = log_softmax(LOGITS(policy, params, jnp.concatenate([prompts.tokens, z], 1), attend)[:, 2:])
            picked = np.take_along_axis(log_probs, np.asarray(response)[..., None], -1)[..., 0]
            # k uniform on 1 .. 3, the set uniform among those of k; 1 / (t L) = 1 / k
            bound -= (picked * np.array(masked)).sum(1) / count / math.comb(length, count) / length
    losses = jax.jit(jax.vmap(lambda key: sft.masked_cross_entropy(policy, params, prompts, response, key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    error = 4.5 * float(jnp.std(losses)) / math.sqrt(4000)
    assert float(losses.mean()) == pytest.approx(bound.mean(), abs=error) and error < 0.05 * bound.mean()
    key = jax.random.split(jax.random.key(0), 4000)[7]
    chunked = dataclasses.replace(policy, config=dataclasses.replace(policy.config, head_chunk=1))
    in_parts = jax.jit(sft.masked_cross_entropy, static_argnums=0)(chunked, params, prompts, response, key)
    assert in_parts == pytest.approx(float(losses[7]), rel=1e-4)


def test_update_learns_and_takes_its_noise_from_the_step():
    config = get_config()
    config.update_from_flattened_dict({"sft.steps": 150, "sft.learning_rate": 2e-2, "sft.warmup_steps": 5})
    policy, params = tiny_policy(vocab=4, width=16, sharpness=1.0)
    prompts = Prompts(jnp.zeros((16, 1), jnp.int32), jnp.ones((16, 1), bool))
    response = jnp.tile(jnp.asarray([[0, 0, 0, 0], [1, 1, 1, 1]]), (8, 1))
    update = sft.make_sft_update(policy, config, jax.random.key(0))

    def start():
        copy = jax.tree.map(jnp.copy, params)
        return sft.SftState(jnp.zeros((), jnp.int32), copy, sft.make_optimiser(config).init(copy))

    state, losses = start(), []
    for _ in range(150):
        state, metrics = update(state, prompts, response)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(3), abs=0.1) and state.step == 150
    # a row is one bit: of the masks of k positions only that of all leaves doubt, log 2 a position in one of four
    assert np.mean(losses[-20:]) == pytest.approx(math.log(2) / 4, abs=0.05)
    again = start()
    for _ in range(2):
        again, metrics = update(again, prompts, response)
    assert float(metrics["loss"]) == losses[1]
