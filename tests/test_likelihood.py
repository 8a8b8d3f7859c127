"""Surrogate likelihoods against the sampler's record, against the enumerated process they belong to, and on average over cuts."""

import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffpo_jax import sft
from diffpo_jax.likelihood import (
    ESTIMATORS,
    UNUSED,
    all_cuts,
    cut_reads,
    draw_cuts,
    latents,
    mask_prompts,
    read_log_probs,
    surrogate_log_probs,
    window_weights,
)
from diffpo_jax.objectives import truncated_importance_weights
from diffpo_jax.reductions import largest_divisor, map_positions
from diffpo_jax.sampling.denoise import denoise, response_mask
from diffpo_jax.sampling.unmasking import RULES
from diffpo_jax.structs import Prompts, Trajectory
from tests.reference import LOGITS, POSITION_FIRST, as_trajectory, enumerate_paths, log_softmax, make_prompts, tiny_policy

VOCAB, EOS, LENGTH, ROWS = 6, 0, 8, 6
READ = jax.jit(surrogate_log_probs, static_argnums=0, static_argnames="temperature")


@pytest.fixture(scope="module")
def model():
    return *tiny_policy(vocab=VOCAB, seed=3, sharpness=40.0), make_prompts(ROWS, 4, VOCAB, padding=(0, 1, 3))


@pytest.fixture(scope="module")
def one_at_a_time(model):
    policy, params, prompts = model
    return denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(0), length=LENGTH, rule="random")


def rows_of(tokens, sigma, nfe, log_prob=None):
    """A trajectory without a model."""
    tokens = jnp.asarray(tokens, jnp.int32)
    zeros = jnp.zeros(tokens.shape)
    prompts = Prompts(tokens[:, :1], jnp.ones((tokens.shape[0], 1), bool))
    return Trajectory(prompts, tokens, jnp.asarray(sigma, jnp.int32), zeros if log_prob is None else log_prob, zeros, jnp.asarray(nfe))


def test_latents_by_hand():
    trajectory = rows_of([[4, 3, 2], [1, 1, 1]], [[0, 2, 1], [1, 0, 1]], [3, 2])
    for steps, expected in (
        ([0, 0], [[9, 9, 9], [9, 9, 9]]),
        ([1, 1], [[4, 9, 9], [9, 1, 9]]),
        ([2, 0], [[4, 9, 2], [9, 9, 9]]),
        ([3, 2], [[4, 3, 2], [1, 1, 1]]),
    ):
        np.testing.assert_array_equal(latents(trajectory, jnp.asarray(steps), 9), expected)


# Item 1: with every step a cut the surrogate is the sampler's record


@pytest.mark.parametrize("rule, temperature", [(rule, 1.0) for rule in sorted(RULES)] + [("entropy_bounded", 0.7), ("low_confidence", 1.5)])
def test_exact_likelihood_is_the_recorded_one(model, rule, temperature):
    policy, params, prompts = model
    options = {"block_length": 4, "steps": 6, "eos_id": EOS, "threshold": 0.5} if temperature == 1.0 else (
        {"threshold": 2.0} if rule == "entropy_bounded" else {"steps": 3}
    )  # fmt: skip
    options |= {"length": LENGTH, "rule": rule, "temperature": temperature}
    trajectory = denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(7), **options)
    cuts = all_cuts(trajectory.nfe, LENGTH)
    exact = READ(policy, params, trajectory, cuts, temperature=temperature)
    counted = np.asarray(response_mask(trajectory.tokens, EOS)) if "eos_id" in options else np.ones((ROWS, LENGTH), bool)
    np.testing.assert_allclose(np.asarray(exact)[counted], np.asarray(trajectory.log_prob)[counted], atol=3e-5)
    assert np.asarray(trajectory.log_prob)[counted].min() < -0.1
    mean_field = READ(policy, params, trajectory, cuts[:, :1], temperature=temperature)
    assert np.abs(mean_field - trajectory.log_prob)[counted].max() > 0.01  # one cut is not enough


# Item 2: a surrogate is a policy, and importance weights take the sampler's expectation to its


CUTS = {"m=1": (0,), "m=2, early": (0, 1), "m=2, late": (0, 2), "m=T": (0, 1, 2)}
THRESHOLDS = {"threshold": 0.75, "entropy_bounded": 0.7}


