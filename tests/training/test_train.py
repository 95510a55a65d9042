"""What `session.train` does around the loop, on a toy whose state has a frozen part."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.training import run_folder
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.options import TrainingOptions
from rlhf_jax.training.session import train


@chex.dataclass(frozen=True)
class State:
    params: Any
    reference: Any


def begin():
    params = jnp.float32(0.0)
    return State(params={"total": params, "noise": jax.random.key(0)}, reference=jnp.float32(1.0))


@partial(jax.jit, donate_argnums=0)
def step(state, batch):
    total = state.params["total"] + batch * state.reference
    return state.replace(params=state.params | {"total": total}), {"loss/policy": total}


class Counting:
    number = 0

    def __next__(self):
        self.number += 1
        return np.float32(self.number)

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def distance(state, done):
    """Smallest after step 3, where the total is 6."""
    return {"eval/distance": abs(float(state.params["total"]) - 6.0)}


@pytest.fixture
def folder(tmp_path):
    return run_folder.create(tmp_path / "run", "toy", {})


OPTIONS = TrainingOptions(log_every=1, evaluate_every=3)


def saved(folder):
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def test_the_best_evaluation_is_saved_and_kept(folder):
    options = dataclasses.replace(OPTIONS, keep_best="min:eval/distance")
    train(options, folder, step, begin(), Counting(), 12, distance)
    assert saved(folder) == ["step_00000003", "step_00000009", "step_00000012"]


def test_a_metric_that_no_evaluation_has_is_refused(folder):
    options = dataclasses.replace(OPTIONS, keep_best="max:eval/nll")
    with pytest.raises(
        ValueError, match="no evaluation measures the 'eval/nll' of --keep-best: choose one of eval/dis"
    ):
        train(options, folder, step, begin(), Counting(), 12, distance)


def test_a_resumed_run_frees_its_initial_state_but_for_the_frozen_part(folder):
    train(dataclasses.replace(OPTIONS, save_every=4), folder, step, begin(), Counting(), 5, distance)
    first = begin()
    trained = train(
        dataclasses.replace(OPTIONS, resume=True), folder, lambda s, b: (s, {}), first, Counting(), 5, distance
    )
    assert trained.first_step is None and float(trained.state.params["total"]) == 15.0
    assert trained.state.reference is first.reference and not first.reference.is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert [line["step"] for line in read_metrics(folder.path / "metrics.jsonl") if "eval/distance" in line] == [
        0,
        3,
        5,
    ]


def test_resuming_before_the_first_checkpoint_begins_anew(folder):
    trained = train(dataclasses.replace(OPTIONS, resume=True), folder, step, begin(), Counting(), 2, distance)
    assert float(trained.state.params["total"]) == 3.0
