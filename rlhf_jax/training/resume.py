"""What an interrupted run needs to go on as if nothing had happened: the whole state, and the place in the data.

    OUT/checkpoints/step_00000200/state    every array: parameters, optimiser, keys, counters
    OUT/checkpoints/step_00000200/run      JSON: the step, the place of the data iterator, the options
    OUT/checkpoints/step_00000200/metrics  JSON: its evaluation, with `--keep-best`

They are written while training goes on, and appear only when they are complete. The newest two are kept, and the best
if that is asked for. If the newest is damaged (a failing disk, a copy cut short), the one before serves.
"""

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_jax.parallel.meetings import exchanged, on_first
from rlhf_jax.training import checkpoints
from rlhf_jax.training.json_files import plain
from rlhf_jax.training.run_folder import RunFolder, describe_device

NEWEST = 2
"""How many checkpoints are kept, the best not counted."""

LONGEST_WRITE_SECONDS = 7200
"""After this time a checkpoint that is still being written counts as failed."""

SAME_RUN = (
    *("resume", "overwrite", "strict", "tensorboard", "wandb", "out", "save_every", "keep_best"),
    *("mesh", "mesh_between", "split_optimizer", "offload_reference", "accumulate", "attention", "remat"),
    *("coordinator", "processes", "process_id", "startup_seconds"),
)
"""Options that may differ when a run is taken up again: they change none of its numbers, or by rounding only."""


class Checkpoint(NamedTuple):
    """A state that was read back.

    Attributes:
        step: number of steps it has seen.
        state: the state.
        data: what the data iterator's `get_state` gave then.
    """

    step: int
    state: Any
    data: Any


class Best(NamedTuple):
    """Which checkpoint is the best one.

    Attributes:
        metric: name of a metric of the evaluations.
        direction: whether its smallest or its largest value is the best.
    """

    metric: str
    direction: Literal["min", "max"]


SaveStep = Callable[..., None]
"""`save(step, state, data, metrics={}, wait=False)`, see `open_checkpoints`."""


def parse_best(words: str) -> Best:
    """Reads `min:METRIC` or `max:METRIC`.

    Raises:
        ValueError: it is neither.

    Example:
        >>> parse_best("min:eval/nll")
        Best(metric='eval/nll', direction='min')
    """
    direction, _, metric = words.partition(":")
    if direction not in ("min", "max") or not metric:
        raise ValueError(
            f"--keep-best is {words!r}: write min: or max: and a metric of the evaluations, such as min:eval/nll."
        )
    return Best(metric, direction)


@contextlib.contextmanager
def open_checkpoints(
    folder: Path | str, config: Mapping[str, Any] | None = None, best: Best | None = None
) -> Iterator[SaveStep]:
    """Gives the function that saves the steps of a run; what is being written is completed when the block is left.

    A call returns as soon as the arrays are copied to the host, so that the next step may overwrite them; if the
    checkpoint before is still being written, it waits for that. An older one is deleted only when the new one is
    complete. Of a run of several processes, all save the same steps.

    Args:
        folder: where the checkpoints of the run lie. What an interrupted save left there is removed.
        config: the options of the run, as JSON values.
        best: of the checkpoints saved with this metric, the best is kept too; ties go to the newer one.

    Yields:
        `save(step, state, data, metrics={}, wait=False)`: the number of steps done, a pytree of arrays and numbers, the
        place of the data iterator as JSON values, the evaluation of this very state if there is one, and whether to
        return only when all is written.

    Raises:
        OSError: a checkpoint cannot be written; it is raised by the next call, or when the block is left.
    """
    import orbax.checkpoint as orbax
    from orbax.checkpoint import checkpoint_managers as policies

    def score(metrics: Mapping[str, float]) -> float:
        value = metrics.get(best.metric, math.nan)
        if math.isnan(value):
            return -math.inf
        return value if best.direction == "max" else -value

    kept = [policies.LatestN(NEWEST)]
    if best is not None:
        kept.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
    options = orbax.CheckpointManagerOptions(
        step_prefix="step",
        step_format_fixed_length=8,
        save_root_metadata=False,
        cleanup_tmp_directories=True,
        best_fn=None if best is None else score,
        preservation_policy=policies.AnyPreservationPolicy(kept),
        async_options=orbax.AsyncOptions(timeout_secs=LONGEST_WRITE_SECONDS),
    )
    manager = orbax.CheckpointManager(Path(folder).absolute(), options=options)
    # The loop asks JAX for the step to stop at. Orbax would too, later and for an earlier step, and confuse the answer.
    manager.reached_preemption = lambda step: False

    def save(step: int, state: Any, data: Any, metrics: Mapping[str, Any] | None = None, wait: bool = False) -> None:
        run = {"step": step, "data": plain(data, "the data iterator's state"), "config": config}
        state = orbax.args.StandardSave(checkpoints.writable(state))
        items = orbax.args.Composite(state=state, run=orbax.args.JsonSave(run))
        evaluation = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        with _complaining(folder):
            manager.save(step, args=items, metrics=evaluation, force=True)
            if wait:
                manager.wait_until_finished()

    try:
        yield save
    finally:
        with _complaining(folder):
            manager.close()


