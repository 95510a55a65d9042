"""Imitation where everything can be worked out: a bandit of 40 arms, its optimum, and what VAR, SuperHF, RAFT and
best-of-n distillation make of samples.

    python experiments/bandit.py

It reports (a) how far VAR stays below the optimum J* of J = E r - lambda KL(policy || reference) as the group it
normalises over grows, and (b) what reward SuperHF, RAFT and best-of-n distillation get for how much KL and entropy,
beside the optima of all lambda, the frontier of reward for KL. It takes 20 seconds of processor time, half of them to
compile. Means over 8 seeds, at lambda = 0.5:

| policy      | J* - J | total variation from the optimum |
|-------------|-------:|---------------------------------:|
| SFT         |  0.922 |                            0.622 |
| VAR, K = 2  |  0.455 |                            0.477 |
| VAR, K = 4  |  0.199 |                            0.331 |
| VAR, K = 8  |  0.078 |                            0.214 |
| VAR, K = 16 |  0.026 |                            0.120 |
| VAR, K = 64 |  0.003 |                            0.035 |

| policy               | reward | KL   | entropy |
|----------------------|-------:|-----:|--------:|
| best of 4            |   1.05 | 0.62 |    2.57 |
| best of 16           |   1.64 | 1.72 |    1.44 |
| RAFT, iteration 2    |   1.92 | 2.84 |    0.71 |
| SuperHF, beta = 0    |   2.10 | 4.14 |    0.08 |
| SuperHF, beta = 0.1  |   1.92 | 3.55 |    0.59 |
| SuperHF, beta = 0.25 |   1.69 | 2.91 |    1.12 |
| SuperHF, beta = 1    |   1.04 | 1.47 |    2.26 |

Of the reward that SuperHF gains at beta = 0, beta = 0.1 keeps 92 %, and beta = 0.25 keeps 81 %. Its limit is known, and
training ends there: (best-of-n of itself + beta reference) / (1 + beta), n being the samples it keeps the best of. Such
a mixture keeps entropy and pays for it: at the same KL, VAR, best-of-n and RAFT's second iteration have more reward.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax.evaluation.figures import GREY, PALE, PALETTE, style
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.bandit import Measures, Options, Study, check_options, distance, run_bandits, tilted
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.sampling.best_of_n import best_of_n_kl
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the run.

    Attributes:
        preset: a complete configuration to start from.
        out: folder to write to; None: runs/bandit/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
    """

    preset: Literal["default"] = "default"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False


NAMES = {
    "SFT": "SFT{}",
    "VAR": "VAR, K = {}",
    "best-of-n": "best of {}, distilled",
    "RAFT": "RAFT, iteration {}",
    "SuperHF": "SuperHF, beta = {}",
}


def rows_of(config: Config, found: Study) -> list[dict]:
    """What the summary reports of every policy."""
    start = found.measured(found.reference)
    rows = [
        row("optimum: J*", "reward", found.measured(found.optimum).objective(config.temperature)),
        row("reference: J", "reward", start.objective(config.temperature)),
        row("reference: entropy", "nats", start.entropy),
    ]
    for family, name in NAMES.items():
        for setting, measures in found.measures(family).items():
            label = name.format(setting)
            if family in ("SFT", "VAR"):
                below = found.below(family, config.temperature)[setting]
                apart = distance(found.trained[family][setting], found.optimum)
                rows += [
                    row(f"{label}: J", "reward", measures.objective(config.temperature)),
                    row(f"{label}: J* - J", "reward", below),
                    row(f"{label}: distance to the optimum", "total variation", apart),
                ]
            else:
                rows += [
                    row(f"{label}: reward", "reward", measures.reward),
                    row(f"{label}: KL", "nats", measures.kl),
                    row(f"{label}: entropy", "nats", measures.entropy),
                ]
    return rows


