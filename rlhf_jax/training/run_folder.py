"""The folder that a run leaves behind: made before anything is computed, described by `config.json` and `summary.json`.

In short:

    folder = create(out=None, name="overoptimization", config=config)      # runs/overoptimization/2025-01-31_14-05-09
    with MetricsWriter(folder.path / "metrics.jsonl") as metrics: ...      # see metrics.py
    result = conclude(folder, rows, checks, began, compile_seconds=…)      # summary.json, and the tables
"""

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import __version__
from rlhf_jax.parallel.distributed import first_process
from rlhf_jax.parallel.meetings import on_first
from rlhf_jax.training.json_files import plain, write_json


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder and what its `config.json` says.

    Attributes:
        path: the folder; it exists and holds `config.json`.
        experiment: the name of the experiment.
        config: every option, as JSON values.
        device: `platform`, `kind` and `count` of the devices.
        started: when the run was begun, ISO 8601 with its time zone.
    """

    path: Path
    experiment: str
    config: dict[str, Any]
    device: dict[str, Any]
    started: str


def create(out: Path | str | None, name: str, config: Any, overwrite: bool = False) -> RunFolder:
    """Makes the folder of a run and writes its `config.json`; call it before anything is computed.

    Of several processes the first makes it, and all get it or the same error.

    Args:
        out: the folder; None for `runs/NAME/<time>` under the working directory.
        name: the name of the experiment.
        config: every option: a dataclass or a mapping, nested as you like.
        overwrite: whether an earlier run in `out` may be deleted. Only a folder whose `config.json` was written by this
            function is deleted from, and only once the new options are known to be writable.

    Returns:
        The folder.

    Raises:
        ValueError: an option that JSON cannot hold, a folder that is not empty, or (with `overwrite`) that is no
            earlier run. Nothing has been changed then.
    """
    return from_first(lambda: _create(out, name, config, overwrite), "making the folder of the run")


def from_first(make: Callable[[], RunFolder], name: str) -> RunFolder:
    """The folder that `make` makes or finds on the first process, on all processes; its errors too."""

    def fields() -> dict[str, Any]:
        found = make()
        return vars(found) | {"path": str(found.path)}

    known = on_first(fields, name)
    return RunFolder(**known | {"path": Path(known["path"])})


def _create(out: Path | str | None, name: str, config: Any, overwrite: bool) -> RunFolder:
    options = plain(config, "config", non_finite=str)
    path = Path("runs", name) if out is None else Path(out)
    earlier = [] if out is None else _contents_to_delete(path, overwrite)
    device = describe_device()
    record = {
        "experiment": name,
        "config": options,
        "versions": versions(),
        "device": device,
        "commit": commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    if out is None:
        path = _new_subfolder(path)
    path.mkdir(parents=True, exist_ok=True)
    for item in earlier:
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    write_json(path / "config.json", record)
    return RunFolder(path=path, experiment=name, config=options, device=device, started=record["started"])


def check_out(out: Path | str | None, overwrite: bool = False) -> None:
    """Raises the ValueError that `create` would raise for the folder, on all processes; changes nothing."""
    if out is not None:
        on_first(lambda: len(_contents_to_delete(Path(out), overwrite)), "a look at the folder of the run")


def versions() -> dict[str, str]:
    """The versions of this package, Python and the libraries that numbers depend on."""
    libraries = {
        library: importlib.metadata.version(library) for library in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    return {"rlhf_jax": __version__, "python": platform.python_version(), **libraries}


def describe_device() -> dict[str, Any]:
    """The devices JAX computes on: platform, kind (such as `NVIDIA H200`) and how many."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def commit() -> str | None:
    """The git commit that the package runs from, with `-dirty` where tracked files differ from it; None outside git."""
    repository = Path(__file__).resolve().parents[2]
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def check(name: str, value: float | bool, expected: float | bool, tolerance: float | str = 0.0) -> dict[str, Any]:
    """A check of a run, as `summary.json` holds it.

    Args:
        name: what should hold, in a few words.
        value: what the run gave.
        expected: what it is compared with.
        tolerance: the largest |value − expected| that passes; or "at least" or "at most", where `expected` is a bound.

    Returns:
        The check; a NaN never passes.

    Raises:
        ValueError: a tolerance that is neither a number ≥ 0 nor one of the two words.

    Example:
        >>> check("KL of a policy to itself", 1e-9, 0.0, tolerance=1e-6)["pass"]
        True
        >>> check("gold reward gained", 0.4, 0.5, tolerance="at least")["pass"]
        False
    """
    if tolerance == "at least":
        passed = value >= expected
    elif tolerance == "at most":
        passed = value <= expected
    elif not isinstance(tolerance, str) and tolerance >= 0:
        passed = abs(float(value) - float(expected)) <= tolerance
    else:
        raise ValueError(
            f"the tolerance of check '{name}' is {tolerance!r}: give a number ≥ 0, 'at least' or 'at most'"
        )
    return {"name": name, "value": value, "expected": expected, "tolerance": tolerance, "pass": bool(passed)}


