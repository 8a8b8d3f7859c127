"""What a compiled program executes on each device: FLOPs, HBM traffic, collectives and large arrays, read from its optimised HLO text.

XLA's own `cost_analysis()` counts a loop's body once; here it counts as often as it runs. `text` is always `compiled.as_text()`, of the TPU
or the CPU backend: it is the program of one device, after partitioning.

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
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np


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


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an instruction produces."""

    dtype: str
    shape: tuple[int, ...]  # of one device's shard
    bytes: int
    op_name: str  # of the metadata: the JAX operation it comes from; empty if unknown


class _Leaf(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    bytes: float
    space: int  # memory space; 0 is HBM


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    inputs: str  # the text between the opcode's parentheses
    operands: tuple[str, ...]
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Computation:
    name: str
    instructions: dict[str, _Instruction]

    @functools.cached_property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        users: dict[str, list[_Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.inputs): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    def leaves(self, name: str) -> tuple[_Leaf, ...]:
        return _leaves(self.instructions[name].type)


@dataclasses.dataclass(frozen=True, eq=False)
class _Module:
    computations: dict[str, _Computation]
    entry: str
    devices: int

    def fused(self, fusion: _Instruction) -> _Computation:
        return self.computations[_called(fusion, "calls")[0]]

    @functools.cached_property
    def loops(self) -> dict[str, tuple[_Computation, _Instruction]]:
        """Body -> (the computation that runs it, its `while`)."""
        whiles = ((c, i) for c in self.computations.values() for i in c.instructions.values() if i.opcode == "while")
        return {_called(i, "body")[0]: (c, i) for c, i in whiles}


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # -> which operand is the update
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_PASSING = frozenset(  # without a result of their own
    "parameter tuple get-tuple-element bitcast while conditional call after-all add-dependency opt-barrier domain".split()
)
_FREE = _PASSING | {"constant", "iota", "partition-id", "replica-id"}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")  # types never have a space, a word and a parenthesis
_LEAF = re.compile(r"([a-z]\w*)\[([^\[\]]*)\](?:\{([^{}]*)\})?")


@functools.lru_cache(maxsize=65536)
def _leaves(type_: str) -> tuple[_Leaf, ...]:
    """The arrays of a type, nested tuples flattened."""
    leaves = []
    for dtype, dims, layout in _LEAF.findall(type_):
        shape = tuple(int(d) for d in re.findall(r"\d+", dims))
        width = re.search(r"\d+", dtype)  # bits; token and opaque have none
        bits = 8 if dtype == "pred" else int(width.group()) if width else 0
        space = re.search(r"S\((\d+)\)", layout)
        leaves.append(_Leaf(dtype, shape, math.prod(shape) * bits / 8, int(space.group(1)) if space else 0))
    return tuple(leaves)


def _size(leaves: tuple[_Leaf, ...]) -> float:
    return sum(leaf.bytes for leaf in leaves)


def _hbm(leaves: tuple[_Leaf, ...]) -> float:
    return sum(leaf.bytes for leaf in leaves if leaf.space == 0)


def _instruction(line: str) -> _Instruction | None:
    head = _INSTRUCTION.match(line)
    opcode = head and _OPCODE.search(head.group(3))
    if not opcode:
        return None
    rest, depth, end = head.group(3), 1, opcode.end()
    while depth:  # to the parenthesis that closes the operands, whose types may have parentheses
        close = rest.index(")", end)
        depth += rest.count("(", end, close) - 1
        end = close + 1
    inputs = rest[opcode.end() : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inputs))
    return _Instruction(head.group(2), rest[: opcode.start()], opcode.group(1), inputs, operands, rest[end:], bool(head.group(1)))


def _parse(text: str) -> _Module:
    computations: dict[str, _Computation] = {}
    entry, current = None, {}
    for line in text.splitlines():
        if line[:1].isspace():
            if instruction := _instruction(line):
                current[instruction.name] = instruction
        elif header := _HEADER.match(line):
            current = {}
            computations[header.group(2)] = _Computation(header.group(2), current)
            entry = header.group(2) if header.group(1) else entry
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    devices = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[text.find("HloModule") :].partition("\n")[0])
    return _Module(computations, entry, math.prod(map(int, devices)))


def _called(instruction: _Instruction, *attributes: str) -> list[str]:
    """The computations that an instruction calls by these attributes, in the text's order."""
    found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^{{}}]*\}}|%[\w.\-]+)", instruction.attributes)
    return re.findall(r"%([\w.\-]+)", " ".join(found))


