"""The denoising sampler: one jitted while_loop from prompts to a Trajectory. One step = one denoiser call for the row in each lane (NFE).

As many lanes as rows, and a step is a call for every row until the slowest is finished; fewer, and a row that waits takes the place of a
finished one at once (see diffpo_jax.sampling.queues). Either way a row's result is the same.

With a cache (Fast-dLLM, arXiv 2505.22618) only the first call in a block, and every `refresh`-th after it, runs the trunk over the whole
row; the others run it over the block alone ("dual"), or over the block and what follows ("prefix"), with the keys and values that the
last whole one left elsewhere. Lanes whose next call is a whole one wait for each other, so that it is made for all of them at once. The
model being bidirectional, this is an approximation; what is recorded is the distribution that was drawn from.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from diffpo_jax.models.attention import Cache
from diffpo_jax.models.threshold_head import pool_prompt
from diffpo_jax.models.transformer import Policy
from diffpo_jax.sampling import queues
from diffpo_jax.sampling.reading import read
from diffpo_jax.sampling.unmasking import RULES, TOP_K_RULES, PositionStats, tokens_this_step
from diffpo_jax.structs import Prompts, ThresholdDraw, Trajectory

ThresholdFn = Callable[[Any, jax.Array, jax.Array], ThresholdDraw]  # (params, features [N, D], keys [N]) -> draw


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a program is compiled for; see `denoise`."""

    length: int
    eos_id: int | None
    block_length: int
    rule: str
    steps_per_block: int
    temperature: float
    threshold_fn: ThresholdFn | None
    lanes: int
    cache: str
    refresh: int


class _Rows(struct.PyTreeNode):
    """What is known of rows while they are denoised: of all N, or of those in the lanes."""

    tokens: jax.Array  # [N, L] int32, MASK where still masked
    unmask_step: jax.Array  # [N, L] int32
    log_prob: jax.Array  # [N, L] float32
    entropy: jax.Array  # [N, L] float32
    nfe: jax.Array  # [N] int32
    whole_calls: jax.Array  # [N] int32
    first_step: jax.Array  # [N] int32
    last_step: jax.Array  # [N] int32
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
    lanes: int = 0,
    cache: str = "none",
    refresh: int = 0,
) -> Trajectory:
    """Denoises a response to each prompt and records its whole trajectory.

    Row i at step s draws with fold_in(fold_in(key, row_ids[i]), s), and its position k with fold_in of that and k: its result does not
    depend on the rows beside it, nor on how the head's vocabulary is split.

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
      lanes: rows denoised at once, a multiple of the devices over which rows are split; the others wait in a queue (each device's rows in
        one of its own) and take the place of finished ones. 0 = N.
      cache: one of `CACHES`.
      refresh: calls in a block from one over the whole row to the next, 1 = no approximation; 0 = only a block's first.

    Returns:
      Trajectory of N rows.

    Raises:
      ValueError: for an unknown rule or cache, sizes that do not divide, or more lanes than rows.
    """
    chex.assert_rank([prompt, prompt_mask], 2)
    chex.assert_equal_shape([prompt, prompt_mask])
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; known: {', '.join(RULES)}")
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r} is unknown; known: {', '.join(CACHES)}")
    block_length, steps = block_length or length, steps or length
    if length % block_length:
        raise ValueError(f"length = {length} is not a multiple of block_length = {block_length}")
    num_blocks = length // block_length
    if steps % num_blocks or steps > length:
        raise ValueError(f"steps = {steps} must be a multiple of the {num_blocks} blocks and at most length = {length}")
    rows = prompt.shape[0]
    queues.check(lanes or rows, rows, policy.layout.splits("rows"))
    options = _Options(
        length, eos_id, block_length, rule, steps // num_blocks, float(temperature), threshold_fn, lanes or rows, cache, refresh
    )
    threshold = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), rows)
    row_ids = jnp.arange(rows, dtype=jnp.int32) if row_ids is None else row_ids
    return _denoise(policy, params, Prompts(prompt, prompt_mask), key, threshold, threshold_params, row_ids, options=options)


