"""Does a training step fit a machine that we do not have, how long does it take, and what decides that?

    python experiments/plan.py --model llama-3-8b --algorithm ppo --topology v5p:2x2x4
    python experiments/plan.py --model FOLDER --algorithm sft --topology h100:16 --mesh fsdp=8,tensor=2
    python experiments/plan.py --preset llama-3-70b-dpo --smallest

It compiles the rollout, the scoring and the update that the other scripts run, for devices that only a description
exists of, from the shape of a model (no weights): a name of `rlhf_jax.parallel.plan.published`, or a Hugging Face
folder with a `config.json`. TPUs need the TPU compiler (`pip install 'rlhf_jax[plan]'`) and no TPU; GPUs are estimated
by the compiler for CPUs. Minutes on 2 CPU cores; neither weights nor batches ever exist, so 8 GiB of memory do.

OUT holds `plan.json` (bytes by role, FLOPs, collectives, times of each phase), `figures/memory.png` and `summary.json`.
Times are the largest of arithmetic, memory traffic and sending at stated shares of the chip's peaks: expect a factor of
two, and use them to compare layouts.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.losses.preference_choices import preference_loss
from rlhf_jax.models.config import Attention, ModelConfig
from rlhf_jax.models.heads import apply_head, init_policy, init_reward_model, reward_features
from rlhf_jax.models.huggingface import load_config
from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.parallel.plan import flops, layouts
from rlhf_jax.parallel.plan.estimate import Efficiency, Plan, Step, make_plan, smallest
from rlhf_jax.parallel.plan.hardware import Topology, parse_topology, topology_devices
from rlhf_jax.parallel.plan.programs import whole_bytes
from rlhf_jax.parallel.plan.published import PUBLISHED
from rlhf_jax.parallel.plan.report import as_json, memory_figure, print_plan
from rlhf_jax.parallel.plan.steps import (
    Machine,
    array,
    rollout_of,
    rollout_program,
    score_of,
    score_program,
    sequences_of,
    update_program,
)
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ellipsoid import Geometry
from rlhf_jax.rewards.ensemble import uncertainty_weighted
from rlhf_jax.rewards.last_layer import advpo
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.json_files import write_json
from rlhf_jax.types import Algorithm, Demonstrations, PreferenceBatch, Score, Sequences

Dtype = Literal["float32", "bfloat16"]
ON_POLICY = ("ppo", "grpo", "score")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a plan.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/plan/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when the step does not fit.
        model: name of a published model, or a Hugging Face folder with a config.json (or a hub id).
        layers: number of layers in place of the model's.
        algorithm: whose step is planned; "score" is the scoring of a rollout alone.
        reward: what scores rollouts: one reward model of the policy's shape with AdvPO, `members` heads on one trunk,
            or a Python function (which takes no memory or time here).
        members: heads of the ensemble.
        topology: the machine: v5e:4x4, v5p:2x2x4, v6e:8x8, h100:16 or h200:16.
        smallest: look for the smallest standard slice of that family that holds the step.
        mesh: devices along each axis, such as fsdp=8,tensor=2; auto: fsdp as far as it divides the rows of a
            microbatch, the rest tensor.
        rollout_mesh: the layout of rollouts; auto: tensor as far as it divides the key-value heads, the rest data, or
            fsdp where a copy of the policy would take a quarter of the memory; same: that of training.
        batch_size: prompts (or rows, or pairs) a step.
        samples: responses a prompt (GRPO).
        prompt_length: tokens of a prompt, padding included.
        response_length: tokens of a response.
        passes: passes over the responses of a step.
        minibatches: optimiser steps a pass.
        accumulate: microbatches an optimiser step.
        dtype: of the computation.
        param_dtype: of the parameters that are trained.
        frozen_dtype: of reference policy and reward model.
        moments: of Adam.
        remat: what a layer keeps for the backward pass, see `ModelConfig.remat`.
        attention: how attention is computed, see `ModelConfig.attention`.
        split_optimizer: split the optimiser's state over the data axis too.
        offload_reference: keep the reference policy in the memory of the host.
        compute_efficiency: share of the peak FLOP/s that is reached.
        memory_efficiency: share of the HBM bandwidth that is reached.
        network_efficiency: share of the bandwidth between devices that is reached.
    """

    preset: str = "default"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False
    model: str = "llama-3-8b"
    layers: int | None = None
    algorithm: Literal["sft", "reward_model", "dpo", "ppo", "grpo", "score"] = "ppo"
    reward: Literal["advpo", "ensemble", "function"] = "advpo"
    members: int = 5
    topology: str = "v5p:2x2x4"
    smallest: bool = False
    mesh: str = "auto"
    rollout_mesh: str = "auto"
    batch_size: int = 128
    samples: int = 1
    prompt_length: int = 512
    response_length: int = 512
    passes: int = 1
    minibatches: int = 1
    accumulate: int = 1
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    frozen_dtype: Dtype = "bfloat16"
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    remat: str = "full"
    attention: Attention = "reference"
    split_optimizer: bool = False
    offload_reference: bool = False
    compute_efficiency: float = 0.5
    memory_efficiency: float = 0.8
    network_efficiency: float = 0.8