def checks_of(config: Config, found: Study) -> list[dict]:
    """What should hold; means over seeds unless a name says otherwise."""
    below = list(found.below("VAR", config.temperature).values())
    superhf = found.measures("SuperHF")
    rising = list(superhf.values())
    falling = rising[::-1]

    def least_rise(values: Sequence[np.ndarray]) -> float:
        """The least mean change from one setting to the next."""
        return min(float((after - before).mean()) for before, after in itertools.pairwise(values))

    start = (found.reference * found.rewards).sum(axis=-1)
    full = float((rising[0].reward - start).mean())
    shares = {beta: float((measures.reward - start).mean()) / full for beta, measures in superhf.items()}
    moderate = [beta for beta in config.betas[1:] if shares[beta] >= 0.9]
    widest = max((float(superhf[beta].entropy.mean()) for beta in moderate), default=0.0)
    best_of = found.exact["best-of-n"]
    excess = max(float(found.measured(policy).kl.max()) - best_of_n_kl(n) for n, policy in best_of.items())
    check, largest = run_folder.check, config.groups[-1]
    checks = [
        check(f"VAR: J* - J at K = {largest}", float(below[-1].mean()), 0.02, "at most"),
        check(f"VAR: J* - J at K = {largest}, worst seed", float(below[-1].max()), 0.02, "at most"),
        check("VAR: least fall of J* - J from one K to the next", least_rise(below[::-1]), 0.0, "at least"),
        check("SuperHF: least rise of reward as beta falls", least_rise([m.reward for m in falling]), 0.0, "at least"),
        check("SuperHF: least rise of KL as beta falls", least_rise([m.kl for m in falling]), 0.0, "at least"),
        check("SuperHF: least rise of entropy as beta rises", least_rise([m.entropy for m in rising]), 0.0, "at least"),
        check(
            "SuperHF: entropy with 90 % of the reward gained, over that of beta = 0",
            widest / max(float(rising[0].entropy.mean()), np.finfo(np.float64).tiny),
            2.0,
            "at least",
        ),
        check("best of n, exact: KL above log n - (n - 1) / n, worst seed", excess, 0.0, "at most"),
    ]
    for family, policies in found.exact.items():
        apart = max(distance(found.trained[family][at], policy).mean() for at, policy in policies.items())
        checks.append(check(f"{family}: largest distance to the exact policy", float(apart), 0.02, "at most"))
    return checks


def draw(config: Config, found: Study, path: Path) -> Path:
    """J* - J of VAR by K; and reward against KL and entropy of everything, with the frontier of the tilted policies."""
    from matplotlib.figure import Figure

    temperatures = np.geomspace(0.02, 20.0, 60)
    frontier = [found.measured(tilted(found.reference, found.rewards, one)) for one in temperatures]
    colours = dict(zip(("SuperHF", "best-of-n", "RAFT", "VAR"), PALETTE, strict=False))
    markers = dict(zip(colours, "os^D", strict=True))
    labels = {"SuperHF": "β", "best-of-n": "n", "RAFT": "iteration", "VAR": "K"}
    below = np.stack(list(found.below("VAR", config.temperature).values()))
    sft = found.below("SFT", config.temperature)[""].mean()

    def trace(panel: Any, quantity: str, measures: Iterable[Measures], **line: Any) -> None:
        """Mean reward against the mean of another measure."""
        points = [(getattr(each, quantity).mean(), each.reward.mean()) for each in measures]
        panel.plot(*zip(*points, strict=True), **line)

    with style():
        figure = Figure(figsize=(11.4, 3.7), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        left.plot(config.groups, below, color=PALE, linewidth=0.8)
        left.plot(config.groups, below.mean(axis=1), color=colours["VAR"], marker=markers["VAR"], markersize=5)
        left.axhline(sft, color=GREY, linestyle=":", linewidth=1.2)
        left.axhline(0.02, color="black", linestyle="--", linewidth=0.9)
        left.text(config.groups[-1], sft * 0.95, "SFT", color=GREY, ha="right", va="top")
        left.text(config.groups[0], 0.02 * 0.95, "0.02", ha="left", va="top")
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        left.set_xticks(config.groups, [str(size) for size in config.groups])
        left.set_xlabel("K, responses that weights are normalised over")
        left.set_ylabel("J* − J (reward)")
        left.set_title("VAR approaches the optimum")

        for panel, quantity in ((middle, "kl"), (right, "entropy")):
            trace(panel, quantity, frontier, color=PALE, linewidth=5, label="optimum at every λ", zorder=1)
            start = {"color": "black", "marker": "x", "linestyle": "", "label": "reference", "zorder": 4}
            trace(panel, quantity, [found.measured(found.reference)], **start)
            for family, colour in colours.items():
                look = {"color": colour, "marker": markers[family], "markersize": 4.5, "linewidth": 1.0, "zorder": 3}
                measures = found.measures(family).values()
                trace(panel, quantity, measures, label=f"{family} (by {labels[family]})", **look)
            panel.set_ylabel("reward")
            for beta, m in found.measures("SuperHF").items():
                panel.annotate(
                    f"{beta:g}",
                    (getattr(m, quantity).mean(), m.reward.mean()),
                    xytext=(5, -9) if panel is middle else (-7, -10),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=colours["SuperHF"],
                )
        middle.set_xlabel("KL from the reference (nats)")
        middle.set_title("reward for KL")
        right.set_xlabel("entropy (nats)")
        right.set_title("reward for entropy")
        handles, names = middle.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def main(config: Config) -> dict:
    """Trains every policy on every bandit and returns the summary."""
    began = time.monotonic()
    check_options(config)
    folder = run_folder.create(config.out, "bandit", config, config.overwrite)
    found, compiled = run_bandits(config)
    draw(config, found, folder.path / "figures" / "bandit.png")
    rows, checks = rows_of(config, found), checks_of(config, found)
    return run_folder.conclude(folder, rows, checks, began, compiled)


if __name__ == "__main__":
    use_all_cores()
    run(main, {"default": Config()}, __doc__)
