"""What the sweep of in-context learning costs: prompts a second, and many runs in one program against one by one.

    python experiments/icl_sweep.py

Every run trains one layer of linear attention on prompts of Gaussian mixtures (`rlhf_jax.icl.sweep`), by gradient
descent on fresh prompts. Three comparisons, each timed several times in alternating order:

(a) seeds × context lengths in one program against one run after the other, both on one device: with one compiled
    program, which the traced context length allows, and with a program a context length, as one writes it with a fixed
    length; and what splitting the one program over all devices (here: CPU cores) adds, as rows of their own;
(b) runs that one program maps one after the other against runs that it vmaps, on one device;
(c) raw prompts, every example drawn, against sufficient statistics, whose cost does not depend on the context length.

A timed call begins with its state on the device and ends with the weights of all runs on the host. Ratios are geometric
means with 95 % intervals over repeats.

Two CPU cores (AMD EPYC), 145 s: (a) 16 seeds x 8 lengths in one program 1.77 million prompts a second on one core and
3.12 on two; one by one on one core takes 1.11 [.99, 1.25] times as long as the one program there, 1.96 [1.75, 2.20]
times as long as on both, and with a program a length, compilation included, 2.93 [2.82, 3.04] times as long. (b) vmap
takes .82 [.78, .86] of map. (c) raw prompts take 1.8, 10 and 91 times as long at N = 10, 100 and 1,000.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.timing import Prepared, ratio, seconds_of
from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.claims.training import make_raw_training
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.sweep import Lanes, Log, Runs, grid, make_sweep, start
from rlhf_jax.parallel.lanes import choose_rule, use_all_cores
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the measurement.

    Attributes:
        preset: a complete configuration to start from.
        dimension: features d.
        lengths: context lengths of the sweep.
        seeds: runs of each length.
        steps: updates a timed call.
        batch: prompts an update.
        raw_lengths: context lengths at which raw prompts are timed.
        raw_seeds: runs of raw prompts.
        repeats: timed calls of each program, at least 2.
        out: folder to write to; None: runs/icl_sweep/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
    """

    preset: Literal["default", "tiny"] = "default"
    dimension: int = 3
    lengths: tuple[int, ...] = (10, 20, 40, 80, 160, 320, 640, 1280)
    seeds: int = 16
    steps: int = 50
    batch: int = 1024
    raw_lengths: tuple[int, ...] = (10, 100, 1000)
    raw_seeds: int = 2
    repeats: int = 5
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False


PRESETS = {
    "default": Config(),
    "tiny": Config(
        "tiny", dimension=2, lengths=(3, 5), seeds=2, steps=2, batch=8, raw_lengths=(4,), raw_seeds=1, repeats=2
    ),
}
OPTIMIZER = optax.sgd(2.0)


def begin(config: Config, runs: Runs) -> Lanes:
    """The state that a call of the sweep consumes, ready on the device."""
    return jax.block_until_ready(start(Mixture(config.dimension), runs, OPTIMIZER))


def program(config: Config, runs: Runs, **options: Any) -> tuple[Callable[[Lanes], tuple[Lanes, Log]], float]:
    """The compiled sweep, and its seconds of compilation."""
    state = begin(config, runs)
    began = time.perf_counter()
    advance = make_sweep(Mixture(config.dimension), OPTIMIZER, config.steps, config.batch, **options)
    compiled = advance.lower(state).compile()
    return compiled, time.perf_counter() - began


def seconds_to_compile(config: Config, length: int) -> float:
    """Seconds of compilation of a single run whose context length is part of the program."""
    state = begin(config, grid((0,), (length,)))
    began = time.perf_counter()
    advance = make_sweep(Mixture(config.dimension), OPTIMIZER, config.steps, config.batch, devices=jax.devices()[:1])
    fixed = jax.jit(lambda lanes: advance(lanes._replace(length=jnp.array([length], jnp.int32))))
    fixed.lower(state).compile()
    return time.perf_counter() - began


