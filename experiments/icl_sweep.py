"""What the sweep of in-context learning costs: prompts a second, and many runs in one program against one by one.

    python experiments/icl_sweep.py

Every run trains one layer of linear attention on prompts of Gaussian mixtures (`rlhf_jax.icl.sweep`), by gradient
descent on fresh prompts. Three comparisons, each timed several times in alternating order:

(a) seeds × context lengths in one program against one run after the other: with one compiled program, which the traced
    context length allows, and with a program a context length, as one writes it with a fixed length;
(b) runs that one program maps one after the other on every core against runs that it vmaps;
(c) raw prompts, every example drawn, against sufficient statistics, whose cost does not depend on the context length.

Ratios are geometric means with 95 % intervals over repeats.
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

from rlhf_jax.evaluation.statistics import mean_interval, row
from rlhf_jax.icl.claims.training import make_raw_training
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.sweep import Lanes, Runs, grid, make_sweep, start
from rlhf_jax.parallel.lanes import use_all_cores
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


def seconds_of(*calls: Callable[[], Any], repeats: int) -> np.ndarray:
    """Seconds of each call, [calls, repeats]; the calls take turns, so that all meet the same load."""
    found = np.empty((len(calls), repeats))
    for number in range(repeats):
        for place, call in enumerate(calls):
            began = time.perf_counter()
            jax.block_until_ready(call())
            found[place, number] = time.perf_counter() - began
    return found


def ratio(name: str, slower: np.ndarray, faster: np.ndarray) -> dict[str, Any]:
    """A row: how many times as long, the geometric mean over repeats with the interval of its logarithm."""
    logs = np.log(slower / faster)
    found = mean_interval(logs)
    ends = [float(np.exp(found.low)), float(np.exp(found.high))]
    return {
        "name": name,
        "unit": "times",
        "mean": float(np.exp(found.mean)),
        "sd": found.sd,
        "n": found.n,
        "ci95": ends,
    }


def program(config: Config, runs: Runs, **options: Any) -> tuple[Callable[[], Lanes], float]:
    """A call of the sweep from its start, and its seconds of compilation."""
    mixture = Mixture(config.dimension)
    began = time.perf_counter()
    advance = make_sweep(mixture, OPTIMIZER, config.steps, config.batch, **options)
    compiled = advance.lower(start(mixture, runs, OPTIMIZER)).compile()
    seconds = time.perf_counter() - began

    def call(runs: Runs = runs) -> Lanes:
        return compiled(start(mixture, runs, OPTIMIZER))[0]  # the state is donated, so every call has its own

    return call, seconds


def seconds_to_compile(config: Config, length: int) -> float:
    """Seconds of compilation of a single run whose context length is part of the program."""
    mixture = Mixture(config.dimension)
    advance = make_sweep(mixture, OPTIMIZER, config.steps, config.batch, devices=jax.devices()[:1])
    began = time.perf_counter()
    fixed = jax.jit(lambda lanes: advance(lanes._replace(length=jnp.array([length], jnp.int32))))
    fixed.lower(start(mixture, grid((0,), (length,)), OPTIMIZER)).compile()
    return time.perf_counter() - began


def against_one_by_one(config: Config) -> tuple[list[dict], list[dict], float]:
    """All runs in one program beside one after the other, with one program and with one a context length."""
    runs = grid(range(config.seeds), config.lengths)
    singles = [Runs(*(leaf[i : i + 1] for leaf in runs)) for i in range(len(runs.seeds))]
    together, compile_together = program(config, runs)
    vmapped, compile_vmapped = program(config, runs, rule="vmap")
    single, compile_alone = program(config, singles[0], devices=jax.devices()[:1])
    naive = sum(seconds_to_compile(config, length) for length in config.lengths)

    def one_by_one() -> list[np.ndarray]:
        return [np.asarray(single(one).weights) for one in singles]

    expected, found = np.concatenate(one_by_one()), np.asarray(together().weights)
    jax.block_until_ready(vmapped())
    apart = float(np.abs(found - expected).max() / np.abs(expected).max())
    one, batched, sequential = seconds_of(together, vmapped, one_by_one, repeats=config.repeats)
    millions = len(singles) * config.steps * config.batch / 1e6
    size = f"{config.seeds} seeds × {len(config.lengths)} lengths"
    total = f"{config.steps} updates and compilation"
    rows = [
        row(f"{size}, one program: prompts", "million a second", millions / one),
        row(f"{size}, one by one: prompts", "million a second", millions / sequential),
        ratio(f"{size}: one by one over one program", sequential, one),
        ratio(f"{size}: one by one over one program, {total}", sequential + compile_alone, one + compile_together),
        ratio(f"{size}: a program a length over one program, {total}", sequential + naive, one + compile_together),
        ratio(f"{size}: vmapped over mapped", batched, one),
        row("compilation of the sweep", "s", np.array([compile_together])),
        row("compilation of the vmapped sweep", "s", np.array([compile_vmapped])),
        row("compilation of one run", "s", np.array([compile_alone])),
        row(f"compilation of one run, {len(config.lengths)} times", "s", np.array([naive])),
    ]
    checks = [run_folder.check("largest relative difference of W from that of single runs", apart, 1e-3, "at most")]
    return rows, checks, compile_together + compile_vmapped + naive


def against_raw_prompts(config: Config) -> list[dict]:
    """Raw prompts beside sufficient statistics: the same runs, with drawn labels, at each context length."""
    rows, mixture = [], Mixture(config.dimension)
    keys = jax.random.split(jax.random.key(0), config.raw_seeds)
    millions = config.raw_seeds * config.steps * config.batch / 1e6
    for length in config.raw_lengths:
        reduced, _ = program(config, grid(range(config.raw_seeds), (length,)), labels="hard")
        training = make_raw_training(mixture, length, config.steps, config.batch)
        jax.block_until_ready((reduced(), training(keys)))
        raw, statistics = seconds_of(lambda: training(keys), reduced, repeats=config.repeats)  # noqa: B023
        rows += [
            row(f"raw prompts, N = {length}: prompts", "million a second", millions / raw),
            row(f"sufficient statistics, N = {length}: prompts", "million a second", millions / statistics),
            ratio(f"raw prompts over sufficient statistics, N = {length}", raw, statistics),
        ]
    return rows


def main(config: Config) -> dict:
    """Measures and returns the summary."""
    began = time.monotonic()
    if config.repeats < 2 or config.raw_seeds < 1:
        raise ValueError("icl_sweep needs at least 2 repeats, as intervals are over repeats, and 1 raw seed.")
    grid(range(config.seeds), config.lengths)  # refuses bad options before there is a folder
    folder = run_folder.create(config.out, "icl_sweep", config, config.overwrite)
    rows, checks, compiled = against_one_by_one(config)
    rows += against_raw_prompts(config)
    result = run_folder.summary(folder, rows, checks, time.monotonic() - began, compiled)
    run_folder.write_summary(folder, result)
    run_folder.print_summary(result)
    return result


if __name__ == "__main__":
    use_all_cores()
    run(main, PRESETS, __doc__)
