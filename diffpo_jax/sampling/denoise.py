"""The denoising sampler: one jitted while_loop from prompts to a Trajectory. One step = one denoiser call per unfinished row (NFE)."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from diffpo_jax.models.threshold_head import pool_prompt
from diffpo_jax.models.transformer import Policy, argmax, pick, without_mask
from diffpo_jax.reductions import map_positions
from diffpo_jax.sampling.unmasking import RULES, TOP_K_RULES, position_stats, tokens_this_step
from diffpo_jax.structs import Prompts, ThresholdDraw, Trajectory

ThresholdFn = Callable[[Any, jax.Array, jax.Array], ThresholdDraw]  # (params, features [N, D], keys [N]) -> draw


@struct.dataclass
class _Lanes:
    """Loop state, a row each."""

    tokens: jax.Array  # [N, L] int32, MASK where still masked
    unmask_step: jax.Array  # [N, L] int32
    log_prob: jax.Array  # [N, L] float32
    entropy: jax.Array  # [N, L] float32
    nfe: jax.Array  # [N] int32
    step_in_block: jax.Array  # [N] int32
    threshold: jax.Array  # [N] float32
    draw: ThresholdDraw | None


def denoise(
    policy: Policy,
    params: Any,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    *,
    length: int,
    eos_id: int | None = None,
    block_length: int = 0,
    rule: str = "entropy_bounded",
    threshold: jax.Array | float = 0.5,
    steps: int = 0,
    temperature: float = 1.0,
    threshold_fn: ThresholdFn | None = None,
    threshold_params: Any = None,
    row_ids: jax.Array | None = None,
) -> Trajectory:
    """Denoises a response to each prompt and records its whole trajectory.

    Row i at step s draws with fold_in(fold_in(key, row_ids[i]), s), and its position k with fold_in of that and k: its result does not
    depend on the rows beside it, nor on how many positions the head reads at a time (`model.head_chunk`).

    Args:
      policy: the denoiser.
      params: its parameters.
      prompt: [N, P] int32, left-padded.
      prompt_mask: [N, P] bool, True at real tokens.
      key: a typed PRNG key.
      length: response length L.
      eos_id: id of EOS; once it is unmasked and everything before it is, the row is finished and its remaining positions are filled
        with EOS at no further call. None: rows run until nothing is masked.
      block_length: semi-autoregressive block, tokens, a divisor of L; 0 = L.
      rule: a key of `RULES`.
      threshold: scalar or [N], the dial of the rules that take a threshold.
      steps: denoising steps of the top-k rules for the whole response, at most L and a multiple of the number of blocks; 0 = L.
      temperature: tokens ~ softmax(logits / temperature); 0 = argmax.
      threshold_fn: draws each row's threshold from the first call's pooled hidden states (`ThresholdHead.sample` or `.mode`), replacing
        `threshold`; costs no call of its own.
      threshold_params: its parameters.
      row_ids: [N] int32, identity of each row; 0 .. N - 1 by default.

    Returns:
      Trajectory of N rows.

    Raises:
      ValueError: for an unknown rule, or sizes that do not divide.
    """
    chex.assert_rank([prompt, prompt_mask], 2)
    chex.assert_equal_shape([prompt, prompt_mask])
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; known: {', '.join(RULES)}")
    block_length, steps = block_length or length, steps or length
    if length % block_length:
        raise ValueError(f"length = {length} is not a multiple of block_length = {block_length}")
    num_blocks = length // block_length
    if steps % num_blocks or steps > length:
        raise ValueError(f"steps = {steps} must be a multiple of the {num_blocks} blocks and at most length = {length}")
    rows = prompt.shape[0]
    return _denoise(
        policy, params, prompt, prompt_mask, key, jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), rows), threshold_params,
        jnp.arange(rows, dtype=jnp.int32) if row_ids is None else row_ids,
        length=length, eos_id=eos_id, block_length=block_length, rule=rule, steps_per_block=steps // num_blocks,
        temperature=float(temperature), threshold_fn=threshold_fn,
    )  # fmt: skip


@functools.partial(
    jax.jit,
    static_argnames=("policy", "length", "eos_id", "block_length", "rule", "steps_per_block", "temperature", "threshold_fn"),
)
def _denoise(
    policy, params, prompt, prompt_mask, key, threshold, threshold_params, row_ids,
    *, length, eos_id, block_length, rule, steps_per_block, temperature, threshold_fn,
):  # fmt: skip
    rows, prompt_length = prompt.shape
    mask_id = policy.config.mask_id
    attend = jnp.concatenate([prompt_mask, jnp.ones((rows, length), bool)], axis=1)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)
    by_rows = functools.partial(jax.tree.map, lambda x: policy.layout(x, "rows", *[None] * (x.ndim - 1)))

    def finished(lanes):
        """[N] bool: nothing masked, or nothing masked before an EOS."""
        masked = lanes.tokens == mask_id
        if eos_id is None:
            return ~jnp.any(masked, axis=1)
        return ~jnp.any(masked & ~_after_eos(lanes.tokens, eos_id), axis=1)

    def body(lanes):
        active = ~finished(lanes)
        hidden = policy.hidden(params, jnp.concatenate([prompt, lanes.tokens], axis=1), attend)
        keys = jax.vmap(jax.random.fold_in)(row_keys, lanes.nfe)
        key_positions, key_threshold = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
        if threshold_fn is not None:
            draw = threshold_fn(threshold_params, pool_prompt(hidden, prompt_mask), key_threshold)
            draw = jax.tree.map(lambda new, old: _where_row(lanes.nfe == 0, new, old), draw, lanes.draw)
            lanes = lanes.replace(draw=draw, threshold=draw.gamma)

        masked = lanes.tokens == mask_id
        block = jnp.argmax(masked, axis=1) // block_length  # [N]: the first block with a masked position
        view = block[:, None] * block_length + jnp.arange(block_length)  # [N, K] positions in view
        at_view = functools.partial(jnp.take_along_axis, indices=view, axis=1)

        def read(hidden, positions):
            """Tokens drawn at positions [N, chunk], their log-probabilities and the statistics of their distributions."""
            keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_positions, positions)
            key_token, key_noise = jax.vmap(jax.vmap(lambda k: tuple(jax.random.split(k))))(keys)
            whole = policy.whole_head(params, hidden)
            logits = without_mask(whole, mask_id)
            tokens, log_prob = sample_tokens(logits, key_token, temperature)
            noise = jax.vmap(jax.vmap(jax.random.uniform))(key_noise)
            return tokens, log_prob, position_stats(whole if policy.config.mask_in_confidence else logits, tokens, noise)

        in_view = jnp.take_along_axis(hidden, prompt_length + view[..., None], axis=1)
        tokens, log_prob, stats = map_positions(read, policy.config.head_chunk, in_view, view)
        amount = tokens_this_step(lanes.step_in_block, block_length, steps_per_block) if rule in TOP_K_RULES else lanes.threshold
        eligible = at_view(masked)
        select = RULES[rule](stats, eligible, amount) & active[:, None]

        def put(old, new):
            return old.at[jnp.arange(rows)[:, None], view].set(jnp.where(select, new, at_view(old)))

        block_done = ~jnp.any(eligible & ~select, axis=1)
        return by_rows(lanes.replace(
            tokens=put(lanes.tokens, tokens),
            unmask_step=put(lanes.unmask_step, jnp.broadcast_to(lanes.nfe[:, None], select.shape)),
            log_prob=put(lanes.log_prob, log_prob),
            entropy=put(lanes.entropy, stats.entropy),
            nfe=lanes.nfe + active,
            step_in_block=jnp.where(block_done, 0, lanes.step_in_block + 1),
        ))  # fmt: skip

    zeros = jnp.zeros((rows, length))
    draw = None
    if threshold_fn is not None:
        width = policy.config.width
        draw = ThresholdDraw(jnp.zeros(rows), jnp.zeros(rows), jnp.zeros(rows), jnp.zeros((rows, width)))
    counters = jnp.zeros(rows, jnp.int32)
    lanes = _Lanes(
        jnp.full((rows, length), mask_id, jnp.int32), zeros.astype(jnp.int32), zeros, zeros, counters, counters, threshold, draw
    )
    # A call unmasks at least one position a row, so that `length` calls always do; but not where logits are NaN, which must end too.
    lanes = jax.lax.while_loop(lambda lanes: jnp.any(~finished(lanes) & (lanes.nfe < length)), body, lanes)
    # What is left behind an EOS was never drawn: it is EOS, unmasked by the last step so that no latent shows it.
    left = lanes.tokens == mask_id
    return Trajectory(
        prompts=Prompts(prompt, prompt_mask),
        tokens=jnp.where(left, eos_id if eos_id is not None else mask_id, lanes.tokens),
        unmask_step=jnp.where(left, lanes.nfe[:, None] - 1, lanes.unmask_step),
        log_prob=lanes.log_prob,
        entropy=lanes.entropy,
        nfe=lanes.nfe,
        draw=lanes.draw,
    )


def sample_tokens(logits: jax.Array, keys: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Tokens [N, K] int32 and their log-probabilities [N, K] float32 from logits [N, K, V] and keys [N, K].

    The log-probability is of the distribution drawn from, softmax(logits / temperature); at temperature 0 (argmax) it is 0.
    """
    if temperature == 0:
        tokens = argmax(logits)
        return tokens, jnp.zeros(tokens.shape)
    log_probs = jax.nn.log_softmax(logits / temperature)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[2:], jnp.float32)))(keys)
    tokens = argmax(log_probs + noise)
    return tokens, pick(log_probs, tokens)


def response_mask(tokens: jax.Array, eos_id: int) -> jax.Array:
    """m_k [N, L] bool: positions up to and including the first EOS of tokens [N, L]."""
    return ~_after_eos(tokens, eos_id)


def _after_eos(tokens: jax.Array, eos_id: int) -> jax.Array:
    """[N, L] bool: an EOS stands somewhere before the position."""
    is_eos = tokens == eos_id
    return (jnp.cumsum(is_eos, axis=1) - is_eos) > 0


def _where_row(row: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(row.reshape(row.shape + (1,) * (new.ndim - 1)), new, old)