@pytest.fixture(scope="module")
def small():
    policy, params = tiny_policy(vocab=4, sharpness=32.0)
    return policy, params, jax.tree.map(lambda x: 0.7 * x, params), make_prompts(1, 2, 4, padding=(1,))


@pytest.mark.parametrize("rule", POSITION_FIRST)
def test_surrogates_are_policies_and_weights_are_exact(small, rule):
    policy, old_params, params, prompts = small
    options = {"length": 3, "rule": rule, "threshold": THRESHOLDS.get(rule, 0.0)}
    behaviour = enumerate_paths(policy, old_params, prompts, **options)
    trajectory = as_trajectory(behaviour, prompts)
    pi_old = np.array([path.probability for path in behaviour])
    f = np.sin(3.0 * np.asarray(trajectory.tokens) @ [1, 3, 9]) + 0.3 * np.asarray(trajectory.unmask_step) @ [1.0, 2.0, -1.0]
    for name, cuts in CUTS.items():
        padded = [*cuts, *[UNUSED] * (3 - len(cuts))]
        cuts_of_rows = jnp.asarray([[cut if cut < path.nfe else UNUSED for cut in padded] for path in behaviour], jnp.int32)
        old = READ(policy, old_params, trajectory, cuts_of_rows)
        new = READ(policy, params, trajectory, cuts_of_rows)
        # the same process written again: its paths are the same, its probabilities are the surrogate's
        process = enumerate_paths(policy, old_params, prompts, cuts=cuts, token_params=params, **options)
        assert [(p.tokens, p.sigma) for p in process] == [(p.tokens, p.sigma) for p in behaviour]
        np.testing.assert_allclose(new, [path.log_prob for path in process], atol=1e-4, err_msg=name)
        surrogate = np.array([path.choices for path in behaviour]) * np.exp(np.asarray(new).sum(1))
        assert surrogate.sum() == pytest.approx(1.0, abs=1e-4)

        weights = np.asarray(truncated_importance_weights(old - trajectory.log_prob, jnp.inf), np.float64)
        ratio = np.exp(np.asarray(new - old, np.float64).sum(1))
        weighted = np.sum(pi_old * weights.prod(1) * ratio * f)
        assert weighted == pytest.approx(sum(path.probability * g for path, g in zip(process, f, strict=True)), abs=1e-4)
        if name == "m=T":
            np.testing.assert_allclose(weights, 1.0, atol=1e-4)
        elif name == "m=1" and rule != "threshold":
            assert np.abs(np.sum(pi_old * ratio * f) - weighted) > 1e-3  # the weights are needed


# Cuts


def test_draw_cuts_are_uniform_without_replacement():
    cuts = np.asarray(draw_cuts(jax.random.key(0), jnp.full(6000, 5), 3, 8))
    counts = Counter(map(tuple, cuts.tolist()))
    assert set(counts) == {(0, a, b) for a, b in itertools.combinations(range(1, 5), 2)}
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 5 + 4 * math.sqrt(10)


def test_draw_cuts_of_short_rows_of_all_steps_and_of_one():
    nfe = jnp.asarray([1, 2, 3, 4, 7])
    cuts = np.asarray(draw_cuts(jax.random.key(1), nfe, 4, 7))
    assert cuts[0].tolist() == [0, UNUSED, UNUSED, UNUSED] and cuts[1].tolist() == [0, 1, UNUSED, UNUSED]
    assert cuts[2].tolist() == [0, 1, 2, UNUSED] and cuts[3].tolist() == [0, 1, 2, 3]
    assert sorted(set(cuts[4].tolist())) == cuts[4].tolist() and cuts[4, -1] <= 6
    np.testing.assert_array_equal(draw_cuts(jax.random.key(1), nfe, 1, 7), np.zeros((5, 1)))
    more_than_steps = draw_cuts(jax.random.key(1), jnp.asarray([2]), 4, 2)
    np.testing.assert_array_equal(more_than_steps, [[0, 1, UNUSED, UNUSED]])
    np.testing.assert_array_equal(all_cuts(jnp.asarray([3, 1]), 4), [[0, 1, 2, UNUSED], [0, UNUSED, UNUSED, UNUSED]])


