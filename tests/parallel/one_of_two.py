"""One of two processes: run by `test_distributed.py` as a command, with the options of `Distributed` and a folder."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.parallel import meetings
from rlhf_jax.parallel.distributed import Distributed, first_process, initialise, printing_first, process_count
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.progress import ProgressReport
from rlhf_jax.training.samples import write_samples
from rlhf_jax.training.sinks import open_sinks


@dataclasses.dataclass(frozen=True)
class Config(Distributed):
    """Options of the process.

    Attributes:
        preset: where to start from.
        folder: where it writes.
    """

    preset: str = "only"
    folder: Path = Path()


def meet(number: int) -> dict:
    """What this process learns from the other."""
    spread = meetings.over_processes(
        lambda prompts, lengths: [len(p) + n + number / 2 for p, n in zip(prompts, lengths, strict=True)]
    )
    return {
        "processes": process_count(),
        "devices": [len(jax.devices()), len(jax.local_devices())],
        "exchanged": meetings.exchanged({"process": number}, "the numbers"),
        "on first": meetings.on_first(lambda: ["from", number], "a value"),
        "spread": spread(["a", "bb", "ccc"], lengths=[10, 20, 30]),
        "spread over few": spread(["a"], lengths=[1]),
        "errors": [
            error_of(lambda: meetings.on_first(lambda: 1 // 0, "a division")),
            error_of(lambda: meetings.together(lambda: {"one": 1}[["one", "two"][number]], "a look")),
            error_of(lambda: meetings.exchanged(None, f"place {number}")),
            error_of(lambda: meetings.barrier("the late one", 0.3 if number == 0 else 60.0), late=number * 1.5),
        ],
    }


def error_of(work, late: float = 0.0) -> str:
    time.sleep(late)
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def gather() -> dict:
    """Whether arrays that lie on both processes come back whole."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    whole = np.arange(13 * 16, dtype=np.float32).reshape(13, 16)

    def on_mesh(*axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    arrays = {"columns": on_mesh(None, ("data", "fsdp")), "copies": on_mesh(), "here": jax.numpy.asarray(whole)}
    found = {"one piece": meetings.gathered(arrays)}
    with pieces_of(whole.nbytes // 3):
        found["several pieces"] = meetings.gathered(arrays)
        on_first = meetings.gathered(arrays, everywhere=False)
    if first_process():
        found["on the first"] = on_first
    wrong = {
        name: [key for key, array in tree.items() if not np.array_equal(array, whole)] for name, tree in found.items()
    }
    return {"wrong": wrong, "first only": {name: array is not None for name, array in on_first.items()}}


@contextlib.contextmanager
def pieces_of(size: int):
    before, meetings.LARGEST_PIECE_BYTES = meetings.LARGEST_PIECE_BYTES, size
    yield
    meetings.LARGEST_PIECE_BYTES = before


def main(config: Config) -> dict:
    initialise(config)
    number = jax.process_index()
    learned = {**meet(number), **gather()}
    with printing_first():
        folder = run_folder.create(config.folder / "run", "two", {"process": number})
        again = run_folder.from_first(lambda: folder, "the same folder")
        print(f"writing to {folder.path}", flush=True)
        with open_sinks(folder) as sinks:
            sinks.write(1, {"loss": 0.5, "process": number})
        write_samples(folder.path / "samples.md", f"From {number}", [])
        run_folder.write_summary(folder, {"process": number})
        with ProgressReport("counting", 1) as progress:
            progress.advance()
    learned |= {"folder": [str(folder.path), folder.config], "same": again == folder}
    meetings.barrier("all files are written")
    learned["files"] = sorted(path.name for path in folder.path.iterdir())
    (config.folder / f"learned_{number}.json").write_text(json.dumps(learned))
    run_folder.create(config.folder / "run", "two", {})  # refused: the folder is not empty
    return {}


if __name__ == "__main__":
    run(main, {"only": Config()}, __doc__)
