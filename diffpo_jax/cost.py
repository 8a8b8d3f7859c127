"""What a compiled program executes on each device: FLOPs, HBM traffic and collectives, read from its optimised HLO text.

XLA's own `cost_analysis()` counts a loop's body once; here it counts as often as it runs.

FLOPs are exact for dots and convolutions (a TPU's dots are convolutions) and leave out all else: element-wise work, reductions (a TPU turns
a product with a vector into one), and kernels behind a custom call. Link bytes assume ring algorithms. HBM bytes are an estimate: every
instruction outside a fusion reads its operands and writes its result once, in full, without the padding of tiles, except that
  - slices and gathers, fused or not, read only what they take, and updates in place read and write only the update;
  - arrays in another memory space cost nothing (`S(1)` in a TPU's layouts is on-chip memory, `S(5)` the host's, others hold semaphores).
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffpo_jax.hlo import PASSING, Computation, Instruction, Leaf, Module, parse, trips, unfused


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind."""

    count: float  # executions: an asynchronous one once, several combined into one instruction once
    bytes: float  # what a device sends over its links for them


@dataclasses.dataclass(frozen=True)
class Cost:
    """One execution of a program on one device."""

    flops: float  # 2 * multiply-adds of dots and convolutions
    bytes: float  # HBM traffic, an estimate
    collectives: Mapping[str, Collective]  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute; those that occur
    dynamic_loops: int  # `while` instructions whose trip count depends on data, each counted once


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # -> which operand is the update
_FREE = PASSING | {"constant", "iota", "partition-id", "replica-id"}


def _size(leaves: tuple[Leaf, ...]) -> float:
    return sum(leaf.bytes for leaf in leaves)


def _hbm(leaves: tuple[Leaf, ...]) -> float:
    return sum(leaf.bytes for leaf in leaves if leaf.space == 0)


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    lhs = computation.leaves(dot.operands[0])[0].shape
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    depth = math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracting.group(1) if contracting else ""))
    return 2.0 * math.prod(dot.leaves[0].shape) * depth


@functools.lru_cache(maxsize=4096)
def _valid_pairs(size: int, window: int, out: int, stride: int, low: int, dilate: int, window_dilate: int) -> int:
    """Pairs (output index, window index) of one spatial dimension that meet an element of the input, not padding or a hole of dilation."""
    starts, pairs = np.arange(out) * stride - low, 0
    for k in range(window):
        position = starts + k * window_dilate
        pairs += int(np.sum((position >= 0) & (position <= (size - 1) * dilate) & (position % dilate == 0)))
    return pairs


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """As XLA's cost analysis: a dot's batch and contracted dimensions may be spatial here, by means of strides, dilation and padding."""
    lhs, rhs = (computation.leaves(name)[0].shape for name in convolution.operands[:2])
    out = convolution.leaves[0].shape
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}

    def field(key: str, dim: int, default: int) -> int:
        return int(fields[key].split("x")[dim].partition("_")[0]) if key in fields else default

    pairs = 1
    for d in range(len(left) - 2):
        sizes = (shape[labels.index(str(d))] for shape, labels in ((lhs, left), (rhs, right), (out, result)))
        stride, low, dilate, window_dilate = field("stride", d, 1), field("pad", d, 0), field("lhs_dilate", d, 1), field("rhs_dilate", d, 1)
        pairs *= _valid_pairs(*sizes, stride, low, dilate, window_dilate)
    groups = math.prod(int(n) for n in re.findall(r"(?:feature|batch)_group_count=(\d+)", convolution.attributes))
    return 2.0 * pairs * lhs[left.index("b")] * lhs[left.index("f")] * rhs[right.index("o")] / groups


def _group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective together: the size of a replica group."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh.group(1)))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh.group(2))  # 'axis', or a part of one: 'axis':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota.group(1))
    explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(explicit.group(1).split(",")) if explicit else devices


def _sliced(computation: Computation, name: str) -> bool:
    """Whether nothing but dynamic slices use an array."""
    users, passing = computation.users[name], ("get-tuple-element", "bitcast", "reshape")
    return bool(users) and all(u.opcode == "dynamic-slice" or (u.opcode in passing and _sliced(computation, u.name)) for u in users)


def _in_flight(i: Instruction) -> bool:
    """Whether this stands for a collective that another fusion started: a TPU repeats it in every fusion up to the one that ends it."""
    flag = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', i.attributes) if i.opcode in _KINDS else None
    return '"AsyncCollectiveDone"' in i.attributes or (flag is not None and flag.group(1) != "-1")


def _collective(module: Module, computation: Computation, i: Instruction, fused: bool) -> tuple[str, float] | None:
    """(kind, bytes that a device sends) of a collective; None for anything else."""
    kind = i.opcode.removesuffix("-start")
    if kind not in _KINDS or _in_flight(i):
        return None
    if kind == "all-reduce" and fused and _sliced(computation, i.name):
        kind = "reduce-scatter"  # a TPU runs the fusion of the two as one
    n, size = _group_size(i.attributes, module.devices), sum(_size(computation.leaves(name)) for name in i.operands)
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
    return kind, factor * size


