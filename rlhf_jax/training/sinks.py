"""Where the metrics of a run go: `metrics.jsonl` always, TensorBoard and Weights & Biases beside it when asked for."""

import hashlib
import importlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from rlhf_jax.parallel.distributed import first_process
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.run_folder import RunFolder


@runtime_checkable
class Sink(Protocol):
    """Anything that takes a step's metrics."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the scalars of a step by name."""

    def close(self) -> None:
        """Writes out what is still held back."""


class Sinks:
    """Hands every step's metrics, fetched from the device once, to any number of sinks; use it in a `with` block."""

    def __init__(self, *sinks: Sink):
        self._sinks = sinks

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the scalars of a step by name in every sink, in the order given."""
        if not self._sinks:
            return
        fetched = jax.device_get(dict(metrics))
        ordered = {name: fetched[name] for name in metrics}
        for sink in self._sinks:
            sink.write(step, ordered)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, folder: RunFolder, start: int):
        from tensorboardX import SummaryWriter

        # A resumed run takes back what an interrupted one showed after its last checkpoint.
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: RunFolder, project: str):
        import wandb

        # One folder is one run there too, however often it is resumed.
        identity = hashlib.sha256(f"{folder.path.absolute()} {folder.started}".encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project,
            name=folder.path.name,
            group=folder.experiment,
            config=folder.config,
            dir=str(folder.path),
            id=identity,
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers; a name or a None has no place on a curve."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float | np.number | np.ndarray) and np.ndim(value) == 0
    }


def check_sinks(tensorboard: bool, wandb: str | None) -> None:
    """Refuses a sink whose library is not installed, before anything is computed.

    Raises:
        ValueError: the library is missing; the sentence holds the command that installs it.
    """
    asked = [("tensorboardX", "--tensorboard", tensorboard), ("wandb", "--wandb", wandb is not None)]
    for library, option, wanted in asked:
        if wanted:
            try:
                importlib.import_module(library)
            except ImportError:
                raise ValueError(
                    f"{option} needs {library}, which is not installed: run `pip install {library}`."
                ) from None


def open_sinks(folder: RunFolder, tensorboard: bool = False, wandb: str | None = None, start: int = 0) -> Sinks:
    """Opens the sinks of a run: on the first of several processes; the others write nothing.

    Args:
        folder: the run's folder; `metrics.jsonl` and `tensorboard/` lie there.
        tensorboard: whether to write files for TensorBoard.
        wandb: project of Weights & Biases to log to (`WANDB_MODE=offline` logs to the folder); None: do not.
        start: the step that a resumed run goes on from; 0 for a new one.

    Returns:
        The sinks; closed by leaving their `with` block.

    Raises:
        ValueError: as `check_sinks`.
    """
    check_sinks(tensorboard, wandb)
    if not first_process():
        return Sinks()
    sinks: list[Sink] = [MetricsWriter(folder.path / "metrics.jsonl")]
    if tensorboard:
        sinks.append(_TensorBoard(folder, start))
    if wandb is not None:
        sinks.append(_WeightsAndBiases(folder, wandb))
    return Sinks(*sinks)
