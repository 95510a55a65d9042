"""What a train step costs with the logits of all positions, and with blocks of them: memory, compilation and time.

    python experiments/chunked_logprobs.py

One update (next-token loss with an entropy term, Adam) of a small trunk under a vocabulary of 150,000 tokens, on one
row of 4,096: the size at which the logits, 2.3 GiB, are most of the memory. `--preset large` compiles the step of a
model of about a billion parameters on four such rows, and runs nothing.

Memory is what the compiler plans for the program, on the device that it is compiled for: 16.2 GiB with all logits and
1.1 GiB in blocks on a CPU (86.2 and 31.7 GiB for `large`). The two programs take turns, so that a busy machine slows
both. The default needs 18 GiB of free memory, and a few minutes on 2 CPU cores; `--calls 0` compiles only.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.optimizer import adam, apply_gradients
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.losses.logprobs import entropy, token_logprob
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy, token_scores, unembed
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.options import RunOptions
from rlhf_jax.training.progress import ProgressReport


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the measurement.

    Attributes:
        vocabulary: tokens of the vocabulary.
        tokens: tokens of a row.
        rows: rows of the batch.
        width: width of the residual stream; heads have 64 channels, feed-forward blocks four times the width.
        layers: number of blocks of the trunk.
        calls: timed calls of each program, after one that is not timed; 0: compile only.
    """

    vocabulary: int = 150_000
    tokens: int = 4096
    rows: int = 1
    width: int = 64
    layers: int = 1
    calls: int = 3


def plain_scores(config: ModelConfig, params, states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `token_scores` returns, from the logits of all positions."""
    logits = unembed(config, params, states)
    return token_logprob(logits, targets), entropy(logits)


def make_step(config: ModelConfig, scores: Callable) -> tuple[Callable, Callable]:
    """`init(key) -> state` and `step(state, tokens) -> (state, metrics)` of a policy whose tokens are scored so."""
    optimizer = adam(1e-3)

    def init(key: jax.Array):
        params = init_policy(config, key)
        return params, optimizer.init(params)

    def loss(params, tokens: jax.Array) -> jax.Array:
        states = apply_trunk(config, params["trunk"], tokens, jnp.ones(tokens.shape, bool)).final
        logprob, spread = scores(config, params, states, jnp.roll(tokens, -1, axis=1))
        return -(logprob[:, :-1] + 0.01 * spread[:, :-1]).mean()

    def step(state, tokens: jax.Array):
        params, optimizer_state = state
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        params, optimizer_state, applied = apply_gradients(optimizer, gradients, optimizer_state, params)
        return (params, optimizer_state), applied | {"loss": value}

    return init, step


def planned_memory(program) -> float:
    """The memory that a compiled program needs, in GiB: arguments, results that do not replace them, temporaries."""
    plan = program.memory_analysis()
    new = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (plan.argument_size_in_bytes + new + plan.temp_size_in_bytes) / 2**30


def main(config: Config) -> dict:
    """Compiles both steps, times them in turns, and returns the summary."""
    began = time.monotonic()
    if config.calls < 0 or config.width % 64:
        raise ValueError("chunked_logprobs needs a width that is a multiple of 64, and calls of 0 or more.")
    folder = run_folder.create(config.out, "chunked_logprobs", config, config.overwrite)
    model = ModelConfig(
        vocab_size=config.vocabulary,
        width=config.width,
        layers=config.layers,
        heads=config.width // 64,
        key_value_heads=config.width // 64,
        feed_forward_width=4 * config.width,
        context_length=config.tokens,
        attention="ring",
        remat="full",
    )
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (config.rows, config.tokens), 0, config.vocabulary, jnp.int32)
    programs, starts, memory, compiled = {}, {}, {}, {}
    for name, scores in {"all logits": plain_scores, "blocks": token_scores}.items():
        starts[name], step = make_step(model, scores)
        start = time.perf_counter()
        shapes = jax.eval_shape(starts[name], key)
        programs[name] = jax.jit(step, donate_argnums=0).lower(shapes, tokens).compile()
        compiled[name] = time.perf_counter() - start
        memory[name] = planned_memory(programs[name])
    logits = config.rows * config.tokens * config.vocabulary * 4 / 2**30

    one = partial(np.full, 1)
    rows = [row("logits of all positions", "GiB", one(logits))]
    rows += [row(f"{name}: memory of a train step", "GiB", one(memory[name])) for name in programs]
    saved = memory["blocks"] / memory["all logits"]
    rows += [row("memory, blocks over all logits", "1", one(saved))]
    rows += [row(f"{name}: compilation", "s", one(compiled[name])) for name in programs]
    checks = [run_folder.check("memory, blocks over all logits", saved, 1.0, "at most")]
    if config.calls:
        seconds, metrics = take_turns(programs, starts, key, tokens, config.calls)
        rows += [row(f"{name}: one train step", "s", seconds[name]) for name in programs]
        rows += [row("time, blocks over all logits", "1", seconds["blocks"] / seconds["all logits"])]
        for name in ("loss", "grad_norm"):
            both = [float(metrics[of][name]) for of in programs]
            gap = abs(both[1] / both[0] - 1)
            checks.append(run_folder.check(f"relative difference of the first {name}", gap, 0.0, 1e-4))
    return run_folder.conclude(folder, rows, checks, began, sum(compiled.values()))


def take_turns(programs: dict, starts: dict, key: jax.Array, tokens: jax.Array, calls: int) -> tuple[dict, dict]:
    """Seconds of each call of each program, [calls], and the metrics of its first call, which is not timed."""
    states, first = {}, {}
    for name, program in programs.items():
        states[name], first[name] = jax.block_until_ready(program(jax.jit(starts[name])(key), tokens))
    seconds = {name: np.zeros(calls) for name in programs}
    with ProgressReport("train steps", calls) as progress:
        for call in range(calls):
            for name, program in programs.items():
                began = time.perf_counter()
                states[name], _ = jax.block_until_ready(program(states[name], tokens))
                seconds[name][call] = time.perf_counter() - began
            progress.advance({f"seconds, {name}": seconds[name][call] for name in programs})
    return seconds, first


if __name__ == "__main__":
    run(main, {"default": Config(), "large": Config(rows=4, width=2048, layers=16, calls=0)}, __doc__)
