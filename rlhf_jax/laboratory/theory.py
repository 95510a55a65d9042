"""An experiment on theory, stage by stage: rows of what was predicted beside what was measured, figures, measures."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.theory_figure import Panel, theory_figure
from rlhf_jax.icl.comparison import Comparison, checks, markdown, print_comparisons, write_comparisons
from rlhf_jax.training import run_folder
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.options import RunOptions
from rlhf_jax.training.progress import ProgressReport


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
    began, clock = time.monotonic(), CompileClock()
    for stage in config.stages:
        if stage not in stages:
            raise ValueError(f"there is no stage {stage!r}; choose among {', '.join(stages)}.")
    chosen = [stage for stage in stages if not config.stages or stage in config.stages]
    folder = run_folder.create(config.out, name, config, config.overwrite)
    comparisons, rows = [], []
    with ProgressReport(name, len(chosen), seconds_between_lines=0.0) as progress:
        for stage in chosen:
            start = time.monotonic()
            found = stages[stage](config)
            seconds = time.monotonic() - start
            comparisons += found.comparisons
            rows += [*found.rows, row(f"{stage}: time", "s", np.array([seconds]))]
            if found.panels:
                theory_figure(found.panels, folder.path / "figures" / f"{stage}.png")
            write_comparisons(folder.path, comparisons)
            (folder.path / "comparisons.md").write_text(markdown(comparisons) + "\n", encoding="utf-8")
            failed = sum(not comparison.passed for comparison in comparisons)
            progress.advance({f"{stage}: seconds": seconds, "rows": len(comparisons), "failed": failed})
    print_comparisons(comparisons, f"{name}: predicted and measured")
    total = time.monotonic() - began
    result = run_folder.summary(folder, rows, checks(comparisons), total, clock.seconds)
    run_folder.write_summary(folder, result)
    run_folder.print_summary(result | {"checks": []})  # they stand in the table above, with standard errors
    return result
