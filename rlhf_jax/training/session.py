"""One run of a training script from its folder to its summary: what all of them have in common.

folder = open_run(options, "sft")
trained = train(options, folder, algorithm.update, state, batches, steps, evaluate, tokens)
result = finish(folder, trained, rows, checks, began, clock, panels)
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.parallel.meetings import on_first
from rlhf_jax.training import run_folder
from rlhf_jax.training.checkpoints import shapes_of
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.curves import training_curves
from rlhf_jax.training.loop import Batches, Cadence, Trained, run_steps
from rlhf_jax.training.metrics import cut_metrics, read_metrics
from rlhf_jax.training.options import SourceOptions, TrainingOptions, check_options
from rlhf_jax.training.resume import newest, open_checkpoints, parse_best, reopen, saved_steps
from rlhf_jax.training.run_folder import RunFolder
from rlhf_jax.training.sinks import check_sinks, open_sinks

# Parts of a state that no step changes; they come from the model's folder again when a run is resumed.
FROZEN = ("base", "reference")


def check_run(options: SourceOptions, name: str) -> None:
    """Refuses, before a model or data are read, options and folders that cannot be used; changes nothing.

    Args:
        options: the options.
        name: the name of the experiment.

    Raises:
        ValueError: the sentence names the option or the folder.
    """
    check_options(options)
    if isinstance(options, TrainingOptions):
        check_sinks(options.tensorboard, options.wandb)
    if options.resume:
        _reopened(options, name)
        return
    run_folder.check_out(options.out, options.overwrite)
    if options.out is not None:
        _check_inputs_survive(options)


def _check_inputs_survive(options: SourceOptions) -> None:
    """Raises ValueError where a file or folder to read lies in the folder of the earlier run, which is deleted."""
    out = options.out.resolve()
    for name, value in vars(options).items():
        for path in value if isinstance(value, tuple) else (value,):
            if name != "out" and isinstance(path, str | Path) and Path(path).exists():
                place = Path(path).resolve()
                if place.is_relative_to(out):
                    raise ValueError(
                        f"--{name.replace('_', '-')} {path} lies in --out {options.out}, which --overwrite deletes: "
                        "choose another folder for the run."
                    )


def open_run(options: SourceOptions, name: str) -> RunFolder:
    """Makes the run's folder, or with `--resume` takes up the one that is there.

    Call it when all that the run needs has been read: what is wrong then leaves no folder behind.

    Raises:
        ValueError: the folder cannot be used.
    """
    if options.resume:
        return _reopened(options, name)
    folder = run_folder.create(options.out, name, options, options.overwrite)
    print(f"writing to {folder.path}", flush=True)
    return folder


def _reopened(options: SourceOptions, name: str) -> RunFolder:
    """The folder of the interrupted run, as the first process finds it."""
    return run_folder.from_first(lambda: reopen(options.out, name, options), "a look at the run to resume")


def adapter_of(options: TrainingOptions) -> AdapterConfig | None:
    """The adapter that the options ask for; None: the whole model is trained."""
    if options.adapter is None:
        return None
    return AdapterConfig(kind=options.adapter, targets=options.targets, rank=options.rank, alpha=options.alpha)


def train(
    options: TrainingOptions,
    folder: RunFolder,
    step: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    state: Any,
    batches: Batches,
    steps: int,
    evaluate: Callable[[Any, int], Mapping[str, Any]],
    tokens: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    shown: tuple[str, ...] = ("loss/policy",),
) -> Trained:
    """Trains from the start, or with `--resume` from the newest checkpoint; see `loop.run_steps`.

    Args:
        options: the options.
        folder: the run's folder; checkpoints and metrics go there.
        step: `step(state, batch) -> (state, metrics)`; compiled by the caller.
        state: the initial state, a dataclass. If `step` donates it, neither it nor what it was made of can be used
            again; nor can they be with `--resume`, where it is freed before another state is read in its place.
        batches: an iterator at its beginning.
        steps: number of updates.
        evaluate: `evaluate(state, step) -> metrics`; always called for the initial state (step 0) and the last one.
        tokens: `tokens(batch, metrics)`: how many tokens a step trained on, a number or an array without axes.
        shown: metrics beside the progress bar.

    Returns:
        The last state, and when the first step was done.

    Raises:
        ValueError: the loss is NaN, no checkpoint can be read, model or data are not those that the run began with, or
            no evaluation has the metric of `--keep-best`.
    """
    checkpoints, metrics = folder.path / "checkpoints", folder.path / "metrics.jsonl"
    at_start, start = evaluate(state, 0), 0
    best = None if options.keep_best is None else parse_best(options.keep_best)
    if best is not None and best.metric not in at_start:
        raise ValueError(
            f"no evaluation measures the {best.metric!r} of --keep-best: choose one of {', '.join(sorted(at_start))}."
        )
    if options.resume:
        if saved_steps(checkpoints):
            on_first(lambda: check_start(metrics, at_start), "the comparison with the run that was interrupted")
            like = shapes_of(without_frozen(state))
            _free(without_frozen(state), beside=state)
            found = newest(checkpoints, like)
            state, start = with_frozen(found.state, state), found.step
            batches.set_state(found.data)
        on_first(lambda: cut_metrics(metrics, start if start else -1), "cutting metrics.jsonl")
        print(f"resuming after step {start} of {steps}", flush=True)
    with (
        open_sinks(folder, options.tensorboard, options.wandb, start) as sinks,
        open_checkpoints(checkpoints, folder.config, best) as save,
    ):
        if start == 0:
            sinks.write(0, at_start)
        trained = run_steps(
            step,
            state,
            batches,
            Cadence(steps, options.log_every, options.evaluate_every, options.save_every, best is not None),
            save,
            sinks,
            start,
            evaluate,
            tokens,
            to_save=without_frozen,
            description=folder.experiment,
            shown=shown,
        )
    if start == steps:
        evaluate(trained.state, steps)
    return trained


def check_start(path: Path, at_start: Mapping[str, Any]) -> None:
    """Refuses to resume from another model or other data than the run began with (their folder was written anew, say).

    Args:
        path: the `metrics.jsonl` of the run; its line of step 0 holds the first evaluation.
        at_start: the first evaluation, made again; floats of another device differ by less than a hundredth.

    Raises:
        ValueError: the two differ; the sentence names the metric.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 0, "eval/nll": 1.5}' + chr(10))
        >>> check_start(path, {"eval/nll": 1.5001})
        >>> check_start(path, {"eval/nll": 2.0})
        Traceback (most recent call last):
            ...
        ValueError: eval/nll was 1.5 when the run began and is 2.0 now: ...
    """
    line = next((line for line in read_metrics(path) if line["step"] == 0), {})
    for name in line.keys() & at_start.keys():
        before, now = line[name], float(at_start[name])
        if before is not None and not math.isclose(before, now, rel_tol=1e-2, abs_tol=1e-3):
            raise ValueError(
                f"{name} was {before:.6} when the run began and is {now:.6} now: the model or the data are others; "
                "give those of the interrupted run, or begin anew with --overwrite."
            )


def without_frozen(state: Any) -> Any:
    """The part of a state that a checkpoint holds: frozen fields, also those of states within it, are None."""
    return _map_frozen(lambda _: None, state, state)


def _free(tree: Any, beside: Any) -> None:
    """Frees the arrays of a tree, but for those that stand at another place of the tree `beside` too."""
    places = Counter(id(leaf) for leaf in jax.tree.leaves(beside))
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and places[id(leaf)] == 1:
            leaf.delete()


def with_frozen(saved: Any, state: Any) -> Any:
    """A state that `without_frozen` made, with the frozen fields of another one of its kind."""
    return _map_frozen(lambda frozen: frozen, saved, state)


def _map_frozen(change: Callable[[Any], Any], state: Any, other: Any) -> Any:
    """The state with `change(field)` of the other state's frozen fields in place of its own."""
    if not dataclasses.is_dataclass(state):
        return state
    fields = {}
    for field in dataclasses.fields(state):
        own, others = getattr(state, field.name), getattr(other, field.name)
        fields[field.name] = change(others) if field.name in FROZEN else _map_frozen(change, own, others)
    return state.replace(**fields)


def finish(
    folder: RunFolder,
    trained: Trained,
    rows: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    began: float,
    clock: CompileClock,
    panels: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Draws the curves, and writes and prints the summary; the first of several processes does, and all get it.

    Args:
        folder: the run's folder.
        trained: what `train` returned.
        rows: what was measured, see `run_folder.summary`; speed and the time to the first step are added.
        checks: what must hold.
        began: when the work began, see `command_line.started`.
        clock: counts compilation since then.
        panels: metrics to draw, see `curves.training_curves`.

    Returns:
        The summary.
    """

    def write() -> dict[str, Any]:
        metrics = folder.path / "metrics.jsonl"
        training_curves(metrics, panels, folder.path / "figures" / "training.png")
        speed, measured = "throughput/tokens_per_second", list(rows)
        speeds = [line[speed] for line in read_metrics(metrics) if speed in line]
        if speeds:
            measured.append(row("tokens trained on a second, over the lines of metrics.jsonl", "1/s", np.array(speeds)))
        if trained.first_step is not None:
            measured.append(row("from the command to the first step", "s", np.array([trained.first_step - began])))
        return run_folder.conclude(folder, measured, checks, began, clock.seconds)

    return on_first(write, "the summary of the run")
