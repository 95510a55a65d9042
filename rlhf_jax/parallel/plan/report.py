"""What a plan says, as tables, as JSON and as a figure of the bytes on a device."""

import math
from pathlib import Path
from typing import Any

from rlhf_jax.parallel.plan.collectives import KINDS
from rlhf_jax.parallel.plan.estimate import Phase, Plan

GIB = 2**30
LARGEST = 12


def bytes_by_role(plan: Plan, phase: Phase) -> dict[str, int]:
    """Bytes of a device while a phase runs: the roles, its key-value cache, other temporaries, and the rest.

    The rest are batches, results, the program's code, copies in another layout, and what layouts add as padding. Empty
    where the phase does not compile.
    """
    if not phase.compiled.fits:
        return {}
    temporaries = phase.compiled.temporaries - phase.cache
    named = dict(plan.roles) | {"key-value cache": phase.cache, "activations and temporaries": max(temporaries, 0)}
    return named | {"batches, copies, code": max(phase.peak - sum(named.values()), 0)}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; seconds, bytes and FLOPs are those of one device."""
    chip = plan.topology.chip
    return {
        "topology": str(plan.topology),
        "devices": plan.topology.devices,
        "estimate": chip.kind == "gpu",
        "mesh": plan.mesh,
        "fits": plan.fits,
        "hbm_bytes": chip.hbm_bytes,
        "peak_bytes": plan.peak,
        "seconds": None if math.isnan(plan.seconds) else plan.seconds,
        "roles": dict(plan.roles),
        "phases": [_phase_as_json(plan, phase) for phase in plan.phases],
    }


def print_plan(plan: Plan) -> None:
    """Prints the bytes, the times and the largest collectives of each phase."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    chip = plan.topology.chip
    room = f"{chip.hbm_bytes / GIB:.1f} GiB"
    kind = " (an estimate from the compiler for CPUs)" if chip.kind == "gpu" else ""
    verdict = "fits" if plan.fits else "does NOT fit"
    memory = Table(
        "phase", title=f"{plan.topology}, {plan.mesh}: {verdict}; GiB a device of {room}{kind}", title_justify="left"
    )
    compiled = [phase for phase in plan.phases if phase.compiled.fits]
    names = list(bytes_by_role(plan, compiled[0])) if compiled else list(plan.roles)
    for name in (*names, "peak"):
        memory.add_column(name, justify="right")
    for phase in plan.phases:
        held = bytes_by_role(plan, phase)
        cells = [_gib(held[name]) if held else "–" for name in names]
        memory.add_row(phase.compiled.name, *cells, _gib(phase.peak))
    console.print(memory)
    times = Table("phase", title=f"a step: {plan.seconds:.3g} s, estimated", title_justify="left")
    for name in ("times", "TFLOP", "HBM GiB", "sent GiB", "compute s", "memory s", "network s", "s", "compile s"):
        times.add_column(name, justify="right")
    times.add_column("bound by")
    times.add_column("sent by kind, GiB")
    for phase in compiled:
        sent = ", ".join(f"{kind} {_gib(size)}" for kind, size in phase.moved.items() if size > 0.005 * GIB)
        if phase.reshard:
            sent = ", ".join(filter(None, [sent, f"new layout {_gib(phase.reshard)}"]))
        seconds = (phase.compute_seconds, phase.memory_seconds, phase.network_seconds, phase.seconds)
        times.add_row(
            phase.compiled.name,
            str(phase.times),
            f"{phase.flops / 1e12:.1f}",
            _gib(phase.compiled.traffic),
            _gib(sum(phase.moved.values()) + phase.reshard),
            *(f"{value:.3g}" for value in seconds),
            f"{phase.compiled.compile_seconds:.0f}",
            phase.dominates,
            sent,
        )
    console.print(times)
    for phase in plan.phases:
        for note in notes(phase):
            console.print(f"{phase.compiled.name}: {note}", highlight=False)


def notes(phase: Phase) -> list[str]:
    """What a reader should know of a phase's numbers."""
    compiled = phase.compiled
    if not compiled.fits:
        needed = "it does not say how much" if compiled.needed is None else f"it needs {_gib(compiled.needed)} GiB"
        return [f"over the memory of a device: {needed}, beside {_gib(phase.elsewhere)} GiB of other roles."]
    found = []
    for loop in compiled.loops:
        if loop.trips is None:
            found.append(f"the text does not say how often the loop {loop.name} runs; it is counted once.")
        elif not loop.exact:
            found.append(f"the loop {loop.name} may stop early; it is counted {loop.trips} times, the most it can run.")
    return found


def memory_figure(plan: Plan, path: Path) -> None:
    """Draws the bytes of a device in each phase, by role, against its HBM."""
    import matplotlib
    from matplotlib.figure import Figure

    phases = [phase for phase in plan.phases if phase.compiled.fits]
    colors = matplotlib.colormaps["tab10"].colors
    figure = Figure(figsize=(8.0, 1.4 + 0.6 * max(len(phases), 1)), layout="constrained")
    axes = figure.add_subplot()
    for row, phase in enumerate(phases):
        start = 0.0
        for number, (name, size) in enumerate(bytes_by_role(plan, phase).items()):
            label = name if row == 0 else None
            axes.barh(row, size / GIB, left=start, color=colors[number % 10], label=label)
            start += size / GIB
    axes.axvline(plan.topology.chip.hbm_bytes / GIB, color="black", linestyle="--", label="HBM")
    axes.set_yticks(range(len(phases)), [phase.compiled.name for phase in phases])
    axes.invert_yaxis()
    axes.set_xlabel("GiB a device")
    axes.set_title(f"{plan.topology}, {plan.mesh}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _phase_as_json(plan: Plan, phase: Phase) -> dict[str, Any]:
    compiled = phase.compiled
    return {
        "name": compiled.name,
        "times": phase.times,
        "fits": compiled.fits,
        "compile_seconds": compiled.compile_seconds,
        "peak_bytes": phase.peak,
        "bytes": bytes_by_role(plan, phase),
        "elsewhere_bytes": phase.elsewhere,
        "argument_bytes": compiled.arguments,
        "temporary_bytes": compiled.temporaries,
        "flops": phase.flops,
        "product_flops": compiled.product_flops,
        "hbm_traffic_bytes": compiled.traffic,
        "sent_bytes": {kind: phase.moved[kind] for kind in KINDS},
        "reshard_bytes": phase.reshard,
        "seconds": {
            "compute": phase.compute_seconds,
            "memory": phase.memory_seconds,
            "network": phase.network_seconds,
        },
        "bound_by": phase.dominates if compiled.fits else None,
        "largest_collectives": [
            {
                "kind": one.kind,
                "result_bytes": one.result_bytes,
                "devices": one.group,
                "links": one.links,
                "times": one.times,
                "sent_bytes": one.moved_bytes * one.times,
                "source": one.source,
            }
            for one in compiled.collectives[:LARGEST]
        ],
        "notes": notes(phase),
    }


def _gib(size: float | int) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"
