"""Rewards to advantages, cuts, metrics, and the surrogates of reference and old policy, by hand and against the likelihood's functions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sudoku
from diffpo_jax import sharding
from diffpo_jax.build import Grades
from diffpo_jax.likelihood import read_log_probs, surrogate_log_probs
from diffpo_jax.models.lora import Trainable
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.rollout import make_credit, make_score, rollout_metrics, rollout_options, sample
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.structs import Prompts, ThresholdDraw

LENGTH, ROWS, EOS = 4, 4, 0
REWARDS = jnp.array([1.0, 1.0, 0.5, 0.0])


@pytest.fixture(scope="module")
def setting():
    policy = Policy(ModelConfig(vocab_size=6, mask_id=5, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16))
    params, reference = (jax.tree.map(lambda x: 3 * x, policy.init(jax.random.key(i))) for i in (0, 1))
    prompt = jnp.ones((ROWS, 2), jnp.int32)
    trajectory = denoise(policy, params, prompt, prompt > 0, jax.random.key(2), length=LENGTH, rule="top_probability", steps=2)
    sigma = jnp.array([[0, 1, 2, 3], [0, 0, 1, 1], [1, 0, 1, 0], [3, 2, 1, 0]])  # as if the rows had taken so many calls
    return policy, params, reference, trajectory.replace(nfe=sigma.max(1) + 1, unmask_step=sigma)


def score(setting, components=None, **fields):
    """(scored group, metrics)."""
    policy, params, reference, trajectory = setting
    config = sudoku.get_config("debug")
    config.update_from_flattened_dict(
        {"task.response_length": LENGTH, "sampler.temperature": 1.0, "rl.group_size": 2, "rl.advantage": "mean_only", "rl.nfe_penalty": 0.5,
         "rl.prompts": ROWS // 2} | fields
    )  # fmt: skip
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    parts = SimpleNamespace(config=config, mesh=mesh, tokenizer=SimpleNamespace(eos_id=EOS))
    grades = Grades(np.asarray(REWARDS), np.array([1.0, 0.0, 0.0, 0.0], np.float32), components or {})
    likelihoods = make_score(policy, Trainable(), config)(params, reference, trajectory, jax.random.key(3))
    return make_credit(parts)(trajectory, likelihoods, grades)


def test_advantages_by_hand(setting):
    # R = r (1 - NFE / 8): 0.5, 0.75 | 0.375, 0 in the two groups
    total = [-0.125, 0.125, 0.1875, -0.1875]
    np.testing.assert_allclose(score(setting)[0].advantages, total, atol=1e-7)
    task, _ = score(setting, **{"rl.model_reward": "task"})
    np.testing.assert_allclose(task.advantages, [0, 0, 0.25, -0.25], atol=1e-7)
    np.testing.assert_allclose(task.sampler_advantages, total, atol=1e-7)
    # R = r - NFE / 8: 0.5, 0.75 | 0.25, -0.5
    additive, _ = score(setting, **{"rl.reward_shape": "additive"})
    np.testing.assert_allclose(additive.advantages, [-0.125, 0.125, 0.375, -0.375], atol=1e-7)


def test_surrogates_of_reference_and_old_policy_on_the_same_cuts(setting):
    policy, params, reference, trajectory = setting
    once, _ = score(setting)
    assert once.reads.latents.shape == (1, ROWS, 2, LENGTH) and once.old_log_probs is None  # with one update it is the policy itself
    twice, _ = score(setting, **{"rl.inner_steps": 2})
    cuts = cuts_of(twice.reads, trajectory)
    for i in range(2):
        for given, got in ((reference, twice.ref_log_probs), (params, twice.old_log_probs)):
            np.testing.assert_allclose(got[i][:, 0], surrogate_log_probs(policy, given, trajectory, cuts[i]), atol=1e-5)


def cuts_of(reads, trajectory):
    """[U, N, m]: the step before which each latent stands, from how far it is unmasked."""
    sigma, shown = np.asarray(trajectory.unmask_step), np.asarray(reads.latents) == np.asarray(trajectory.tokens)[None, :, None]
    return np.where(shown, sigma[None, :, None] + 1, 0).max(-1)


def test_the_updates_of_one_rollout_draw_their_own_cuts(setting):
    group = score(setting, **{"rl.inner_steps": 8})[0]
    cuts = cuts_of(group.reads, setting[3])
    assert (cuts[:, :, 0] == 0).all()
    assert set(cuts[:, [0, 3], 1].ravel()) == {1, 2, 3}  # rows of 4 calls: each of the steps 1 .. 3 turns up in 16 draws
    assert (cuts[:, [1, 2], 1] == 1).all()  # rows of 2 calls have one choice


def test_every_estimator_is_scored_at_its_own_reads(setting):
    policy, params, reference, trajectory = setting
    for estimator in ("cuts", "elbo", "quadrature", "coupled"):
        group, metrics = score(setting, **{"likelihood.estimator": estimator, "rl.inner_steps": 2})
        reads = 1 if estimator == "cuts" else 2
        assert group.reads.weights.shape == group.ref_log_probs.shape == (2, ROWS, reads, LENGTH)
        assert np.any(group.reads.latents[0] != group.reads.latents[1])  # each update draws its own
        second = jax.tree.map(lambda x: x[1], group.reads)
        np.testing.assert_allclose(group.ref_log_probs[1], read_log_probs(policy, reference, trajectory, second)[0], atol=1e-5)
        assert metrics["denoiser_calls"] == trajectory.nfe.sum() + ROWS * 2 * 2 * 3


def test_the_elbo_regulariser_has_reads_of_its_own(setting):
    group, metrics = score(setting, **{"rl.elbo_weight": 0.1, "rl.inner_steps": 2})
    assert group.elbo_reads.latents.shape == (2, ROWS, 1, LENGTH) and np.asarray(group.right).tolist() == [True, False, False, False]
    assert metrics["denoiser_calls"] == setting[3].nfe.sum() + ROWS * 2 * (2 * 3 + 1)
    without, _ = score(setting)
    assert without.elbo_reads is None and without.right is None


def test_a_mixture_of_thresholds_is_taken_in_turn(setting):
    config = sudoku.get_config("debug")
    config.update_from_flattened_dict({"sampler.mixture": (0.5, 1.0, 4.0), "rl.prompts": 2, "rl.group_size": 2, "rl.mode": "model"})
    parts = SimpleNamespace(config=config, tokenizer=SimpleNamespace(eos_id=EOS))
    np.testing.assert_allclose(rollout_options(parts, None)["threshold"], [0.5, 1.0, 4.0, 0.5])


def test_without_kl_there_is_no_pass_of_the_reference(setting):
    group, metrics = score(setting, **{"rl.kl_weight": 0.0, "rl.inner_steps": 2})
    assert group.ref_log_probs is None and group.old_log_probs is not None
    assert metrics["denoiser_calls"] == setting[3].nfe.sum() + ROWS * 2 * 2 * 2  # latents, updates, the old policy's pass and the update's


def test_a_frozen_model_needs_no_likelihoods(setting):
    group, _ = score(setting, **{"rl.mode": "sampler"})
    assert group.ref_log_probs is None and group.old_log_probs is None


def test_metrics_by_hand(setting):
    _, _, _, trajectory = setting
    tokens = jnp.array([[1, EOS, EOS, EOS], [1, 2, 3, 4], [EOS, 1, 1, 1], [2, 2, 2, EOS]])  # 2, 4, 1 and 4 tokens count
    entropy = jnp.arange(16.0).reshape(4, 4)
    draw = ThresholdDraw(jnp.array([0.1, 0.2, 0.3, 1.0]), jnp.zeros(4), jnp.zeros(4), jnp.zeros((4, 2)))
    calls = {"last_step": trajectory.nfe - 1, "whole_calls": jnp.array([1, 2, 1, 2])}
    trajectory = trajectory.replace(tokens=tokens, entropy=entropy, draw=draw, **calls)
    tags, answer = np.array([0.5, 0.0, 0.5, 0.0], np.float32), np.array([0.5, 1.0, 0.0, 0.0], np.float32)
    _, metrics = score((*setting[:3], trajectory), {"tags": tags, "answer": answer})
    expected = {
        "reward": 0.625, "accuracy": 0.25, "reward/tags": 0.25, "reward/answer": 0.375, "nfe": 3.0, "tokens_per_call": 11 / 12,
        "utilisation": 12 / (4 * 4), "whole_calls": 1.5,
        "denoiser_calls": 12 + ROWS * 2 * 2,  # the sampler's, and two cuts each for the reference and the update
        "entropy": (0 + 1 + 4 + 5 + 6 + 7 + 8 + 12 + 13 + 14 + 15) / 11,
        "groups_with_signal": 0.5,  # 1, 1 | 0.5, 0
        "threshold/mean": 0.4, "threshold/median": 0.25, "threshold/std": np.std([0.1, 0.2, 0.3, 1.0]),
    }  # fmt: skip
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].shape == () and metrics[name] == pytest.approx(value, rel=1e-6), name
    mask = jnp.ones((4, 4), bool)
    given = rollout_metrics(trajectory.replace(draw=None), {"reward": REWARDS}, mask, 4)
    only = {"accuracy", "reward/tags", "reward/answer", "threshold/mean", "threshold/median", "threshold/std"}
    assert given.keys() == expected.keys() - only
    assert (given["groups_with_signal"], given["entropy"]) == (1.0, 7.5)


def test_the_sampler_has_as_many_lanes_as_the_configuration_says_and_no_more_than_rows(setting):
    policy, params, _, _ = setting
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    prompt = jnp.ones((ROWS, 2), jnp.int32)
    expected = {0: [0, 0, 0, 0], 3: [0, 0, 0, 2], 4: [0, 0, 0, 0], 100: [0, 0, 0, 0]}
    for lanes, first_step in expected.items():
        parts = SimpleNamespace(config=sudoku.get_config("debug"), mesh=mesh, rollout_mesh=mesh, policy=policy)
        parts.config.sampler.lanes = lanes
        options = {"length": LENGTH, "rule": "top_probability", "steps": 2}
        found = sample(parts, params, Prompts(prompt, prompt > 0), jax.random.key(2), **options)
        np.testing.assert_array_equal(found.first_step, first_step)
        np.testing.assert_array_equal(found.tokens, setting[3].tokens)