def _read(module: Module, computation: Computation, name: str) -> float:
    """Bytes that a fused computation reads of its array `name`."""
    size, total = _size(computation.leaves(name)), 0.0
    for user in computation.users[name]:
        buffer = user.operands[0] == name and name not in user.operands[1:]
        if user.opcode in _SLICES and buffer:
            total += _size(user.leaves)
        elif user.opcode == "bitcast":
            total += _read(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.fused(user)
            total += sum(_read(module, inner, inner.parameters[k]) for k, operand in enumerate(user.operands) if operand == name)
        elif not (user.opcode == "tuple" or (user.opcode in _UPDATES and buffer) or _in_flight(user)):
            return size
    return min(size, total)


def _written(module: Module, computation: Computation, name: str) -> float | None:
    """Bytes that a fused computation writes of its result `name` if it updates it in place or passes it on; None if it writes all of it."""
    i = computation.instructions[name]
    if i.opcode == "bitcast":
        return _written(module, computation, i.operands[0])
    if i.opcode == "parameter" or _in_flight(i):
        return 0.0
    if i.opcode in _UPDATES:
        below = _written(module, computation, i.operands[0])
        return None if below is None else below + _size(computation.leaves(i.operands[_UPDATES[i.opcode]]))
    if i.opcode == "fusion" and module.fused(i).root.opcode in _UPDATES:
        return _written(module, module.fused(i), module.fused(i).root.name)
    return None


def _fusion_traffic(module: Module, computation: Computation, fusion: Instruction) -> float:
    inner, leaves = module.fused(fusion), fusion.leaves
    operands = [(inner.parameters[k], _hbm(computation.leaves(operand))) for k, operand in enumerate(fusion.operands)]
    total = sum(min(hbm, _read(module, inner, name)) for name, hbm in operands if hbm)
    if '"AsyncCollectiveStart"' in inner.root.attributes:
        return total + _hbm(leaves[1:])  # the first is the operand
    results = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    if len(leaves) != len(results):
        return total + _hbm(leaves)
    written = [_written(module, inner, name) if leaf.space == 0 else 0.0 for leaf, name in zip(leaves, results, strict=True)]
    return total + sum(leaf.bytes if part is None else part for leaf, part in zip(leaves, written, strict=True))


def _done(computation: Computation, start: Instruction) -> Instruction | None:
    """The -done of an asynchronous -start, perhaps past -updates."""
    user = next((u for u in computation.users[start.name] if u.opcode.endswith(("-done", "-update"))), None)
    return user if user is None or user.opcode.endswith("-done") else _done(computation, user)


def _traffic(module: Module, computation: Computation, i: Instruction) -> float:
    """HBM bytes of one instruction outside of fusions; a -start has those of the pair."""
    opcode = i.opcode.removesuffix("-start")
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or '"AllocateBuffer"' in i.attributes:
        return 0.0
    made = i if opcode == i.opcode else _done(computation, i)
    if made is None or (made is not i and i.parts):  # what they call counts
        return 0.0
    if opcode == "fusion":
        return _fusion_traffic(module, computation, i)
    result = made.leaves
    if opcode in _SLICES:
        return _hbm(result) + (_size(result) if _hbm(computation.leaves(i.operands[0])) else 0.0)
    if opcode in _UPDATES:
        update = computation.leaves(i.operands[_UPDATES[opcode]])
        return _hbm(update) + (_size(update) if _hbm(result) else 0.0)
    return _hbm(result) + sum(_hbm(computation.leaves(operand)) for operand in dict.fromkeys(i.operands))


def _cost(module: Module, name: str, fused: bool, dynamic_trips: Sequence[float], cost: Callable[..., Any]) -> Any:
    """A Counter of "flops", "bytes" and (kind, "count" or "bytes") of one execution of a computation; `cost` gives those of the ones
    it runs."""
    computation = module.computations[name]
    total: Any = Counter()
    for i in computation.instructions.values():
        if i.opcode == "dot":
            total["flops"] += _dot_flops(computation, i)
        elif i.opcode == "convolution":
            total["flops"] += _convolution_flops(computation, i)
        elif sent := _collective(module, computation, i, fused):
            total[sent[0], "count"] += 1
            total[sent[0], "bytes"] += sent[1]
        times, inside = 1, dynamic_trips
        if i.opcode == "while":
            times = trips(module, computation, i)
            if times is None:
                times, inside = dynamic_trips[0], dynamic_trips[1:] or dynamic_trips
        parts = [cost(part, fused or within, inside) for part, within in i.parts]
        if i.opcode == "conditional":
            parts = [max(parts, key=lambda branch: (branch["flops"], branch["bytes"]))]
        for part in parts:
            total.update({key: times * value for key, value in part.items()})
        if not fused:
            total["bytes"] += _traffic(module, computation, i)
    return total


def analyse(text: str, dynamic_trips: float | tuple[float, ...] = 1.0) -> Cost:
    """The cost of a compiled program, with loop bodies as often as they run, and the dearer branch of conditionals.

    Args:
      text: `compiled.as_text()`.
      dynamic_trips: trip count of the loops whose own depends on data; several: of those in none of these, in one, and so on.

    Returns:
      The cost of one execution on one device.

    Raises:
      ValueError: if the text has no ENTRY computation.
    """
    module = parse(text)

    @functools.cache
    def cost(name: str, fused: bool, dynamic_trips: tuple[float, ...]) -> Counter:
        return _cost(module, name, fused, dynamic_trips, cost)

    total = cost(module.entry, False, dynamic_trips if isinstance(dynamic_trips, tuple) else (dynamic_trips,))
    collectives = {kind: Collective(total[kind, "count"], total[kind, "bytes"]) for kind in _KINDS if total[kind, "count"]}
    loops = ((c, i) for c in unfused(module) for i in c.instructions.values() if i.opcode == "while")
    return Cost(float(total["flops"]), float(total["bytes"]), collectives, sum(trips(module, c, i) is None for c, i in loops))