def test_draw_cuts_belong_to_the_row():
    nfe = jnp.asarray([9, 5, 8, 9])
    ids = jnp.asarray([2, 0, 3, 1])
    whole = draw_cuts(jax.random.key(2), nfe, 3, 9)
    np.testing.assert_array_equal(draw_cuts(jax.random.key(2), nfe[ids], 3, 9, ids), whole[ids])
    assert np.any(draw_cuts(jax.random.key(3), nfe, 3, 9) != whole)


# Windows


def cut_sets(steps, m):
    """All cuts of a row of `steps` calls, [*, m]."""
    m_drawn = min(m, steps)
    sets = [(0, *rest) for rest in itertools.combinations(range(1, steps), m_drawn - 1)]
    return np.asarray([[*cuts, *[UNUSED] * (m - m_drawn)] for cuts in sets], np.int32)


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_window_weights_are_unbiased_over_all_cuts(window):
    for m in (1, 2, 3, 7):
        sets = [cut_sets(steps, m) for steps in (1, 2, 5, 6)]
        cuts, nfe = np.concatenate(sets), np.repeat([1, 2, 5, 6], [len(s) for s in sets])
        sigma = np.broadcast_to(np.arange(6), (len(cuts), 6))
        weights = np.asarray(jax.jit(window_weights, static_argnums=3)(sigma, nfe, cuts, window))
        age = sigma[..., None] - cuts.astype(np.int64)[:, None]
        np.testing.assert_array_equal(weights > 0, ((age >= 0) & (age < window)).any(-1))
        for steps in (1, 2, 5, 6):
            # one cut alone can never keep what lies beyond its window
            expected = np.ones(steps) if m > 1 else (np.arange(steps) < window).astype(float)
            np.testing.assert_allclose(weights[nfe == steps, :steps].mean(0), expected, atol=1e-5, err_msg=f"T={steps}, m={m}")


def test_window_weights_by_hand():
    sigma, nfe = jnp.asarray([[0, 1, 2, 3]]), jnp.asarray([4])
    # T = 4, m = 2: one of 3 steps is drawn; w = 1 keeps a later step with 1/3, w = 2 with 2/3
    np.testing.assert_allclose(window_weights(sigma, nfe, jnp.asarray([[0, 2]]), 1), [[1, 0, 3, 0]], rtol=1e-6)
    np.testing.assert_allclose(window_weights(sigma, nfe, jnp.asarray([[0, 2]]), 2), [[1, 1, 1.5, 1.5]], rtol=1e-6)
    np.testing.assert_array_equal(window_weights(sigma, nfe, jnp.asarray([[0, 2]]), 0), np.ones((1, 4)))


def test_window_1_has_the_expectation_of_the_exact_sum_and_windows_of_the_surrogate(model, one_at_a_time):
    policy, params, _ = model
    rows = np.concatenate([np.repeat(np.arange(2), 7)])  # T = 8, m = 2: 7 cut sets
    trajectory = jax.tree.map(lambda x: x[rows], one_at_a_time)
    cuts = jnp.tile(cut_sets(LENGTH, 2), (2, 1))
    values = READ(policy, params, trajectory, cuts)

    def mean_sum(window):
        weights = window_weights(trajectory.unmask_step, trajectory.nfe, cuts, window)
        return np.asarray(jnp.sum(weights * values, axis=1)).reshape(2, 7).mean(1)

    exact = np.asarray(one_at_a_time.log_prob)[:2].sum(1)
    np.testing.assert_allclose(mean_sum(1), exact, rtol=1e-4)
    assert np.all(np.abs(mean_sum(0) - exact) > 0.02)  # stale latents: biased
    assert np.all(np.abs(mean_sum(3) - exact) > 1e-3)


# The head in parts, m forward passes


