"""Meshes by a simple rule, where nobody has chosen one."""

import math

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel.mesh import MeshShape, check_batch, check_model, parse_mesh
from rlhf_jax.parallel.plan.hardware import Topology


def training_mesh(words: str, model: ModelConfig, rows: int, devices: int) -> MeshShape:
    """The mesh to train on: the one named, or for "auto" fsdp as far as it divides the rows, the rest tensor.

    Args:
        words: as `parse_mesh` reads them, or "auto".
        model: shape of the model.
        rows: rows of a microbatch, over all devices.
        devices: how many there are.

    Raises:
        ValueError: it does not divide the model or the rows.

    Example:
        >>> from rlhf_jax.parallel.plan.published import PUBLISHED
        >>> training_mesh("auto", PUBLISHED["llama-3-8b"], rows=8, devices=32)
        MeshShape(data=1, fsdp=8, tensor=4, sequence=1, expert=1)
    """
    fsdp = math.gcd(devices, rows)
    shape = MeshShape(fsdp=fsdp, tensor=devices // fsdp) if words == "auto" else parse_mesh(words)
    check_model(model, shape.sizes)
    check_batch(rows, None, shape.sizes, "rows of a microbatch")
    return shape


def rollout_mesh(words: str, model: ModelConfig, rows: int, policy_bytes: int, topology: Topology) -> MeshShape:
    """The mesh to generate on: the one named, or for "auto" tensor as far as it divides the key-value heads.

    What devices remain are data, so that no parameter travels while a token is decoded; or fsdp, where that copy of the
    policy would take more than a quarter of a device's memory.

    Args:
        words: as `parse_mesh` reads them, or "auto".
        model: shape of the model.
        rows: responses, over all devices.
        policy_bytes: of the whole policy.
        topology: the machine.

    Raises:
        ValueError: it does not divide the model or the rows.
    """
    tensor = math.gcd(topology.devices, model.key_value_heads)
    rest = topology.devices // tensor
    roomy = 4 * policy_bytes / tensor < topology.chip.hbm_bytes
    by_rule = MeshShape(tensor=tensor, data=rest) if roomy else MeshShape(tensor=tensor, fsdp=rest)
    shape = by_rule if words == "auto" else parse_mesh(words)
    check_model(model, shape.sizes)
    check_batch(rows, None, shape.sizes, "responses of a rollout")
    return shape
