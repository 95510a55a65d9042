"""The metrics of a run: one JSON object a logged step, in a file whose lines survive an interrupted run."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from rlhf_jax.parallel.distributed import first_process
from rlhf_jax.training.json_files import plain


class MetricsWriter:
    """Appends one line a step to a file and hands each line to the operating system at once.

    A file that exists is continued; a last line that an interrupted run left unfinished is cut off first.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsWriter(path) as metrics:
        ...     metrics.write(1, {"objective/kl": 0.25, "objective/gold": float("nan")})
        >>> print(path.read_text().strip())
        {"step": 1, "objective/kl": 0.25, "objective/gold": null}
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if self.path.exists():
            complete, newline, unfinished = self.path.read_bytes().rpartition(b"\n")
            if unfinished:
                self.path.write_bytes(complete + newline)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one object: `step`, then the metrics in the order given.

        Args:
            step: the step that the metrics describe.
            metrics: Python, numpy or JAX scalars by name (strings and booleans too, such as a method's name); NaN and
                infinities are written as null. Values on a device are fetched together.

        Raises:
            ValueError: a metric that is an array of more than one number, or is named `step`.
        """
        if "step" in metrics:
            raise ValueError("a metric is named 'step', which every line holds already: give it another name")
        record = {"step": int(step)}
        fetched = jax.device_get(dict(metrics))
        for name in metrics:
            value = fetched[name]
            if np.ndim(value) != 0:
                raise ValueError(f"metric '{name}' has shape {np.shape(value)}: write one number, such as its mean")
            record[name] = plain(value, f"metric '{name}'")
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; a `with` block does so by itself."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def cut_metrics(path: Path | str, step: int) -> None:
    """Takes out of a `metrics.jsonl` what was written after `step`: a resumed run will write it again.

    The file is replaced whole, by the first of several processes; one that is not there is left so.
    """
    path = Path(path)
    if first_process() and path.exists():
        complete, _, _ = path.read_bytes().rpartition(b"\n")
        kept = [line for line in complete.splitlines(keepends=True) if json.loads(line)["step"] <= step]
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(b"".join(kept).rstrip(b"\n") + b"\n" * bool(kept))
        temporary.replace(path)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, in order; a last line that is still being written is left out."""
    complete, _, _ = Path(path).read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in complete.splitlines()]
