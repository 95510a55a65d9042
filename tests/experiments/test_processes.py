"""A script in two processes on a mesh gives what it gives on one device."""

import json
import math
import socket

import pytest

from rlhf_jax.training.metrics import read_metrics


@pytest.mark.slow
def test_advpo_in_two_processes_is_advpo_on_one_device(start, tiny_model, pairs, rewards, tmp_path):
    options = ["--model", tiny_model, "--data", pairs, "--reward", rewards[0], "--rule", "advpo"]
    options += ["--preferences", pairs, "--steps", 4, "--batch-size", 8, "--passes", 1, "--reference-samples", 8]
    options += ["--most-held-out", 4, "--log-every", 1, "--samples", 1, "--response-length", 8]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = [*options, "--out", tmp_path / "two", "--mesh", "data=2,fsdp=2"]
    together += ["--coordinator", address, "--processes", 2]
    runs = [start("ppo", [*together, "--process-id", number], 2, tmp_path / f"log{number}") for number in range(2)]
    runs.append(start("ppo", [*options, "--out", tmp_path / "one"], 1, tmp_path / "log2"))
    for number, run in enumerate(runs):
        assert run.wait() == 0, (tmp_path / f"log{number}").read_text()
    two, one = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for here, there in zip(two, one, strict=True):
        for name in here.keys() - {"step"}:
            if not name.startswith(("time/", "throughput/")) and there[name] is not None:
                assert math.isclose(here[name], there[name], rel_tol=1e-4, abs_tol=1e-4), (here["step"], name)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["device"]["count"] == 4 and (tmp_path / "two" / "model" / "config.json").exists()
    assert "writing to" not in (tmp_path / "log1").read_text(), "only the first process prints"
