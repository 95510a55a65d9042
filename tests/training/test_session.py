"""What a run refuses before anything is read; the scripts' own tests show the rest of it."""

import dataclasses
from typing import Any

import chex
import pytest

from rlhf_jax.training import run_folder
from rlhf_jax.training.options import TrainingOptions
from rlhf_jax.training.session import check_run, with_frozen, without_frozen


@pytest.fixture
def earlier(tmp_path):
    """Options that would replace an earlier run, with rows outside of its folder."""
    (tmp_path / "rows.jsonl").write_text("{}")
    out = run_folder.create(tmp_path / "out", "sft", {}).path
    (out / "model").mkdir()
    return TrainingOptions(model="owner/name", data=tmp_path / "rows.jsonl", out=out, overwrite=True)


def test_an_earlier_run_is_replaced_only_if_nothing_of_it_is_to_be_read(earlier):
    check_run(earlier, "sft")
    with pytest.raises(ValueError, match=r"--model .* lies in --out .*, which --overwrite deletes"):
        check_run(dataclasses.replace(earlier, model=str(earlier.out / "model")), "sft")
    (earlier.out / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"--eval-data .* lies in --out"):
        check_run(dataclasses.replace(earlier, eval_data=earlier.out / "rows.jsonl"), "sft")


@chex.dataclass(frozen=True)
class Inner:
    params: Any
    reference: Any


@chex.dataclass(frozen=True)
class Outer:
    algorithm: Inner
    transform: Any


def test_frozen_parts_are_left_out_and_put_back_in_a_state_within_a_state():
    for state in (
        Inner(params={"reference": 1}, reference=2),
        Outer(algorithm=Inner(params=3, reference=4), transform=()),
    ):
        saved = without_frozen(state)
        assert getattr(saved, "algorithm", saved).reference is None
        assert with_frozen(saved, state) == state
    assert with_frozen(without_frozen(Inner(params=5, reference=6)), Inner(params=7, reference=8)) == Inner(
        params=5, reference=8
    )
