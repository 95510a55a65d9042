"""What a step costs: seconds of the first call and of the following ones, memory, and what it must not do.

A step must not be compiled twice, and nothing in it may go through the host: no copy while it runs (which the transfer
guard of JAX refuses), and no callback, infeed or outfeed in the compiled program (which the guard does not see on a
CPU).
"""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.statistics import bootstrap_rows, row
from rlhf_jax.laboratory.workloads import Workload
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.run_folder import check

GIB = 2**30
Found = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Rows and checks of a summary."""
WARM_UP = 2
"""Steps after the first that are not timed."""
_HOST = re.compile(r"\b(?:infeed|outfeed)\(|is_host_transfer=true|custom_call_target=\"[^\"]*callback[^\"]*\"")


class StepCost(NamedTuple):
    """What was measured of a step.

    Attributes:
        first: seconds of the first call, tracing and compilation included.
        compiling: the part of it that was compilation.
        seconds: of each timed step, [steps].
        planned: bytes that the compiler plans for the program: arguments, results that do not replace them, and
            temporaries.
        device_peak: most bytes that the process ever held on the device; None where the device does not say.
        compiled_later: programs compiled after the first call.
        through_host: what goes through the host: instructions of the compiled program, and the message of the guard.
    """

    first: float
    compiling: float
    seconds: Float[np.ndarray, " steps"]
    planned: int
    device_peak: int | None
    compiled_later: int
    through_host: tuple[str, ...]


def host_traffic(text: str) -> tuple[str, ...]:
    """The instructions of a compiled program through which the host takes part in it.

    Example:
        >>> host_traffic('%x = () custom-call(), custom_call_target="xla_python_cpu_callback"')
        ('custom_call_target="xla_python_cpu_callback"',)
        >>> host_traffic('%y = f32[2] add(a, b), metadata={op_name="jit(callback)"}')
        ()
    """
    return tuple(sorted(set(_HOST.findall(text))))


def planned_bytes(program: jax.stages.Compiled) -> int:
    """What the compiler plans for a program: arguments, results that do not replace them, temporaries."""
    plan = program.memory_analysis()
    new = max(plan.output_size_in_bytes - plan.alias_size_in_bytes, 0)
    return plan.argument_size_in_bytes + new + plan.temp_size_in_bytes


def device_peak() -> int | None:
    """Most bytes that this process ever held on the first device; None where the device does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def process_peak() -> int:
    """Most bytes of main memory that this process ever held."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def measure(workload: Workload, steps: int, clock: CompileClock, trace: Path | None = None) -> StepCost:
    """Runs a workload and times its steps.

    Args:
        workload: what to run.
        steps: timed steps.
        clock: of the process.
        trace: folder for a profile of three more steps, which Perfetto and TensorBoard open; None: none.

    Raises:
        ValueError: no step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps cannot be timed: give 1 or more.")
    state = jax.block_until_ready(workload.begin())
    before, began = clock.seconds, time.perf_counter()
    program = workload.step.lower(state, *workload.rest).compile()
    state, _ = jax.block_until_ready(workload.step(state, *workload.rest))  # what was compiled is found again
    first, compiling = time.perf_counter() - began, clock.seconds - before
    programs, seconds = clock.programs, np.empty(steps)
    refused, guard = (), "disallow"
    for step in range(-WARM_UP, steps):
        began = time.perf_counter()
        try:
            with jax.transfer_guard(guard):
                state, found = workload.step(state, *workload.rest)
        except jax.errors.JaxRuntimeError as error:
            if "isallowed" not in str(error):
                raise
            refused, guard = (str(error).splitlines()[0],), "allow"
            state, found = workload.step(state, *workload.rest)
        jax.block_until_ready((state, found))
        if step >= 0:
            seconds[step] = time.perf_counter() - began
    compiled_later = clock.programs - programs
    with _profile(trace):
        for _ in range(3 if trace is not None else 0):
            state, _ = jax.block_until_ready(workload.step(state, *workload.rest))
    return StepCost(
        first=first,
        compiling=compiling,
        seconds=seconds,
        planned=planned_bytes(program),
        device_peak=device_peak(),
        compiled_later=compiled_later,
        through_host=host_traffic(program.as_text()) + refused,
    )


@contextmanager
def fitting(name: str, checks: list[dict[str, Any]]) -> Iterator[None]:
    """What does not fit into the memory of a device, of JAX or of PyTorch, fails a check; the program goes on.

    Example:
        >>> checks = []
        >>> with fitting("large", checks):
        ...     raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB.")
        large: does not fit into memory
        >>> checks[0]["name"], checks[0]["pass"]
        ('large: fits into memory', False)
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
            raise
        print(f"{name}: does not fit into memory", flush=True)
        checks.append(check(f"{name}: fits into memory", False, True))


def _profile(folder: Path | None) -> AbstractContextManager[None]:
    return nullcontext() if folder is None else jax.profiler.trace(folder, create_perfetto_trace=True)


def median_row(name: str, unit: str, values: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """A row of the summary: a median with its bootstrap interval.

    Example:
        >>> median_row("a step", "s", np.array([1.0, 1.0, 1.0]))["mean"]
        1.0
    """
    return bootstrap_rows([name], unit, np.median, values)[0]


def summary_of(name: str, workload: Workload, cost: StepCost, ceiling: float) -> Found:
    """Rows and checks of one workload.

        MFU = (FLOPs - those computed again) / seconds / ceiling

    Args:
        name: of the workload.
        workload: what was run.
        cost: what was measured.
        ceiling: FLOP/s of the fastest matrix product.
    """
    needed = (workload.flops - workload.again) / ceiling
    rows = [
        median_row(f"{name}: tokens", "a second", workload.tokens / cost.seconds),
        median_row(f"{name}: a step", "s", cost.seconds),
        row(f"{name}: matrix products of a step", "GFLOP", np.array([workload.flops / 1e9])),
        median_row(f"{name}: MFU", "of the matmul ceiling", needed / cost.seconds),
        row(f"{name}: first call", "s", np.array([cost.first])),
        row(f"{name}: compilation in it", "s", np.array([cost.compiling])),
        row(f"{name}: memory of the program", "GiB", np.array([cost.planned / GIB])),
    ]
    if cost.device_peak is not None:
        rows.append(row(f"{name}: most memory of the device so far", "GiB", np.array([cost.device_peak / GIB])))
    checks = [
        check(f"{name}: programs compiled after the first call", float(cost.compiled_later), 0.0),
        check(f"{name}: ways through the host", float(len(cost.through_host)), 0.0),
    ]
    return rows, checks
