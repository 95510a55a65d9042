"""The text of a compiled program as data: its computations, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once. Here a loop counts as often as it runs, nested loops multiply,
and the cases of a conditional share its runs equally. `collectives` and `traffic` add up over what this module reads.

Source: the printed form of HLO, https://openxla.org/xla/operation_semantics.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "bf16": 16, "token": 0}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_MANY_CALLS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_LINE = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = ")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PASSED_ON = ("copy", "convert", "bitcast", "reshape", "broadcast", "copy-start", "copy-done", "opt-barrier")
_WRAPPERS = ("fusion", "call")


class Shape(NamedTuple):
    """One array.

    Attributes:
        dtype: XLA's name of it, such as `bf16`.
        dims: its axes.
        on_chip: it lies in a memory of the core (VMEM, SMEM), not in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """Its size, without the padding of its layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits.group()) if digits else 0
        return math.prod(self.dims) * bits // 8


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: of the value.
        opcode: what it does, such as `all-gather`.
        shapes: of its results; those of a tuple in order, nested ones flattened.
        operands: names of the values it reads.
        called: computations by the attribute that names them (`body`, `condition`, `calls`, `branch 0`, …).
        text: the whole line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: dict[str, str]
    text: str


class Module(NamedTuple):
    """A program.

    Attributes:
        computations: instructions by name, in order, of every computation by its name.
        roots: the name of each computation's result.
        entry: the computation that is the program.
        partitions: devices that it is split over.
    """

    computations: dict[str, dict[str, Instruction]]
    roots: dict[str, str]
    entry: str
    partitions: int


class Loop(NamedTuple):
    """A loop of the program.

    Attributes:
        name: of the instruction.
        body: the computation it repeats.
        trips: how often, at most; None where the text does not say.
        exact: the number does not depend on data.
    """

    name: str
    body: str
    trips: int | None
    exact: bool


def parse(text: str) -> Module:
    """Reads the text of a compiled program, as `compiled.as_text()` gives it.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header.group(2)
            computations[current] = {}
            entry = current if header.group(1) else entry
        elif _END.match(line):
            current = None
        elif current is not None and _LINE.match(line):  # a kernel's attributes may take further lines
            instruction = _instruction(re.sub(r"/\*.*?\*/", "", line.strip()))
            computations[current][instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                roots[current] = instruction.name
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY; give compiled.as_text().")
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    return Module(computations, roots, entry, int(partitions.group(1)) if partitions else 1)


def runs(module: Module) -> dict[str, float]:
    """How often each computation runs that is a part of the program's flow: the entry, loop bodies, cases, calls.

    Computations that one instruction carries out as a whole (fusions, reductions) are not among them; see `within`.
    """
    counted: dict[str, float] = {}
    for name, times, _ in _flow(module):
        counted[name] = counted.get(name, 0.0) + times
    return counted


def loops(module: Module) -> list[Loop]:
    """All loops that run, one entry for each place where one does."""
    return [loop for _, _, found in _flow(module) for loop in found]


def _flow(module: Module) -> Iterator[tuple[str, float, list[Loop]]]:
    """Every computation in the program's flow, how often it runs there, and the loops that stand in it."""
    waiting = [(_Frame(module, module.entry, None, ()), 1.0)]
    while waiting:
        frame, times = waiting.pop()
        found = []
        for instruction in module.computations[frame.name].values():
            if instruction.opcode == "while":
                loop = _loop(frame, instruction)
                found.append(loop)
                body = _Frame(module, loop.body, frame, instruction.operands, any_turn=True)
                waiting.append((body, times * (1 if loop.trips is None else loop.trips)))
            elif instruction.opcode == "conditional":
                for number, case in enumerate(instruction.called.values()):
                    inside = _Frame(module, case, frame, instruction.operands[1 + number : 2 + number])
                    waiting.append((inside, times / len(instruction.called)))
            elif instruction.opcode == "call":
                waiting.append((frame.inside(instruction), times))
        yield frame.name, times, found


def within(module: Module, name: str) -> Iterator[tuple[str, Instruction]]:
    """The instructions of a computation and of all that they carry out as a whole, with the computation of each."""
    for instruction in module.computations[name].values():
        yield name, instruction
        if instruction.opcode == "fusion" or instruction.opcode.startswith("async-"):
            for called in instruction.called.values():
                if instruction.opcode not in ("async-done", "async-update"):
                    yield from within(module, called)


class _Frame(NamedTuple):
    """A computation, and the frame and names of the values that its parameters stand for.

    Attributes:
        module: the program.
        name: of the computation.
        parent: where it is called; None for the entry.
        arguments: names in the parent.
        any_turn: it is the body of a loop, in any of its turns: of its parameter only what no turn changes is known.
    """

    module: Module
    name: str
    parent: "_Frame | None"
    arguments: tuple[str, ...]
    any_turn: bool = False

    def get(self, value: str) -> Instruction:
        return self.module.computations[self.name][value]

    def inside(self, instruction: Instruction) -> "_Frame":
        called = instruction.called["calls" if instruction.opcode == "fusion" else "to_apply"]
        return _Frame(self.module, called, self, instruction.operands)

    def keeps(self, index: int | None) -> bool:
        """Whether every turn of the loop hands on this entry of its parameter as it is."""
        root = self.get(self.module.roots[self.name])
        if root.opcode != "tuple" or index is None:
            return False
        kept = self.get(root.operands[index])
        is_entry = kept.opcode == "get-tuple-element" and f"index={index}" in re.split(r"[,\s]+", kept.text)
        return is_entry and self.get(kept.operands[0]).opcode == "parameter"


def _loop(outside: _Frame, instruction: Instruction) -> Loop:
    """What the text says of a loop: XLA's own note, or the bound that its condition compares the counter with.

    A condition of more than that comparison (a decoding loop, which may stop early) gives the largest number.
    """
    module, body, condition = outside.module, instruction.called["body"], instruction.called["condition"]
    known = _KNOWN_TRIPS.search(instruction.text)
    if known:
        return Loop(instruction.name, body, int(known.group(1)), True)
    first = _Frame(module, condition, outside, instruction.operands)
    once = _Frame(module, body, outside, instruction.operands)
    second = _Frame(module, condition, once, (module.roots[body],))
    trips = None
    # How far apart the two sides of each comparison are before the first turn, and how much nearer after it.
    for (before, closed), (after, _) in zip(_distances(first), _distances(second), strict=True):
        if before is not None:
            step = 1 if after is None or after == before else abs(before - after)
            needed = -(-(abs(before) + closed) // step)
            trips = needed if trips is None else min(trips, needed)
    root = first.get(module.roots[condition])
    while root.opcode in _WRAPPERS:
        called = root.called["calls" if root.opcode == "fusion" else "to_apply"]
        root = module.computations[called][module.roots[called]]
    return Loop(instruction.name, body, trips, root.opcode == "compare")


def _distances(frame: _Frame) -> Iterator[tuple[int | None, bool]]:
    """Of every comparison in a condition: right side less left side, where known, and whether equality counts."""
    for instruction in frame.module.computations[frame.name].values():
        if instruction.opcode == "compare":
            left, right = (_integer(frame, operand) for operand in instruction.operands)
            known = left is not None and right is not None
            yield right - left if known else None, re.search(r"direction=(LE|GE)", instruction.text) is not None
        elif instruction.opcode in _WRAPPERS:
            yield from _distances(frame.inside(instruction))


def _integer(frame: _Frame, value: str, index: int | None = None) -> int | None:
    """The integer that a value (or an entry of a tuple) has, if it follows from constants."""
    instruction = frame.get(value)
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        found = re.search(r"constant\((-?\d+)\)", instruction.text)
        return int(found.group(1)) if found else None
    if opcode == "get-tuple-element":
        return _integer(frame, operands[0], int(re.search(r"index=(\d+)", instruction.text).group(1)))
    if opcode == "tuple" and index is not None:
        return _integer(frame, operands[index])
    if opcode == "parameter" and frame.parent is not None and (not frame.any_turn or frame.keeps(index)):
        number = int(re.search(r"parameter\((\d+)\)", instruction.text).group(1))
        return _integer(frame.parent, frame.arguments[number], index)
    if opcode in _PASSED_ON:
        return _integer(frame, operands[0], index)
    if opcode in _WRAPPERS:
        inside = frame.inside(instruction)
        return _integer(inside, frame.module.roots[inside.name], index)
    if opcode in ("add", "subtract"):
        left, right = (_integer(frame, operand) for operand in operands)
        if left is not None and right is not None:
            return left + right if opcode == "add" else left - right
    return None


def _instruction(line: str) -> Instruction:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    called = {attribute: target for attribute, target in _CALLS.findall(rest[closes:])}
    for group in _MANY_CALLS.findall(rest[closes:]):
        called |= {f"branch {number}": target.strip(" %") for number, target in enumerate(group.split(","))}
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opens : closes + 1]))
    return Instruction(name.lstrip("%"), rest[:opens], _shapes(kind), operands, called, line)


def _shapes(kind: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), "S(" in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(kind)
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def shapes_of(module: Module, computation: str) -> Mapping[str, tuple[Shape, ...]]:
    """Shapes of every value of a computation."""
    return {name: instruction.shapes for name, instruction in module.computations[computation].items()}