def _dot_flops(computation: _Computation, dot: _Instruction) -> float:
    lhs = computation.leaves(dot.operands[0])[0].shape
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    depth = math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracting.group(1) if contracting else ""))
    return 2.0 * math.prod(_leaves(dot.type)[0].shape) * depth


@functools.lru_cache(maxsize=4096)
def _valid_pairs(size: int, window: int, out: int, stride: int, low: int, dilate: int, window_dilate: int) -> int:
    """Pairs (output index, window index) of one spatial dimension that meet an element of the input, not padding or a hole of dilation."""
    starts, pairs = np.arange(out) * stride - low, 0
    for k in range(window):
        position = starts + k * window_dilate
        pairs += int(np.sum((position >= 0) & (position <= (size - 1) * dilate) & (position % dilate == 0)))
    return pairs


def _convolution_flops(computation: _Computation, convolution: _Instruction) -> float:
    """As XLA's cost analysis: a dot's batch and contracted dimensions may be spatial here, by means of strides, dilation and padding."""
    lhs, rhs = (computation.leaves(name)[0].shape for name in convolution.operands[:2])
    out = _leaves(convolution.type)[0].shape
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


def _sliced(computation: _Computation, name: str) -> bool:
    """Whether nothing but dynamic slices use an array."""
    users, passing = computation.users[name], ("get-tuple-element", "bitcast", "reshape")
    return bool(users) and all(u.opcode == "dynamic-slice" or (u.opcode in passing and _sliced(computation, u.name)) for u in users)


def _in_flight(i: _Instruction) -> bool:
    """Whether this stands for a collective that another fusion started: a TPU repeats it in every fusion up to the one that ends it."""
    flag = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', i.attributes) if i.opcode in _KINDS else None
    return '"AsyncCollectiveDone"' in i.attributes or (flag is not None and flag.group(1) != "-1")


def _collective(module: _Module, computation: _Computation, i: _Instruction, fused: bool) -> tuple[str, float] | None:
    """(kind, bytes that a device sends) of a collective; None for anything else."""
    kind = i.opcode.removesuffix("-start")
    if kind not in _KINDS or _in_flight(i):
        return None
    if kind == "all-reduce" and fused and _sliced(computation, i.name):
        kind = "reduce-scatter"  # a TPU runs the fusion of the two as one
    n, size = _group_size(i.attributes, module.devices), sum(_size(computation.leaves(name)) for name in i.operands)
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
    return kind, factor * size


_Place = tuple[_Computation, _Instruction, tuple | None]  # where an instruction is: inside a fusion, the last is the fusion's own place


def _origin(module: _Module, computation: _Computation, name: str, caller: _Place | None = None) -> _Place:
    """The instruction that computes a value, past copies and tuples, into fusions and out of them."""
    while True:
        i = computation.instructions[name]
        source = computation.instructions[i.operands[0]] if i.opcode == "get-tuple-element" else i
        element = int(re.search(r"index=(\d+)", i.attributes).group(1)) if source is not i else None
        if i.opcode in ("copy", "bitcast", "convert", "reshape"):
            name = i.operands[0]
        elif i.opcode == "parameter" and caller:
            position = int(i.inputs)
            computation, i, caller = caller
            name = i.operands[position]
        elif source.opcode == "tuple" and element is not None:
            name = source.operands[element]
        elif source.opcode == "fusion":
            caller, computation = (computation, source, caller), module.fused(source)
            name = computation.root.name if element is None else computation.root.operands[element]
        else:
            return computation, i, caller


def _affine(module: _Module, computation: _Computation, name: str, caller: _Place | None = None) -> tuple[int | None, int] | None:
    """(k, c) of an integer that is c plus element k of its computation's parameter, or c alone if k is None; None if it is neither."""
    computation, i, caller = _origin(module, computation, name, caller)
    if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.inputs):
        return None, int(i.inputs)
    if i.opcode == "get-tuple-element" and computation.instructions[i.operands[0]].opcode == "parameter" and not caller:
        return int(re.search(r"index=(\d+)", i.attributes).group(1)), 0
    if i.opcode == "add":
        terms = [_affine(module, computation, operand, caller) for operand in i.operands]
        if None not in terms and (terms[0][0] is None or terms[1][0] is None):
            return (terms[1][0] if terms[0][0] is None else terms[0][0]), terms[0][1] + terms[1][1]
    return None


