"""The optimised HLO text of a compiled program as a structure: computations, instructions, arrays, and how often loops run.

`text` is always `compiled.as_text()`, of the TPU or the CPU backend: it is the program of one device, after partitioning.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an instruction produces."""

    dtype: str
    shape: tuple[int, ...]  # of one device's shard
    bytes: int
    op_name: str  # of the metadata: the JAX operation it comes from; empty if unknown


class Leaf(NamedTuple):
    """An array in the type of an instruction, a tuple perhaps."""

    dtype: str
    shape: tuple[int, ...]
    bytes: float
    space: int  # memory space; 0 is HBM


class Instruction(NamedTuple):
    """A line of the text."""

    name: str
    type: str
    opcode: str
    inputs: str  # the text between the opcode's parentheses
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The arrays of its result, nested tuples flattened."""
        return _leaves(self.type)

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """(computation, whether it is fused) of those that it runs; of a conditional's it runs one."""
        attributes = _RUNS.get(self.opcode, _CALLS if self.opcode.endswith("-start") else ())
        return [(name, self.opcode in ("fusion", "custom-call")) for name in self.called(*attributes)] if attributes else []

    def called(self, *attributes: str) -> list[str]:
        """The computations that it names in these attributes, in the text's order."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^{{}}]*\}}|%[\w.\-]+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(found))


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, one of them the root."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.inputs): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    def leaves(self, name: str) -> tuple[Leaf, ...]:
        return self.instructions[name].leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """Computations by name, one of them the entry."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def fused(self, fusion: Instruction) -> Computation:
        return self.computations[fusion.called("calls")[0]]

    @functools.cached_property
    def loops(self) -> dict[str, tuple[Computation, Instruction]]:
        """Body -> (the computation that runs it, its `while`)."""
        whiles = ((c, i) for c in self.computations.values() for i in c.instructions.values() if i.opcode == "while")
        return {i.called("body")[0]: (c, i) for c, i in whiles}


_CALLS = ("calls", "called_computations")
_RUNS = {  # opcode -> the attributes that name what it runs
    "while": ("body", "condition"), "call": ("to_apply",), "fusion": _CALLS, "custom-call": _CALLS,
    "conditional": ("branch_computations", "true_computation", "false_computation"),
}  # fmt: skip
PASSING = frozenset(  # without a result of their own
    "parameter tuple get-tuple-element bitcast while conditional call after-all add-dependency opt-barrier domain".split()
)
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")  # types never have a space, a word and a parenthesis
_LEAF = re.compile(r"([a-z]\w*)\[([^\[\]]*)\](?:\{([^{}]*)\})?")


@functools.lru_cache(maxsize=65536)
def _leaves(type_: str) -> tuple[Leaf, ...]:
    """The arrays of a type, nested tuples flattened."""
    leaves = []
    for dtype, dims, layout in _LEAF.findall(type_):
        shape = tuple(int(d) for d in re.findall(r"\d+", dims))
        width = re.search(r"\d+", dtype)  # bits; token and opaque have none
        bits = 8 if dtype == "pred" else int(width.group()) if width else 0
        space = re.search(r"S\((\d+)\)", layout)
        leaves.append(Leaf(dtype, shape, math.prod(shape) * bits / 8, int(space.group(1)) if space else 0))
    return tuple(leaves)


def _instruction(line: str) -> Instruction | None:
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
    return Instruction(head.group(2), rest[: opcode.start()], opcode.group(1), inputs, operands, rest[end:], bool(head.group(1)))


def parse(text: str) -> Module:
    """The structure of `compiled.as_text()`.

    Raises:
      ValueError: if the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, {}
    for line in text.splitlines():
        if line[:1].isspace():
            if instruction := _instruction(line):
                current[instruction.name] = instruction
        elif header := _HEADER.match(line):
            current = {}
            computations[header.group(2)] = Computation(header.group(2), current)
            entry = header.group(2) if header.group(1) else entry
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    devices = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[text.find("HloModule") :].partition("\n")[0])
    return Module(computations, entry, math.prod(map(int, devices)))


# --- what runs, and how often ---


_Place = tuple[Computation, Instruction, tuple | None]  # where an instruction is: inside a fusion, the last is the fusion's own place


def _origin(module: Module, computation: Computation, name: str, caller: _Place | None = None) -> _Place:
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


def _affine(module: Module, computation: Computation, name: str, caller: _Place | None = None) -> tuple[int | None, int] | None:
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


def _constant(module: Module, computation: Computation, value: tuple[int | None, int] | None) -> int | None:
    """The number that a value of `_affine` always is: an element of a loop's state that its body only passes on stays what it was."""
    if value is None or value[0] is None:
        return None if value is None else value[1]
    outer, loop = module.loops.get(computation.name, (None, None))
    if outer is None or _element(module, computation, computation.root, value[0]) != (value[0], 0):
        return None
    start = _constant(module, outer, _element(module, outer, outer.instructions[loop.operands[0]], value[0]))
    return None if start is None else start + value[1]


def _element(module: Module, computation: Computation, state: Instruction, k: int) -> tuple[int | None, int] | None:
    return _affine(module, computation, state.operands[k]) if state.opcode == "tuple" else None


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trip count of a `while`; None if it depends on data. The TPU's text does not state it: a counter below a constant is recognised."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known.group(1))
    body, condition = (module.computations[loop.called(key)[0]] for key in ("body", "condition"))
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


def unfused(module: Module) -> list[Computation]:
    """The computations that run outside of fusions, so that their results are buffers."""
    names, seen = [module.entry], {}
    while names:
        computation = module.computations[names.pop()]
        seen[computation.name] = computation
        for i in computation.instructions.values():
            names += [name for name, fused in i.parts if not fused and name not in seen]
    return list(seen.values())


# --- arrays ---


def _results(instruction: Instruction) -> Iterator[Array]:
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    for leaf in instruction.leaves:
        yield Array(leaf.dtype, leaf.shape, math.ceil(leaf.bytes), name.group(1) if name else "")


def arrays(text: str) -> Iterator[Array]:
    """The results of all instructions, those inside fusions too: what is not here exists nowhere, not even in registers.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: if the text has no ENTRY computation.
    """
    for computation in parse(text).computations.values():
        for instruction in computation.instructions.values():
            if not (instruction.type.startswith("(") and instruction.opcode in PASSING):  # its elements come from elsewhere
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
    instructions = (i for computation in unfused(parse(text)) for i in computation.instructions.values())
    made = (i for i in instructions if i.opcode not in PASSING and not i.opcode.endswith(("-start", "-update")))
    distinct = dict.fromkeys(array for i in made for array in _results(i))
    return sorted(distinct, key=lambda array: -array.bytes)[:count]
