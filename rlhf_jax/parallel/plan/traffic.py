"""What a compiled program does on one device: bytes between HBM and the core, and FLOPs of its matrix products."""

import math
import re
from collections.abc import Mapping

from rlhf_jax.parallel.plan.hlo import Instruction, Module, Shape, runs, shapes_of, within

# These move nothing: they rename, or what they do is counted in the computations that they call.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "iota"),
)
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
_READS_A_PART = ("dynamic-slice", "slice", "gather")
_SEES_THROUGH = ("bitcast", "convert", "copy")


def memory_traffic(module: Module) -> float:
    """Bytes that one device reads from and writes to HBM while the program runs once.

    Every instruction reads its operands and writes its results once, as far as they do not lie on the core; of an array
    that a slice is taken from or written into, only that slice counts.
    """
    total = 0.0
    for name, times in runs(module).items():
        shapes = shapes_of(module, name)
        for instruction in module.computations[name].values():
            total += times * _instruction_bytes(module, instruction, shapes)
    return total


def product_flops(module: Module) -> float:
    """FLOPs of one device's matrix products (`dot`) while the program runs once: 2 x multiply-adds.

    For programs compiled for CPU devices; the TPU compiler rewrites products as convolutions.
    """
    total = 0.0
    for name, times in runs(module).items():
        for home, instruction in within(module, name):
            if instruction.opcode == "dot":
                left = shapes_of(module, home)[instruction.operands[0]][0].dims
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text).group(1)
                inner = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
                total += times * 2.0 * math.prod(instruction.shapes[0].dims) * inner
    return total


def _instruction_bytes(module: Module, instruction: Instruction, shapes: Mapping[str, tuple[Shape, ...]]) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or any(target in instruction.text for target in _FREE_TARGETS):
        return 0
    if opcode.endswith("-start"):  # the result stands beside the operand in one tuple
        return _in_hbm(instruction.shapes)
    if opcode in _READS_A_PART:
        return 2 * _in_hbm(instruction.shapes)
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(shapes[instruction.operands[1]])
    if opcode == "fusion":
        return _fusion_bytes(module, instruction, shapes)
    return _in_hbm(instruction.shapes) + sum(_in_hbm(shapes[operand]) for operand in instruction.operands)


def _fusion_bytes(module: Module, instruction: Instruction, shapes: Mapping[str, tuple[Shape, ...]]) -> int:
    called = instruction.called["calls"]
    total = 0
    for number, operand in enumerate(instruction.operands):
        if not all(shape.on_chip for shape in shapes[operand]):
            total += _read_of_parameter(module, called, number)
    root = module.computations[called][module.roots[called]]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    for result, shape in zip(results, instruction.shapes, strict=False):
        if not shape.on_chip:
            total += min(shape.bytes, _written(module, called, result))
    return total


def _read_of_parameter(module: Module, computation: str, number: int) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    for instruction in module.computations[computation].values():
        if instruction.opcode == "parameter" and f"parameter({number})" in instruction.text:
            return _read(module, computation, instruction.name)
    return 0


def _read(module: Module, computation: str, name: str) -> int:
    """Bytes that the other instructions of a fusion read of a value: slices of it, or all of it."""
    inside = module.computations[computation]
    whole, total = _size(inside[name].shapes), 0
    for user in inside.values():
        if name not in user.operands:
            continue
        if user.opcode in _READS_A_PART and user.operands[0] == name:
            total += _size(user.shapes)
        elif user.opcode in _SEES_THROUGH and user.name != module.roots[computation]:
            total += _read(module, computation, user.name)
        elif user.opcode == "fusion":
            total += _read_of_parameter(module, user.called["calls"], user.operands.index(name))
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            total += whole
    return min(whole, total)


def _written(module: Module, computation: str, name: str) -> int:
    """Bytes that a fusion writes of one of its results: the slice that it puts into an array, or all of it."""
    instruction = module.computations[computation][name]
    if instruction.opcode == "dynamic-update-slice":
        return _size(module.computations[computation][instruction.operands[1]].shapes)
    if instruction.opcode in _SEES_THROUGH:
        return _written(module, computation, instruction.operands[0])
    if instruction.opcode == "fusion":
        called = instruction.called["calls"]
        return _written(module, called, module.roots[called])
    return _size(instruction.shapes)


def _size(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes)


def _in_hbm(shapes) -> int:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)
