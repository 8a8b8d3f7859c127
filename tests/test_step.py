"""The update: its gradients against hand-written ones, its metrics by hand, what it must not depend on and what it must not touch."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.default import get_config
from diffpo_jax import sharding
from diffpo_jax.likelihood import cut_reads, draw_cuts, elbo_reads, surrogate_log_probs, window_weights
from diffpo_jax.models.lora import Trainable
from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.objectives import grpo_advantages, row_weights
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.step import SCHEDULES, Rows, init_state, likelihood_temperature, make_loss, make_optimisers, make_update
from diffpo_jax.structs import ScoredGroup
from tests.reference import make_prompts, tiny_policy

VOCAB, EOS, LENGTH, ROWS, P = 6, 0, 6, 8, 4
HEAD = ThresholdHead(hidden=8, gamma_min=0.05, gamma_max=8.0, gamma_init=1.0, std_init=1.0)
POLICY, PARAMS = tiny_policy(vocab=VOCAB, seed=3, sharpness=30.0)
REFERENCE = jax.tree.map(lambda x: 0.9 * x, PARAMS)
READ = jax.jit(surrogate_log_probs, static_argnums=0, static_argnames="temperature")


def make_config(**overrides):
    config = get_config()
    base = {"rl.learning_rate": 1e-2, "rl.warmup_steps": 0, "threshold_network.entropy_bonus": 0.0, "rl.importance_cap": 1.2,
            "rl.kl_weight": 0.0, "task.response_length": LENGTH, "sampler.temperature": 0.8}  # fmt: skip
    config.update_from_flattened_dict(base | {name.replace("__", "."): value for name, value in overrides.items()})
    return config


@functools.cache
def updater(head_chunk=0, **overrides):
    policy = dataclasses.replace(POLICY, config=dataclasses.replace(POLICY.config, head_chunk=head_chunk))
    return make_update(policy, Trainable(), HEAD, make_config(**overrides), EOS, jax.random.key(9))


def fresh_state(config=None):
    copy = functools.partial(jax.tree.map, jnp.copy)  # updates donate their state
    return init_state(config or make_config(), copy(PARAMS), HEAD.init(jax.random.key(1), POLICY.config.width))


def cuts_of(trajectory):
    return draw_cuts(jax.random.key(5), trajectory.nfe, 2, LENGTH)


def reads_of(trajectory, cuts, window=0):
    """The reads of one update, as a group holds them."""
    return jax.tree.map(lambda x: x[None], cut_reads(trajectory, cuts, POLICY.config.mask_id, window))


@pytest.fixture(scope="module")
def group():
    prompts = make_prompts(ROWS, P, VOCAB, padding=(0, 2))
    trajectory = denoise(
        POLICY, PARAMS, prompts.tokens, prompts.mask, jax.random.key(4), length=LENGTH, eos_id=EOS, temperature=0.8,
        threshold_fn=HEAD.sample, threshold_params=fresh_state().threshold_params,
    )  # fmt: skip
    assert len(set(np.asarray(trajectory.nfe).tolist())) > 1 and np.asarray(trajectory.tokens == EOS).any()
    rng = np.random.default_rng(0)
    # a behaviour policy further from the surrogate than this model's, so that some weights are truncated
    trajectory = trajectory.replace(log_prob=trajectory.log_prob + jnp.asarray(0.3 * rng.normal(size=(ROWS, LENGTH)), jnp.float32))
    cuts = cuts_of(trajectory)
    return ScoredGroup(
        trajectory=trajectory,
        advantages=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        sampler_advantages=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        reads=reads_of(trajectory, cuts),
        old_log_probs=None,
        ref_log_probs=READ(POLICY, REFERENCE, trajectory, cuts, temperature=0.8)[None, :, None],
    )


def run(group, state=None, i=0, head_chunk=0, **overrides):
    return updater(head_chunk, **overrides)(state or fresh_state(make_config(**overrides)), PARAMS, group, jnp.asarray(i))


def assert_close(a, b, atol=1e-5, rtol=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=rtol)


def differs(a, b):
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def counted(group):
    """m_k in NumPy."""
    tokens = np.asarray(group.trajectory.tokens)
    ends = [list(row).index(EOS) if EOS in row else LENGTH for row in tokens]
    return np.arange(LENGTH) <= np.array(ends)[:, None]


def rows_of(group):
    """All rows of a group, as the loss takes them."""
    reads, normalisation = jax.tree.map(lambda x: x[0], group.reads), row_weights(jnp.asarray(counted(group)))
    return Rows(
        group.trajectory, group.advantages, group.sampler_advantages, reads, None, group.ref_log_probs[0], normalisation,
        jnp.full(ROWS, 1 / ROWS),
    )  # fmt: skip


# Item 4: the gradient at theta = theta_old


def hand_log_probs(params, group):
    """log pihat by two whole forward passes, [N, L]."""
    t, cuts = group.trajectory, cuts_of(group.trajectory)
    attend = jnp.concatenate([t.prompts.mask, jnp.ones((ROWS, LENGTH), bool)], 1)
    out = 0.0
    for j in range(2):
        z = jnp.where(t.unmask_step < cuts[:, j : j + 1], t.tokens, POLICY.config.mask_id)
        logits = POLICY.logits(params, jnp.concatenate([t.prompts.tokens, z], 1), attend)[:, P:] / 0.8
        log_prob = jnp.take_along_axis(logits, t.tokens[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)
        mine = (t.unmask_step >= cuts[:, 1:]) if j else (t.unmask_step < cuts[:, 1:])
        out = out + jnp.where(mine, log_prob, 0.0)
    return out


def hand_coefficients(group, importance, window, beta):
    """d J / d log pihat: normalisation * window * (w A - beta (1 - exp(log ref - log pihat)))."""
    mask = counted(group)
    share = mask / mask.sum(1, keepdims=True) / ROWS
    new = np.asarray(hand_log_probs(PARAMS, group), np.float64)
    w = np.minimum(1.2, np.exp(new - np.asarray(group.trajectory.log_prob))) if importance == "truncated" else 1.0
    kept = np.asarray(window_weights(group.trajectory.unmask_step, group.trajectory.nfe, cuts_of(group.trajectory), window))
    advantages = np.asarray(group.advantages)[:, None]
    pull = 1 - np.exp(np.asarray(group.ref_log_probs[0, :, 0]) - new)
    return share * kept * (w * advantages - beta * pull), share * kept * w * advantages


@pytest.mark.parametrize("importance, window, beta", [("truncated", 0, 0.0), ("none", 0, 0.5), ("truncated", 1, 0.5)])
def test_gradient_is_the_weighted_reinforce_gradient(group, importance, window, beta):
    overrides = {"rl__importance_weights": importance, "likelihood__window": window, "rl__kl_weight": beta, "rl__mode": "model"}
    coefficients, objective = hand_coefficients(group, importance, window, beta)
    by_hand = jax.jit(jax.grad(lambda params: -jnp.sum(jnp.asarray(coefficients, jnp.float32) * hand_log_probs(params, group))))(PARAMS)
    group = group.replace(reads=reads_of(group.trajectory, cuts_of(group.trajectory), window))
    (value, _), (grads, head_grads) = jax.jit(jax.value_and_grad(make_loss(POLICY, HEAD, make_config(**overrides)), (0, 1), has_aux=True))(
        PARAMS, fresh_state().threshold_params, rows_of(group)
    )
    assert_close(grads, by_hand, atol=1e-6)
    assert not differs(head_grads, jax.tree.map(jnp.zeros_like, head_grads))
    if beta == 0:
        assert value == pytest.approx(-objective.sum(), abs=1e-5)  # rho = 1

    # and the program as a whole takes the optimiser's step with it
    config = make_config(**overrides)
    optimiser, _ = make_optimisers(config)
    expected = optax.apply_updates(PARAMS, optimiser.update(by_hand, optimiser.init(PARAMS), PARAMS)[0])
    state, metrics = run(group, **overrides)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(by_hand)), rel=1e-4)
    for new, want, g in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), jax.tree.leaves(by_hand), strict=True):
        clear = np.abs(g) > 1e-5  # Adam's first step is the gradient's sign
        np.testing.assert_allclose(np.asarray(new)[clear], np.asarray(want)[clear], atol=1e-4)
    assert differs(state.params, PARAMS)


def test_threshold_gradient_is_reinforce_too(group):
    draw, state = group.trajectory.draw, fresh_state()

    def objective(head_params):
        return -2.0 * jnp.mean(group.sampler_advantages * HEAD.log_prob(head_params, draw.features, draw.action))

    expected = jax.grad(objective)(state.threshold_params)
    _, metrics = run(group, rl__mode="sampler", rl__sampler_weight=2.0)
    assert metrics["threshold/grad_norm"] == pytest.approx(float(optax.tree.norm(expected)), rel=1e-4)
    assert metrics["loss"] == pytest.approx(-2.0 * float(group.sampler_advantages.mean()), abs=1e-5)  # rho = 1
    assert metrics["grad_norm"] == 0.0


# Item 5: rows may be permuted and split


@pytest.mark.parametrize("normalisation", ["row", "token_mean", "constant"])
def test_permuted_rows_and_micro_batches_give_the_same_update(group, normalisation):
    overrides = {"rl__normalisation": normalisation, "head_chunk": 3}
    whole = run(group, **overrides)
    assert_close(run(group, rl__microbatch=2, **overrides), whole)
    order = jnp.asarray([5, 2, 7, 0, 1, 6, 4, 3])
    permuted = jax.tree.map(lambda x: x[order] if x.shape[0] == ROWS else x[:, order], group)
    assert_close(run(permuted, **overrides), whole)
    assert whole[1]["loss"] != 0 and whole[1]["grad_norm"] > 0.01
    if normalisation != "row":  # rows of other lengths: the normalisations are different functions
        assert abs(float(whole[1]["grad_norm"] / run(group, head_chunk=3)[1]["grad_norm"]) - 1) > 1e-3


def test_a_micro_batch_is_the_largest_part_that_fits(group, monkeypatch):
    sizes, microbatch = [], optax.microbatch

    def noted(*args, **options):
        sizes.append(options["microbatch_size"])
        return microbatch(*args, **options)

    monkeypatch.setattr(optax, "microbatch", noted)
    for most in (0, 3, 5, 8, 100):
        update = make_update(POLICY, Trainable(), HEAD, make_config(rl__microbatch=most), EOS, jax.random.key(9))
        jax.eval_shape(update, fresh_state(), PARAMS, group, jnp.asarray(0))
    assert sizes == [8, 2, 4, 8, 8]  # of 8 rows


def test_a_mesh_of_one_device_gives_the_same_update(group):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    policy = dataclasses.replace(POLICY, layout=sharding.Layout(mesh))
    config = make_config(rl__microbatch=4)
    update = make_update(policy, Trainable(), HEAD, config, EOS, jax.random.key(9), mesh)
    laid_out = jax.device_put(fresh_state(config), sharding.params_sharding(mesh, fresh_state(config)))
    got = update(laid_out, PARAMS, jax.device_put(group, sharding.replicated_sharding(mesh)), jnp.asarray(0))
    assert_close(got, run(group, rl__microbatch=4))


# Item 7, and the modes


def test_equal_rewards_give_no_gradient_at_all(group):
    equal = jnp.repeat(grpo_advantages(jnp.asarray([[0.7] * 4, [0.1] * 4])).reshape(-1), 1)
    group = group.replace(advantages=equal, sampler_advantages=equal)
    before = fresh_state()
    state, metrics = run(group)
    assert metrics["threshold/grad_norm"] == 0.0 and metrics["grad_norm"] == 0.0 and metrics["loss"] == 0.0
    assert not differs((state.params, state.threshold_params), (before.params, before.threshold_params))
    assert run(group, threshold_network__entropy_bonus=0.1)[1]["threshold/grad_norm"] > 0.01


@pytest.mark.parametrize("mode, model, sampler", [("joint", True, True), ("model", True, False), ("sampler", False, True)])
def test_modes_touch_only_their_parameters(group, mode, model, sampler):
    before = fresh_state()
    state, metrics = run(group, rl__mode=mode)
    assert differs(state.params, before.params) == differs(state.opt_state, before.opt_state) == model
    assert differs(state.threshold_params, before.threshold_params) == sampler
    assert differs(state.threshold_opt_state, before.threshold_opt_state) == sampler
    assert (metrics["grad_norm"] > 0) == model and (metrics["threshold/grad_norm"] > 0) == sampler
    assert ("weight/mean" in metrics) == model and ("threshold/entropy" in metrics) == sampler
    assert state.step == 1


def test_joint_is_the_sum_of_its_parts(group):
    (joint, metrics), (model, _), (sampler, _) = run(group), run(group, rl__mode="model"), run(group, rl__mode="sampler")
    assert_close(joint.params, model.params)
    assert_close(joint.threshold_params, sampler.threshold_params)
    assert metrics["threshold/entropy"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e), rel=1e-5)


@pytest.mark.parametrize("field", ["advantages", "sampler_advantages"])
def test_non_finite_advantages_are_skipped_and_counted(group, field):
    bad = group.replace(**{field: getattr(group, field).at[3].set(jnp.nan)})
    before = fresh_state()
    state, metrics = run(bad)
    for name in ("params", "threshold_params", "opt_state", "threshold_opt_state"):
        assert not differs(getattr(state, name), getattr(before, name)), name
    assert (state.step, state.bad_updates, state.total_bad_updates, metrics["bad_updates"]) == (1, 1, 1, 1)
    state, _ = run(bad, state)
    assert (state.bad_updates, state.total_bad_updates) == (2, 2)
    state, metrics = run(group, state)
    assert (state.step, state.bad_updates, state.total_bad_updates, metrics["bad_updates"]) == (3, 0, 2, 2)
    assert_close(state.params, run(group)[0].params)  # as if the bad updates had not been


# Several updates a rollout


def test_given_old_log_probs_change_nothing_at_first_and_are_the_ratio_after(group):
    cuts = [cuts_of(group.trajectory), draw_cuts(jax.random.key(9), group.trajectory.nfe, 2, LENGTH)]
    twice = group.replace(
        reads=jax.tree.map(lambda *x: jnp.concatenate(x), *[reads_of(group.trajectory, c) for c in cuts]),
        old_log_probs=jnp.stack([READ(POLICY, PARAMS, group.trajectory, c, temperature=0.8)[:, None] for c in cuts]),
        ref_log_probs=jnp.stack([READ(POLICY, REFERENCE, group.trajectory, c, temperature=0.8)[:, None] for c in cuts]),
    )
    state, metrics = run(twice, rl__inner_steps=2)
    once, once_metrics = run(group)
    assert_close((state, metrics), (once, once_metrics))
    new = np.asarray(READ(POLICY, state.params, group.trajectory, cuts[1], temperature=0.8))
    _, metrics = run(twice, state, i=1, rl__inner_steps=2)
    old = np.asarray(twice.old_log_probs[1, :, 0])
    ratio, advantages, mask = np.exp(new - old), np.asarray(group.advantages)[:, None], counted(group)
    clipped = (((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0)))[mask].mean()
    assert metrics["clip_share"] == pytest.approx(clipped, abs=1e-6) and clipped > 0.1
    w = np.minimum(1.2, np.exp(old - np.asarray(group.trajectory.log_prob)))
    objective = w * np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages) * mask / mask.sum(1, keepdims=True)
    draw = group.trajectory.draw
    rho = np.exp(np.asarray(HEAD.log_prob(once.threshold_params, draw.features, draw.action) - draw.log_prob))
    a = np.asarray(group.sampler_advantages)
    expected = -objective.sum() / ROWS - np.minimum(rho * a, np.clip(rho, 0.8, 1.2) * a).mean()
    assert metrics["loss"] == pytest.approx(expected, abs=1e-4)


def test_metrics_by_hand(group):
    _, metrics = run(group)
    mask, new = counted(group), np.asarray(hand_log_probs(PARAMS, group), np.float64)
    gap = (new - np.asarray(group.trajectory.log_prob))[mask]
    w = np.minimum(1.2, np.exp(gap))
    d = (np.asarray(group.ref_log_probs[0, :, 0]) - new)[mask]
    expected = {
        "weight/mean": w.mean(), "weight/max": w.max(), "weight/truncated": (gap > np.log(1.2)).mean(),
        "weight/ess": w.sum() ** 2 / (len(w) * (w**2).sum()), "surrogate/gap": np.abs(gap).mean(), "kl": (np.exp(d) - d - 1).mean(),
        "clip_share": 0.0,
    }  # fmt: skip
    assert 0 < expected["weight/truncated"] < 1 and expected["weight/ess"] < 0.999
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert 0 < metrics["surrogate/entropy"] < np.log(VOCAB - 1) and "weight/squared" not in metrics


# The trunk through the threshold network; the KL


def test_without_stop_gradient_the_sampler_moves_the_trunk(group):
    t = group.trajectory

    def by_hand(params):
        z = jnp.concatenate([t.prompts.tokens, jnp.full((ROWS, LENGTH), POLICY.config.mask_id)], 1)
        hidden = POLICY.hidden(params, z, jnp.concatenate([t.prompts.mask, jnp.ones((ROWS, LENGTH), bool)], 1))[:, :P]
        share = t.prompts.mask / t.prompts.mask.sum(1, keepdims=True)
        features = jnp.sum(hidden * share[..., None], axis=1)
        return -jnp.mean(group.sampler_advantages * HEAD.log_prob(fresh_state().threshold_params, features, t.draw.action))

    expected = jax.jit(jax.grad(by_hand))(PARAMS)
    loss = make_loss(POLICY, HEAD, make_config(rl__mode="sampler", threshold_network__stop_gradient=False))
    grads = jax.jit(jax.grad(loss, has_aux=True))(PARAMS, fresh_state().threshold_params, rows_of(group))[0]
    assert_close(grads, expected, atol=1e-6)
    assert optax.tree.norm(expected) > 1e-3


def test_kl_pulls_to_the_reference(group):
    still = group.replace(advantages=jnp.zeros(ROWS))
    overrides = {"rl__kl_weight": 1.0, "rl__mode": "model", "rl__learning_rate": 3e-3}
    state, kls = fresh_state(make_config(**overrides)), []
    for _ in range(15):
        state, metrics = run(still, state, **overrides)
        kls.append(float(metrics["kl"]))
        assert metrics["loss"] >= 0
    assert kls[-1] < 0.3 * kls[0] and kls[0] > 0.005
    at_reference = READ(POLICY, PARAMS, group.trajectory, cuts_of(group.trajectory), temperature=0.8)
    at_reference = still.replace(ref_log_probs=at_reference[None, :, None])
    _, metrics = run(at_reference, **overrides)
    assert metrics["kl"] < 1e-9 and metrics["grad_norm"] < 1e-5


@pytest.mark.parametrize("counts", ["all", "right"])
def test_the_elbo_regulariser_adds_its_gradient(group, counts):
    t, right = group.trajectory, jnp.arange(ROWS) % 3 == 0
    reads = elbo_reads(jax.random.key(6), t, SimpleNamespace(num_latents=1), POLICY.config.mask_id)
    z, weights = reads.latents[:, 0], counted(group) * np.asarray(reads.weights[:, 0]) / counted(group).sum(1, keepdims=True) / ROWS
    weights = weights * np.asarray(right)[:, None] if counts == "right" else weights

    def by_hand(params):
        attend = jnp.concatenate([t.prompts.mask, jnp.ones((ROWS, LENGTH), bool)], 1)
        log_probs = jax.nn.log_softmax(POLICY.logits(params, jnp.concatenate([t.prompts.tokens, z], 1), attend)[:, P:] / 0.8)
        return -0.3 * jnp.sum(weights * jnp.take_along_axis(log_probs, t.tokens[..., None], -1)[..., 0])

    group = group.replace(advantages=jnp.zeros(ROWS), elbo_reads=jax.tree.map(lambda x: x[None], reads), right=right)
    _, metrics = run(group, rl__mode="model", rl__elbo_weight=0.3, rl__elbo_rows=counts)
    value, grads = jax.jit(jax.value_and_grad(by_hand))(PARAMS)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-4) and value > 0.01
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    share = np.asarray(right).mean() if counts == "right" else 1.0
    assert metrics["elbo"] == pytest.approx(-float(value) / 0.3 / share, rel=1e-4)  # nats a token of the rows it counts
    whole, _ = run(group, rl__mode="model", rl__elbo_weight=0.3, rl__elbo_rows=counts)
    assert_close(run(group, rl__mode="model", rl__elbo_weight=0.3, rl__elbo_rows=counts, rl__microbatch=2)[0].params, whole.params)


def test_likelihood_temperature():
    assert likelihood_temperature(make_config()) == 0.8
    assert likelihood_temperature(make_config(likelihood__temperature="one")) == 1.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_train_alone_and_in_micro_batches(group, dropout):
    trainable = Trainable(rank=2, alpha=4.0, dropout=dropout)
    states, metrics = [], []
    for size in (0, 2):
        config = make_config(rl__microbatch=size, lora__rank=2, lora__dropout=dropout)
        update = make_update(POLICY, trainable, HEAD, config, EOS, jax.random.key(9))
        start = trainable.init(jax.random.key(2), PARAMS)
        state = init_state(config, jax.tree.map(jnp.copy, start), HEAD.init(jax.random.key(1), POLICY.config.width))
        for _ in range(2):  # A has no gradient before B, which starts at zero, has moved
            state, values = update(state, PARAMS, group, jnp.asarray(0))
        states.append(state)
        metrics.append(values)
    assert_close(states[0].params, states[1].params, atol=1e-4)
    assert_close(metrics[0], metrics[1])
    assert jax.tree.structure(states[0].params) == jax.tree.structure(start)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max() > 0, states[0].params, start)
    assert all(jax.tree.leaves(moved))


def test_masked_prompts_are_what_the_update_reads(group):
    masked = jnp.full_like(group.trajectory.prompts.tokens, POLICY.config.mask_id)
    by_field, _ = run(group.replace(seen_prompts=masked[None]), rl__mode="model")
    prompts = group.trajectory.prompts.replace(tokens=masked)
    by_hand, _ = run(group.replace(trajectory=group.trajectory.replace(prompts=prompts)), rl__mode="model")
    whole, _ = run(group, rl__mode="model")
    assert_close(by_field.params, by_hand.params)
    assert differs(by_field.params, whole.params)


def test_schedules():
    rl = make_config(rl__learning_rate=0.4, rl__warmup_steps=2, rl__steps=3, rl__inner_steps=2).rl
    np.testing.assert_allclose([SCHEDULES["constant"](rl)(i) for i in range(4)], [0.0, 0.2, 0.4, 0.4], atol=1e-6)
    np.testing.assert_allclose([SCHEDULES["cosine"](rl)(i) for i in (0, 1, 2, 4, 6, 9)], [0.0, 0.2, 0.4, 0.2, 0.0, 0.0], atol=1e-6)