def summary(
    folder: RunFolder,
    rows: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    total_seconds: float,
    compile_seconds: float,
) -> dict[str, Any]:
    """What a run found, in the form of `summary.json`.

    Args:
        folder: the run's folder.
        rows: measured numbers, each with `name`, `unit`, `mean`, `sd`, `n`, `ci95` (see `evaluation.statistics.row`).
        checks: from `check`.
        total_seconds: wall time of the run, compilation included.
        compile_seconds: the part of it that was compilation, see `compilation.CompileClock`.

    Returns:
        JSON values only; NaN and infinities have become None.

    Raises:
        ValueError: a row or check with other fields than these.
    """
    for kind, records, fields in (("row", rows, ROW_FIELDS), ("check", checks, CHECK_FIELDS)):
        for record in records:
            if set(record) != set(fields):
                raise ValueError(
                    f"{kind} {record.get('name')!r} has the fields {sorted(record)}; it must have {sorted(fields)}"
                )
    return plain(
        {
            "experiment": folder.experiment,
            "config": folder.config,
            "device": folder.device,
            "seconds": {"total": total_seconds, "compile": compile_seconds},
            "rows": [{field: row[field] for field in ROW_FIELDS} for row in rows],
            "checks": [{field: check[field] for field in CHECK_FIELDS} for check in checks],
        },
        "summary",
    )


ROW_FIELDS = ("name", "unit", "mean", "sd", "n", "ci95")
CHECK_FIELDS = ("name", "value", "expected", "tolerance", "pass")


def write_summary(folder: RunFolder, result: dict[str, Any]) -> Path:
    """Writes `summary.json`, whole or not at all, on the first process only, and returns its path."""
    path = folder.path / "summary.json"
    return write_json(path, result) if first_process() else path


def failed_checks(result: Mapping[str, Any]) -> list[str]:
    """The names of the checks that did not pass; a script with `--strict` exits 1 when there are any."""
    return [check["name"] for check in result["checks"] if not check["pass"]]


def print_summary(result: Mapping[str, Any]) -> None:
    """Prints the rows and checks of a summary as two tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file or a pipe is as wide as the table
        console = Console(width=140)
    seconds, device = result["seconds"], result["device"]
    title = (
        f"{result['experiment']}: {_number(seconds['total'])} s, of which {_number(seconds['compile'])} s compiling, "
        f"on {device['count']} × {device['kind']}"
    )
    rows = Table("measure", "unit", title=Text(title), title_justify="left")
    for header in ("mean", "s.d.", "n", "95 % interval"):
        rows.add_column(header, justify="right")
    for row in result["rows"]:
        interval = "–" if row["ci95"] is None else f"[{_number(row['ci95'][0])}, {_number(row['ci95'][1])}]"
        numbers = [_number(row["mean"]), _number(row["sd"]), _number(row["n"]), interval]
        rows.add_row(*map(Text, [row["name"], row["unit"], *numbers]))
    console.print(rows)
    if result["checks"]:
        checks = Table("check", "value", "expected", "tolerance", "result")
        for check in result["checks"]:
            verdict = Text("pass", style="green") if check["pass"] else Text("FAIL", style="bold red")
            numbers = [_number(check[field]) for field in ("value", "expected", "tolerance")]
            checks.add_row(*map(Text, [check["name"], *numbers]), verdict)
        console.print(checks)


def conclude(
    folder: RunFolder,
    rows: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    began: float,
    compile_seconds: float,
) -> dict[str, Any]:
    """Ends a run: its summary, written and printed.

    Args:
        folder: the run's folder.
        rows: measured numbers, see `summary`.
        checks: from `check`.
        began: when the run began, on the clock of `time.monotonic`, in seconds.
        compile_seconds: of compilation.

    Returns:
        The summary.
    """
    result = summary(folder, rows, checks, time.monotonic() - began, compile_seconds)
    write_summary(folder, result)
    print_summary(result)
    return result


def _number(value: float | int | bool | str | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _contents_to_delete(path: Path, overwrite: bool) -> list[Path]:
    """What an earlier run left in a folder, `config.json` last so that a deletion cut short can be taken up again."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose another folder for the run")
    contents = sorted(path.iterdir(), key=lambda item: item.name == "config.json") if path.is_dir() else []
    if contents and not overwrite:
        raise ValueError(
            f"the folder {path} is not empty: choose another with --out, or replace its run with --overwrite"
        )
    if contents and not _is_a_run(path):
        raise ValueError(
            f"the folder {path} holds no run of rlhf_jax, so it is not overwritten: choose another with --out"
        )
    return contents


def _is_a_run(path: Path) -> bool:
    try:
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return "rlhf_jax" in record["versions"] and "experiment" in record
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _new_subfolder(parent: Path) -> Path:
    """A folder that did not exist, named by the local time; a second run within the second gets a number."""
    parent.mkdir(parents=True, exist_ok=True)
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        path = parent / (time if number == 1 else f"{time}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
