"""Several processes: how they start, what they tell one another, what only the first writes, and what is said of one
that does not come."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.parallel import distributed, meetings
from rlhf_jax.parallel.distributed import Distributed, initialise

SCRIPT = Path(__file__).parent / "one_of_two.py"
OF_SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def start(folder: Path, port: int, process: int, startup_seconds: int = 60) -> subprocess.Popen:
    options = {"coordinator": f"127.0.0.1:{port}", "processes": 2, "process-id": process, "folder": folder}
    options["startup-seconds"] = startup_seconds
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(SCRIPT), *words], env=environment, cwd=folder, **pipes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes that met: what each learned, its exit code, what it printed and its errors, and their folder."""
    folder, port = tmp_path_factory.mktemp("pair"), free_port()
    running = [start(folder, port, process) for process in (0, 1)]
    printed = [process.communicate(timeout=120) for process in running]
    learned = [folder / f"learned_{process}.json" for process in (0, 1)]
    assert all(path.exists() for path in learned), printed
    return folder, [json.loads(path.read_text()) for path in learned], [p.returncode for p in running], printed


def test_two_processes_tell_one_another_what_they_know(pair):
    _, learned, _, _ = pair
    for found in learned:
        assert found["processes"] == 2 and found["devices"] == [8, 4]
        assert found["exchanged"] == [{"process": 0}, {"process": 1}]
        assert found["on first"] == ["from", 0]


def test_each_process_calls_a_function_for_its_own_rows(pair):
    for found in pair[1]:
        assert found["spread"] == [11.0, 22.5, 33.0]  # process 1, which adds a half, had the second row
        assert found["spread over few"] == [2.0]


def test_an_error_of_one_process_is_an_error_of_both(pair):
    first, second = (found["errors"] for found in pair[1])
    assert first[0] == "ZeroDivisionError: integer division or modulo by zero"
    assert second[0] == "ValueError: a division failed with ZeroDivisionError: integer division or modulo by zero"
    assert (first[1], second[1]) == ("ValueError: a look failed with KeyError: 'two'", "KeyError: 'two'")


def test_processes_at_different_places_and_one_that_does_not_come_are_named(pair):
    first, second = (found["errors"] for found in pair[1])
    assert first[2] == "RuntimeError: processes are at different places of the program: one at place 0, one at place 1."
    assert second[2].endswith("one at place 1, one at place 0.")
    assert first[3].startswith(
        "TimeoutError: process 1 of 2 (numbered from 0) did not come to the meeting of all processes"
    )
    assert "for the late one within 0.3 s" in first[3] and second[3] != "none"


def test_arrays_that_lie_on_both_processes_are_gathered(pair):
    first, second = pair[1]
    assert not any(names for found in (first, second) for names in found["wrong"].values())
    assert all(first["first only"].values()) and not any(second["first only"].values())


def test_only_the_first_process_writes_and_prints(pair):
    folder, learned, _, printed = pair
    run = folder / "run"
    for found in learned:
        assert found["folder"] == [str(run), {"process": 0}] and found["same"]
        assert found["files"] == ["config.json", "metrics.jsonl", "samples.md", "summary.json"]
    assert (run / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5, "process": 0}\n'
    assert (run / "samples.md").read_text().startswith("# From 0")
    assert json.loads((run / "summary.json").read_text()) == {"process": 0}
    (out, _), (other_out, _) = printed
    assert f"writing to {run}" in out and "counting 1/1" in out
    assert "writing" not in other_out and "counting" not in other_out


def test_a_mistake_of_the_user_ends_both_processes_with_the_same_sentence(pair):
    folder, _, codes, printed = pair
    for code, (_, errors) in zip(codes, printed, strict=True):
        assert code == 2
        assert f"error: the folder {folder / 'run'} is not empty" in errors and "Traceback" not in errors


def test_a_process_that_is_missing_at_the_start_is_reported_with_the_address(tmp_path):
    ports = [free_port(), free_port()]
    alone = [start(tmp_path, port, process, startup_seconds=2) for process, port in enumerate(ports)]
    errors = [process.communicate(timeout=60)[1] for process in alone]
    assert [process.returncode for process in alone] == [2, 2]
    assert (
        f"error: fewer than 2 processes came to process 0 at 127.0.0.1:{ports[0]} within 2 s: see that all" in errors[0]
    )
    assert f"error: process 1 of 2 did not reach process 0 at 127.0.0.1:{ports[1]} within 2 s: see that" in errors[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (Distributed(processes=2), "--coordinator, --process-id must be given too: no cluster says"),
        (Distributed(coordinator="10.0.0.1:8476", process_id=0), "--processes must be given too"),
        (Distributed(coordinator="10.0.0.1"), "--coordinator is '10.0.0.1': give HOST:PORT"),
        (Distributed(processes=0), "--processes is 0: give 1 or more"),
        (Distributed(process_id=-1), "--process-id is -1: give 0 or more"),
        (Distributed(startup_seconds=0), "--startup-seconds is 0: give 1 or more"),
        (Distributed("10.0.0.1:8476", 2, 1), "JAX was used before the processes were connected"),
    ],
)
def test_options_that_cannot_work_are_refused(options, sentence):
    jax.devices()
    with pytest.raises(ValueError, match=sentence):
        initialise(options)


def test_a_cluster_is_asked_unless_one_process_is_wanted(monkeypatch):
    jax.devices()
    for name, value in (OF_SLURM | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="JAX was used before"):  # so it would have connected
        initialise()
    initialise(Distributed(processes=1))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1")
    with pytest.raises(ValueError, match=r"--coordinator is '10.0.0.1': give HOST:PORT"):
        initialise()
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    initialise()


def test_what_a_cluster_says_completes_what_is_given(monkeypatch):
    for name, value in (OF_SLURM | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    found = distributed._completed(Distributed(startup_seconds=7))
    assert found.coordinator.startswith("node01:") and (found.processes, found.process_id) == (2, 1)
    given = Distributed(coordinator="10.0.0.1:8476", process_id=0)
    assert distributed._completed(given) == Distributed("10.0.0.1:8476", 2, 0)
    monkeypatch.setenv("SLURM_NTASKS", "two")
    with pytest.raises(ValueError, match=r"the cluster does not say who takes part in this run .*give --coordinator"):
        initialise()


def test_a_run_of_one_process_is_left_as_it_is(capsys):
    initialise()
    assert distributed.first_process() and distributed.process_count() == 1
    kept = object()
    assert meetings.on_first(lambda: kept, "work") is kept
    with pytest.raises(ZeroDivisionError):
        meetings.together(lambda: 1 // 0, "a division")
    meetings.barrier("nobody", 0.1)
    with distributed.printing_first():
        print("printed")
    assert capsys.readouterr().out == "printed\n"
    began = time.monotonic()
    with pytest.raises(SystemExit) as left:
        distributed.leave(3)
    assert left.value.code == 3 and time.monotonic() - began < 1.0


def test_arrays_on_the_devices_of_one_process_are_gathered():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(np.arange(16.0, dtype=np.float32), NamedSharding(mesh, PartitionSpec("data")))
    found = meetings.gathered({"split": split, "number": 3, "none": None})
    np.testing.assert_array_equal(found["split"], np.arange(16.0, dtype=np.float32))
    assert isinstance(found["split"], np.ndarray) and found["number"] == 3 and found["none"] is None


def test_a_spread_function_looks_like_its_own():
    def reward(prompts, completions, longest):
        return [0.0] * len(prompts)

    spread = meetings.over_processes(reward)
    assert spread.__name__ == "reward" and spread(["a"], ["b"], longest=[1]) == [0.0]