def _constant(module: _Module, computation: _Computation, value: tuple[int | None, int] | None) -> int | None:
    """The number that a value of `_affine` always is: an element of a loop's state that its body only passes on stays what it was."""
    if value is None or value[0] is None:
        return None if value is None else value[1]
    outer, loop = module.loops.get(computation.name, (None, None))
    if outer is None or _element(module, computation, computation.root, value[0]) != (value[0], 0):
        return None
    start = _constant(module, outer, _element(module, outer, outer.instructions[loop.operands[0]], value[0]))
    return None if start is None else start + value[1]


def _element(module: _Module, computation: _Computation, state: _Instruction, k: int) -> tuple[int | None, int] | None:
    return _affine(module, computation, state.operands[k]) if state.opcode == "tuple" else None


def _trips(module: _Module, computation: _Computation, loop: _Instruction) -> int | None:
    """Trip count of a `while`; None if it depends on data. The TPU's text does not state it: a counter below a constant is recognised."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known.group(1))
    body, condition = (module.computations[_called(loop, key)[0]] for key in ("body", "condition"))
    inside, test, caller = _origin(module, condition, condition.root.name)
    if test.opcode != "compare" or not re.search("direction=(LT|GT)", test.attributes):
        return None
    index, end = (_affine(module, inside, operand, caller) for operand in test.operands[:: 1 if "direction=LT" in test.attributes else -1])
    if index is None or index[0] is None:
        return None
    step = _element(module, body, body.root, index[0])
    start = _constant(module, computation, _element(module, computation, computation.instructions[loop.operands[0]], index[0]))
    end = _constant(module, body, end)
    if step is None or step[0] != index[0] or step[1] <= 0 or start is None or end is None:
        return None
    return max(0, -((start + index[1] - end) // step[1]))


def _read(module: _Module, computation: _Computation, name: str) -> float:
    """Bytes that a fused computation reads of its array `name`."""
    size, total = _size(computation.leaves(name)), 0.0
    for user in computation.users[name]:
        buffer = user.operands[0] == name and name not in user.operands[1:]
        if user.opcode in _SLICES and buffer:
            total += _size(_leaves(user.type))
        elif user.opcode == "bitcast":
            total += _read(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.fused(user)
            total += sum(_read(module, inner, inner.parameters[k]) for k, operand in enumerate(user.operands) if operand == name)
        elif not (user.opcode == "tuple" or (user.opcode in _UPDATES and buffer) or _in_flight(user)):
            return size
    return min(size, total)


def _written(module: _Module, computation: _Computation, name: str) -> float | None:
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


def _fusion_traffic(module: _Module, computation: _Computation, fusion: _Instruction) -> float:
    inner, leaves = module.fused(fusion), _leaves(fusion.type)
    operands = [(inner.parameters[k], _hbm(computation.leaves(operand))) for k, operand in enumerate(fusion.operands)]
    total = sum(min(hbm, _read(module, inner, name)) for name, hbm in operands if hbm)
    if '"AsyncCollectiveStart"' in inner.root.attributes:
        return total + _hbm(leaves[1:])  # the first is the operand
    results = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    if len(leaves) != len(results):
        return total + _hbm(leaves)
    written = [_written(module, inner, name) if leaf.space == 0 else 0.0 for leaf, name in zip(leaves, results, strict=True)]
    return total + sum(leaf.bytes if part is None else part for leaf, part in zip(leaves, written, strict=True))


def _done(computation: _Computation, start: _Instruction) -> _Instruction | None:
    """The -done of an asynchronous -start, perhaps past -updates."""
    user = next((u for u in computation.users[start.name] if u.opcode.endswith(("-done", "-update"))), None)
    return user if user is None or user.opcode.endswith("-done") else _done(computation, user)


def _traffic(module: _Module, computation: _Computation, i: _Instruction) -> float:
    """HBM bytes of one instruction outside of fusions; a -start has those of the pair."""
    opcode = i.opcode.removesuffix("-start")
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or '"AllocateBuffer"' in i.attributes:
        return 0.0
    made = i if opcode == i.opcode else _done(computation, i)
    if made is None or (made is not i and _called(i, "calls", "called_computations")):  # what they call counts
        return 0.0
    if opcode == "fusion":
        return _fusion_traffic(module, computation, i)
    result = _leaves(made.type)
    if opcode in _SLICES:
        return _hbm(result) + (_size(result) if _hbm(computation.leaves(i.operands[0])) else 0.0)
    if opcode in _UPDATES:
        update = computation.leaves(i.operands[_UPDATES[opcode]])
        return _hbm(update) + (_size(update) if _hbm(result) else 0.0)
    return _hbm(result) + sum(_hbm(computation.leaves(operand)) for operand in dict.fromkeys(i.operands))


def _parts(module: _Module, computation: _Computation, i: _Instruction, dynamic_trips: float) -> list[tuple[str, bool, float]]:
    """(computation, whether it is fused, times) that an instruction other than a conditional runs."""
    if i.opcode == "while":
        trips = _trips(module, computation, i)
        return [(name, False, dynamic_trips if trips is None else trips) for name in _called(i, "body", "condition")]
    if i.opcode == "call":
        return [(name, False, 1) for name in _called(i, "to_apply")]
    if i.opcode in ("fusion", "custom-call") or i.opcode.endswith("-start"):
        return [(name, not i.opcode.endswith("-start"), 1) for name in _called(i, "calls", "called_computations")]
    return []


def _cost(module: _Module, name: str, fused: bool, dynamic_trips: float, cost: Callable[[str, bool], Counter]) -> Counter:
    """"flops", "bytes" and (kind, "count" or "bytes") of one execution of a computation; `cost` gives those of the ones it runs."""
    computation, total = module.computations[name], Counter()
    for i in computation.instructions.values():
        if i.opcode == "dot":
            total["flops"] += _dot_flops(computation, i)
        elif i.opcode == "convolution":
            total["flops"] += _convolution_flops(computation, i)
        elif i.opcode == "conditional":
            branches = [cost(branch, fused) for branch in _called(i, *_BRANCHES)]
            total.update(max(branches, key=lambda branch: (branch["flops"], branch["bytes"])))
        elif sent := _collective(module, computation, i, fused):
            total[sent[0], "count"] += 1
            total[sent[0], "bytes"] += sent[1]
        for part, within, times in _parts(module, computation, i, dynamic_trips):
            total.update({key: times * value for key, value in cost(part, fused or within).items()})
        if not fused:
            total["bytes"] += _traffic(module, computation, i)
    return total


def _unfused(module: _Module) -> list[_Computation]:
    """The computations that run outside of fusions, so that their results are buffers."""
    names, seen = [module.entry], {}
    while names:
        computation = module.computations[names.pop()]
        seen[computation.name] = computation
        for i in computation.instructions.values():
            called = [name for name, fused, _ in _parts(module, computation, i, 1.0) if not fused] + _called(i, *_BRANCHES)
            names += [name for name in called if name not in seen]
    return list(seen.values())


def analyse(text: str, dynamic_trips: float = 1.0) -> Cost:
    """The cost of a compiled program, with loop bodies as often as they run, and the dearer branch of conditionals.

    Args:
      text: `compiled.as_text()`.
      dynamic_trips: trip count of the loops whose own depends on data.

    Returns:
      The cost of one execution on one device.

    Raises:
      ValueError: if the text has no ENTRY computation.
    """
    module = _parse(text)

    @functools.cache
    def cost(name: str, fused: bool) -> Counter:
        return _cost(module, name, fused, dynamic_trips, cost)

    total = cost(module.entry, False)
    collectives = {kind: Collective(total[kind, "count"], total[kind, "bytes"]) for kind in _KINDS if total[kind, "count"]}
    loops = [(c, i) for c in _unfused(module) for i in c.instructions.values() if i.opcode == "while"]
    return Cost(float(total["flops"]), float(total["bytes"]), collectives, sum(_trips(module, c, i) is None for c, i in loops))


def _results(instruction: _Instruction) -> Iterator[Array]:
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    for leaf in _leaves(instruction.type):
        yield Array(leaf.dtype, leaf.shape, math.ceil(leaf.bytes), name.group(1) if name else "")


def arrays(text: str) -> Iterator[Array]:
    """The results of all instructions, those inside fusions too: what is not here exists nowhere, not even in registers.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: if the text has no ENTRY computation.
    """
    for computation in _parse(text).computations.values():
        for instruction in computation.instructions.values():
            if not (instruction.type.startswith("(") and instruction.opcode in _PASSING):  # its elements come from elsewhere
                yield from _results(instruction)


def largest_arrays(text: str, count: int = 5) -> list[Array]:
    """The largest buffers that the program fills, its parameters left out.

    Args:
      text: `compiled.as_text()`.
      count: how many at most.

    Returns:
      Distinct (dtype, shape, op_name), biggest first.

    Raises:
      ValueError: if the text has no ENTRY computation.
    """
    instructions = (i for computation in _unfused(_parse(text)) for i in computation.instructions.values())
    made = (i for i in instructions if i.opcode not in _PASSING and not i.opcode.endswith(("-start", "-update")))
    distinct = dict.fromkeys(array for i in made for array in _results(i))
    return sorted(distinct, key=lambda array: -array.bytes)[:count]