@functools.partial(jax.jit, static_argnames=("policy", "options"))
def _denoise(policy, params, prompts, key, threshold, threshold_params, row_ids, *, options):
    by_rows = functools.partial(jax.tree.map, lambda x: policy.layout(x, "rows", *[None] * (x.ndim - 1)))

    def step(carry, cache=None):
        """A call of the rows in the lanes: over whole rows, and what it leaves for the cache is returned too; or with the cache."""
        number, lanes, rows = carry
        prompt, ids, before = by_rows(queues.take(lanes, (prompts, row_ids, rows)))
        keys = jax.vmap(lambda row_id, nfe: jax.random.fold_in(jax.random.fold_in(key, row_id), nfe))(ids, before.nfe)
        key_positions, key_threshold = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys)
        block = jnp.argmax(before.tokens == policy.config.mask_id, axis=1) // options.block_length  # [W]: first with a masked position
        if cache is None:
            hidden, left = _see_whole(policy, params, options, prompt, before.tokens)
            before = _draw_threshold(options, threshold_params, pool_prompt(hidden, prompt.mask), key_threshold, before)
            hidden = _of_block(hidden[:, -options.length :], block, options.block_length)
            after = _unmask(policy, params, options, hidden, block, key_positions, before)
            after = after.replace(whole_calls=before.whole_calls + 1)
        else:
            hidden, left = VIEWS[options.cache](policy, params, options, prompt, before.tokens, block, cache), cache
            after = _unmask(policy, params, options, hidden, block, key_positions, before)
            after = jax.tree.map(functools.partial(_where_row, _needs_whole(options, before.step_in_block)), before, after)
        called = after.nfe > before.nfe
        after = after.replace(
            first_step=jnp.where(called & (before.nfe == 0), number, before.first_step),
            last_step=jnp.where(called, number, before.last_step),
        )
        # A call unmasks at least one position, so that `length` calls always finish a row; but not where logits are NaN: it must end too.
        done = _finished(after.tokens, policy.config.mask_id, options.eos_id) | (after.nfe >= options.length)
        return (number + 1, queues.advance(lanes, done), by_rows(queues.put(lanes, rows, by_rows(after)))), left

    def steps(carry):
        """A call over whole rows, and then those that need none."""
        carry, cache = step(carry)
        if options.cache == "none":
            return carry
        return jax.lax.while_loop(some_need_none, lambda carry: step(carry, cache)[0], carry)

    def some_need_none(carry):
        _, lanes, rows = carry
        return jnp.any(queues.busy(lanes) & ~_needs_whole(options, queues.take(lanes, rows.step_in_block)))

    lanes = queues.start(options.lanes, len(row_ids), policy.layout.splits("rows"))
    start = (jnp.zeros((), jnp.int32), lanes, _masked_rows(policy, options, threshold))
    _, _, rows = jax.lax.while_loop(lambda carry: jnp.any(queues.busy(carry[1])), steps, start)
    # What is left behind an EOS was never drawn: it is EOS, unmasked by the last step so that no latent shows it.
    left = rows.tokens == policy.config.mask_id
    return Trajectory(
        prompts=prompts,
        tokens=jnp.where(left, policy.config.mask_id if options.eos_id is None else options.eos_id, rows.tokens),
        unmask_step=jnp.where(left, rows.nfe[:, None] - 1, rows.unmask_step),
        log_prob=rows.log_prob,
        entropy=rows.entropy,
        nfe=rows.nfe,
        draw=rows.draw,
        whole_calls=rows.whole_calls,
        first_step=rows.first_step,
        last_step=rows.last_step,
    )


def _masked_rows(policy: Policy, options: _Options, threshold: jax.Array) -> _Rows:
    """Rows before their first call; threshold [N]."""
    number, shape = threshold.shape[0], (threshold.shape[0], options.length)
    zeros, counters, draw = jnp.zeros(shape), jnp.zeros(number, jnp.int32), None
    if options.threshold_fn is not None:
        none = jnp.zeros(number)
        draw = ThresholdDraw(none, none, none, jnp.zeros((number, policy.config.width)))
    tokens = jnp.full(shape, policy.config.mask_id, jnp.int32)
    return _Rows(tokens, zeros.astype(jnp.int32), zeros, zeros, counters, counters, counters, counters, counters, threshold, draw)


def _needs_whole(options: _Options, step_in_block: jax.Array) -> jax.Array:
    """[W] bool: the next call of the row is one over the whole of it."""
    return step_in_block % options.refresh == 0 if options.refresh else step_in_block == 0


def _see_whole(policy: Policy, params: Any, options: _Options, prompts: Prompts, tokens: jax.Array) -> tuple[jax.Array, Cache | None]:
    """Hidden states [W, P + L, D] of whole rows; and the cache where the sampler has one."""
    if options.cache == "none":
        return policy.hidden(params, *prompts.with_response(tokens)), None
    return policy.hidden_and_cache(params, *prompts.with_response(tokens))


def _see_block(policy, params, options, prompts, tokens, block, cache) -> jax.Array:
    """Hidden states [W, K, D] of blocks [W]; all else is from the cache (dual cache)."""
    start = prompts.tokens.shape[1] + block[:, None] * options.block_length  # [W, 1]
    whole, attend = prompts.with_response(tokens)
    position = jnp.arange(whole.shape[1])
    renewed = (position >= start) & (position < start + options.block_length)
    return policy.hidden_in_view(params, whole, attend, start + jnp.arange(options.block_length), renewed, cache)


