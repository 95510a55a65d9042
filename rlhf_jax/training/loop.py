"""The host loop of every training script: batches in, steps, metrics, evaluations and checkpoints out.

The life of a step: a batch is taken, the compiled step is dispatched, and the loop goes on at once to the next. Only
where a line of metrics, an evaluation or a checkpoint is due does it wait for the device; there the losses of all steps
since are looked at, so that a NaN is named with the step it first appeared in and never reaches a checkpoint.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.experimental import multihost_utils

from rlhf_jax.parallel.distributed import process_count
from rlhf_jax.training.progress import ProgressReport
from rlhf_jax.training.resume import SaveStep
from rlhf_jax.training.sinks import Sinks


@runtime_checkable
class Batches(Protocol):
    """An endless or long enough iterator whose place can be written down."""

    def __next__(self) -> Any:
        """The next batch."""

    def get_state(self) -> Mapping[str, Any]:
        """The place after the last batch that was taken, as JSON values."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How long a run is, and what is done how often.

    Attributes:
        steps: number of steps of the whole run.
        log_every: steps between two lines of metrics.
        evaluate_every: steps between two evaluations; None: only the one after the last step.
        save_every: steps between two checkpoints; None: one at the end.
        save_evaluated: save a checkpoint after each evaluation too.
    """

    steps: int
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = None
    save_evaluated: bool = False


class Trained(NamedTuple):
    """What a loop gives back.

    Attributes:
        state: the state after the last step.
        first_step: when the first step of this process was done, on the clock of `time.monotonic`; None: there was no
            step left to do.
    """

    state: Any
    first_step: float | None


def run_steps(
    step: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    state: Any,
    batches: Batches,
    cadence: Cadence,
    save: SaveStep,
    sinks: Sinks,
    start: int = 0,
    evaluate: Callable[[Any, int], Mapping[str, Any]] | None = None,
    tokens: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    to_save: Callable[[Any], Any] = lambda state: state,
    description: str = "training",
    shown: tuple[str, ...] = ("loss/policy",),
) -> Trained:
    """Does the steps from `start` to `cadence.steps`.

    Metrics are those of the step they stand beside, and `time/update` (seconds a step) and
    `throughput/tokens_per_second` since the line before; compilation of the first step is not in these.

    Checkpoints are written while the next steps run. SIGTERM and Ctrl-C are obeyed after the step (and the evaluation)
    that is running: the state is saved, and a run with `--resume` goes on from there. Of several processes, all stop
    after the same step, whichever of them got the signal. A second Ctrl-C stops at once.

    Args:
        step: `step(state, batch) -> (state, metrics)`; jitted by the caller, with the state donated.
        state: the state before the first step; do not use it afterwards if `step` donates it.
        batches: where batches come from, set to the place that belongs to `start`.
        cadence: how many steps, and what is done how often.
        save: from `resume.open_checkpoints`.
        sinks: where metrics go.
        start: steps that were done before, when a run is resumed.
        evaluate: `evaluate(state, step) -> metrics`, called every `evaluate_every` steps and after the last; None:
            never.
        tokens: `tokens(batch, metrics)`: how many tokens the step trained on, a number or an array without axes; None:
            no throughput is written.
        to_save: the part of the state that a checkpoint holds.
        description: what the progress bar says.
        shown: metrics beside the progress bar; the first three that there are.

    Returns:
        The last state, and when the first step was done.

    Raises:
        ValueError: a loss or the gradient norm is NaN or infinite; the sentence names the step.
        KeyboardInterrupt: Ctrl-C, after the state was saved.
        SystemExit: with code 0: SIGTERM, after the state was saved.
    """
    first_step, numbers = None, {}
    unread: list[tuple[int, dict[str, Any]]] = []  # losses that nobody has waited for yet
    window, counted = time.monotonic(), []  # since when speed is measured, and the tokens of each step since

    def record(done: int, metrics: Mapping[str, Any]) -> None:
        sinks.write(done, metrics)
        numbers.update({name: metrics[name] for name in shown if name in metrics})

    with _interruptions() as interruption, ProgressReport(description, cadence.steps, done=start) as progress:
        for done in range(start + 1, cadence.steps + 1):
            batch = next(batches)
            state, metrics = step(state, batch)
            unread.append((done, _watched(metrics)))
            last = done == cadence.steps
            if first_step is None:
                jax.block_until_ready(metrics)
                first_step = window = time.monotonic()
            else:
                counted.append(tokens(batch, metrics) if tokens else 0)
            evaluating = evaluate is not None and (last or _due(done, cadence.evaluate_every))
            logging = last or _due(done, cadence.log_every)
            if logging or evaluating:
                check_finite(unread)
                unread.clear()
            if logging:
                metrics = jax.device_get(dict(metrics))
                record(done, metrics | _rates(time.monotonic() - window, jax.device_get(counted)))
                window, counted = time.monotonic(), []
            paused = time.monotonic()
            evaluation = evaluate(state, done) if evaluating else {}
            if evaluation:
                record(done, evaluation)
            received = interruption(done)  # asked only once: a signal from here on is obeyed after the next step
            stopping = received is not None
            if last or stopping or _due(done, cadence.save_every) or (evaluating and cadence.save_evaluated):
                check_finite(unread)
                unread.clear()
                save(done, to_save(state), batches.get_state(), evaluation, wait=stopping)
            window += time.monotonic() - paused
            progress.advance({name: numbers[name] for name in shown if name in numbers})
            if stopping:
                print(
                    f"stopped after step {done}, which is saved; the same command with --resume goes on from there",
                    flush=True,
                )
                if received == signal.SIGTERM:
                    raise SystemExit(0)
                raise KeyboardInterrupt
    return Trained(state=state, first_step=first_step)


def check_finite(losses: list[tuple[int, dict[str, Any]]]) -> None:
    """Refuses losses that are NaN or infinite.

    Args:
        losses: step number, and scalars by name, in the order of the steps.

    Raises:
        ValueError: one is not finite; the sentence names the first such step.

    Example:
        >>> check_finite([(1, {"loss/policy": 0.5}), (2, {"loss/policy": float("nan")})])
        Traceback (most recent call last):
            ...
        ValueError: loss/policy is nan at step 2: lower --learning-rate, or look at the data of that step; ...
    """
    for done, metrics in jax.device_get(losses):
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{name} is {float(value)} at step {done}: lower --learning-rate, or look at the data of that "
                    "step; checkpoints that were saved before are whole."
                )


def _watched(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics whose NaN means that training is lost."""
    return {name: value for name, value in metrics.items() if name.startswith("loss/") or name == "grad_norm"}


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _rates(seconds: float, tokens: list[Any]) -> dict[str, float]:
    """Seconds a step and tokens a second; nothing where no step was timed or no token counted."""
    if not tokens:
        return {}
    rates = {"time/update": seconds / len(tokens)}
    return rates | {"throughput/tokens_per_second": float(sum(tokens)) / seconds} if any(tokens) else rates


@contextlib.contextmanager
def _interruptions() -> Iterator[Callable[[int], int | None]]:
    """Collects SIGTERM and Ctrl-C instead of obeying them; a second Ctrl-C is obeyed at once.

    Of several processes any may get a signal. JAX itself waits for SIGTERM then, tells the others, and finds a step
    that none of them has passed; so Ctrl-C becomes a SIGTERM there.

    Only the main thread may handle signals: elsewhere nothing is collected.

    Yields:
        `interruption(done)`: after which signal all processes are to stop now; None: go on. Every process asks after
        every step.
    """
    received: list[int] = []
    several = process_count() > 1

    def interruption(done: int) -> int | None:
        if several and not multihost_utils.reached_preemption_sync_point(done):
            return None
        return received[0] if received else signal.SIGTERM if several else None

    def receive(number: int, _: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if several:
                signal.raise_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    collected = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in collected}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
