"""The algorithms by name: what they set, and that each one's first update is the gradient its paper says, written by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import countdown, default, math, sudoku
from diffpo_jax.algorithms import ALGORITHMS, describe, set_algorithm
from diffpo_jax.config import check_config
from diffpo_jax.models.lora import Trainable
from diffpo_jax.objectives import SPG_BETA, SPG_MIX
from diffpo_jax.rollout import make_score
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.step import init_state, make_update
from diffpo_jax.structs import ScoredGroup
from tests.reference import make_prompts, tiny_policy

VOCAB, EOS, LENGTH, ROWS, P = 6, 0, 6, 8, 4
POLICY, PARAMS = tiny_policy(vocab=VOCAB, seed=3, sharpness=30.0)
ADVANTAGES = jnp.asarray([1.0, -1.0, 0.5, -0.5, 2.0, -1.0, -1.5, 0.5])
# name: (latents a row, prompts masked, importance weights, KL to the start); what else they are is in the gradients below
FIELDS = {
    "d1": (1, True, False, True), "d1_is": (1, True, True, True), "mf2": (2, False, False, True), "diffpo": (2, False, True, True),
    "diffpo_m4": (4, False, True, True), "window": (2, False, True, True), "agrpo": (4, False, False, True),
    "wd1": (1, True, False, False), "unigrpo": (1, False, False, True), "coupled_grpo": (2, False, False, True),
    "spg": (2, False, False, False), "espo": (2, False, False, True),
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_a_name_sets(name):
    config = set_algorithm(default.get_config(), name)
    likelihood, rl = config.likelihood, config.rl
    found = (likelihood.num_latents, likelihood.prompt_masking > 0, rl.importance_weights == "truncated", rl.kl_weight > 0)
    assert config.algorithm == name and found == FIELDS[name]
    for file in (math, countdown, sudoku):
        for preset in ("tiny", "suite", "llada_8b"):
            for mode in ("joint", "model"):
                config = file.get_config(preset)
                config.rl.mode = mode
                check_config(set_algorithm(config, name))


def test_all_name_the_same_things_but_for_what_is_their_own():
    common = set.intersection(*[set(fields) for fields in ALGORITHMS.values()])
    assert {"likelihood.estimator", "likelihood.num_latents", "likelihood.window", "likelihood.prompt_masking", "rl.objective",
            "rl.importance_weights"} == common  # fmt: skip
    assert set.union(*[set(fields) for fields in ALGORITHMS.values()]) - common == {"rl.kl_weight", "rl.kl_estimator", "rl.advantage"}
    assert len({tuple(sorted(fields.items())) for fields in ALGORITHMS.values()}) == len(ALGORITHMS)


def test_what_is_given_stays_and_the_difference_is_said():
    config = default.get_config()
    config.rl.importance_weights = "truncated"
    config = set_algorithm(config, "wd1", keep=("rl.importance_weights", "rl.steps"))
    assert config.rl.importance_weights == "truncated" and config.rl.advantage == "wd1"
    lines = describe(config).splitlines()
    assert lines[0] == "algorithm wd1:" and len(lines) == 1 + len(ALGORITHMS["wd1"])
    assert "  rl.importance_weights = 'truncated'  (wd1 itself: 'none')" in lines and "  rl.advantage = 'wd1'" in lines
    with pytest.raises(ValueError, match="^algorithm = 'ppo' is unknown; known: d1, d1_is, mf2, "):
        set_algorithm(config, "ppo")


@pytest.fixture(scope="module")
def trajectory():
    prompts = make_prompts(ROWS, P, VOCAB, padding=(0, 2))
    options = {"length": LENGTH, "eos_id": EOS, "temperature": 0.8, "threshold": 1.0}
    found = denoise(POLICY, PARAMS, prompts.tokens, prompts.mask, jax.random.key(4), **options)
    assert len(set(np.asarray(found.nfe).tolist())) > 1 and found.nfe.max() > 2 and np.asarray(found.tokens == EOS).any()
    return found


QUICK = ("diffpo", "agrpo", "spg", "espo")  # one of each kind; the others with the slow tests


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALGORITHMS])
def test_the_first_update_has_the_gradient_of_the_paper(name, trajectory):
    """Reads are taken as drawn (tests/test_likelihood.py), log-probabilities and weights are made again."""
    config = set_algorithm(default.get_config(), name)
    config.update_from_flattened_dict({"rl.mode": "model", "sampler.temperature": 0.8, "task.response_length": LENGTH})
    group = ScoredGroup(
        trajectory=trajectory, advantages=ADVANTAGES, sampler_advantages=ADVANTAGES,
        **make_score(POLICY, Trainable(), config)(PARAMS, PARAMS, trajectory, jax.random.key(7)),
    )  # fmt: skip
    reads = jax.tree.map(lambda x: x[0], group.reads)
    tokens = np.asarray(trajectory.tokens)
    ends = [list(row).index(EOS) if EOS in row else LENGTH for row in tokens]
    counted = np.arange(LENGTH) <= np.array(ends)[:, None]
    share = counted / counted.sum(1, keepdims=True) / ROWS
    weights = share[:, None] * np.asarray(reads.weights)
    prompts = trajectory.prompts if group.seen_prompts is None else trajectory.prompts.replace(tokens=group.seen_prompts[0])

    def log_probs(params):
        """[N, R, L] by a forward pass of each latent."""
        found = []
        for j in range(reads.latents.shape[1]):
            logits = POLICY.logits(params, *prompts.with_response(reads.latents[:, j]))[:, P:] / 0.8
            found.append(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0])
        found = jnp.stack(found, axis=1)
        return found if reads.source is None else jnp.take_along_axis(found, reads.source[:, None], axis=1)

    gap = np.asarray(log_probs(PARAMS), np.float64) - np.asarray(trajectory.log_prob)[:, None]
    if FIELDS[name][2]:
        weights = weights * np.minimum(config.rl.importance_cap, np.exp(gap))
    if name == "agrpo":  # every position that counts is read where it was drawn
        np.testing.assert_allclose(gap[weights > 0], 0.0, atol=1e-4)

    def by_hand(params):
        new, a = log_probs(params), ADVANTAGES
        rows = jnp.sum(weights * new, axis=(1, 2))  # at rho = 1 a ratio has the gradient of its logarithm, of a token as of a row
        if name == "spg":
            inside = jnp.sum(jnp.asarray(reads.weights) * jnp.exp(SPG_BETA * new), axis=1)
            upper = jnp.sum(share * jnp.where(inside > 0, jnp.log(jnp.where(inside > 0, inside, 1.0)), 0.0), axis=1) / SPG_BETA
            rows = jnp.where(a < 0, SPG_MIX * upper + (1 - SPG_MIX) * rows, rows)
        return -jnp.sum(a * rows)

    expected = jax.jit(jax.grad(by_hand))(PARAMS)
    head = SimpleNamespace(init=lambda *_: {}, entropy=None)
    update = make_update(POLICY, Trainable(), head, config, EOS, jax.random.key(9))
    state, metrics = update(init_state(config, jax.tree.map(jnp.copy, PARAMS), {}), PARAMS, group, jnp.asarray(0))
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(expected)), rel=1e-4) and metrics["grad_norm"] > 1e-3
    first_moment = state.opt_state[1][0].mu  # (1 - b1) times the gradient, clipped
    scale = 0.1 * min(1.0, config.rl.max_grad_norm / float(metrics["grad_norm"]))
    jax.tree.map(lambda mu, g: np.testing.assert_allclose(mu, scale * g, atol=1e-6), first_moment, expected)
