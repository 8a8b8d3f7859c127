"""Lanes and queues: of N rows, W are worked on at once; the others wait, and take the place of finished ones. Shapes are fixed.

Rows [N, ...] are split into S queues of Q = N / S rows that lie together, one for each part into which devices split rows, and K = W / S
lanes work on each: no row goes from one device to another. All that is known of a row stays in its place of the arrays [N, ...]; a lane is
the number of a row in its queue. With as many lanes as rows nothing waits, and nothing is gathered or scattered.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class Lanes(struct.PyTreeNode):
    """Which rows are worked on."""

    row: jax.Array  # [S, K] int32, the row of its queue that each lane works on, no two the same; Q or more: the lane idles
    waiting: jax.Array  # [S] int32, the first row of each queue that no lane has had; Q or more: none waits
    queue: int = struct.field(pytree_node=False)  # Q


def check(lanes: int, rows: int, shards: int) -> None:
    """Raises ValueError unless `rows` rows can be worked on in `lanes` lanes over `shards` parts."""
    if not 0 < lanes <= rows:
        raise ValueError(f"lanes = {lanes} must be at least 1 and at most the {rows} rows; 0 = as many lanes as rows")
    for name, size in (("rows", rows), ("lanes", lanes)):
        if size % shards:
            raise ValueError(f"{name} = {size} is not a multiple of the {shards} devices over which rows are split")


def start(lanes: int, rows: int, shards: int) -> Lanes:
    """`lanes` lanes at the first of `rows` rows, in `shards` queues; see `check`."""
    each = lanes // shards
    row = jnp.broadcast_to(jnp.arange(each, dtype=jnp.int32), (shards, each))
    return Lanes(row, jnp.full(shards, each, jnp.int32), rows // shards)


def busy(lanes: Lanes) -> jax.Array:
    """[W] bool: the lane has a row."""
    return (lanes.row < lanes.queue).reshape(-1)


def take(lanes: Lanes, rows: Any) -> Any:
    """Of arrays [N, ...] the rows in the lanes, [W, ...]; for an idle lane those of any row."""
    if lanes.row.shape[1] == lanes.queue:
        return rows

    def one(x):
        taken = jax.vmap(lambda queue, row: queue.at[row].get(mode="clip"))(_queues(lanes, x), lanes.row)
        return taken.reshape(-1, *x.shape[1:])

    return jax.tree.map(one, rows)


def put(lanes: Lanes, rows: Any, new: Any) -> Any:
    """Arrays [N, ...] with `new` [W, ...] in the places of the rows in the lanes; what idle lanes hold goes nowhere."""
    if lanes.row.shape[1] == lanes.queue:
        return jax.tree.map(lambda x, new: jnp.where(busy(lanes).reshape(-1, *[1] * (x.ndim - 1)), new, x), rows, new)

    def one(x, new):
        new = new.reshape(*lanes.row.shape, *x.shape[1:])
        placed = jax.vmap(lambda queue, row, new: queue.at[row].set(new, mode="drop", unique_indices=True))
        return placed(_queues(lanes, x), lanes.row, new).reshape(x.shape)

    return jax.tree.map(one, rows, new)


def advance(lanes: Lanes, done: jax.Array) -> Lanes:
    """Gives the lanes [W] whose row is `done` the next rows of their queue, in the order of the lanes; idle ones stay idle."""
    done = done.reshape(lanes.row.shape) & (lanes.row < lanes.queue)
    following = lanes.waiting[:, None] + jnp.cumsum(done, axis=1) - 1  # beyond the queue's end they are no rows, and differ all the same
    return lanes.replace(row=jnp.where(done, following, lanes.row), waiting=lanes.waiting + jnp.sum(done, axis=1))


def utilisation(first_step: jax.Array, last_step: jax.Array, calls: jax.Array) -> jax.Array:
    """[] float32: the share of lane-steps at which a lane had a row that did not wait.

    Args:
      first_step: [N] int32, the step at which each row had its first call.
      last_step: [N] int32, its last.
      calls: [N] int32, how many it had from the one to the other.
    """
    steps, lanes = jnp.max(last_step) + 1, jnp.sum(first_step == 0)  # a row has at least one call: every lane has one at step 0
    return jnp.sum(calls) / (steps * lanes).astype(jnp.float32)


def _queues(lanes: Lanes, x: jax.Array) -> jax.Array:
    """[N, ...] -> [S, Q, ...]."""
    return x.reshape(lanes.row.shape[0], lanes.queue, *x.shape[1:])