def test_chunked_head_is_the_whole_one_in_value_and_gradient(model, one_at_a_time):
    policy, params, _ = model
    cuts = draw_cuts(jax.random.key(0), one_at_a_time.nfe, 2, LENGTH)

    def read(params, policy):
        log_probs, entropy = read_log_probs(policy, params, one_at_a_time, cut_reads(one_at_a_time, cuts, VOCAB - 1), temperature=0.8)
        return jnp.sum(jnp.sin(log_probs) + entropy), (log_probs, entropy)

    grad = jax.jit(jax.value_and_grad(read, has_aux=True), static_argnums=1)
    (_, whole), whole_grad = grad(params, policy)
    assert optax.global_norm(whole_grad) > 0.1
    chunked = dataclasses.replace(policy, config=dataclasses.replace(policy.config, head_chunk=3))
    (_, parts), parts_grad = grad(params, chunked)
    for a, b in zip(jax.tree.leaves((whole, whole_grad)), jax.tree.leaves((parts, parts_grad)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # 3 does not divide 8: parts of 2 positions, forwards and backwards, and never all 8 at once
    whole_program, program = (str(jax.make_jaxpr(jax.grad(lambda p, c=c: read(p, c)[0]))(params)) for c in (policy, chunked))
    assert f"f32[{ROWS},2,{VOCAB}]" in program and f"f32[{ROWS},8,{VOCAB}]" not in program
    assert f"f32[{ROWS},8,{VOCAB}]" in whole_program


def test_largest_divisor_by_hand():
    asked = {(8, 3): 2, (8, 7): 4, (8, 8): 8, (8, 9): 8, (8, 1): 1, (8, 0): 8, (12, 5): 4, (7, 6): 1, (1, 0): 1, (96, 40): 32}
    assert {sizes: largest_divisor(*sizes) for sizes in asked} == asked


def test_positions_are_read_a_few_at_a_time_and_put_back_in_order():
    x, y, sizes = jnp.arange(48.0).reshape(3, 8, 2), jnp.arange(24).reshape(3, 8), []

    def read(x, pair):
        sizes.append((x.shape[1], pair["y"].shape[1]))
        return {"sum": x.sum(-1) + pair["y"], "both": x * 2}

    for chunk, size in ((0, 8), (3, 2), (4, 4), (9, 8)):
        got = map_positions(read, chunk, x, {"y": y})
        np.testing.assert_array_equal(got["sum"], x.sum(-1) + y)
        np.testing.assert_array_equal(got["both"], 2 * x)
        assert set(sizes) == {(size, size)}
        sizes.clear()


def test_surrogate_by_hand(model, one_at_a_time):
    """Each position at the latent of its own cut, by whole forward passes in NumPy's log-softmax."""
    policy, params, _ = model
    t, cuts = one_at_a_time, jnp.asarray([[0, 3], [0, 5], [0, 1], [0, UNUSED], [0, 7], [0, 2]])
    got = READ(policy, params, t, cuts, temperature=0.6)
    z = np.empty((ROWS, LENGTH, LENGTH), np.int32)
    for i, k in np.ndindex(ROWS, LENGTH):
        cut = max(c for c in cuts[i].tolist() if c <= t.unmask_step[i, k])
        z[i, k] = np.where(t.unmask_step[i] < cut, t.tokens[i], policy.config.mask_id)
    prompts = jax.tree.map(lambda x: jnp.repeat(x, LENGTH, axis=0), t.prompts)
    z = z.reshape(-1, LENGTH)
    logits = LOGITS(policy, params, jnp.concatenate([prompts.tokens, z], 1), jnp.concatenate([prompts.mask, z >= 0], 1))[:, 4:]
    log_probs = log_softmax(logits, 0.6).reshape(ROWS, LENGTH, LENGTH, VOCAB)
    for i, k in np.ndindex(ROWS, LENGTH):
        assert got[i, k] == pytest.approx(log_probs[i, k, k, t.tokens[i, k]], abs=3e-5)


# Item 3: on a trained model more cuts are nearer to the truth


@pytest.fixture(scope="module")
def trained():
    """A model of walks on a ring: each token is the one before plus 1 or 2, modulo 5."""
    policy, params = tiny_policy(vocab=6, width=32, sharpness=1.0, heads=4, kv_heads=4)
    prompts = Prompts(jnp.zeros((64, 1), jnp.int32), jnp.ones((64, 1), bool))
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, 300))

    def walks(key):
        key_start, key_steps = jax.random.split(key)
        start, steps = jax.random.randint(key_start, (64, 1), 0, 5), jax.random.randint(key_steps, (64, 7), 1, 3)
        return jnp.concatenate([start, start + jnp.cumsum(steps, axis=1)], axis=1) % 5

    @jax.jit
    def update(params, state, step):
        key_data, key_mask = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
        response = walks(key_data)
        loss, grads = jax.value_and_grad(lambda p: sft.masked_cross_entropy(policy, p, prompts, response, key_mask))(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimiser.init(params)
    for step in range(300):
        params, state, loss = update(params, state, step)
    assert loss < 1.3  # untrained: log 5 = 1.61; the truth: (log 5 + 7 log 2) / 8 = 0.81 in left-to-right order
    return policy, params, jax.tree.map(lambda x: jnp.tile(x, (8, 1)), prompts)


def test_surrogates_approach_the_truth_with_more_cuts(trained):
    policy, params, prompts = trained
    t = denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(1), length=8, rule="random")
    gap, divergence = [], []
    for m in (1, 2, 4, 8):
        surrogate = READ(policy, params, t, draw_cuts(jax.random.key(m), t.nfe, m, 8))
        gap.append(float(jnp.mean(jnp.abs(surrogate - t.log_prob))))
        divergence.append(float(jnp.mean(jnp.sum(t.log_prob - surrogate, axis=1))))
    assert gap[0] > 1.2 * gap[1] > 1.2**2 * gap[2] > 0.1 and gap[3] < 1e-4, gap
    assert divergence[0] > 1.2 * divergence[1] > 1.2**2 * divergence[2] > 0.1 and abs(divergence[3]) < 1e-3, divergence


