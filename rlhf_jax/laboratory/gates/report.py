"""Runs gates stage by stage: one table of all of them, as text, Markdown and JSON, and a figure a stage."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation.figures import GREY, PALETTE, panel_grid, save, style
from rlhf_jax.laboratory.gates.gate import HEADERS, Gate, gate_checks, gate_rows, gate_table
from rlhf_jax.laboratory.stages import conclude, run_each
from rlhf_jax.training.json_files import write_json

COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage found.

    Attributes:
        gates: the claims that it tests.
        rows: what was measured besides, from `evaluation.statistics.row`.
    """

    gates: Sequence[Gate]
    rows: Sequence[dict[str, Any]] = ()


def run_gates(name: str, config: Any, stages: Mapping[str, Callable[[Any], Stage]]) -> dict[str, Any]:
    """Runs the stages one after the other and returns the summary; a gate that fails is a check that fails.

    The run folder gets `gates.json`, `tables.md` and `figures/STAGE.png` beside what every experiment leaves; they are
    written after each stage, so that a run that is interrupted has what it found.

    Args:
        name: of the experiment.
        config: its options, with `stages` (none: all), `out` and `overwrite`; each stage is called with it.
        stages: by name.

    Raises:
        ValueError: an unknown stage, before anything is computed.
    """

    def leave(path: Path, found: Mapping[str, Stage]) -> dict[str, int]:
        stage, newest = list(found.items())[-1]
        gate_figure(newest.gates, path / "figures" / f"{stage}.png")
        records = {stage: [gate.record for gate in one.gates] for stage, one in found.items()}
        write_json(path / "gates.json", records)
        (path / "tables.md").write_text(tables(found), encoding="utf-8")
        gates = _gates(found)
        return {"gates": len(gates), "failed": sum(not gate.passed for gate in gates)}

    done = run_each(name, config, stages, leave)
    gates = _gates(done.found)
    print_gates(gates, name)
    rows = [row for one in done.found.values() for row in one.rows]
    return conclude(done, rows, gate_checks(gates), tabled=gate_rows(gates))


def tables(found: Mapping[str, Stage]) -> str:
    """The gates of every stage as Markdown, and what was measured besides."""
    parts = []
    for stage, one in found.items():
        lines = [f"## {stage}", "", gate_table(one.gates), ""]
        if one.rows:
            lines += ["| measure | unit | mean | 95 % interval | n |", "| --- | --- | --- | --- | --- |"]
            lines += [
                f"| {row['name']} | {row['unit']} | {row['mean']:.3g} | {_interval(row['ci95'])} | {row['n']} |"
                for row in one.rows
            ]
            lines.append("")
        parts.append("\n".join(lines))
    return "\n".join(parts)


def print_gates(gates: Sequence[Gate], title: str) -> None:
    """Prints the table of gates."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file or a pipe is as wide as the table
        console = Console(width=180)
    table = Table(*HEADERS, title=Text(f"{title}: {sum(gate.passed for gate in gates)} of {len(gates)} gates passed"))
    for gate in gates:
        colour = "green" if gate.passed else "bold red"
        table.add_row(*map(Text, gate.cells[:-1]), Text(gate.outcome, style=colour))
    console.print(table)


def gate_figure(gates: Sequence[Gate], path: str | Path) -> Path:
    """Draws a strip a gate: its seeds, their mean with the 95 % interval, and the range that passes.

    Args:
        gates: at least one.
        path: file to write.
    """
    across = min(COLUMNS, len(gates))
    down = -(-len(gates) // across)
    with style():
        figure, grid = panel_grid(down, across, width=4.6 * across, height=1.35 * down + 0.3)
        for axes, gate in zip(grid.flat, gates, strict=False):
            _draw(axes, gate)
        for axes in grid.flat[len(gates) :]:
            axes.set_visible(False)
        return save(figure, path)


def _draw(axes: Any, gate: Gate) -> None:
    found, colour = gate.estimate, PALETTE[2] if gate.passed else PALETTE[0]
    ends = [end for end in (gate.low, gate.high) if np.isfinite(end)]
    every = np.concatenate([gate.values, ends, [found.low, found.high]])
    margin = 0.08 * (np.ptp(every) or 1.0)
    left, right = every.min() - margin, every.max() + margin
    axes.axvspan(max(gate.low, left), min(gate.high, right), color=PALETTE[2], alpha=0.12, linewidth=0)
    for end in ends:
        axes.axvline(end, color=GREY, linestyle=":", linewidth=1.2)
    axes.plot(gate.values, np.zeros(gate.values.size), "o", color=GREY, alpha=0.45, markersize=4, markeredgewidth=0)
    half = [[found.mean - found.low], [found.high - found.mean]]
    axes.errorbar([found.mean], [0.0], xerr=half, fmt="D", color=colour, markersize=6, capsize=3)
    axes.set_xlim(left, right)
    axes.set_ylim(-1.0, 1.0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(_in_lines(gate.name), fontsize=7.5)
    axes.set_xlabel(f"{gate.outcome} (must be {gate.threshold})", fontsize=7.5, color=colour)


def _gates(found: Mapping[str, Stage]) -> list[Gate]:
    return [gate for one in found.values() for gate in one.gates]


def _in_lines(text: str, width: int = 62) -> str:
    import textwrap

    return textwrap.fill(text, width)


def _interval(ends: Sequence[float | None]) -> str:
    return "–" if ends[0] is None else f"[{ends[0]:.3g}, {ends[1]:.3g}]"
