"""From compiled programs to the answer: does a step fit, how long does it take, and what decides that.

A phase takes the longest of its three times, as all three can go on at once: arithmetic, memory traffic, and sending
between devices; each at a stated share of the chip's peak. A step takes the sum of its phases.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.parallel.plan.collectives import KINDS
from rlhf_jax.parallel.plan.hardware import Chip, Topology, family
from rlhf_jax.parallel.plan.programs import Compiled, Program, compile_program, device_bytes


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached.

    Attributes:
        compute: of the peak FLOP/s, where a program is bound by them.
        memory: of the HBM bandwidth.
        network: of the bandwidth between devices.
    """

    compute: float = 0.5
    memory: float = 0.8
    network: float = 0.8


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole step of training on a machine.

    Attributes:
        roles: what stays on the devices from step to step (policy, reference, optimizer, …), as placed trees.
        programs: the phases, in order.
    """

    roles: Mapping[str, Any]
    programs: Sequence[Program]


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a plan says of one phase; bytes and FLOPs are those of one device and one run.

    Attributes:
        compiled: what the compiler says.
        elsewhere: bytes of roles that lie on the device and that the program does not read.
        cache: bytes of the key-value cache, among the temporaries.
        peak: bytes in all while it runs.
        flops: by arithmetic.
        reshard: bytes received before, to have the parameters in the layout of this phase.
        compute_seconds: of arithmetic, at the stated efficiency, as the two below.
        memory_seconds: of memory traffic.
        network_seconds: of sending.
        times: how often the phase runs in a step.
    """

    compiled: Compiled
    elsewhere: int
    cache: int
    peak: int
    flops: float
    reshard: int
    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    times: int

    @property
    def seconds(self) -> float:
        """Of one run."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

    @property
    def dominates(self) -> str:
        """What the time is spent on."""
        each = {"compute": self.compute_seconds, "memory": self.memory_seconds, "network": self.network_seconds}
        return max(each, key=each.get)

    @property
    def moved(self) -> dict[str, float]:
        """Bytes sent by kind of collective."""
        total = dict.fromkeys(KINDS, 0.0)
        for one in self.compiled.collectives:
            total[one.kind] += one.moved_bytes * one.times
        return total


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer for one topology.

    Attributes:
        topology: the machine.
        mesh: how it is used, in words.
        roles: bytes a device by role, without the padding of layouts.
        phases: of a step.
    """

    topology: Topology
    mesh: str
    roles: Mapping[str, int]
    phases: Sequence[Phase]

    @property
    def peak(self) -> int:
        """Most bytes a device needs at once."""
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether every phase has room."""
        return all(phase.compiled.fits for phase in self.phases) and self.peak <= self.topology.chip.hbm_bytes

    @property
    def seconds(self) -> float:
        """Of a step; NaN where a phase does not compile."""
        if not all(phase.compiled.fits for phase in self.phases):
            return float("nan")
        return sum(phase.times * phase.seconds for phase in self.phases)


def make_plan(step: Step, topology: Topology, mesh: str, efficiency: Efficiency = Efficiency()) -> Plan:
    """Compiles every phase of a step and adds up.

    Args:
        step: the programs, placed on devices of the topology.
        topology: the machine.
        mesh: its use, for the report.
        efficiency: see `Efficiency`.
    """
    roles = {name: device_bytes(tree) for name, tree in step.roles.items()}
    phases = [_phase(program, roles, topology, efficiency) for program in step.programs]
    return Plan(topology=topology, mesh=mesh, roles=roles, phases=phases)


def smallest(
    chip: Chip, resident: int, plan_for: Callable[[Topology], Plan]
) -> tuple[list[tuple[Topology, str]], Plan]:
    """The smallest standard slice of a family that a step fits.

    Slices that could not hold even the resident bytes are passed over without compiling; the others are compiled, from
    the smallest on, until one fits.

    Args:
        chip: the family.
        resident: bytes of all roles together, once.
        plan_for: makes the plan for a topology; raises ValueError where the mesh does not divide.

    Returns:
        The slices that were passed over, with the reason of each, and the plan of the first that fits.

    Raises:
        ValueError: none fits.
    """
    passed = []
    for topology in family(chip):
        room = topology.devices * chip.hbm_bytes
        if resident > room:
            passed.append((topology, f"{resident / 2**30:.0f} GiB resident in {room / 2**30:.0f} GiB of HBM"))
            continue
        try:
            plan = plan_for(topology)
        except ValueError as error:
            passed.append((topology, str(error)))
            continue
        if plan.fits:
            return passed, plan
        passed.append((topology, f"needs {plan.peak / 2**30:.1f} GiB of {chip.hbm_bytes / 2**30:.1f} GiB a device"))
    reasons = "; ".join(f"{topology}: {reason}" for topology, reason in passed)
    raise ValueError(f"no standard slice of {chip.name} holds this step ({reasons}): choose a smaller batch or model.")


def _phase(program: Program, roles: Mapping[str, int], topology: Topology, efficiency: Efficiency) -> Phase:
    compiled, chip = compile_program(program), topology.chip
    elsewhere = sum(size for name, size in roles.items() if name not in program.reads)
    used = compiled.arguments + compiled.outputs + compiled.temporaries + compiled.code
    flops = program.flops / topology.devices
    sent = sum(one.moved_bytes * one.times / bandwidth(chip, one.group, one.links) for one in compiled.collectives)
    sent += program.reshard / bandwidth(chip, topology.devices)
    return Phase(
        compiled=compiled,
        elsewhere=elsewhere,
        cache=program.cache,
        peak=elsewhere + (used if compiled.fits else compiled.needed or chip.hbm_bytes + 1),
        flops=flops,
        reshard=program.reshard,
        compute_seconds=flops / (chip.flops * efficiency.compute),
        memory_seconds=compiled.traffic / (chip.hbm_bandwidth * efficiency.memory),
        network_seconds=sent / efficiency.network,
        times=program.times,
    )


def bandwidth(chip: Chip, group: int, links: int = 2) -> float:
    """Bytes/s that a device sends in a collective among so many, over so many links of a torus."""
    if chip.slow_beyond and group > chip.slow_beyond:
        return chip.slow_bandwidth
    return chip.network_bandwidth * links / 2