def test_mask_prompts_masks_tokens_at_the_rate_and_never_padding():
    prompts = make_prompts(400, 10, 5, padding=(0, 4))
    seen = np.asarray(mask_prompts(jax.random.key(0), prompts, 0.15, 4))
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    changed = seen != tokens
    assert (seen[changed] == 4).all() and not changed[~mask].any()
    assert changed[mask].mean() == pytest.approx(0.15, abs=0.02)
    assert len({row.tobytes() for row in changed[::2]}) > 60  # each row its own noise
    half = jax.tree.map(lambda x: x[:200], prompts)
    np.testing.assert_array_equal(mask_prompts(jax.random.key(0), half, 0.15, 4), seen[:200])


# Masks drawn at random


def exact_elbo(policy, params, trajectory):
    """The mean over n of E[L/n sum over n masked positions of log p], [N], and its terms [N, L], over all sets of masked positions."""
    (rows, length), prompt = trajectory.tokens.shape, trajectory.prompts.tokens.shape[1]
    terms = np.zeros((rows, length))
    for n in range(1, length + 1):
        sets = [np.isin(np.arange(length), chosen) for chosen in itertools.combinations(range(length), n)]
        for masked in sets:
            z = jnp.where(masked, policy.config.mask_id, trajectory.tokens)
            logits = LOGITS(policy, params, *trajectory.prompts.with_response(z))[:, prompt:]
            log_probs = np.take_along_axis(log_softmax(logits), np.asarray(trajectory.tokens)[..., None], -1)[..., 0]
            terms[:, n - 1] += length / n * (log_probs * masked).sum(1) / len(sets)
    return terms.mean(1), terms


@pytest.fixture(scope="module")
def enumerated():
    """One response of three tokens, the same in many rows, and its ELBO."""
    policy, params = tiny_policy(vocab=4, seed=2, sharpness=32.0)
    trajectory = rows_of([[0, 2, 1]], [[0, 1, 2]], [3])
    trajectory = trajectory.replace(prompts=make_prompts(1, 2, 4, padding=(1,)))
    elbo, terms = exact_elbo(policy, params, trajectory)
    return policy, params, jax.tree.map(lambda x: jnp.repeat(x, 4000, axis=0), trajectory), elbo[0], terms[0]


def totals(enumerated, estimator, m):
    """The estimate of each row, [N]."""
    policy, params, trajectory, *_ = enumerated
    reads = ESTIMATORS[estimator](jax.random.key(m), trajectory, SimpleNamespace(num_latents=m), 3)
    log_probs = jax.jit(read_log_probs, static_argnums=0)(policy, params, trajectory, reads)[0]
    assert np.all((np.asarray(reads.latents) == 3) == (np.asarray(reads.weights) > 0))  # what is masked is what is read
    return np.asarray(jnp.sum(reads.weights * log_probs, axis=(1, 2)), np.float64)


@pytest.mark.parametrize("estimator, m", [("elbo", 1), ("elbo", 4), ("coupled", 2), ("coupled", 4)])
def test_the_elbo_is_estimated_without_bias(enumerated, estimator, m):
    found = totals(enumerated, estimator, m)
    assert abs(found.mean() - enumerated[3]) < 4 * found.std() / len(found) ** 0.5 < 0.2
    assert found.std() > 0.05


