"""How far a loop is, how fast, and the few numbers that matter: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_jax.parallel.distributed import first_process


class ProgressReport:
    """Reports on a loop of known length; use it in a `with` block and call `advance` once a step.

    Args:
        description: what the loop does.
        total: number of steps.
        seconds_between_lines: where the output is no terminal, the least time between two lines, in seconds; the last
            step is always reported.
        console: where to report; by default the standard output of the first process.
        done: steps that an earlier run has done already.

    Example:
        >>> with ProgressReport("PPO", total=2, seconds_between_lines=60.0) as progress:
        ...     for step in range(2):
        ...         progress.advance({"objective/kl": 0.5 * step})
        PPO 2/2, ... steps/s, objective/kl 0.5
    """

    def __init__(
        self,
        description: str,
        total: int,
        seconds_between_lines: float = 10.0,
        console: Console | None = None,
        done: int = 0,
    ):
        self._description = description
        self._total = total
        self._seconds_between_lines = seconds_between_lines
        self._console = console or Console(quiet=not first_process())
        self._done = self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if self._console.is_terminal:
            columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
            columns += [TextColumn("{task.fields[details]}", markup=False), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(description, total=total, completed=done, details="")

    def advance(self, numbers: Mapping[str, Any] | None = None, steps: int = 1) -> None:
        """Counts steps as done and shows up to three numbers by name (scalars; reading them waits for the device)."""
        self._done += steps
        now = time.monotonic()
        last = self._done >= self._total
        if not (self._bar or last or now - self._last_line >= self._seconds_between_lines):
            return
        self._last_line = now
        rate = (self._done - self._done_before) / max(now - self._started, 1e-9)
        shown = [f"{name} {float(value):.4g}" for name, value in list((numbers or {}).items())[:3]]
        details = ", ".join([f"{rate:.3g} steps/s", *shown])
        if self._bar:
            self._bar.update(self._task, completed=self._done, details=details)
        else:
            line = f"{self._description} {self._done}/{self._total}, {details}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "ProgressReport":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
