"""The estimator study: its statistics by hand and on average, its gradients on a model that can be enumerated, and what it writes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sudoku
from diffpo_jax import referee, study
from diffpo_jax.likelihood import all_cuts, cut_reads, surrogate_log_probs
from diffpo_jax.referee import Studied
from diffpo_jax.sampling.denoise import denoise, response_mask
from tests import runs
from tests.reference import make_prompts, tiny_policy

VOCAB, EOS, LENGTH, ROWS = 6, 0, 6, 4


# Statistics


def test_products_by_hand():
    gradients = np.array([[[1.0, 0.0], [3.0, 2.0]], [[0.0, 1.0], [0.0, 3.0]]])  # [batch, draw, parameter]
    exact = np.array([[1.0, 1.0], [2.0, 0.0]])
    found = referee.products(gradients, exact)
    np.testing.assert_allclose(found.estimate, [[3, 2], [2, 3]])  # on the diagonal 1*3 + 0*2 and 0*0 + 1*3; (2, 1) . (0, 2) beside it
    np.testing.assert_allclose(found.cross, [[3, 4], [2, 0]])
    np.testing.assert_allclose(found.exact, [[2, 2], [2, 4]])
    np.testing.assert_allclose(found.noise, [2 + 2, 2])


def test_products_are_unbiased():
    rng, batches, draws, size, repeats = np.random.default_rng(0), 3, 2, 5, 20_000
    means, exact = rng.normal(size=(batches, size)), rng.normal(size=(batches, size))
    spread = np.array([0.5, 1.0, 2.0])
    noise = spread[:, None, None] * rng.normal(size=(repeats, batches, draws, size))
    found = [referee.products(means[:, None] + each, exact) for each in noise]
    mean = referee.Products(*(np.mean(x, axis=0) for x in zip(*found, strict=True)))
    np.testing.assert_allclose(mean.estimate, means @ means.T, atol=0.4)
    assert size * spread[2] ** 2 / draws > 9  # what plugging in the means would add to the last of the diagonal
    np.testing.assert_allclose(mean.cross, means @ exact.T, atol=0.15)
    np.testing.assert_allclose(mean.noise, size * spread**2, rtol=0.05)


def test_gradient_statistics_by_hand():
    # two batches with means (2, 0) and (0, 2), exact ones (1, 1) and (1, -1): mean gradient (1, 1) against (1, 0)
    found = referee.Products(np.diag([4.0, 4.0]), np.array([[2.0, 2.0], [2.0, -2.0]]), np.diag([2.0, 2.0]), np.array([1.0, 3.0]))
    values = referee.gradient_statistics(found, np.arange(2))
    np.testing.assert_allclose([values["cosine"], values["norm"], values["noise"]], [2**-0.5, 2**0.5, 2.0])
    np.testing.assert_allclose(values["variance"], 4.0 + 2.0)  # |(2, 0) - (0, 2)|^2 / 2 and the noise, over 1
    assert np.isnan(values["expected_cosine"])  # products of different batches are 0


def test_exact_gradients_are_without_bias_and_noise():
    exact = np.random.default_rng(1).normal(size=(4, 7)) + 1.0
    values = referee.gradient_statistics(referee.products(np.repeat(exact[:, None], 2, axis=1), exact), np.arange(4))
    spread = np.var(exact, axis=0, ddof=1).sum() / np.sum(exact.mean(0) ** 2)
    assert values == pytest.approx({"cosine": 1, "norm": 1, "noise": 0, "variance": spread, "expected_cosine": 1}, abs=1e-9)


def test_jackknife_is_students_interval_of_a_mean():
    x = np.array([1.0, 4.0, 4.0, 7.0])
    found = referee.jackknife(lambda taken: {"mean": x[taken].mean(), "both": x[taken].mean() * np.array([1.0, 2.0])}, 4)
    half = 3.182446 * np.std(x, ddof=1) / 2  # 97.5% of t with 3 degrees of freedom
    assert found["mean"]["value"] == 4.0
    np.testing.assert_allclose(found["mean"]["interval"], [4 - half, 4 + half], rtol=1e-5)
    np.testing.assert_allclose(found["both"]["interval"][1], [4 + half, 8 + 2 * half], rtol=1e-5)


def test_weights_by_hand():
    gap = np.log([0.5, 1.0, 4.0]) + [0, 1e-7, 0]  # rounding truncates nothing
    found = referee.weight_statistics([referee.weight_sums(gap[:1]), referee.weight_sums(gap[1:])], np.arange(2))
    assert found["gap"] == pytest.approx((np.log(2) + np.log(4)) / 3)
    at = dict(zip(referee.CAPS, zip(found["ess"], found["truncated"], strict=True), strict=True))
    np.testing.assert_allclose(at[1.0], [2.5**2 / (3 * 2.25), 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(at[3.0], [4.5**2 / (3 * 10.25), 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(at[float("inf")], [5.5**2 / (3 * 17.25), 0], rtol=1e-6)


# Estimators on a tiny policy


@pytest.fixture(scope="module")
def model():
    policy, params = tiny_policy(vocab=VOCAB, seed=3, sharpness=40.0)
    prompts = make_prompts(ROWS, 4, VOCAB, padding=(0, 1, 3))
    trajectory = denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(0), length=LENGTH, rule="random", eos_id=EOS)
    return policy, params, trajectory, jnp.array([1.0, -0.5, 2.0, -1.0]), response_mask(trajectory.tokens, EOS)


@pytest.fixture(scope="module")
def config():
    config = sudoku.get_config("debug")
    config.rl.microbatch = 2
    return config


def gradient_of(model, config, studied, key=None):
    policy, params, trajectory, advantages, mask = model
    prompts, reads = referee.draw(policy, studied, trajectory, jax.random.key(0) if key is None else key)
    gradient = referee.make_gradient(policy, config)
    return gradient(params, trajectory, prompts, reads, advantages, mask, importance=studied.importance, objective=studied.objective)


def exact_gradient(model):
    """By autodiff of the sum written out, all rows at once."""
    policy, params, trajectory, advantages, mask = model

    def objective(params):
        log_probs = surrogate_log_probs(policy, params, trajectory, all_cuts(trajectory.nfe, LENGTH))
        return jnp.mean(advantages * jnp.sum(jnp.where(mask, log_probs, 0), axis=1) / jnp.sum(mask, axis=1))

    return jax.flatten_util.ravel_pytree(jax.grad(objective)(params))[0]


def test_as_many_cuts_as_steps_give_the_exact_gradient(model, config):
    policy, params, trajectory, advantages, mask = model
    exact = exact_gradient(model)
    scale = float(jnp.abs(exact).max())
    many = Studied("cuts", LENGTH)
    for found in (
        referee.make_referee(policy, config, LENGTH)(params, trajectory, advantages, mask),
        gradient_of(model, config, many),
        gradient_of(model, config, Studied("cuts, weights", LENGTH, importance="truncated")),  # which are 1
        gradient_of(model, config, Studied("exact", LENGTH, "exact")),
    ):
        np.testing.assert_allclose(found, exact, atol=2e-5 * scale)
    few = gradient_of(model, config, Studied("cuts", 1))
    assert np.abs(few - exact).max() > 0.1 * scale


def test_sampled_steps_are_unbiased_and_stale_latents_are_not(model, config):
    """The mean over all choices of one cut more, weighted alike, is the exact gradient with window 1 and is not without a window."""
    policy, params, trajectory, advantages, mask = model
    gradient, exact = referee.make_gradient(policy, config), np.asarray(exact_gradient(model))
    options = {"importance": "none", "objective": "clipped"}
    common = int(np.lcm.reduce(np.asarray(trajectory.nfe) - 1))  # each row goes through its own steps equally often
    assert 1 < common <= 60
    means = {}
    for window in (0, 1):
        each = []
        for i in range(common):
            cuts = jnp.stack([jnp.zeros(ROWS, jnp.int32), 1 + i % (trajectory.nfe - 1)], axis=1)
            reads = cut_reads(trajectory, cuts, policy.config.mask_id, window)
            each.append(np.asarray(gradient(params, trajectory, trajectory.prompts, reads, advantages, mask, **options)))
        means[window] = np.mean(each, axis=0)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(means[1], exact, atol=1e-4 * scale)
    assert np.abs(means[0] - exact).max() > 0.05 * scale


@pytest.mark.parametrize("studied", [each for each in referee.ESTIMATORS_STUDIED if each.plain and each.num_latents <= 2], ids=str)
def test_what_is_drawn(model, studied):
    policy, _, trajectory, _, _ = model
    prompts, reads = referee.draw(policy, studied, trajectory, jax.random.key(5))
    assert reads.latents.shape == (ROWS, studied.num_latents, LENGTH)
    assert (np.asarray(prompts.tokens) != np.asarray(trajectory.prompts.tokens)).any() == bool(studied.prompt_masking)
    assert (reads.source is None) == (studied.estimator != "cuts")
    if studied.window:
        assert set(np.unique(reads.weights)) != {1.0}


def test_kl_is_none_where_it_is_exact_and_falls_with_the_cuts(model, config):
    policy, params, trajectory, _, mask = model
    compare, hidden = referee.make_comparison(policy, config), referee.make_exact_hidden(policy, LENGTH)(params, trajectory)
    means, gaps = [], []
    for m, draws in ((1, 1), (2, 12), (4, 12), (LENGTH, 1)):
        sums, gap = [], []
        for i in range(draws):
            prompts, reads = referee.draw(policy, Studied("cuts", m), trajectory, jax.random.key(i))
            kl, log_weight = compare(params, trajectory, prompts, reads, hidden)
            sums.append(referee.kl_sums(kl, reads.weights, trajectory, mask))
            gap.append(np.abs(np.asarray(log_weight[:, 0])[np.asarray(mask)]).mean())
        means.append(referee.kl_statistics(np.array(sums), np.arange(draws))["kl"])
        gaps.append(np.mean(gap))
    assert means[0] > means[1] > means[2] > 0.01 and gaps[0] > gaps[1] > gaps[2] > 0.01
    assert means[3] == pytest.approx(0, abs=1e-5) and gaps[3] == pytest.approx(0, abs=1e-4)


def test_kl_by_hand(model, config):
    """Mean-field on one row and position, from the logits of the two latents."""
    policy, params, trajectory, _, _ = model
    prompts, reads = referee.draw(policy, Studied("cuts", 1), trajectory, jax.random.key(0))
    hidden = referee.make_exact_hidden(policy, LENGTH)(params, trajectory)
    kl = np.asarray(referee.make_comparison(policy, config)(params, trajectory, prompts, reads, hidden)[0])
    row, k = 0, int(np.argmax(trajectory.unmask_step[0]))
    log_probs = []
    for step in (int(trajectory.unmask_step[row, k]), 0):
        z = jnp.where(trajectory.unmask_step < step, trajectory.tokens, policy.config.mask_id)
        logits = policy.logits(params, *trajectory.prompts.with_response(z))[row, k - LENGTH]
        log_probs.append(np.asarray(jax.nn.log_softmax(logits), np.float64))
    tokens = [v for v in range(VOCAB) if v != policy.config.mask_id]
    by_hand = sum(np.exp(log_probs[0][v]) * (log_probs[0][v] - log_probs[1][v]) for v in tokens)
    assert by_hand > 1e-3 and kl[row, 0, k] == pytest.approx(by_hand, rel=1e-3)


def test_kl_sums_by_hand(model):
    trajectory = model[2].replace(unmask_step=jnp.array([[0, 1, 2, 3, 4]]), nfe=jnp.array([5]))
    kl, weights = np.array([[[1.0, 2, 3, 4, 5], [9, 9, 9, 9, 9]]]), np.array([[[1.0, 0, 2, 1, 1], [0, 0, 1, 0, 0]]])
    sums = referee.kl_sums(kl, weights, trajectory, np.array([[True, True, True, True, False]]))
    np.testing.assert_allclose(sums, [[1, 0, 15, 4, 0], [1, 0, 3, 1, 0]])
    values = referee.kl_statistics(sums[None], np.arange(1))
    assert values["kl"] == 4.0
    np.testing.assert_allclose(values["by_step"], [1, np.nan, 5, 4, np.nan])


# The program


@pytest.mark.slow
def test_files(tmp_path, monkeypatch):
    some = {("cuts", 1), ("cuts, weights", 1), ("elbo", 2)}
    chosen = [each for each in referee.ESTIMATORS_STUDIED if (each.name, each.num_latents) in some]
    monkeypatch.setattr(study, "ESTIMATORS_STUDIED", chosen)
    config = sudoku.get_config("debug")
    folder = tmp_path / "study"
    study.run(config, str(tmp_path / "run"), str(folder), "the command", prompts=2, batches=3, draws=2)
    found = json.loads((folder / "study.json").read_text())
    measured = found["measured"]
    assert (measured["rows"], measured["batches"], measured["draws"]) == (8, 3, 2) and measured["parameters"] > 1000
    assert found["config"]["sft"]["steps"] == 40
    entries = {entry["name"]: entry for entry in found["estimators"]}
    assert set(entries) == {"cuts", "cuts, weights", "elbo", "exact"} and "kl" not in entries["cuts, weights"]
    exact = {name: entries["exact"][name]["value"] for name in ("cosine", "norm", "noise", "kl")}
    assert exact == pytest.approx({"cosine": 1, "norm": 1, "noise": 0, "kl": 0}, abs=1e-5)
    assert entries["cuts"]["noise"]["value"] == 0 < entries["elbo"]["noise"]["value"]
    assert len(entries["cuts"]["ess"]["value"]) == len(entries["cuts"]["truncated"]["interval"][0]) == len(referee.CAPS)
    assert "ess" not in entries["elbo"]
    text = (folder / "study.md").read_text()
    assert "`the command`" in text and "3 batches of 8 rows" in text and "| cuts, weights | 1 |" in text
    for name in ("gradient", "kl", "cap"):
        assert 2_000 < (folder / f"study-{name}.png").stat().st_size <= 60_000
    with pytest.raises(ValueError, match="batches = 2, draws = 1: intervals need 3 batches"):
        study.study(None, None, prompts=2, batches=2, draws=1)


@pytest.mark.slow
def test_command_line():
    line = [sys.executable, "-m", "diffpo_jax.study", "--config=configs/sudoku.py:debug"]
    done = subprocess.run(line, cwd=runs.ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2 and "--workdir must have a value" in done.stderr
