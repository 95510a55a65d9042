"""What sixteen seeds cost in one program, beside sixteen runs one after the other: mapped on every device, and vmapped.

    python experiments/lanes.py

It runs the policy updates of the over-optimisation study (`experiments/overoptimization.py --preset demo`, PPO on a
single reward model, fresh weights) and reports compile time, wall time of a call, how many times as long the same work
takes as single runs, and how many programs were compiled after the first call. The programs are called in turns. Two
minutes on 2 CPU cores; docs/results.md has the numbers.

On a CPU, jaxlib 0.10 can wait for ever in its thread pool when vmapped lanes are split over several devices, or when
they hold batched triangular solves (AdvPO, sample-wise) inside a loop: vmapped lanes take one device here, and studies
on a CPU map their lanes.
"""

import dataclasses
import time

import jax
import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.timing import ratio, seconds_of
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.study_costs import study
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.options import RunOptions


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the measurement.

    Attributes:
        seeds: lanes of the larger programs.
        updates: PPO updates a call.
        calls: timed calls of each program, after one that is not timed.
    """

    seeds: int = 16
    updates: int = 5
    calls: int = 10


def main(config: Config) -> dict:
    """Measures one seed and many, vmapped and mapped, and returns the summary."""
    began = time.monotonic()
    if config.seeds < 2 or config.calls < 2 or config.updates < 1:
        raise ValueError("lanes needs at least 2 seeds, 1 update and 2 timed calls.")
    folder = run_folder.create(config.out, "lanes", config, config.overwrite)
    clock, rows, programs = CompileClock(), [], {}
    many = f"{config.seeds} seeds"
    for name, seeds, rule in (
        ("1 seed", 1, "vmap"),  # on one device; mapped over several it would be filled up with copies of itself
        (f"{many}, mapped", config.seeds, "map"),
        (f"{many}, vmapped", config.seeds, "vmap"),
    ):
        before = clock.seconds
        options = Options(seeds=seeds, updates=config.updates, report_every=config.updates, methods=("PPO",))
        programs[name] = (seeds, study(options, rule, jax.random.key(0)))
        rows.append(row(f"{name}: compilation", "s", np.array([clock.seconds - before])))
        print(f"[{time.monotonic() - began:6.1f} s] {name}: compiled", flush=True)

    warm = clock.programs
    calls = [lambda go_on=go_on: go_on for _, go_on in programs.values()]
    seconds = dict(zip(programs, seconds_of(*calls, repeats=config.calls), strict=True))
    late = clock.programs - warm
    for name, (seeds, _) in programs.items():
        rows += [
            row(f"{name}: {config.updates} updates", "s", seconds[name]),
            row(f"{name}: one update of one seed", "ms", seconds[name] / (seeds * config.updates) * 1e3),
        ]
    alone, *together = programs
    rows += [
        ratio(f"{config.seeds} runs one after the other, over {name}", config.seeds * seconds[alone], seconds[name])
        for name in together
    ]
    checks = [run_folder.check("programs compiled after the first call", float(late), 0.0)]
    return run_folder.conclude(folder, rows, checks, began, clock.seconds)


if __name__ == "__main__":
    use_all_cores()
    run(main, {"default": Config()}, __doc__)
