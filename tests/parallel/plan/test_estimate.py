"""Whole plans of small programs on CPU devices that stand for GPUs, and on a TPU topology."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.parallel.plan.estimate import Efficiency, Step, bandwidth, make_plan, smallest
from rlhf_jax.parallel.plan.hardware import CHIPS, Topology, parse_topology, topology_devices
from rlhf_jax.parallel.plan.layouts import rollout_mesh, training_mesh
from rlhf_jax.parallel.plan.programs import Program, device_bytes, whole_bytes
from rlhf_jax.parallel.plan.published import PUBLISHED
from rlhf_jax.parallel.plan.report import as_json, bytes_by_role, memory_figure, notes, print_plan

LLAMA = PUBLISHED["llama-3-8b"]


def doubling(topology, width=1024, **options):
    """A step that doubles a donated matrix split over the devices, with another one that only lies there."""
    mesh = make_mesh(MeshShape(fsdp=topology.devices), topology_devices(topology))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    matrix = jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=rows)
    program = Program(
        name="double",
        function=lambda x: 2 * x,
        arguments=(matrix,),
        mesh=mesh,
        flops=1e12,
        out_shardings=rows,
        donate=(0,),
        reads=("read",),
        **options,
    )
    return Step(roles={"read": matrix, "elsewhere": {"a": matrix}}, programs=[program])


def test_bytes_and_times_by_hand(tmp_path, capsys):
    """4 MiB over 4 devices: 1 MiB each of what is read (and overwritten) and of what only lies there."""
    topology = parse_topology("h100:4")
    step = doubling(topology, times=3, reshard=450 * 10**6)
    plan = make_plan(step, topology, "fsdp=4", Efficiency(compute=0.5, memory=1.0, network=0.5))
    (phase,) = plan.phases
    assert plan.roles == {"read": 2**20, "elsewhere": 2**20}
    assert (phase.elsewhere, phase.compiled.arguments, phase.compiled.outputs) == (2**20, 2**20, 0)
    assert phase.peak == 2 * 2**20 + phase.compiled.temporaries + phase.compiled.code
    assert phase.compiled.traffic == 2 * 2**20
    assert phase.compute_seconds == pytest.approx(0.25e12 / (989e12 * 0.5))
    assert phase.memory_seconds == pytest.approx(2 * 2**20 / 3350e9)
    assert phase.network_seconds == pytest.approx(0.002)  # the new layout, at half of 450 GB/s
    assert phase.dominates == "network" and plan.seconds == pytest.approx(0.006) and plan.fits
    assert sum(bytes_by_role(plan, phase).values()) == phase.peak
    print_plan(plan)
    assert "h100:4, fsdp=4: fits" in capsys.readouterr().out
    assert json.loads(json.dumps(as_json(plan)))["phases"][0]["bound_by"] == "network"
    memory_figure(plan, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_a_step_that_is_too_large_is_said_not_to_fit():
    chip = dataclasses.replace(CHIPS["h100"], hbm_bytes=2**20)
    topology = Topology(chip, (4,))
    plan = make_plan(doubling(topology), topology, "fsdp=4")
    assert not plan.fits and plan.peak >= 2 * 2**20


def test_the_smallest_slice_is_found_by_arithmetic_then_by_compiling():
    """8 MiB in all: one device of 4 MiB cannot hold it, two could but need more than that, four do."""
    chip = dataclasses.replace(CHIPS["h100"], hbm_bytes=4 * 2**20)
    tried = []

    def plan_for(topology):
        tried.append(topology.devices)
        return make_plan(doubling(topology), topology, "fsdp")

    passed, plan = smallest(chip, 2 * 2**22, plan_for)
    assert plan.topology.devices == tried[-1] and plan.fits
    assert [topology.devices for topology, _ in passed] == [size for size in (1, 2, 4) if size < tried[-1]]
    assert "0 GiB resident in 0 GiB" in passed[0][1] and 1 not in tried
    with pytest.raises(ValueError, match="no standard slice of h100 holds this step"):
        smallest(dataclasses.replace(chip, slices=((1,),)), 2 * 2**22, plan_for)


def test_beyond_a_host_gpus_talk_over_the_slow_network():
    assert bandwidth(CHIPS["h100"], 8) == 450e9
    assert bandwidth(CHIPS["h100"], 16) == 50e9
    assert bandwidth(CHIPS["v5p"], 512) == 200e9


def test_meshes_by_rule():
    assert str(training_mesh("auto", LLAMA, 128, 16)) == "fsdp=16"
    assert str(training_mesh("fsdp=4,tensor=4", LLAMA, 4, 16)) == "fsdp=4,tensor=4"
    with pytest.raises(ValueError, match=r"tensor=16 does not divide the 8 key and value heads \(8 = 16 × 0 \+ 8\)"):
        training_mesh("auto", LLAMA, 1, 16)
    # 16 GB of parameters on 8 devices are 2 GB: a copy fits beside the rest on a chip of 95 GiB, not on one of 16 GiB
    assert str(rollout_mesh("auto", LLAMA, 64, 16 * 10**9, parse_topology("v5p:2x2x4"))) == "data=2,tensor=8"
    assert str(rollout_mesh("auto", LLAMA, 64, 64 * 10**9, parse_topology("v5e:4x4"))) == "fsdp=2,tensor=8"


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install 'rlhf_jax[plan]'"
)


@needs_libtpu
def test_a_tpu_program_over_its_memory_is_reported_with_the_sizes():
    """Two matrices of 16 GiB a device on chips of 16 GiB; a small one fits and is padded by its layout at most."""
    topology = parse_topology("v5e:2x2")
    plan = make_plan(doubling(topology, width=2**17), topology, "fsdp=4")
    (phase,) = plan.phases
    assert not phase.compiled.fits and not plan.fits
    assert phase.compiled.needed >= 16 * 2**30
    assert "over the memory of a device: it needs" in notes(phase)[0]
    assert as_json(plan)["seconds"] is None
    small = make_plan(doubling(topology, width=2048), topology, "fsdp=4")
    assert small.fits and small.phases[0].compiled.arguments == 4 * 2**20
    step = doubling(topology)
    assert device_bytes(step.roles) == 2 * 2**20 and whole_bytes(step.roles) == 8 * 2**20