def against_one_by_one(config: Config) -> tuple[list[dict], list[dict], float]:
    """All runs in one program beside one after the other, with one program and with one a context length."""
    runs = grid(range(config.seeds), config.lengths)
    singles = [Runs(*(leaf[i : i + 1] for leaf in runs)) for i in range(len(runs.seeds))]
    one, every = jax.devices()[:1], jax.devices()
    rule = choose_rule("auto")
    other = "vmap" if rule == "map" else "map"
    here, compile_here = program(config, runs, devices=one)
    otherwise, compile_other = program(config, runs, rule=other, devices=one)
    spread, compile_spread = program(config, runs, devices=every)
    single, compile_alone = program(config, singles[0], devices=one)
    naive = sum(seconds_to_compile(config, length) for length in config.lengths)

    def whole(compiled: Callable[[Lanes], tuple[Lanes, Log]]) -> Prepared:
        def prepare() -> Callable[[], np.ndarray]:
            state = begin(config, runs)
            return lambda: np.asarray(compiled(state)[0].weights)

        return prepare

    def apart() -> Callable[[], np.ndarray]:
        states = [begin(config, run) for run in singles]
        return lambda: np.concatenate([np.asarray(single(state)[0].weights) for state in states])

    calls = [whole(here), apart, whole(otherwise), whole(spread)]
    found, expected, *_ = [call()() for call in calls]
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    together, sequential, batched, split = seconds_of(*calls, repeats=config.repeats)
    millions = len(singles) * config.steps * config.batch / 1e6
    size = f"{config.seeds} seeds × {len(config.lengths)} lengths"
    devices, total = f"all devices ({len(every)})", f"one device, {config.steps} updates and compilation"
    rows = [
        row(f"{size}, one program, one device: prompts", "million a second", millions / together),
        row(f"{size}, one program, {devices}: prompts", "million a second", millions / split),
        row(f"{size}, one by one, one device: prompts", "million a second", millions / sequential),
        ratio(f"{size}: one by one over one program, one device", sequential, together),
        ratio(f"{size}: one by one on one device over one program on {devices}", sequential, split),
        ratio(f"{size}: one program, one device over {devices}", together, split),
        ratio(f"{size}: one by one over one program, {total}", sequential + compile_alone, together + compile_here),
        ratio(f"{size}: a program a length over one program, {total}", sequential + naive, together + compile_here),
        ratio(f"{size}: {other} over {rule}, one device", batched, together),
        row("compilation of the sweep, one device", "s", np.array([compile_here])),
        row(f"compilation of the sweep, {devices}", "s", np.array([compile_spread])),
        row(f"compilation of the sweep by {other}, one device", "s", np.array([compile_other])),
        row("compilation of one run", "s", np.array([compile_alone])),
        row(f"compilation of one run, {len(config.lengths)} times", "s", np.array([naive])),
    ]
    checks = [run_folder.check("largest relative difference of W from that of single runs", off, 1e-3, "at most")]
    return rows, checks, compile_here + compile_other + compile_spread + compile_alone + naive


def against_raw_prompts(config: Config) -> list[dict]:
    """Raw prompts beside sufficient statistics on all devices: the same runs, with drawn labels, at each length."""
    rows, mixture = [], Mixture(config.dimension)
    keys = jax.random.split(jax.random.key(0), config.raw_seeds)
    millions = config.raw_seeds * config.steps * config.batch / 1e6
    for length in config.raw_lengths:
        runs = grid(range(config.raw_seeds), (length,))
        reduced, _ = program(config, runs, labels="hard", devices=jax.devices())
        training = make_raw_training(mixture, length, config.steps, config.batch)

        def of_statistics() -> Callable[[], Any]:
            state = begin(config, runs)  # noqa: B023
            return lambda: reduced(state)  # noqa: B023

        calls = [lambda: lambda: training(keys), of_statistics]  # noqa: B023
        jax.block_until_ready([call()() for call in calls])
        raw, statistics = seconds_of(*calls, repeats=config.repeats)
        rows += [
            row(f"raw prompts, N = {length}: prompts", "million a second", millions / raw),
            row(f"sufficient statistics, N = {length}: prompts", "million a second", millions / statistics),
            ratio(f"raw prompts over sufficient statistics, N = {length}", raw, statistics),
        ]
    return rows


def check_options(config: Config) -> None:
    """Refuses options that cannot be.

    Raises:
        ValueError: naming the option.
    """
    Mixture(config.dimension)
    for name in ("seeds", "steps", "batch", "raw_seeds"):
        at_least(f"option {name}", getattr(config, name), 1)
    at_least("option repeats", config.repeats, 2)  # intervals are over repeats
    grid(range(config.seeds), config.lengths)
    for length in config.raw_lengths:
        at_least("context length of raw prompts", length, 1)


def main(config: Config) -> dict:
    """Measures and returns the summary."""
    began = time.monotonic()
    check_options(config)
    folder = run_folder.create(config.out, "icl_sweep", config, config.overwrite)
    rows, checks, compiled = against_one_by_one(config)
    rows += against_raw_prompts(config)
    return run_folder.conclude(folder, rows, checks, began, compiled)


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