def _see_suffix(policy, params, options, prompts, tokens, block, cache) -> jax.Array:
    """Hidden states [W, K, D] of blocks [W]; what is before the block is from the cache (prefix cache).

    One program for each block that may be the first of all lanes; a lane that is further takes no notice of what it sees too early.
    """
    size, prompt_length = options.block_length, prompts.tokens.shape[1]
    whole, attend = prompts.with_response(tokens)
    renewed = jnp.arange(whole.shape[1]) >= prompt_length + block[:, None] * size

    def from_block(first):
        view = jnp.broadcast_to(jnp.arange(prompt_length + first * size, whole.shape[1]), (len(block), options.length - first * size))
        hidden = policy.hidden_in_view(params, whole, attend, view, renewed, cache)
        return _of_block(hidden, block - first, size)

    branches = [functools.partial(from_block, first) for first in range(options.length // size)]
    return jax.lax.switch(jnp.min(block), branches)


VIEWS = {"prefix": _see_suffix, "dual": _see_block}
CACHES = ("none", *VIEWS)  # which keys and values are kept from one call to the next


def _draw_threshold(options: _Options, threshold_params: Any, features: jax.Array, keys: jax.Array, rows: _Rows) -> _Rows:
    """Rows before their first call with the thresholds that the network draws from features [W, D], if it is to; others as they are."""
    if options.threshold_fn is None:
        return rows
    draw = options.threshold_fn(threshold_params, features, keys)
    draw = jax.tree.map(lambda new, old: _where_row(rows.nfe == 0, new, old), draw, rows.draw)
    return rows.replace(draw=draw, threshold=draw.gamma)


def _unmask(
    policy: Policy, params: Any, options: _Options, hidden: jax.Array, block: jax.Array, keys: jax.Array, rows: _Rows
) -> _Rows:  # fmt: skip
    """Rows [W] after a denoiser call, from hidden states [W, K, D] of their blocks [W]; keys [W], of the row and the step."""
    masked, size = rows.tokens == policy.config.mask_id, options.block_length
    tokens, log_prob, stats = _draw(policy, params, options, hidden, block, keys)
    eligible = _of_block(masked, block, size)
    by_count = options.rule in TOP_K_RULES
    amount = tokens_this_step(rows.step_in_block, size, options.steps_per_block) if by_count else rows.threshold
    select = RULES[options.rule](stats, eligible, amount)
    put = functools.partial(_put_block, block=block, select=select)
    return rows.replace(
        tokens=put(rows.tokens, tokens),
        unmask_step=put(rows.unmask_step, jnp.broadcast_to(rows.nfe[:, None], select.shape)),
        log_prob=put(rows.log_prob, log_prob),
        entropy=put(rows.entropy, stats.entropy),
        nfe=rows.nfe + 1,
        step_in_block=jnp.where(jnp.any(eligible & ~select, axis=1), rows.step_in_block + 1, 0),
    )


def _draw(
    policy: Policy, params: Any, options: _Options, hidden: jax.Array, block: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array, PositionStats]:
    """Tokens drawn at the positions of blocks [W] from hidden states [W, K, D] of these, their log-probabilities, statistics; keys [W]."""
    positions = block[:, None] * options.block_length + jnp.arange(options.block_length)
    at = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)
    return read(policy, params, hidden, at, options.temperature)


def _of_block(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
    """What x [W, L, ...] holds at the positions of blocks [W] of `size` positions: [W, size, ...]."""
    if size == x.shape[1]:
        return x
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.take_along_axis(x, block.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]


def _put_block(old: jax.Array, new: jax.Array, *, block: jax.Array, select: jax.Array) -> jax.Array:
    """old [W, L] with new [W, K] at the selected [W, K] positions of blocks [W] of K positions."""
    rows, size = new.shape
    old_blocks = old.reshape(rows, -1, size)
    here = jnp.arange(old_blocks.shape[1]) == block[:, None]
    return jnp.where(here[..., None] & select[:, None], new[:, None], old_blocks).reshape(old.shape)


def _finished(tokens: jax.Array, mask_id: int, eos_id: int | None) -> jax.Array:
    """[N] bool of tokens [N, L]: nothing masked, or nothing masked before an EOS."""
    masked = tokens == mask_id
    return ~jnp.any(masked if eos_id is None else masked & ~_after_eos(tokens, eos_id), axis=1)


def response_mask(tokens: jax.Array, eos_id: int) -> jax.Array:
    """m_k [N, L] bool: positions up to and including the first EOS of tokens [N, L]."""
    return ~_after_eos(tokens, eos_id)


def _after_eos(tokens: jax.Array, eos_id: int) -> jax.Array:
    """[N, L] bool: an EOS stands somewhere before the position."""
    is_eos = tokens == eos_id
    return (jnp.cumsum(is_eos, axis=1) - is_eos) > 0


def _where_row(row: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(row.reshape(row.shape + (1,) * (new.ndim - 1)), new, old)
