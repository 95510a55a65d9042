"""Chips, the slices that they come in, and devices of machines that we do not have.

| chip | bf16 peak | HBM       | HBM bandwidth | one network axis, both directions |
|------|-----------|-----------|---------------|-----------------------------------|
| v5e  | 197 TF/s  | 15.75 GiB | 0.819 TB/s    | 100 GB/s (of 2 axes)              |
| v5p  | 459 TF/s  | 95.74 GiB | 2.765 TB/s    | 200 GB/s (of 3)                   |
| v6e  | 918 TF/s  | 31.25 GiB | 1.638 TB/s    | 200 GB/s (of 2)                   |
| h100 | 989 TF/s  | 80 GB     | 3.35 TB/s     | 450 GB/s NVLink, one direction    |
| h200 | 989 TF/s  | 141 GB    | 4.8 TB/s      | 450 GB/s NVLink, one direction    |

HBM of TPUs is what their compiler (libtpu 0.0.42) lets a program have, a little less than the chip's. A collective in
a ring along one axis of a TPU's torus sends in both directions, and each direction has half of what the vendor calls
bidirectional: per chip 400 (v5e), 1200 (v5p), 800 (v6e) GB/s, over 4, 6, 4 links. Where the compiler says that it uses
more links at once, they count (`collectives.Collective.links`); a slice without wrap-around links is slower. A group
of GPUs that is larger than one host of 8 sends at most 50 GB/s a GPU (a 400 Gb/s network card each).

Sources: https://cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e; data sheets of NVIDIA H100 SXM (dense bf16) and H200 SXM.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do.

    Attributes:
        name: of the family, as topologies begin with.
        flops: peak of bf16 matrix products, FLOP/s.
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s.
        network_bandwidth: bytes/s that a device sends in a collective, see the module.
        kind: which compiler plans it: that for TPUs, or the one for CPUs as an estimate for GPUs.
        slices: shapes that the family is rented in, the smallest first; for GPUs numbers of devices.
        slow_beyond: devices of one host, beyond which the network is `slow_bandwidth`; None: there is one network.
        slow_bandwidth: bytes/s.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    network_bandwidth: float
    kind: Literal["tpu", "gpu"]
    slices: tuple[tuple[int, ...], ...]
    slow_beyond: int | None = None
    slow_bandwidth: float = 0.0


_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 16), (8, 16, 16)),
)
_HOSTS = tuple((number,) for number in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
_NVLINK = dict(network_bandwidth=450e9, kind="gpu", slices=_HOSTS, slow_beyond=8, slow_bandwidth=50e9)

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 100e9, "tpu", _FLAT),
            Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 200e9, "tpu", _CUBES),
            Chip("v6e", 918e12, int(31.25 * GIB), 1638e9, 200e9, "tpu", _FLAT),
            Chip("h100", 989e12, 80 * 10**9, 3350e9, **_NVLINK),
            Chip("h200", 989e12, 141 * 10**9, 4800e9, **_NVLINK),
        )
    }
)


_NO_TPU_HERE = {
    # Else libtpu asks the metadata server of a cloud machine which TPU it sits on, waits for an answer, and complains.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Else only one process at a time may have it, as if there were a TPU to share.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips and how they are wired.

    Attributes:
        chip: what one of them can do.
        shape: chips along each axis of the torus; for GPUs their number.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many chips there are."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(words: str) -> Topology:
    """A topology from words such as `v5p:2x2x4` or `h100:16`.

    Raises:
        ValueError: an unknown chip, or a shape that the family does not come in.

    Example:
        >>> parse_topology("v5p:2x2x4").devices
        16
    """
    name, _, shape = words.partition(":")
    if name not in CHIPS:
        raise ValueError(f"the topology {words!r} names no known chip: begin with one of {', '.join(CHIPS)}.")
    chip, sizes = CHIPS[name], shape.split("x")
    axes = len(chip.slices[0])
    example = str(Topology(chip, chip.slices[3]))
    if len(sizes) != axes or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"the topology {words!r} has no shape of {axes} numbers: write it as {example}.")
    return Topology(chip, tuple(map(int, sizes)))


def family(chip: Chip) -> list[Topology]:
    """The standard slices of a family, the smallest first."""
    return [Topology(chip, shape) for shape in chip.slices]


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for; nothing can be run on those of a TPU topology.

    TPUs: the ahead-of-time compiler in `libtpu`, without any TPU. GPUs: as many CPU devices, whose compiler gives an
    estimate; ask for them by `jax_num_cpu_devices` before JAX is used.

    Raises:
        ValueError: libtpu is not installed, the compiler knows no such topology, or there are too few CPU devices.
    """
    if topology.chip.kind == "gpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise ValueError(
                f"a plan for {topology} needs {topology.devices} CPU devices to stand for GPUs, and there are "
                f"{len(devices)}: set the environment variable JAX_NUM_CPU_DEVICES={topology.devices}."
            )
        return list(devices[: topology.devices])
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"a plan for {topology} needs the TPU compiler: pip install 'rlhf_jax[plan]' (libtpu).")
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=str(topology)).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the TPU compiler refuses the topology {topology}: {str(error).splitlines()[0]}") from None