def test_complementary_masks_have_less_variance(enumerated):
    assert totals(enumerated, "coupled", 2).var() < 0.7 * totals(enumerated, "elbo", 2).var()


@pytest.mark.parametrize("m", [1, 2, 3])
def test_quadrature_by_hand(enumerated, m):
    """Gauss-Legendre of the ELBO's terms, linear between neighbouring numbers of masked positions."""
    terms = enumerated[4]
    nodes, shares = {1: ([0.5], [1.0]), 2: ([0.5 - 12**-0.5, 0.5 + 12**-0.5], [0.5, 0.5]),
                     3: ([0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5], [5 / 18, 8 / 18, 5 / 18])}[m]  # fmt: skip
    expected = sum(share * np.interp(max(3 * node, 1), [1, 2, 3], terms) for node, share in zip(nodes, shares, strict=True))
    found = totals(enumerated, "quadrature", m)
    assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5 + 1e-4


def test_coupled_masks_are_complementary_and_read_each_position_once():
    trajectory = rows_of(np.arange(40).reshape(10, 4) % 5, np.zeros((10, 4)), np.ones(10, int))
    reads = ESTIMATORS["coupled"](jax.random.key(0), trajectory, SimpleNamespace(num_latents=4), 9)
    masked = np.asarray(reads.latents) == 9
    np.testing.assert_array_equal(masked[:, :2], ~masked[:, 2:])
    counts = masked[:, :2].sum(-1)
    for i, j in np.ndindex(10, 2):
        n = counts[i, j]
        first, second = (2.0, 0.0) if n == 4 else (2.0 / n, 2.0 / (4 - n))  # L/2 over the pairs' number
        first = 0.5 * (4 / n if n == 4 else first)
        np.testing.assert_allclose(reads.weights[i, j], np.where(masked[i, j], first, 0), rtol=1e-6)
        np.testing.assert_allclose(reads.weights[i, 2 + j], np.where(masked[i, 2 + j], second / 2, 0), rtol=1e-6)
    assert set(counts.ravel()) == {1, 2, 3, 4}


def test_masks_belong_to_the_row():
    trajectory = rows_of(np.zeros((8, 6)), np.zeros((8, 6)), np.ones(8, int))
    for estimator in ("elbo", "quadrature", "coupled"):
        whole, half = (
            ESTIMATORS[estimator](jax.random.key(1), jax.tree.map(lambda x: x[:n], trajectory), SimpleNamespace(num_latents=2), 9)  # noqa: B023
            for n in (8, 4)
        )
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[:4], whole), half)
        assert len({row.tobytes() for row in np.asarray(whole.latents)}) > 4


# Gradients: estimates of the policy gradient on V = 3, L = 3


def test_gradients_of_unbiased_estimators_have_the_mean_of_the_exact_one(small):
    """Over all cuts, windows of one step have the exact policy gradient as their mean; stale latents have not."""
    policy, params, _, prompts = small
    paths = enumerate_paths(policy, params, prompts, length=3, rule="entropy_bounded", threshold=0.7)
    paths = [path for path in paths if path.nfe == 3]
    trajectory = as_trajectory(paths, prompts)
    chances = jnp.asarray([path.probability for path in paths], jnp.float32)
    scores = jnp.sin(3.0 * trajectory.tokens @ jnp.asarray([1.0, 3.0, 9.0]))

    def gradient(cuts, window):
        reads = cut_reads(trajectory, jnp.broadcast_to(jnp.asarray(cuts), (len(paths), len(cuts))), 3, window)

        def objective(params):
            log_probs = read_log_probs(policy, params, trajectory, reads)[0]
            return jnp.sum(chances * scores * jnp.sum(reads.weights * log_probs, axis=(1, 2)))

        return jax.flatten_util.ravel_pytree(jax.jit(jax.grad(objective))(params))[0]

    exact = gradient([0, 1, 2], 0)
    cosine = lambda a, b: a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)  # noqa: E731
    sampled = (gradient([0, 1], 1) + gradient([0, 2], 1)) / 2
    np.testing.assert_allclose(sampled, exact, atol=1e-4 * float(jnp.linalg.norm(exact)))
    stale = (gradient([0, 1], 0) + gradient([0, 2], 0)) / 2
    assert cosine(gradient([0], 0), exact) < cosine(stale, exact) < 0.999
