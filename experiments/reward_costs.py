"""What a score costs by kind of uncertainty: scores a second and memory, beside one reward model.

    python experiments/reward_costs.py
    python experiments/reward_costs.py --model FOLDER --dtype bfloat16

All kinds score the same batch, each as one compiled program: one reward model; an ensemble of linear heads on one
trunk; of LoRA adapters on one trunk; of whole reward models; a last-layer posterior (the ellipsoid of AdvPO); and Monte
Carlo dropout at the head. Weights are those of a folder, or random: the work does not depend on them. Programs take
turns, so that all meet the same load; ratios to one reward model are geometric means with 95 % intervals over repeats.
Memory is that of the parameters, and of what the compiled program needs beside its arguments and results.

The check: many linear heads cost at most 1.1 times one reward model.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.timing import Prepared, ratio, seconds_of
from rlhf_jax.models.adapters import AdapterConfig, init_adapter
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import EnsembleParams, ensemble_scorer, reward_scorer
from rlhf_jax.rewards.dropout import DropoutParams, draw_masks, dropout_scorer
from rlhf_jax.rewards.ellipsoid import geometry, gram
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, init_heads, linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import LoRAEnsembleParams, lora_ensemble_scorer
from rlhf_jax.rewards.posterior import PosteriorParams, posterior_scorer
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.options import RunOptions
from rlhf_jax.types import Params, Score

MIB = 2**20
LARGEST_RATIO = 1.1
"""How many times one reward model an ensemble of linear heads may cost."""


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the measurement.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/reward_costs/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when the check fails.
        model: Hugging Face folder of a reward model, or a hub id; None: a Llama of random weights.
        width: of the random model.
        layers: of the random model.
        dtype: dtype of the computation.
        rows: sequences of the batch.
        length: tokens of each sequence.
        heads: linear heads, and dropout masks.
        members: LoRA adapters, and whole reward models.
        rank: of the adapters, on the query and value projections.
        repeats: timed calls of each program, at least 2, after one that is not timed.
    """

    preset: Literal["default", "tiny"] = "default"
    model: str | None = None
    width: int = 256
    layers: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: int = 32
    length: int = 256
    heads: int = 20
    members: int = 5
    rank: int = 8
    repeats: int = 10


PRESETS = {
    "default": Config(),
    "tiny": Config("tiny", width=16, layers=1, rows=2, length=4, heads=3, members=2, rank=2, repeats=2),
}


class Program(NamedTuple):
    """A compiled scorer with its parameters.

    Attributes:
        score: scores the batch.
        parameters: bytes of the parameters.
        temporaries: bytes that the program needs beside arguments and results.
    """

    score: Callable[[], Score]
    parameters: int
    temporaries: int


