"""Runs that are killed outright, at any moment, and taken up again: they end as if nothing had happened."""

import dataclasses
import importlib.util
import json
import random
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_policy
from rlhf_jax.training.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def lines_of(out):
    path = out / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def saved(out):
    """The newest complete checkpoint; 0 where there is none."""
    names = [path.name for path in (out / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names if re.fullmatch(r"step_\d{8}", name)), default=0)


def logged(out):
    """The last step in the metrics; 0 where there is none."""
    return max((line["step"] for line in lines_of(out)), default=0)


def kill(process, out, beyond, delay=0.0):
    """Kills a run some seconds after it has logged a step beyond that number; False: it had come to its end before."""
    while process.poll() is None:
        if logged(out) > beyond:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.01)
    return False


def measured(out):
    """Every line of metrics without what depends on the clock."""
    clocked = ("time/", "throughput/")
    return [{name: value for name, value in line.items() if not name.startswith(clocked)} for line in lines_of(out)]


def assert_same_run(out, whole):
    assert measured(out) == measured(whole)
    jax.tree.map(np.testing.assert_array_equal, *(load_policy(folder / "model")[1] for folder in (out, whole)))


def test_a_killed_run_ends_like_one_that_was_not(start, tiny_model, demonstrations, tmp_path):
    specification = importlib.util.spec_from_file_location("sft_experiment", REPOSITORY / "experiments" / "sft.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    options = {"steps": 40, "batch_size": 4, "log_every": 1, "save_every": 1, "samples": 1, "response_length": 2}
    config = script.Config(model=str(tiny_model), data=demonstrations, out=tmp_path / "killed", **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--model", tiny_model, "--data", demonstrations, "--out", config.out]
    assert kill(start("sft", words, devices=8, log=tmp_path / "log"), config.out, beyond=5)
    reached = saved(config.out)
    assert reached >= 4, "when step 6 is logged, the checkpoint of step 4 is complete: the next waited for it"
    script.main(dataclasses.replace(config, resume=True))
    script.main(dataclasses.replace(config, out=tmp_path / "whole"))
    assert_same_run(config.out, tmp_path / "whole")


STEPS, KILLS = 60, 10


@pytest.fixture(scope="module")
def advpo(tiny_model, pairs, rewards):
    """The command line of PPO with AdvPO that logs and saves every step."""
    options = {
        "--model": tiny_model,
        "--data": pairs,
        "--reward": rewards[0],
        "--rule": "advpo",
        "--preferences": pairs,
        "--advpo-ema": 0.9,
        "--steps": STEPS,
        "--batch-size": 8,
        "--passes": 1,
        "--learning-rate": 1e-4,
        "--reference-samples": 8,
        "--most-held-out": 4,
        "--log-every": 1,
        "--save-every": 1,
        "--evaluate-every": 10,
        "--samples": 1,
        "--response-length": 4,
    }
    return [word for name, value in options.items() for word in (name, *str(value).split())]


@pytest.fixture(scope="module")
def uninterrupted(start, advpo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert start("ppo", [*advpo, "--out", folder / "run"], devices=2, log=folder / "log").wait() == 0
    return folder / "run"


@pytest.mark.slow
def test_advpo_killed_ten_times_is_bitwise_the_uninterrupted_run(start, advpo, uninterrupted, tmp_path):
    out, log, generator = tmp_path / "run", tmp_path / "log", random.Random(0)
    killed_at, resume = [], []
    for _ in range(KILLS):
        before = saved(out)
        process = start("ppo", [*advpo, "--out", out, *resume], devices=2, log=log)
        assert kill(process, out, beyond=logged(out), delay=generator.uniform(0.0, 0.5)), log.read_text()
        killed_at.append(saved(out))
        assert killed_at[-1] >= before, "a complete checkpoint is gone"
        resume = ["--resume"]
    assert start("ppo", [*advpo, "--out", out, *resume], devices=2, log=log).wait() == 0, log.read_text()
    resumed_after = [int(step) for step in re.findall(r"resuming after step (\d+)", log.read_text())]
    assert resumed_after == killed_at, "each run went on from the newest complete checkpoint"
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((), ("--mesh", "data=2")), (("--mesh", "data=2"), ())])
def test_advpo_killed_and_resumed_on_another_number_of_devices(start, advpo, uninterrupted, tmp_path, before, after):
    out, log = tmp_path / "run", tmp_path / "log"
    assert kill(start("ppo", [*advpo, "--out", out, *before], devices=2, log=log), out, STEPS // 2)
    reached = saved(out)
    assert start("ppo", [*advpo, "--out", out, "--resume", *after], devices=2, log=log).wait() == 0, log.read_text()
    lines, expected = measured(out), measured(uninterrupted)
    assert reached > 0 and [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        *(load_policy(folder / "model")[1] for folder in (out, uninterrupted)),
    )
    assert json.loads((out / "summary.json").read_text())["checks"]
