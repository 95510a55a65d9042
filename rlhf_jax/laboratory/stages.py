"""Runs an experiment stage by stage; what was found is written after each, so that an interrupted run has it."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.training import run_folder
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.progress import ProgressReport


class Staged(NamedTuple):
    """An experiment whose stages have run.

    Attributes:
        folder: of the run.
        found: what each stage returned, by name.
        times: a row of the summary for the time of each stage.
        began: when the run began, on the clock of `time.monotonic`, in seconds.
        clock: of compilation.
    """

    folder: run_folder.RunFolder
    found: dict[str, Any]
    times: list[dict[str, Any]]
    began: float
    clock: CompileClock


def run_each(
    name: str,
    config: Any,
    stages: Mapping[str, Callable[[Any], Any]],
    leave: Callable[[Path, Mapping[str, Any]], Mapping[str, int | float]],
) -> Staged:
    """Runs the stages that `config.stages` names, in the order of `stages`.

    Args:
        name: of the experiment.
        config: its options, with `stages` (none: all), `out` and `overwrite`; each stage is called with it.
        stages: by name.
        leave: `leave(path, found)`, called after each stage with all that was found so far, the newest last: writes it
            to the folder and returns numbers for the line of progress.

    Raises:
        ValueError: an unknown stage, before anything is computed.
    """
    began, clock = time.monotonic(), CompileClock()
    for stage in config.stages:
        if stage not in stages:
            raise ValueError(f"there is no stage {stage!r}; choose among {', '.join(stages)}.")
    chosen = [stage for stage in stages if not config.stages or stage in config.stages]
    folder = run_folder.create(config.out, name, config, config.overwrite)
    done = Staged(folder, {}, [], began, clock)
    with ProgressReport(name, len(chosen), seconds_between_lines=0.0) as progress:
        for stage in chosen:
            start = time.monotonic()
            done.found[stage] = stages[stage](config)
            seconds = time.monotonic() - start
            done.times.append(row(f"{stage}: time", "s", np.array([seconds])))
            progress.advance({f"{stage}: seconds": seconds, **leave(folder.path, done.found)})
    return done


def conclude(
    done: Staged,
    rows: Sequence[dict[str, Any]],
    checks: Sequence[dict[str, Any]],
    tabled: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Writes the summary, prints what no table of the experiment's own has shown yet, and returns it.

    Args:
        done: from `run_each`.
        rows: what was measured.
        checks: of the summary; the experiment's own table has shown them.
        tabled: rows that it has shown too, which come first in the summary.
    """
    every = [*tabled, *rows, *done.times]
    result = run_folder.summary(done.folder, every, checks, time.monotonic() - done.began, done.clock.seconds)
    run_folder.write_summary(done.folder, result)
    run_folder.print_summary(result | {"rows": result["rows"][len(tabled) :], "checks": []})
    return result
