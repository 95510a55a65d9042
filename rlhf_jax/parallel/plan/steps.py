"""The phases of an algorithm's step as programs to compile: its own functions, with shapes in place of arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel.plan import flops
from rlhf_jax.parallel.plan.programs import Program, device_bytes, placed
from rlhf_jax.parallel.sharding import batch_sharding, infer, replicated
from rlhf_jax.types import Algorithm, Prompts, Rollout, Score, Sequences, Transform


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where arrays lie.

    Attributes:
        mesh: of devices that need not exist.
        model: shape of all models of the step.
        split_optimizer: see `sharding.infer`.
        offload: see `sharding.infer`.
    """

    mesh: Mesh
    model: ModelConfig
    split_optimizer: bool = False
    offload: tuple[str, ...] = ()

    def state(self, shapes: Any) -> Any:
        """Parameters and what belongs to them, placed by their names."""
        return placed(shapes, infer(shapes, self.mesh, (self.model,), self.split_optimizer, self.offload))

    def rows(self, shapes: Any) -> Any:
        """A batch, placed by its rows."""
        rows, whole = batch_sharding(self.mesh), replicated(self.mesh)
        return placed(shapes, jax.tree.map(lambda leaf: rows if leaf.shape else whole, shapes))


def array(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape of an array.

    Example:
        >>> array(2, 3).shape
        (2, 3)
    """
    return jax.ShapeDtypeStruct(axes, dtype)


def sequences_of(rows: int, tokens: int) -> Sequences:
    """Shapes of whole sequences with the mask of their completions."""

    def zeros() -> Sequences:
        mask = jnp.zeros((rows, tokens), bool)
        return Sequences(tokens=jnp.zeros((rows, tokens), jnp.int32), mask=mask, loss_mask=mask)

    return jax.eval_shape(zeros)


def prompts_of(rows: int, length: int) -> Prompts:
    """Shapes of a batch of prompts."""

    def zeros() -> Prompts:
        tokens, index = jnp.zeros((rows, length), jnp.int32), jnp.zeros(rows, jnp.int32)
        return Prompts(tokens=tokens, mask=jnp.zeros((rows, length), bool), index=index)

    return jax.eval_shape(zeros)


def rollout_of(rows: int, prompt: int, new: int) -> Rollout:
    """Shapes of a batch of prompts and their responses."""

    def zeros(prompts: Prompts) -> Rollout:
        logprob = jnp.zeros((rows, new))
        return Rollout(
            prompts=prompts,
            tokens=jnp.zeros((rows, new), jnp.int32),
            mask=jnp.zeros((rows, new), bool),
            logprob=logprob,
            sampling_logprob=logprob,
            finished=jnp.zeros(rows, bool),
        )

    return jax.eval_shape(zeros, prompts_of(rows, prompt))


def score_of(rows: int, width: int) -> Score:
    """Shapes of the scores of a batch, with the features that they are read from."""
    return jax.eval_shape(lambda: Score(mean=jnp.zeros(rows), features=jnp.zeros((rows, width))))


def rollout_program(
    algorithm: Algorithm,
    state: Any,
    policy: Callable[[Any], Any],
    machine: Machine,
    training: Machine,
    prompts: int,
    taken: Rollout,
) -> Program:
    """The rollout of an on-policy algorithm, in a layout of its own or that of training.

    In a layout of its own the copy of the policy has the dtype of the computation, see `sharding.reshard`.

    Args:
        algorithm: the triple.
        state: shapes of its state.
        policy: the parameters within a state that are needed, which travel to the other layout.
        machine: where responses are drawn.
        training: where the state lies.
        prompts: prompts a step; the responses of a prompt are those of `taken`.
        taken: shapes of the rollout.
    """
    model, (rows, new) = machine.model, taken.tokens.shape
    length = taken.prompts.tokens.shape[1]
    same = machine.mesh == training.mesh
    copied = set() if same else {id(leaf) for leaf in jax.tree.leaves(policy(state))}
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype) if id(leaf) in copied else leaf  # noqa: E731
    here = machine.state(jax.tree.map(cast, state))

    def rollout(state: Any, prompts: Prompts) -> Rollout:
        return algorithm.rollout(state, prompts)[1]

    return Program(
        name="rollout",
        function=rollout,
        arguments=(here, machine.rows(prompts_of(prompts, length))),
        mesh=machine.mesh,
        flops=flops.generation_flops(model, rows, length, new),
        reads=("policy",) if same else (),
        cache=cache_bytes(model, machine.mesh, rows, length + new),
        reshard=0 if same else device_bytes(policy(here)),
    )


def update_program(
    algorithm: Algorithm, state: Any, batch: Sequence[Any], machine: Machine, work: float, reads: Sequence[str]
) -> Program:
    """The update of an algorithm; its state is donated and comes back as it lies.

    Args:
        algorithm: the triple.
        state: its placed state.
        batch: shapes of what follows the state: a batch, or a rollout and its rewards.
        machine: where.
        work: FLOPs on all devices.
        reads: the roles that the state holds.
    """
    return Program(
        name="update",
        function=algorithm.update,
        arguments=(state, *map(machine.rows, batch)),
        mesh=machine.mesh,
        flops=work,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        donate=(0,),
        reads=tuple(reads),
    )


def score_program(
    scorer: Callable[..., Score],
    transform: Transform,
    roles: Mapping[str, Any],
    taken: Rollout,
    reference: Score | None,
    machine: Machine,
) -> Program:
    """The rewards of a rollout: a scorer and what is made of its scores.

    Args:
        scorer: `score(params, tokens, mask) -> Score`.
        transform: of the scores.
        roles: the scorer's placed parameters, then the transform's placed state.
        taken: shapes of the rollout.
        reference: shapes of the scores of reference responses; None where the transform wants none.
        machine: where.
    """

    def score(params: Any, state: Any, taken: Rollout, reference: Score | None):
        found = scorer(params, taken.sequences.tokens, taken.sequences.mask)
        return transform.apply(found, reference, state)

    rows, new = taken.tokens.shape
    tokens = taken.prompts.tokens.shape[1] + new
    return Program(
        name="score",
        function=score,
        arguments=(*roles.values(), machine.rows(taken), machine.rows(reference)),
        mesh=machine.mesh,
        flops=flops.forward_flops(machine.model, rows, tokens),
        reads=tuple(roles),
    )


def cache_bytes(model: ModelConfig, mesh: Mesh, rows: int, slots: int) -> int:
    """Bytes of the key-value cache on one device: rows are split over data, fsdp and expert, heads over tensor."""
    sizes = mesh.shape
    entries = 2 * model.layers * rows * slots * model.key_value_heads * model.head_size
    devices = sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["tensor"]
    return entries * jnp.dtype(model.dtype).itemsize // devices
