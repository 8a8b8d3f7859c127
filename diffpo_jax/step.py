"""The pure update: (TrainState, ScoredGroup, i) -> (TrainState, metrics). One jitted, donated program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from optax.microbatching import AccumulationType

from diffpo_jax import objectives, sharding
from diffpo_jax.likelihood import read_log_probs
from diffpo_jax.models.lora import Trainable
from diffpo_jax.models.threshold_head import ThresholdHead, pool_prompt
from diffpo_jax.models.transformer import Dropout, Policy
from diffpo_jax.reductions import largest_divisor, masked_max, masked_sum
from diffpo_jax.sampling.denoise import response_mask
from diffpo_jax.structs import Reads, ScoredGroup, TrainState, Trajectory

MODES = {"joint": (True, True), "model": (True, False), "sampler": (False, True)}  # (trains the model, trains the threshold network)
Metrics = dict[str, Any]  # name -> (sum, count), or a scalar


def make_optimisers(config: Any) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Optax transformations of the model (AdamW, warm-up, clipping by global norm) and of the threshold network (Adam, clipping)."""
    rl = config.rl
    rate = SCHEDULES[rl.schedule](rl)
    model = optax.chain(
        optax.clip_by_global_norm(rl.max_grad_norm), optax.adamw(rate, b2=rl.adam_b2, weight_decay=rl.weight_decay)
    )
    threshold = optax.chain(optax.clip_by_global_norm(rl.max_grad_norm), optax.adam(config.threshold_network.learning_rate))
    return model, threshold


