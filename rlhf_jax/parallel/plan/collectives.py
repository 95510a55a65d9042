"""What a compiled program sends between devices: bytes that each device moves, by kind of collective.

n devices in a ring, S bytes of result on each device:

| kind                | bytes a device sends |
|---------------------|----------------------|
| all-gather          | S (n - 1) / n        |
| reduce-scatter      | S (n - 1)            |
| all-reduce          | 2 S (n - 1) / n      |
| all-to-all          | S (n - 1) / n        |
| collective-permute  | S                    |

Source: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from rlhf_jax.parallel.plan.hlo import Instruction, Module, runs, within

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FACTORS = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_KIND_OF = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}


class Collective(NamedTuple):
    """One collective of the program.

    Attributes:
        kind: one of `KINDS`.
        result_bytes: of its result on a device, each time it runs.
        group: devices that take part.
        moved_bytes: what a device sends each time.
        times: how often it runs.
        links: links of a device that are used at once, where the TPU compiler says so; else 2, both ways of one axis.
        source: the operation of the user's program that it comes from, as XLA notes it.
    """

    kind: str
    result_bytes: int
    group: int
    moved_bytes: float
    times: float
    links: int
    source: str


def collectives(module: Module) -> list[Collective]:
    """Every collective of a program that moves anything, those that move most first."""
    found = []
    for name, times in runs(module).items():
        seen = set()
        for home, instruction in within(module, name):
            kind = _kind(instruction)
            if kind is None:
                continue
            # One that is spread over several fusions, to run beside them, is written down in each of them.
            channel = re.search(r"channel_id=(\d+)", instruction.text)
            if channel and (kind, channel.group(1)) in seen:
                continue
            seen.add((kind, channel.group(1)) if channel else instruction.name)
            size, group = _result_bytes(instruction), group_size(instruction.text, module.partitions)
            if kind == "all-reduce" and "reduce-scatter" in home:  # a fusion that keeps only its own part of the sum
                kind, size = "reduce-scatter", size // group
            source = re.search(r'op_name="([^"]*)"', instruction.text)
            moved = size * _FACTORS[kind](group)
            # Several rings over the axes of a torus, each in one direction of one axis at a time.
            rings = re.search(r"NDRingStrategy\{colors:(\d+)", instruction.text)
            links = max(int(rings.group(1)), 2) if rings else 2
            found.append(Collective(kind, size, group, moved, times, links, source.group(1) if source else ""))
    moving = [one for one in found if one.moved_bytes > 0]
    return sorted(moving, key=lambda one: -one.moved_bytes * one.times)


def moved_by_kind(module: Module) -> dict[str, float]:
    """Bytes that a device sends while the program runs once, by kind; all of `KINDS`."""
    total = dict.fromkeys(KINDS, 0.0)
    for one in collectives(module):
        total[one.kind] += one.moved_bytes * one.times
    return total


def group_size(text: str, partitions: int) -> int:
    """How many devices take part in a collective, from the line that describes it.

    Example:
        >>> group_size("replica_groups={{0,1,2,3},{4,5,6,7}}", 8), group_size("replica_groups=[4,2]<=[2,4]T(1,0)", 8)
        (4, 2)
        >>> group_size("replica_groups=mesh['fsdp'=2,'tensor'=4] {'tensor'}", 8), group_size("replica_groups={}", 8)
        (4, 8)
    """
    by_axes = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if by_axes:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", by_axes.group(1))}
        return math.prod(_axis_size(axis, sizes) for axis in _axes(by_axes.group(2)))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    return int(iota.group(2)) if iota else partitions


def _axes(text: str) -> Iterator[tuple[str, str | None]]:
    yield from re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", text)


def _axis_size(axis: tuple[str, str | None], sizes: dict[str, int]) -> int:
    name, part = axis
    return int(part) if part else sizes[name]


def _kind(instruction: Instruction) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    kind = _KIND_OF.get(opcode, opcode)
    return kind if kind in KINDS else None


def _result_bytes(instruction: Instruction) -> int:
    """Bytes of the result; where a collective only begins, its operands and bookkeeping are listed beside it."""
    shapes = instruction.shapes
    if instruction.opcode == "collective-permute-start":
        shapes = shapes[1:2]
    elif instruction.opcode in ("all-gather-start", "reduce-scatter-start", "all-to-all-start"):
        shapes = shapes[len(shapes) // 2 :]
    return sum(shape.bytes for shape in shapes)