PRESETS = {
    "default": Config(),
    "llama-3-8b-ppo": Config(preset="llama-3-8b-ppo"),
    "qwen3-32b-grpo": Config(
        preset="qwen3-32b-grpo",
        model="qwen3-32b",
        algorithm="grpo",
        reward="function",
        topology="v5p:4x4x4",
        batch_size=32,
        samples=8,
        response_length=1536,
        accumulate=2,
    ),
    "llama-3-70b-dpo": Config(
        preset="llama-3-70b-dpo", model="llama-3-70b", algorithm="dpo", topology="v5p:4x4x4", batch_size=64
    ),
    "ensemble": Config(preset="ensemble", algorithm="score", reward="ensemble", topology="v5e:4x4"),
}


def model_of(config: Config) -> ModelConfig:
    """The shape to plan for, in the dtypes asked for."""
    if config.model in PUBLISHED:
        shape = PUBLISHED[config.model]
    else:
        try:
            shape = load_config(config.model)
        except (ValueError, OSError) as error:
            names = ", ".join(PUBLISHED)
            raise ValueError(f"--model {config.model} is no published shape ({names}) and no folder: {error}") from None
    options = dict(dtype=config.dtype, param_dtype=config.param_dtype, remat=config.remat, attention=config.attention)
    if config.layers is not None:
        options |= dict(layers=config.layers, local_layers=shape.local_layers[: config.layers])
    return dataclasses.replace(shape, **options)


def algorithm_of(config: Config, model: ModelConfig) -> Algorithm:
    """The triple that is planned."""
    optimizer = adam(1e-5, moments=config.moments)
    if config.algorithm == "sft":
        return sft(model, optimizer, accumulate=config.accumulate)
    if config.algorithm == "reward_model":
        return reward_modeling(model, optimizer, accumulate=config.accumulate)
    if config.algorithm == "dpo":
        return preference(model, preference_loss("dpo"), optimizer, accumulate=config.accumulate)
    sampling = SamplingConfig(max_new_tokens=config.response_length, stop_tokens=(0,))
    steps = dict(epochs=config.passes, minibatches=config.minibatches, accumulate=config.accumulate)
    if config.algorithm == "ppo":
        return ppo(model, PPOConfig(sampling=sampling, **steps), optimizer)
    from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient

    return policy_gradient(model, PolicyGradientConfig(sampling=sampling, samples=config.samples, **steps), optimizer)


def update_flops(config: Config, model: ModelConfig) -> float:
    """FLOPs of an update on all devices, by arithmetic."""
    rows, new = config.batch_size * config.samples, config.response_length
    tokens = config.prompt_length + new
    read, train = partial(flops.scoring_flops, model), partial(flops.training_flops, model)
    return {
        "sft": lambda: train(rows, tokens, tokens - 1),
        "reward_model": lambda: train(2 * rows, tokens, 0),
        "dpo": lambda: read(2 * rows, tokens, tokens - 1) + train(2 * rows, tokens, tokens - 1),
        "ppo": lambda: (
            read(rows, tokens, new)
            + read(rows, tokens)
            + config.passes * (train(rows, tokens, new) + train(rows, tokens, 0))
        ),
        "grpo": lambda: read(rows, tokens, new) + config.passes * train(rows, tokens, new),
    }[config.algorithm]()


