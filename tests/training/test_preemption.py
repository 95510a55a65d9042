"""A machine is taken away: of two processes one is told, both save the same step and leave in order."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def start(folder, processes):
    """The processes of a toy run; what they print goes to a pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("toy_run.py")
    return [
        subprocess.Popen(
            [sys.executable, script, folder, *map(str, (processes, process, port))],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]


def output_of(processes):
    """What each printed; they must end in order."""
    found = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(found)
    return found


def weights(output):
    return re.search(r"weights (\w+)", output).group(1)


@pytest.mark.slow
def test_both_stop_after_the_same_step_and_one_process_goes_on_from_there(tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    pair = start(cut, 2)
    while not all((cut / f"ready_{process}").exists() for process in range(2)):
        assert all(process.poll() is None for process in pair), output_of(pair)
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGTERM)
    (cut / "go").touch()
    stopped = [re.search(r"stopped after step (\d+), which is saved", output).group(1) for output in output_of(pair)]
    assert stopped[0] == stopped[1] and (cut / "checkpoints" / f"step_{int(stopped[0]):08d}").is_dir()
    whole.mkdir()
    (whole / "go").touch()
    (resumed,), (uninterrupted,) = output_of(start(cut, 1)), output_of(start(whole, 1))
    assert weights(resumed) == weights(uninterrupted)
