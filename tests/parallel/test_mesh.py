import jax
import pytest

from rlhf_jax.models.config import Experts, ModelConfig
from rlhf_jax.parallel.mesh import MeshShape, check_batch, check_model, make_mesh, parse_mesh

MODEL = ModelConfig(
    vocab_size=96, width=32, layers=2, heads=8, key_value_heads=4, feed_forward_width=48, context_length=16
)


def test_a_mesh_has_all_axes_and_as_many_devices_as_it_says():
    mesh = make_mesh(parse_mesh("data=2, fsdp=4"))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1, "expert": 1}
    assert str(parse_mesh("tensor=2,data=4")) == "data=4,tensor=2" and str(MeshShape()) == "data=1"


def test_roles_may_have_devices_of_their_own():
    policy = make_mesh(MeshShape(fsdp=6), jax.devices()[:6])
    reward = make_mesh(MeshShape(tensor=2), jax.devices()[6:])
    assert not set(policy.devices.flat) & set(reward.devices.flat)


@pytest.mark.parametrize("words", ["data", "data=two", "dat=2", "data=2,data=4", "data=-1", "data=2,,fsdp=4", ""])
def test_a_mesh_that_is_not_understood(words):
    with pytest.raises(ValueError, match="is not understood at"):
        parse_mesh(words)


def test_an_axis_of_no_devices():
    with pytest.raises(ValueError, match="axis data is 0: give 1 or more"):
        parse_mesh("data=0")


def test_a_mesh_of_another_number_of_devices_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"has 3 × 2 = 6 devices, but there are 8: choose sizes whose product is 8"):
        make_mesh(MeshShape(data=3, tensor=2))


def test_hybrid_meshes_refuse_a_number_of_hosts_that_is_not_there():
    with pytest.raises(ValueError, match=r"fsdp=4 within and data=2 between processes does not fit these devices"):
        make_mesh(MeshShape(fsdp=4), between=MeshShape(data=2))
    with pytest.raises(ValueError, match=r"times data=4 between slices has 4 × 4 = 16 devices"):
        make_mesh(MeshShape(fsdp=4), between=MeshShape(data=4))


class _Chip:
    """What a hybrid mesh asks of a device."""

    platform, device_kind = "cpu", "chip"

    def __init__(self, number: int, each: int):
        self.id, self.process_index, self.slice_index = number, number // each, number // each

    def __repr__(self) -> str:
        return f"chip {self.id}"


def test_a_hybrid_mesh_keeps_a_slice_within_the_inner_axes():
    chips = [_Chip(number, each=4) for number in range(8)]
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), chips, between=MeshShape(data=2))
    assert mesh.shape["data"] == 2 and mesh.shape["fsdp"] == 2 and mesh.shape["tensor"] == 2
    for number in range(2):
        assert {chip.slice_index for chip in mesh.devices[number].flat} == {number}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(tensor=8), r"tensor=8 does not divide the 4 key and value heads \(4 = 8 × 0 \+ 4\)"),
        (MeshShape(fsdp=3), r"fsdp=3 does not divide the 32 channels of the residual stream \(32 = 3 × 10 \+ 2\)"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(shape, message):
    with pytest.raises(ValueError, match=message):
        check_model(MODEL, shape.sizes)


def test_experts_are_divided_too():
    import dataclasses

    mixture = dataclasses.replace(MODEL, experts=Experts(count=6, active=2))
    check_model(mixture, {"expert": 3})
    with pytest.raises(ValueError, match="expert=4 does not divide the 6 experts"):
        check_model(mixture, {"expert": 4})


def test_a_mesh_that_does_not_divide_the_batch():
    check_batch(16, 8, {"data": 2, "fsdp": 2, "expert": 2, "sequence": 4})
    with pytest.raises(ValueError, match=r"axes data=2 × fsdp=4 do not divide the 12 rows .* \(12 = 8 × 1 \+ 4\)"):
        check_batch(12, None, {"data": 2, "fsdp": 4})
    with pytest.raises(ValueError, match="sequence=4 does not divide the 6 tokens of a row"):
        check_batch(8, 6, {"sequence": 4})