def initial_state(config: Config, model: ModelConfig, algorithm: Algorithm) -> Any:
    """Shapes of the algorithm's state; the reference policy is in its own dtype."""

    def init(key: jax.Array) -> Any:
        if config.algorithm in ("sft", "reward_model"):
            return algorithm.init(key)
        policy = init_policy(model, key)
        reference = jax.tree.map(lambda leaf: leaf.astype(config.frozen_dtype), policy)
        return algorithm.init(key, {"policy": policy, "reference": reference})

    return jax.eval_shape(init, jax.random.key(0))


def roles_of(config: Config, state: Any) -> dict[str, Any]:
    """The parts of an algorithm's state that take memory."""
    trained = "reward model" if config.algorithm == "reward_model" else "policy"
    roles = {trained: state.params} if config.algorithm != "ppo" else dict(state.params)
    if getattr(state, "reference", None) is not None:
        roles["reference"] = state.reference
    return roles | {"optimizer": state.optimizer_state}


def scoring_roles(config: Config, machine: Machine) -> tuple[Any, Any, dict[str, Any]]:
    """The scorer of rollouts, the transform of its scores, and what both keep on the devices."""
    model = machine.model
    frozen = dataclasses.replace(model, param_dtype=config.frozen_dtype)
    params = jax.eval_shape(lambda key: init_reward_model(frozen, key), jax.random.key(0))
    if config.reward == "advpo":
        scorer, transform, width = reward_scorer(model), advpo(), model.width
        state = jax.eval_shape(lambda: transform.init(Geometry(cholesky=jnp.zeros((width, width))), jnp.ones(())))
    else:
        scorer, transform = shared_trunk_scorer(model), uncertainty_weighted()
        heads = {"kernel": array(config.members, model.width), "bias": array(config.members)}
        params = {"trunk": params["trunk"], "heads": heads}
        state = jax.eval_shape(transform.init)
    return scorer, transform, {"reward model": machine.state(params), "uncertainty": machine.state(state)}


def shared_trunk_scorer(model: ModelConfig) -> Any:
    """A scorer of M reward heads on one trunk: `{"trunk", "heads": {"kernel" [M, D], "bias" [M]}}`."""

    def score(params: Any, tokens: jax.Array, mask: jax.Array) -> Score:
        features = reward_features(model, params["trunk"], tokens, mask)
        members = jax.vmap(apply_head, in_axes=(0, None))(params["heads"], features)
        return Score(mean=members.mean(axis=0), features=features, members=members)

    return score


def step_of(config: Config, training: Machine, drawing: Machine) -> Step:
    """All phases of a step, and the roles that stay on the devices between them.

    Args:
        config: the options.
        training: where the state lies and updates run.
        drawing: where responses are drawn.
    """
    rows, new = config.batch_size * config.samples, config.response_length
    taken, roles, programs = rollout_of(rows, config.prompt_length, new), {}, []
    if config.algorithm in ON_POLICY and config.reward != "function":
        scorer, transform, roles = scoring_roles(config, training)
        reference = score_of(rows, training.model.width) if config.reward == "advpo" else None
        programs.append(score_program(scorer, transform, roles, taken, reference, training))
    if config.algorithm == "score":
        return Step(roles, programs)
    algorithm = algorithm_of(config, training.model)
    shapes = initial_state(config, training.model, algorithm)
    state = training.state(shapes)
    own = roles_of(config, state)
    if config.algorithm in ON_POLICY:
        policy = lambda state: roles_of(config, state)["policy"]  # noqa: E731
        drawn = rollout_program(algorithm, shapes, policy, drawing, training, config.batch_size, taken)
        programs.insert(0, drawn)
        batch = (taken, array(rows))
    else:
        batch = (offline_batch(config.algorithm, rows, config.prompt_length + new),)
    work = update_flops(config, training.model)
    programs.append(update_program(algorithm, state, batch, training, work, tuple(own)))
    return Step(own | roles, programs)


def offline_batch(algorithm: str, rows: int, tokens: int) -> Demonstrations | PreferenceBatch:
    """Shapes of a batch of demonstrations or of pairs."""

    def record(one: Sequences) -> Demonstrations | PreferenceBatch:
        if algorithm == "sft":
            return Demonstrations(tokens=one.tokens, mask=one.mask, loss_mask=one.loss_mask)
        return PreferenceBatch(chosen=one, rejected=one, margin=jnp.zeros(rows))

    return jax.eval_shape(record, sequences_of(rows, tokens))