def reward_model(config: Config) -> tuple[ModelConfig, Params]:
    """The reward model that all kinds are made of: from its folder, or random."""
    if config.model is not None:
        from rlhf_jax.models.huggingface import load_reward_model

        return load_reward_model(config.model, config.dtype, config.dtype)
    shape = ModelConfig(
        vocab_size=1024,
        width=config.width,
        layers=config.layers,
        heads=max(1, config.width // 64),
        key_value_heads=max(1, config.width // 64),
        feed_forward_width=3 * config.width,
        context_length=config.length,
        dtype=config.dtype,
        param_dtype=config.dtype,
    )
    return shape, init_reward_model(shape, jax.random.key(0))


def kinds(config: Config, model: ModelConfig, params: Params) -> dict[str, tuple[Callable[..., Score], Any]]:
    """Scorer and parameters of every kind, one reward model first."""
    count, many, width = config.members, config.heads, model.width
    trunk, head = params["trunk"], params["head"]
    keys = jax.random.split(jax.random.key(1), 5)
    heads_key, lora_key, few_key, masks_key, seen_key = keys
    adapter = AdapterConfig(kind="lora", rank=config.rank)
    adapters = jax.vmap(lambda key: init_adapter(adapter, params, key))(jax.random.split(lora_key, count))
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), params)
    shape = geometry(gram(jax.random.normal(seen_key, (2 * width, width))), 1.0)
    return {
        "one reward model": (reward_scorer(model), params),
        f"{many} linear heads": (
            linear_ensemble_scorer(model),
            LinearEnsembleParams(trunk=trunk, heads=init_heads(model, heads_key, many), offset=jnp.zeros(many)),
        ),
        f"{count} LoRA adapters": (
            lora_ensemble_scorer(model, adapter),
            LoRAEnsembleParams(
                base={"trunk": trunk},
                adapters=adapters,
                heads=init_heads(model, few_key, count),
                offset=jnp.zeros(count),
            ),
        ),
        f"{count} reward models": (ensemble_scorer(model), EnsembleParams(members=copies, offset=jnp.zeros(count))),
        "last-layer posterior": (
            posterior_scorer(model),
            PosteriorParams(trunk=trunk, head=head, geometry=shape, radius=jnp.ones(()), offset=jnp.zeros(())),
        ),
        f"dropout, {many} masks": (
            dropout_scorer(model),
            DropoutParams(
                trunk=trunk, head=head, masks=draw_masks(masks_key, many, width, 0.1), offset=jnp.zeros(many)
            ),
        ),
    }


def compile_kind(scorer: Callable[..., Score], params: Any, tokens: jax.Array, mask: jax.Array) -> Program:
    """Compiles a scorer for a batch, and asks the compiler what memory it takes."""
    program = jax.jit(scorer).lower(params, tokens, mask).compile()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return Program(
        score=lambda: program(params, tokens, mask),
        parameters=parameters,
        temporaries=program.memory_analysis().temp_size_in_bytes,
    )


def prepared(program: Program) -> Prepared:
    """The call of a program, for which nothing is to be made."""
    return lambda: program.score


def check_options(config: Config) -> None:
    """Refuses options that cannot be.

    Raises:
        ValueError: naming the option.
    """
    least = {"width": 1, "layers": 1, "rows": 1, "length": 1, "heads": 2, "members": 2, "rank": 1, "repeats": 2}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ValueError(f"--{name} is {getattr(config, name)}: give {smallest} or more.")
    if config.model is None and config.width > 64 and config.width % 64:
        raise ValueError(f"--width is {config.width}: give a multiple of 64, the width of a head, or less than 64.")


def main(config: Config) -> dict:
    """Measures and returns the summary."""
    began, clock = time.monotonic(), CompileClock()
    check_options(config)
    model, params = reward_model(config)
    if config.length > model.context_length:
        raise ValueError(f"--length is {config.length}: the model reads at most {model.context_length} tokens.")
    folder = run_folder.create(config.out, "reward_costs", config, config.overwrite)
    tokens = jax.random.randint(jax.random.key(2), (config.rows, config.length), 0, model.vocab_size, jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    programs = {
        name: compile_kind(scorer, given, tokens, mask)
        for name, (scorer, given) in kinds(config, model, params).items()
    }
    jax.block_until_ready([program.score() for program in programs.values()])
    seconds = seconds_of(*map(prepared, programs.values()), repeats=config.repeats)
    names, (one, *_) = list(programs), seconds
    ratios = [
        ratio(f"{name}: time over one reward model", taken, one) for name, taken in zip(names, seconds, strict=True)
    ]
    rows = [row(f"{name}: scores", "a second", config.rows / taken) for name, taken in zip(names, seconds, strict=True)]
    rows += ratios[1:]
    for name, program in programs.items():
        rows += [
            row(f"{name}: parameters", "MiB", np.array([program.parameters / MIB])),
            row(f"{name}: temporaries", "MiB", np.array([program.temporaries / MIB])),
        ]
    heads = ratios[1]
    checks = [run_folder.check(heads["name"], heads["mean"], LARGEST_RATIO, "at most")]
    return run_folder.conclude(folder, rows, checks, began, clock.seconds)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