def saved_steps(folder: Path | str) -> list[Path]:
    """The checkpoints of a run, newest first, damaged ones included."""
    found = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def newest(folder: Path | str, like: Any) -> Checkpoint | None:
    """The newest checkpoint that can be read; call it before `open_checkpoints`.

    A damaged one is passed over with a warning. Once a good one is found, damaged ones are renamed to `damaged_step_…`:
    they neither stand in the way of the steps that are done again, nor count among those that are kept. Older ones than
    the good one are left alone; one of them may be half deleted, if the run was killed just then. Of a run of several
    processes all read the same one.

    Args:
        folder: where `open_checkpoints` wrote.
        like: a state of the same structure, shapes and dtypes, or its shapes; see `checkpoints.restore`.

    Returns:
        The checkpoint, or None where there is none yet.

    Raises:
        ValueError: all checkpoints are damaged, or they hold another state than `like`.
    """
    found, damaged = None, []
    for path in saved_steps(folder):
        checkpoint, reason = None, None
        try:
            _check_metrics(path)  # Orbax will read those of all
            checkpoint = None if found else _read(path, like)
        except checkpoints.DamagedCheckpointError as error:
            reason = str(error)
        reason = next(filter(None, exchanged(reason, f"reading {path}")), None)
        if reason is None:
            found = found or checkpoint
        else:
            damaged.append(path)
            warnings.warn(f"the checkpoint {path} is damaged and passed over: {reason}", stacklevel=2)
    if damaged and found is None:
        raise ValueError(f"all checkpoints in {folder} are damaged: start again with --overwrite instead of --resume")
    on_first(lambda: _set_aside(damaged), "setting damaged checkpoints aside")
    return found


def reopen(out: Path | str | None, name: str, config: Any, same_run: Collection[str] = SAME_RUN) -> RunFolder:
    """The folder of an interrupted run, to go on in; call it instead of `run_folder.create`.

    Args:
        out: the folder.
        name: the name of the experiment.
        config: the options given now.
        same_run: options that may differ from those that the run was started with.

    Returns:
        The folder, with the options that stand in its `config.json`.

    Raises:
        ValueError: there is no such run, it is of another experiment, or it was started with other options.
    """
    if out is None:
        raise ValueError("--resume needs --out FOLDER, the folder of the run that was interrupted")
    path = Path(out)
    try:
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
        experiment, before = record["experiment"], record["config"]
        started = record["started"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no run to resume: leave out --resume to start one there") from None
    if experiment != name:
        raise ValueError(f"{path} holds a run of {experiment}, not of {name}: give the folder of the run to resume")
    now = plain(config, "config", non_finite=str)
    other = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    other = [key for key in other if key not in same_run]
    if other:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in other)
        raise ValueError(
            f"the run in {path} was started with other options ({changes}): give the same ones to --resume"
        )
    return RunFolder(path=path, experiment=name, config=before, device=describe_device(), started=started)


@contextlib.contextmanager
def _complaining(folder: Path | str) -> Iterator[None]:
    """One sentence for the many errors of a file system that cannot be written to."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"a checkpoint could not be written to {folder} ({reason}): see that there is room, and go on with "
            "--resume; checkpoints that were saved before are whole."
        ) from error


def _read(path: Path, like: Any) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        DamagedCheckpointError: something is missing or cannot be read.
        ValueError: it is of another state than `like`.
    """
    try:
        if not json.loads((path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))["commit_timestamp_nsecs"]:
            raise ValueError("it was never completed")
        run = json.loads((path / "run" / "metadata").read_text(encoding="utf-8"))
        step, data = run["step"], run["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checkpoints.DamagedCheckpointError(f"{type(error).__name__}: {error}") from error
    return Checkpoint(step, checkpoints.restore(path / "state", like), data)


def _check_metrics(path: Path) -> None:
    """Raises DamagedCheckpointError if there are metrics that cannot be read."""
    file = path / "metrics" / "metrics"
    try:
        if file.exists():
            json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise checkpoints.DamagedCheckpointError(f"{type(error).__name__}: {error}") from error


def _set_aside(damaged: list[Path]) -> None:
    """Renames folders of damaged checkpoints."""
    for path in damaged:
        aside, number = path.with_name(f"damaged_{path.name}"), 1
        while aside.exists():
            aside, number = path.with_name(f"damaged_{path.name}-{number}"), number + 1
        path.rename(aside)
