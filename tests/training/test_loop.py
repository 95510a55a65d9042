"""The loop on a toy: a state of two numbers, batches of integers."""

import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.training import run_folder
from rlhf_jax.training.loop import Cadence, check_finite, run_steps
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.resume import newest, open_checkpoints
from rlhf_jax.training.sinks import open_sinks


class Counting:
    """Batches 1, 2, 3, …; `before(n)` is called before batch n is handed out."""

    def __init__(self, before=lambda number: None):
        self.number, self.before = 0, before

    def __next__(self):
        self.number += 1
        self.before(self.number)
        return np.float32(self.number)

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


@jax.jit
def step(state, batch):
    total, key = state
    key, now = jax.random.split(key)
    total = total + batch * jax.random.uniform(now)
    return (total, key), {"loss/policy": 1.0 / total, "lr": jnp.float32(0.1), "other": total}


def begin():
    return jnp.float32(0.0), jax.random.key(3)


def loop(folder, batches, cadence, state=None, start=0, step=step, best=None, **options):
    with open_sinks(folder, start=start) as sinks, open_checkpoints(folder.path / "checkpoints", best=best) as save:
        return run_steps(step, state or begin(), batches, cadence, save, sinks, start=start, **options)


def saved(folder):
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def total(state):
    return np.asarray(state[0]).tobytes()


@pytest.fixture
def folder(tmp_path):
    return run_folder.create(tmp_path / "run", "toy", {})


def test_metrics_evaluations_and_checkpoints_come_when_they_are_due(folder, capsys):
    cadence = Cadence(steps=7, log_every=3, evaluate_every=2, save_every=4)
    result = loop(
        folder,
        Counting(),
        cadence,
        evaluate=lambda state, done: {"eval/total": state[0]},
        tokens=lambda batch, metrics: 10,
    )
    lines = read_metrics(folder.path / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/total" in line] == [2, 4, 6, 7]
    logged = [line for line in lines if "lr" in line]
    assert [line["step"] for line in logged] == [3, 6, 7]
    for line in logged:
        assert line["throughput/tokens_per_second"] == pytest.approx(10 / line["time/update"])
    assert saved(folder) == ["step_00000004", "step_00000007"]
    assert result.first_step is not None
    assert logged[-1]["other"] == float(result.state[0])
    assert "training 7/7" in capsys.readouterr().out


def test_a_run_stopped_by_a_signal_and_resumed_equals_the_uninterrupted_one(folder, tmp_path, capsys):
    cadence = Cadence(steps=6, log_every=1, save_every=5)
    whole = loop(run_folder.create(tmp_path / "whole", "toy", {}), Counting(), cadence)

    stop = Counting(before=lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 3 else None)
    with pytest.raises(SystemExit) as left:
        loop(folder, stop, cadence)
    assert left.value.code == 0
    assert "stopped after step 3, which is saved; the same command with --resume" in capsys.readouterr().out

    found = newest(folder.path / "checkpoints", begin())
    assert found.step == 3
    batches = Counting()
    batches.set_state(found.data)
    resumed = loop(folder, batches, cadence, found.state, start=found.step)
    assert total(resumed.state) == total(whole.state)

    def without_times(path):
        return [
            {name: value for name, value in line.items() if not name.startswith("time/")} for line in read_metrics(path)
        ]

    assert without_times(folder.path / "metrics.jsonl") == without_times(tmp_path / "whole" / "metrics.jsonl")


def test_control_c_saves_and_then_interrupts_and_handlers_are_put_back(folder):
    before = signal.getsignal(signal.SIGINT)
    stop = Counting(before=lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        loop(folder, stop, Cadence(steps=5))
    assert newest(folder.path / "checkpoints", begin()).step == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_during_an_evaluation_loses_no_step(folder, capsys):
    def evaluate(state, done):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"eval/total": state[0]}

    with pytest.raises(KeyboardInterrupt):
        loop(folder, Counting(), Cadence(steps=5, evaluate_every=2), evaluate=evaluate)
    assert "stopped after step 2" in capsys.readouterr().out
    assert newest(folder.path / "checkpoints", begin()).step == 2


def test_a_finished_run_has_no_step_left(folder):
    result = loop(folder, Counting(), Cadence(steps=2), start=2, evaluate=lambda state, done: {"eval/total": 1.0})
    assert result.first_step is None
    assert (folder.path / "metrics.jsonl").read_text() == ""


def test_a_nan_is_named_with_its_step_and_never_saved(folder):
    @jax.jit
    def breaks(state, batch):
        loss = jnp.where(batch >= 4, jnp.nan, 1.0)
        return state, {"loss/policy": loss, "grad_norm": jnp.float32(1.0), "other": jnp.nan}

    with pytest.raises(ValueError, match="loss/policy is nan at step 4"):
        loop(folder, Counting(), Cadence(steps=9, log_every=6, save_every=3), step=breaks)
    assert saved(folder) == ["step_00000003"]


def test_an_infinite_gradient_is_refused_too():
    with pytest.raises(ValueError, match="grad_norm is inf at step 8"):
        check_finite([(8, {"loss/policy": 1.0, "grad_norm": np.float32(np.inf)})])


def test_nothing_is_read_from_the_device_between_lines(folder):
    """Metrics of a step without a line are handed on unread: reading one here fails."""

    class Unread:
        def __array__(self, *_, **__):
            raise AssertionError("a metric was fetched for a step without a line")

    def plain(state, batch):
        return state, {"other": Unread()} if batch in (2, 3) else {"other": 1.0}

    loop(folder, Counting(), Cadence(steps=4, log_every=4), step=plain)
    assert json.load(io.StringIO((folder.path / "metrics.jsonl").read_text()))["step"] == 4
