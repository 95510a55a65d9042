"""Where a script runs, and what is refused before it reads anything."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.parallel.mesh import make_mesh, parse_mesh
from rlhf_jax.training.devices import check_rows, current_mesh, mesh_of, mesh_shapes, on_devices, placing
from rlhf_jax.training.held_out import over_rows
from rlhf_jax.training.options import TrainingOptions


@pytest.fixture
def mesh():
    mesh = make_mesh(parse_mesh("data=4,tensor=2"))
    with jax.set_mesh(mesh):
        yield mesh


def test_a_script_runs_under_the_mesh_that_its_options_ask_for():
    main = on_devices(lambda options: {"mesh": current_mesh()})
    assert main(TrainingOptions())["mesh"] is None
    assert main(TrainingOptions(mesh="data=2,fsdp=4", split_optimizer=True))["mesh"].shape["fsdp"] == 4
    assert current_mesh() is None and mesh_of(None) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"split_optimizer": True}, "--split-optimizer is for a run on a mesh: give --mesh as well"),
        ({"mesh_between": "data=2"}, "--mesh-between repeats the mesh of one slice: give --mesh as well"),
        ({"mesh": "data=3"}, "has 3 = 3 devices, but there are 8"),
    ],
)
def test_what_needs_a_mesh_or_another_one_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        on_devices(lambda options: {})(dataclasses.replace(TrainingOptions(), **change))
    assert mesh_shapes(TrainingOptions(mesh="fsdp=8"))[0].fsdp == 8


@dataclasses.dataclass
class Item:
    length: int


def test_too_few_rows_for_a_batch_are_split_over_the_mesh_all_the_same(mesh):
    """Six rows would lie whole on each of the devices: eight are split."""
    seen = []

    def score(batch):
        seen.append(batch)
        return batch * 2

    found = over_rows(score, [Item(length) for length in range(6)], placing(lambda items: np.array(lengths(items))), 16)
    assert found.tolist() == [0, 2, 4, 6, 8, 10]
    assert [batch.shape for batch in seen] == [(8,)] and seen[0].addressable_shards[0].data.shape == (2,)
    with pytest.raises(ValueError, match="data=4 does not divide the 6 rows of a minibatch"):
        check_rows(6, None, "rows of a minibatch")


def lengths(items):
    return [item.length for item in items]
