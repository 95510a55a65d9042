"""An experiment on theory, stage by stage: rows of what was predicted beside what was measured, figures, measures."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.evaluation.theory_figure import Panel, theory_figure
from rlhf_jax.icl.comparison import Comparison, checks, markdown, print_comparisons, write_comparisons
from rlhf_jax.laboratory.stages import conclude, run_each
from rlhf_jax.training.options import RunOptions


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage found.

    Attributes:
        comparisons: predicted beside measured.
        panels: of its figure; none: no figure.
        rows: what was measured and is not predicted, from `evaluation.statistics.row`.
    """

    comparisons: Sequence[Comparison]
    panels: Sequence[Panel] = ()
    rows: Sequence[dict[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Options(RunOptions):
    """Options of every experiment on theory.

    Attributes:
        stages: parts to run; none: all of them.
    """

    stages: tuple[str, ...] = ()


def run_stages(name: str, config: Options, stages: Mapping[str, Callable[[Any], Stage]]) -> dict[str, Any]:
    """Runs the stages one after the other and returns the summary.

    The run folder gets `comparisons.json`, `.csv` and `.md`, and `figures/STAGE.png`, beside what every experiment
    leaves. Comparisons are written after each stage, so that a run that is interrupted has what it found.

    Args:
        name: of the experiment.
        config: its options; each stage is called with it.
        stages: by name.

    Raises:
        ValueError: an unknown stage, before anything is computed.
    """

    def leave(path: Path, found: Mapping[str, Stage]) -> dict[str, int]:
        stage, newest = list(found.items())[-1]
        if newest.panels:
            theory_figure(newest.panels, path / "figures" / f"{stage}.png")
        comparisons = _comparisons(found)
        write_comparisons(path, comparisons)
        (path / "comparisons.md").write_text(markdown(comparisons) + "\n", encoding="utf-8")
        return {"rows": len(comparisons), "failed": sum(not comparison.passed for comparison in comparisons)}

    done = run_each(name, config, stages, leave)
    comparisons = _comparisons(done.found)
    print_comparisons(comparisons, f"{name}: predicted and measured")
    return conclude(done, [row for one in done.found.values() for row in one.rows], checks(comparisons))


def _comparisons(found: Mapping[str, Stage]) -> list[Comparison]:
    return [comparison for one in found.values() for comparison in one.comparisons]
