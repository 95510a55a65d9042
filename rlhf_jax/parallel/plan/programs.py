"""Compiling a step for devices that only a description exists of, and what the compiler says of it."""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.parallel.plan.collectives import Collective, collectives
from rlhf_jax.parallel.plan.hlo import Loop, loops, parse
from rlhf_jax.parallel.plan.traffic import memory_traffic, product_flops

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """One phase of a step, as the experiments run it, with shapes in place of arrays.

    Attributes:
        name: of the phase, such as `update`.
        function: the pure function.
        arguments: trees of `jax.ShapeDtypeStruct` with shardings on `mesh`, see `placed`.
        mesh: what it is traced under.
        flops: of all devices together, by arithmetic (`flops`).
        out_shardings: of the results; None: the compiler's choice.
        donate: numbers of the arguments whose memory the results take over.
        reads: roles (see `Step`) that are among the arguments, so that they are not counted twice.
        cache: bytes of a device's key-value cache, by arithmetic.
        reshard: bytes that a device receives before, to have the parameters in the layout of this mesh.
        times: how often the phase runs in a step.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: Mesh
    flops: float
    out_shardings: Any = None
    donate: tuple[int, ...] = ()
    reads: tuple[str, ...] = ()
    cache: int = 0
    reshard: int = 0
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, for one device.

    Attributes:
        name: of the phase.
        compile_seconds: it took.
        fits: whether the compiler found room for it.
        needed: what it says that the program needs in HBM, bytes; None where it fits.
        arguments: bytes of arguments, padded as the layout asks.
        outputs: bytes of results that do not take over an argument's memory.
        temporaries: bytes of everything in between.
        code: bytes of the program itself.
        traffic: bytes between HBM and the core.
        product_flops: of matrix products that the text still shows (CPU devices), else 0.
        collectives: what it sends, the largest first.
        loops: the loops of the program.
    """

    name: str
    compile_seconds: float
    fits: bool
    needed: int | None = None
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    code: int = 0
    traffic: float = 0.0
    product_flops: float = 0.0
    collectives: tuple[Collective, ...] = ()
    loops: tuple[Loop, ...] = ()


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with the shardings that a tree like theirs gives them."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def device_bytes(tree: Any) -> int:
    """Bytes of a placed tree on one device, without the padding of layouts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind != "pinned_host"
    )


def whole_bytes(tree: Any) -> int:
    """Bytes of a placed tree on all devices together, each array counted once."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def compile_program(program: Program) -> Compiled:
    """Compiles a program and reads what became of it; one that does not fit is a result, not an error."""
    jitted = jax.jit(program.function, donate_argnums=program.donate, out_shardings=program.out_shardings)
    with jax.set_mesh(program.mesh):
        lowered = jitted.lower(*program.arguments)
    began = time.perf_counter()
    try:
        with _nothing_kept(program.mesh):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(program.name, time.perf_counter() - began, fits=False, needed=needed_bytes(str(error)))
    seconds, memory, text = time.perf_counter() - began, compiled.memory_analysis(), compiled.as_text()
    module = parse(text)
    return Compiled(
        name=program.name,
        compile_seconds=seconds,
        fits=True,
        arguments=memory.argument_size_in_bytes,
        outputs=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        traffic=memory_traffic(module),
        product_flops=product_flops(module),
        collectives=tuple(collectives(module)),
        loops=tuple(loops(module)),
    )


@contextlib.contextmanager
def _nothing_kept(mesh: Mesh) -> Iterator[None]:
    """Keeps what is compiled for TPUs out of JAX's cache on disk, which cannot read it again without one."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    if mesh.devices.flat[0].platform == "tpu":
        jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def needed_bytes(message: str) -> int | None:
    """How much memory a compiler that gave up says that it needed; None where it does not say.

    Example:
        >>> needed_bytes("RESOURCE_EXHAUSTED: … HLO temporaries (20.50G) exceeds available HBM (15.75G).")
        22011707392
    """
    found = re.search(r"(?:\(|Used )([\d.]+)([KMGT]?)\)? (?:exceeds|of) ", message)
    return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else None
