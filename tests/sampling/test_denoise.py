"""The sampler against enumeration, against a plain Python loop, and against itself under what must not matter."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.sampling.denoise import denoise, response_mask
from diffpo_jax.sampling.unmasking import RULES
from diffpo_jax.structs import Prompts
from tests.reference import (
    POSITION_FIRST,
    Parts,
    enumerate_paths,
    keys_of,
    make_prompts,
    python_denoise,
    repeat_prompt,
    tiny_policy,
)  # fmt: skip

VOCAB, EOS, LENGTH, ROWS = 6, 0, 8, 6  # of the larger model; MASK is 5
HEAD = ThresholdHead(hidden=4, gamma_min=0.05, gamma_max=8.0, gamma_init=1.0, std_init=1.0)


@pytest.fixture(scope="module")
def small():
    """V = 3 and MASK: all of it can be enumerated."""
    policy, params = tiny_policy(vocab=4, sharpness=32.0)
    return policy, params, make_prompts(1, 2, 4, padding=(1,))


@pytest.fixture(scope="module")
def larger():
    policy, params = tiny_policy(vocab=VOCAB, seed=3, sharpness=40.0)
    return policy, params, make_prompts(ROWS, 4, VOCAB, padding=(0, 1, 3))


def sample(model, key=0, prompts=None, **options):
    policy, params, default = model
    prompts = default if prompts is None else prompts
    return denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(key), **{"length": LENGTH} | options)


def assert_same(a, b, exact=True):
    for name in ("tokens", "unmask_step", "nfe"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("log_prob", "entropy"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=0 if exact else 2e-5, err_msg=name)


# Enumeration (algorithm, section 6, item 2)


def assert_frequencies_match(trajectory, paths):
    rows = trajectory.tokens.shape[0]
    keys = zip(np.asarray(trajectory.tokens).tolist(), np.asarray(trajectory.unmask_step).tolist(), np.asarray(trajectory.nfe), strict=True)
    counts = Counter((tuple(t), tuple(s), int(n)) for t, s, n in keys)
    expected = {(path.tokens, path.sigma, path.nfe): rows * path.probability for path in paths}
    assert len(expected) == len(paths) and set(counts) <= set(expected)
    seen, mean = np.array([counts[key] for key in expected], float), np.array(list(expected.values()))
    assert np.all(np.abs(seen - mean) <= 4.5 * np.sqrt(mean) + 1.0)
    common = mean >= 5
    chi_square, freedom = np.sum((seen - mean)[common] ** 2 / mean[common]), common.sum() - 1
    assert chi_square < freedom + 4.5 * np.sqrt(2 * freedom)
    recorded = {key: path.log_prob for key, path in zip(expected, paths, strict=True)}
    keys = zip(np.asarray(trajectory.tokens).tolist(), np.asarray(trajectory.unmask_step).tolist(), np.asarray(trajectory.nfe), strict=True)
    np.testing.assert_allclose(trajectory.log_prob, [recorded[tuple(t), tuple(s), int(n)] for t, s, n in keys], atol=2e-5)


CASES = [(rule, {"threshold": {"threshold": 0.75, "entropy_bounded": 0.7}.get(rule, 0.0)}) for rule in POSITION_FIRST] + [
    ("random", {"steps": 2}),  # two positions, then one
    ("top_probability", {"block_length": 1}),
    ("entropy", {"temperature": 0.5}),
    ("entropy_bounded", {"threshold": 0.7, "eos_id": 1}),
]


@pytest.mark.parametrize("rule, options", CASES, ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()))
def test_frequencies_are_those_of_all_trajectories(small, rule, options):
    policy, params, prompts = small
    paths = enumerate_paths(policy, params, prompts, length=3, rule=rule, **options)
    assert sum(path.probability for path in paths) == pytest.approx(1.0, abs=1e-6)
    expected_number = {"random": 6 * 27 if "steps" not in options else 3 * 27}.get(rule, 27)
    assert len(paths) == expected_number or "eos_id" in options
    assert len({path.nfe for path in paths}) == (2 if options.get("threshold") else 1)
    assert_frequencies_match(sample(small, prompts=repeat_prompt(prompts, 20_000), length=3, rule=rule, **options), paths)


# The while_loop is a Python loop


LOOPS = [(rule, {"block_length": 4, "steps": 6, "eos_id": EOS, "threshold": 0.5}) for rule in sorted(RULES)] + [
    ("entropy_bounded", {"threshold": 2.0, "temperature": 0.7}),
    ("low_confidence", {"steps": 3, "temperature": 1.5}),
    ("top_probability", {"block_length": 2, "steps": 8, "temperature": 0.0}),
]


@pytest.mark.parametrize("rule, options", LOOPS)
def test_while_loop_is_a_python_loop(larger, rule, options):
    got = sample(larger, key=7, rule=rule, **options)
    tokens, sigma, log_prob, entropy, nfe, _ = python_denoise(larger, jax.random.key(7), length=LENGTH, rule=rule, **options)
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.unmask_step, sigma)
    np.testing.assert_array_equal(got.nfe, nfe)
    np.testing.assert_allclose(got.log_prob, log_prob, atol=2e-5)
    np.testing.assert_allclose(got.entropy, entropy, atol=2e-5)
    assert not np.any(got.tokens == larger[0].config.mask_id)


def test_blocks_are_unmasked_left_to_right_and_each_row_has_its_own_pointer(larger):
    trajectory = sample(larger, rule="entropy_bounded", block_length=2, threshold=0.4)
    sigma = np.asarray(trajectory.unmask_step).reshape(ROWS, 4, 2)
    assert np.all(sigma.max(-1)[:, :-1] < sigma.min(-1)[:, 1:])
    in_block_1 = [set(range(*row)) for row in zip(sigma.max(-1)[:, 0] + 1, sigma.max(-1)[:, 1] + 1, strict=True)]
    assert len({frozenset(steps) for steps in in_block_1}) > 1  # rows are in different blocks at one step
    np.testing.assert_array_equal(trajectory.nfe, sigma.max((1, 2)) + 1)
    for row in np.asarray(trajectory.unmask_step):
        assert set(row) == set(range(row.max() + 1))  # each call unmasked something


def test_schedule_unmasks_the_published_numbers(larger):
    trajectory = sample(larger, rule="random", block_length=4, steps=6)  # 4 = 2 + 1 + 1 in each block
    for row in np.asarray(trajectory.unmask_step):
        np.testing.assert_array_equal(np.bincount(row), [2, 1, 1, 2, 1, 1])


# EOS


def test_eos_early_stop(larger):
    policy, params, _ = larger
    prompts = make_prompts(64, 4, VOCAB)
    early = sample(larger, prompts=prompts, rule="random", eos_id=EOS)
    full = sample(larger, prompts=prompts, rule="random")
    mask, tokens = np.asarray(response_mask(early.tokens, EOS)), np.asarray(early.tokens)
    filled = np.zeros_like(mask)
    for i in range(64):
        # the row stops at the first step after which no position before the first EOS is masked, with the same draws until then
        stop = next(
            s for s in range(LENGTH)
            for z in [np.where(full.unmask_step[i] <= s, full.tokens[i], -1)]
            if not (z[: list(z).index(EOS) if EOS in z else LENGTH] == -1).any()
        )  # fmt: skip
        assert early.nfe[i] == stop + 1
        filled[i] = np.asarray(full.unmask_step[i]) > stop
        np.testing.assert_array_equal(tokens[i], np.where(filled[i], EOS, full.tokens[i]))
        np.testing.assert_array_equal(early.unmask_step[i], np.where(filled[i], stop, full.unmask_step[i]))
        np.testing.assert_array_equal(early.log_prob[i], np.where(filled[i], 0.0, full.log_prob[i]))
        np.testing.assert_array_equal(early.entropy[i], np.where(filled[i], 0.0, full.entropy[i]))
    assert filled.sum() > 30 and (np.asarray(full.nfe) == LENGTH).all()
    assert not (filled & mask).any()  # nothing that was filled in counts
    # no latent that a call saw shows a filled position
    assert np.all(np.asarray(early.unmask_step)[filled] >= np.asarray(early.nfe - 1)[np.nonzero(filled)[0]])


def test_response_mask():
    tokens = jnp.asarray([[1, 0, 2, 0], [0, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 0]])
    np.testing.assert_array_equal(response_mask(tokens, 0), [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])


# What must not matter (item 5)


@pytest.mark.parametrize("rule", ["entropy_bounded", "random"])
def test_more_padding_permuted_rows_and_split_batches_change_nothing(larger, rule):
    policy, params, prompts = larger
    options = {"rule": rule, "block_length": 4, "eos_id": EOS}
    whole = sample(larger, **options)
    padded = Prompts(jnp.pad(prompts.tokens, ((0, 0), (3, 0)), constant_values=2), jnp.pad(prompts.mask, ((0, 0), (3, 0))))
    assert_same(sample(larger, prompts=padded, **options), whole, exact=False)
    ids = jnp.asarray([4, 0, 5, 2, 1, 3])
    permuted = sample(larger, prompts=jax.tree.map(lambda x: x[ids], prompts), row_ids=ids, **options)
    assert_same(permuted, jax.tree.map(lambda x: x[ids], whole), exact=False)
    for part in (np.arange(2), np.arange(2, 6)):
        alone = sample(larger, prompts=jax.tree.map(lambda x, p=part: x[p], prompts), row_ids=jnp.asarray(part), **options)
        assert_same(alone, jax.tree.map(lambda x, p=part: x[p], whole), exact=False)
    other = sample(larger, row_ids=jnp.arange(ROWS) + 10, **options)
    assert np.any(other.tokens != whole.tokens)  # the row's identity is its randomness


@pytest.mark.parametrize("rule, block_length", [("entropy_bounded", 4), ("low_confidence", 0), ("random", 4)])
def test_the_vocabulary_in_parts_samples_the_same_token_for_token(larger, rule, block_length):
    policy, params, _ = larger
    prompts = make_prompts(32, 4, VOCAB, padding=(0, 1, 3))
    options = {"rule": rule, "block_length": block_length, "steps": 6 if block_length else 5, "threshold": 0.9, "temperature": 2.0}
    whole = sample(larger, prompts=prompts, **options)
    assert set(np.unique(whole.tokens)) == set(range(VOCAB - 1)) and (np.asarray(whole.nfe) > 1).all()
    for number in (2, VOCAB):
        parts = dataclasses.replace(policy, layout=Parts((("head_vocab", number),)))
        assert_same(sample((parts, params, prompts), **options), whole, exact=False)


def test_same_key_same_trajectory_other_key_another(larger):
    assert_same(sample(larger, key=1), sample(larger, key=1))
    assert np.any(sample(larger, key=1).tokens != sample(larger, key=2).tokens)
    same = sample(larger, prompts=repeat_prompt(larger[2], ROWS))
    assert len({tuple(row) for row in np.asarray(same.log_prob).tolist()}) > 1  # rows of a group differ


# Thresholds (item 6)


def test_entropy_bounded_nfe(larger):
    prompts = make_prompts(128, 4, VOCAB)
    nfe = {}
    for gamma in (0.0, 0.2, 0.4, 0.8, 1.5, 3.0, np.inf):
        nfe[gamma] = np.asarray(sample(larger, prompts=prompts, threshold=gamma).nfe)
    assert np.all(nfe[0.0] == LENGTH) and np.all(nfe[np.inf] == 1)
    means = [n.mean() for n in nfe.values()]
    assert means == sorted(means, reverse=True) and len(set(means)) == len(means)
    blocks = sample(larger, prompts=prompts, threshold=jnp.where(jnp.arange(128) < 64, jnp.inf, 0.0), block_length=2)  # one a row
    np.testing.assert_array_equal(blocks.nfe, [LENGTH // 2] * 64 + [LENGTH] * 64)


def test_entropy_bounded_gamma_0_is_one_at_a_time_on_a_nearly_certain_model():
    policy, params = tiny_policy(vocab=VOCAB, seed=3, sharpness=40.0)
    params["head_proj"]["kernel"] *= 6.0
    trajectory = sample((policy, params, make_prompts(32, 4, VOCAB)), threshold=0.0)
    entropies = np.asarray(trajectory.entropy)
    certain = (entropies == 0.0).sum(1)
    assert np.all(trajectory.nfe >= LENGTH - certain) and (entropies[entropies > 0] < 1e-4).any()


def test_threshold_network_is_read_at_the_first_call_and_costs_none(larger):
    policy, params, prompts = larger
    head_params = HEAD.init(jax.random.key(5), policy.config.width)
    learned = sample(larger, key=2, threshold_fn=HEAD.sample, threshold_params=head_params, threshold=99.0)
    given = sample(larger, key=2, threshold=learned.draw.gamma)
    assert_same(learned, given)
    assert given.draw is None and len(set(np.asarray(learned.draw.gamma).tolist())) == ROWS

    masked = jnp.full((ROWS, LENGTH), policy.config.mask_id)
    attend = jnp.concatenate([prompts.mask, jnp.ones_like(masked, bool)], 1)
    hidden = np.asarray(jax.jit(policy.hidden)(params, jnp.concatenate([prompts.tokens, masked], 1), attend))
    pooled = np.stack([hidden[i, :4][np.asarray(prompts.mask[i])].mean(0) for i in range(ROWS)])
    np.testing.assert_allclose(learned.draw.features, pooled, atol=1e-5)

    def key_of(i):
        return keys_of(jax.random.key(2), i, 0, LENGTH)[2]

    expected = jax.jit(lambda features: HEAD.sample(head_params, features, jax.vmap(key_of)(jnp.arange(ROWS))))(pooled)
    for name in ("gamma", "action", "log_prob"):
        np.testing.assert_allclose(getattr(learned.draw, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    greedy = sample(larger, key=2, threshold_fn=HEAD.mode, threshold_params=head_params)
    np.testing.assert_allclose(greedy.draw.gamma, HEAD.mode(head_params, jnp.asarray(pooled)).gamma, rtol=1e-4)


# Tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_mask_is_never_sampled(larger, temperature):
    policy, params, _ = larger
    eager = params | {"head_proj": {"kernel": params["head_proj"]["kernel"].at[:, policy.config.mask_id].set(1e4)}}
    trajectory = sample((policy, eager, make_prompts(64, 4, VOCAB)), temperature=temperature, threshold=1.0)
    assert np.asarray(trajectory.tokens).max() < policy.config.mask_id and np.isfinite(trajectory.log_prob).all()


def test_temperature_0_is_greedy_and_records_0(larger):
    a, b = (sample(larger, key=key, temperature=0.0) for key in (0, 1))
    assert_same(a, b)
    np.testing.assert_array_equal(a.log_prob, 0.0)
    assert np.all(np.asarray(a.entropy) > 0)


@pytest.mark.parametrize("options, message", [
    ({"rule": "best"}, "best.*entropy_bounded"),
    ({"block_length": 3}, "length = 8.*block_length = 3"),
    ({"block_length": 2, "steps": 6}, "steps = 6.*4 blocks"),
    ({"steps": 9}, "steps = 9.*length = 8"),
])  # fmt: skip
def test_errors(larger, options, message):
    with pytest.raises(ValueError, match=message):
        sample(larger, **options)