def plan_for(config: Config, model: ModelConfig, topology: Topology) -> Plan:
    """The plan for one machine."""
    rows = config.batch_size * config.samples
    parts = config.minibatches * config.accumulate
    training = layouts.training_mesh(config.mesh, model, rows // parts, topology.devices)
    drawing = training
    if config.algorithm in ("ppo", "grpo") and config.rollout_mesh != "same":
        policy = jax.eval_shape(lambda key: init_policy(model, key), jax.random.key(0))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(policy))
        drawing = layouts.rollout_mesh(config.rollout_mesh, model, rows, size, topology)
    devices = topology_devices(topology)
    offload = ("reference",) if config.offload_reference else ()
    machines = [
        Machine(make_mesh(shape, devices), model, config.split_optimizer, offload) for shape in (training, drawing)
    ]
    words = str(training) if drawing == training else f"{training}, rollouts on {drawing}"
    shares = Efficiency(config.compute_efficiency, config.memory_efficiency, config.network_efficiency)
    return make_plan(step_of(config, *machines), topology, words, shares)


def resident_bytes(config: Config, model: ModelConfig) -> int:
    """Bytes of all roles together, each array once."""
    one = Machine(make_mesh(MeshShape(), jax.devices()[:1]), model, config.split_optimizer)
    return sum(whole_bytes(tree) for tree in step_of(config, one, one).roles.values())


def check_config(config: Config) -> None:
    """Refuses options that do not go together.

    Raises:
        ValueError: one sentence that names the option.
    """
    rows, parts = config.batch_size * config.samples, config.minibatches * config.accumulate
    if config.algorithm == "score" and config.reward == "function":
        raise ValueError("--algorithm score with --reward function has nothing to compile: choose another --reward.")
    if config.samples != 1 and config.algorithm != "grpo":
        raise ValueError(f"--samples {config.samples} belongs to --algorithm grpo: leave it out.")
    if rows % parts:
        raise ValueError(
            f"{rows} rows do not split into --minibatches {config.minibatches} x --accumulate {config.accumulate}: "
            f"choose divisors of {rows}."
        )
    if config.minibatches > 1 and config.algorithm not in ON_POLICY:
        raise ValueError(f"--minibatches {config.minibatches} belongs to ppo and grpo: use --accumulate.")


def use_devices(topology: Topology, largest: bool) -> None:
    """Lets CPU devices stand for GPUs; to be called before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.kind == "gpu":
        count = topology.chip.slices[-1][0] if largest else topology.devices
        try:
            jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))
        except RuntimeError:  # JAX has started: `topology_devices` says what is missing
            return


def main(config: Config) -> dict:
    """Makes the plan and returns the summary."""
    began = time.monotonic()
    topology = parse_topology(config.topology)
    check_config(config)
    use_devices(topology, config.smallest)
    model = model_of(config)
    folder = run_folder.create(config.out, "plan", config, config.overwrite)
    if config.smallest:
        passed, plan = smallest(topology.chip, resident_bytes(config, model), partial(plan_for, config, model))
        for other, reason in passed:
            print(f"{other}: {reason}")
    else:
        passed, plan = [], plan_for(config, model, topology)
    print_plan(plan)
    passed_over = [{"topology": str(other), "reason": reason} for other, reason in passed]
    write_json(folder.path / "plan.json", as_json(plan) | {"passed_over": passed_over})
    memory_figure(plan, folder.path / "figures" / "memory.png")
    rows = [row(f"bytes a device: {name}", "GiB", np.array([size / GIB])) for name, size in plan.roles.items()]
    for phase in plan.phases:
        rows.append(row(f"{phase.compiled.name}: peak", "GiB", np.array([phase.peak / GIB])))
        if phase.compiled.fits:
            rows.append(row(f"{phase.compiled.name}: time", "s", np.array([phase.times * phase.seconds])))
    most = plan.topology.chip.hbm_bytes / GIB
    checks = [run_folder.check("peak of a device, GiB, against its memory", plan.peak / GIB, most, "at most")]
    compiling = sum(phase.compiled.compile_seconds for phase in plan.phases)
    return run_folder.conclude(folder, rows, checks, began, compiling)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