def _cosine(rl: Any) -> optax.Schedule:
    updates = max(rl.steps * rl.inner_steps, 1)
    return optax.warmup_cosine_decay_schedule(0.0, rl.learning_rate, min(rl.warmup_steps, updates // 2), updates)


SCHEDULES = {  # after a linear warm-up
    "constant": lambda rl: optax.warmup_constant_schedule(0.0, rl.learning_rate, rl.warmup_steps) if rl.warmup_steps else rl.learning_rate,
    "cosine": _cosine,
}


def init_state(config: Any, params: Any, threshold_params: Any) -> TrainState:
    """The state before the first update."""
    model, threshold = make_optimisers(config)
    step, bad, total_bad = (jnp.zeros((), jnp.int32) for _ in range(3))  # a buffer each: updates donate the state
    return TrainState(step, params, threshold_params, model.init(params), threshold.init(threshold_params), bad, total_bad)


def likelihood_temperature(config: Any) -> float:
    """Temperature of the surrogates: that of the rollouts, or 1."""
    return LIKELIHOOD_TEMPERATURES[config.likelihood.temperature](config)


LIKELIHOOD_TEMPERATURES = {"sampling": lambda config: config.sampler.temperature, "one": lambda config: 1.0}


class Rows(struct.PyTreeNode):
    """What the loss of some rows of a batch is made of."""

    trajectory: Trajectory
    advantages: jax.Array  # [N] float32, of the model
    sampler_advantages: jax.Array  # [N] float32, of the threshold network
    reads: Reads
    old_log_probs: jax.Array | None  # [N, R, L] float32, or the policy's own
    ref_log_probs: jax.Array | None  # [N, R, L] float32; None without KL
    normalisation: jax.Array  # [N, L] float32, a value of `NORMALISATIONS` of the whole batch
    share: jax.Array  # [N] float32, 1 / rows of the whole batch
    elbo_reads: Reads | None = None
    right: jax.Array | None = None  # [N] bool
    dropout_keys: jax.Array | None = None  # [N]


def make_loss(policy: Policy, head: ThresholdHead, config: Any) -> Callable[[Any, Any, Rows], tuple[jax.Array, tuple[Metrics, Metrics]]]:
    """The function minimised: -(J_model + alpha J_sampler) of some rows, with metrics as (sum, count) pairs and maxima a row.

    `loss(params, threshold_params, rows)`: `params` are the policy's. Of `Rows` the normalisation is that of the *whole* batch, so that
    losses and gradients of parts add up.
    """
    rl, net = config.rl, config.threshold_network
    train_model, train_sampler = MODES[rl.mode]
    read = functools.partial(read_log_probs, policy, temperature=likelihood_temperature(config))

    def model_loss(params, rows):
        trajectory, reads = rows.trajectory, rows.reads
        dropout = None if rows.dropout_keys is None else Dropout(rows.dropout_keys, config.lora.dropout)
        new, entropy = read(params, trajectory, reads, dropout=dropout)
        old = jax.lax.stop_gradient(new) if rows.old_log_probs is None else rows.old_log_probs
        gap = old - trajectory.log_prob[:, None]
        importance = objectives.IMPORTANCE_WEIGHTS[rl.importance_weights](gap, rl.importance_cap)
        estimate = objectives.Estimate(new, old, importance, rows.normalisation, reads.weights)
        objective, log_ratio = objectives.model_objective(
            estimate, rows.ref_log_probs, rows.advantages, objective=rl.objective, clip=(rl.clip_low, rl.clip_high),
            kl_weight=rl.kl_weight, kl_estimator=rl.kl_estimator,
        )  # fmt: skip
        sums, maxima = model_metrics(estimate, gap, entropy, log_ratio, rows)
        if rows.elbo_reads is not None:
            counted = rows.normalisation * rows.right[:, None] if rl.elbo_rows == "right" else rows.normalisation
            log_probs, _ = read(params, trajectory, rows.elbo_reads, dropout=dropout)
            weights = counted[:, None] * rows.elbo_reads.weights
            elbo = masked_sum(weights * log_probs, weights > 0)
            objective, sums = objective + rl.elbo_weight * elbo, sums | {"elbo": (elbo / rows.share[0], jnp.sum(counted) / rows.share[0])}
        return -objective, sums, maxima

    def model_metrics(estimate, gap, entropy, log_ratio, rows):
        read = estimate.weights > 0
        # Reported whether or not they are used: what truncated weights would be.
        weight = objectives.truncated_importance_weights(gap, rl.importance_cap)
        clipped = objectives.is_clipped(log_ratio, rows.advantages[:, None, None], rl.clip_low, rl.clip_high)
        values = {
            "weight/mean": weight,
            "weight/squared": jnp.square(weight),
            "weight/truncated": (gap > jnp.log(rl.importance_cap)).astype(jnp.float32),
            "clip_share": jnp.broadcast_to(clipped, read.shape).astype(jnp.float32),
            "surrogate/entropy": entropy,
            "surrogate/gap": jnp.abs(gap),
        }
        if rows.ref_log_probs is not None:
            values["kl"] = objectives.k3_kl(estimate.log_probs, rows.ref_log_probs)
        count = jnp.sum(read)
        sums = {name: (masked_sum(value, read), count) for name, value in values.items()}
        return sums, {"weight/max": masked_max(weight, read, axis=(1, 2))}

    def sampler_loss(params, threshold_params, rows):
        trajectory, draw, features = rows.trajectory, rows.trajectory.draw, rows.trajectory.draw.features
        if not net.stop_gradient:
            masked = jnp.full_like(trajectory.tokens, policy.config.mask_id)  # what the first denoiser call sees
            features = pool_prompt(policy.hidden(params, *trajectory.prompts.with_response(masked)), trajectory.prompts.mask)
        entropy = head.entropy(threshold_params, features)
        objective = objectives.sampler_objective(
            head.log_prob(threshold_params, features, draw.action), draw.log_prob, rows.sampler_advantages, entropy,
            clip=rl.clip_high, entropy_bonus=net.entropy_bonus,
        )  # fmt: skip
        every = jnp.ones(objective.shape[0], bool)
        return -jnp.sum(rows.share * objective), {"threshold/entropy": (masked_sum(entropy, every), jnp.sum(every))}

    def loss(params, threshold_params, rows):
        value, sums, maxima = jnp.zeros(()), {}, {}
        if train_model:
            value, sums, maxima = model_loss(params, rows)
        if train_sampler:
            part, more = sampler_loss(params, threshold_params, rows)
            value, sums = value + rl.sampler_weight * part, sums | more
        return value, (sums, maxima)

    return loss


def make_update(
    policy: Policy,
    trainable: Trainable,
    head: ThresholdHead,
    config: Any,
    eos_id: int,
    root: jax.Array,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Any, ScoredGroup, jax.Array], tuple[TrainState, Metrics]]:
    """`update(state, base, group, i)`: the i-th of the U updates on one rollout, jitted; `state` is donated.

    `base` are the frozen parameters of the start; the noise of the adapters' dropout is that of fold_in(root, state.step).

    Gradients are accumulated over micro-batches of up to `rl.microbatch` rows a device with the same result as the whole batch, and are
    laid out over `mesh` like the parameters. A non-finite loss or gradient changes nothing but the counters of bad updates.
    """
    model_optimiser, threshold_optimiser = make_optimisers(config)
    train_model, train_sampler = MODES[config.rl.mode]
    loss = make_loss(policy, head, config)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, base: Any, group: ScoredGroup, i: jax.Array) -> tuple[TrainState, Metrics]:
        trajectory, devices = group.trajectory, sharding.split(mesh, "rows")
        number = trajectory.nfe.shape[0]
        mask = response_mask(trajectory.tokens, eos_id)
        at_i = functools.partial(jax.tree.map, lambda x: x[i])
        if group.seen_prompts is not None:
            trajectory = trajectory.replace(prompts=trajectory.prompts.replace(tokens=group.seen_prompts[i]))
        dropout_keys = None
        if trainable.rank and trainable.dropout:
            dropout_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(root, state.step), jnp.arange(number))
        batch = Rows(
            trajectory, group.advantages, group.sampler_advantages, at_i(group.reads), at_i(group.old_log_probs),
            at_i(group.ref_log_probs), objectives.NORMALISATIONS[config.rl.normalisation](mask), jnp.full(number, 1.0 / number),
            at_i(group.elbo_reads), group.right, dropout_keys,
        )  # fmt: skip

        def grad(rows):
            rows = sharding.lay_out_rows(mesh, rows)
            (value, (sums, maxima)), grads = jax.value_and_grad(
                lambda params, threshold_params: loss(trainable.join(base, params), threshold_params, rows), argnums=(0, 1), has_aux=True
            )(state.params, state.threshold_params)
            return (value, sums, sharding.lay_out_params(mesh, grads)), maxima

        parts = optax.microbatch(
            grad,
            argnums=0,
            microbatch_size=devices * largest_divisor(number // devices, config.rl.microbatch),
            accumulator=(AccumulationType.SUM, AccumulationType.CONCAT),
        )
        (value, sums, (grads, threshold_grads)), maxima = parts(batch)

        grad_norm, threshold_grad_norm = optax.tree.norm(grads), optax.tree.norm(threshold_grads)
        good = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(threshold_grad_norm)
        params, opt_state = _apply(model_optimiser, grads, state.opt_state, state.params, good & train_model)
        threshold_params, threshold_opt_state = _apply(
            threshold_optimiser, threshold_grads, state.threshold_opt_state, state.threshold_params, good & train_sampler
        )
        state = TrainState(
            step=state.step + 1,
            params=params,
            threshold_params=threshold_params,
            opt_state=opt_state,
            threshold_opt_state=threshold_opt_state,
            bad_updates=jnp.where(good, 0, state.bad_updates + 1),
            total_bad_updates=state.total_bad_updates + ~good,
        )
        return sharding.lay_out_params(mesh, state), summarise(sums, maxima) | {
            "loss": value,
            "grad_norm": grad_norm,
            "threshold/grad_norm": threshold_grad_norm,
            "bad_updates": state.total_bad_updates,
        }

    return update


def _apply(optimiser, grads, opt_state, params, good):
    """The optimiser's step where `good`, nothing otherwise."""
    updates, new_opt_state = optimiser.update(grads, opt_state, params)
    new = (optax.apply_updates(params, updates), new_opt_state)
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (params, opt_state))


def summarise(sums: Metrics, maxima: Metrics) -> Metrics:
    """Scalars from (sum, count) pairs and per-row maxima; adds the effective sample size of the importance weights."""
    metrics = {name: total / jnp.maximum(count, 1) for name, (total, count) in sums.items()}
    metrics |= {name: jnp.max(value) for name, value in maxima.items()}
    if "weight/squared" in metrics:
        (total, count), (squares, _) = sums["weight/mean"], sums["weight/squared"]
        metrics["weight/ess"] = objectives.effective_sample_size(total, squares, count)
        del metrics["weight/squared"]
    return metrics
