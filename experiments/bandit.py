"""Imitation where everything can be worked out: a bandit of 40 arms, its optimum, and what VAR, SuperHF, RAFT and
best-of-n distillation make of samples.

    python experiments/bandit.py

A response is one arm, so that the reward, the entropy and the KL of a policy are sums over arms and need no samples;
only the training does. A seed is a bandit of its own: rewards and the logits of the reference are standard normal. All
policies see as many responses a step for as many steps (RAFT in each iteration), through the losses of the package.

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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.algorithms.imitation import Imitation, imitating
from rlhf_jax.algorithms.optimizer import adam, apply_gradients, learning_rate_schedule
from rlhf_jax.evaluation.figures import GREY, PALE, PALETTE, style
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.losses.imitation import equal_weights, top_rows, weighted_likelihood_loss
from rlhf_jax.models.divergence import hidden_forward_kl
from rlhf_jax.parallel.lanes import over_lanes, use_all_cores
from rlhf_jax.sampling.best_of_n import best_of_n_kl
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the experiment.

    Attributes:
        preset: a complete configuration to start from.
        out: folder to write to; None: runs/bandit/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
        seeds: how many bandits.
        arms: of each.
        temperature: lambda of VAR and of J, reward units a nat.
        groups: sizes K of the groups that VAR normalises its weights over, ascending.
        best_of: the n of best-of-n distillation.
        samples: n of SuperHF and RAFT, of which the best response is kept.
        betas: SuperHF's coefficients of KL(reference || policy), from 0 up.
        iterations: of RAFT, each a best-of-n distillation of the one before.
        responses: drawn at each step.
        steps: of Adam with a cosine decay, for each policy (of RAFT: for each iteration).
        learning_rate: its peak.
    """

    preset: Literal["default"] = "default"
    out: Path | None = None
    overwrite: bool = False
    strict: bool = False
    seeds: int = 8
    arms: int = 40
    temperature: float = 0.5
    groups: tuple[int, ...] = (2, 4, 8, 16, 64)
    best_of: tuple[int, ...] = (2, 4, 8, 16, 32)
    samples: int = 8
    betas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
    iterations: int = 4
    responses: int = 2048
    steps: int = 300
    learning_rate: float = 0.1


class Bandit(NamedTuple):
    """Rewards and the logits of the reference policy, [A] each."""

    rewards: Float[Array, " A"]
    reference: Float[Array, " A"]


class Policies(NamedTuple):
    """Logits of the trained policies, [settings, A] each; with a leading axis of seeds once they are stacked."""

    sft: Array
    var: Array
    best_of_n: Array
    raft: Array
    superhf: Array


def make_bandit(config: Config, seed: Array) -> Bandit:
    """Rewards and reference of one seed."""
    return Bandit(*jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), (2, config.arms)))


def imitate(
    config: Config,
    bandit: Bandit,
    key: Array,
    chosen: Imitation,
    samples: int,
    source: Array | None,
    beta: Array | float = 0.0,
) -> Float[Array, " A"]:
    """Logits of a policy trained on samples of a fixed source, or of itself where there is none."""
    rate = learning_rate_schedule(config.learning_rate, config.steps, shape="cosine")
    optimizer = adam(rate, max_grad_norm=None)
    keep = samples if chosen.keep is None else chosen.keep
    identity = jnp.eye(config.arms)

    def step(carry, key):
        logits, optimizer_state = carry
        drawn = jax.nn.softmax(logits if source is None else source)
        arms = jax.random.choice(key, config.arms, (config.responses,), p=drawn)
        rows = top_rows(bandit.rewards[arms], samples, keep)
        arms = arms[rows]
        weights = chosen.weights(bandit.rewards[arms], keep)

        def loss(logits):
            logprob = jax.nn.log_softmax(logits)[arms][:, None]
            likelihood = weighted_likelihood_loss(
                logprob, weights, jnp.ones(logprob.shape, bool), keep, chosen.reduction
            )
            # With the identity for a kernel the states are the logits.
            prior = hidden_forward_kl(logits[None, None], identity, bandit.reference[None, None], identity)
            return likelihood + beta * prior.mean()

        logits, optimizer_state, _ = apply_gradients(optimizer, jax.grad(loss)(logits), optimizer_state, logits)
        return (logits, optimizer_state), None

    start = bandit.reference if source is None else source
    (logits, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, config.steps))
    return logits


def train(config: Config, bandit: Bandit, key: Array) -> Policies:
    """Every policy of one seed."""
    var, distilled = imitating("var", config.temperature), imitating("best_of_n_distillation")
    keys = iter(jax.random.split(key, 3 + len(config.groups) + len(config.best_of)))
    start = bandit.reference

    def iterate(logits, key):
        logits = imitate(config, bandit, key, imitating("raft"), config.samples, logits)
        return logits, logits

    def superhf(key, beta):
        return imitate(config, bandit, key, imitating("superhf"), config.samples, None, beta)

    plain = dataclasses.replace(var, weights=equal_weights)
    betas = jnp.asarray(config.betas)
    return Policies(
        sft=imitate(config, bandit, next(keys), plain, 1, start)[None],
        var=jnp.stack([imitate(config, bandit, next(keys), var, size, start) for size in config.groups]),
        best_of_n=jnp.stack([imitate(config, bandit, next(keys), distilled, n, start) for n in config.best_of]),
        raft=jax.lax.scan(iterate, start, jax.random.split(next(keys), config.iterations))[1],
        superhf=jax.vmap(superhf)(jax.random.split(next(keys), len(betas)), betas),
    )


# What is known without training, in float64 on the host; policies are [seeds, A].


def best_of_n(policy: np.ndarray, rewards: np.ndarray, n: int) -> np.ndarray:
    """The best of n samples of a policy: the n-th power of the distribution function of its rewards, differenced."""
    order = np.argsort(rewards, axis=-1)
    below = np.cumsum(np.take_along_axis(policy, order, -1), axis=-1)
    density = np.diff((below / below[..., -1:]) ** n, axis=-1, prepend=0.0)
    return np.take_along_axis(density, np.argsort(order, axis=-1), -1)


def superhf_limit(reference: np.ndarray, rewards: np.ndarray, n: int, beta: float) -> np.ndarray:
    """The policy that SuperHF's loss leaves where it is: (best-of-n of itself + beta reference) / (1 + beta)."""
    policy = reference
    for _ in range(2000):
        policy = (best_of_n(policy, rewards, n) + beta * reference) / (1.0 + beta)
    return policy


def tilted(reference: np.ndarray, rewards: np.ndarray, temperature: float) -> np.ndarray:
    """The optimum of E r - temperature KL(policy || reference)."""
    return softmax(np.log(reference) + rewards / temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class Measures(NamedTuple):
    """Reward, entropy (nats) and KL from the reference (nats) of policies, [seeds] each."""

    reward: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray

    def objective(self, temperature: float) -> np.ndarray:
        """J = E r - lambda KL(policy || reference)."""
        return self.reward - temperature * self.kl


def measured(policy: np.ndarray, reference: np.ndarray, rewards: np.ndarray) -> Measures:
    """What can be said of policies [seeds, A]."""
    log_policy = np.log(np.maximum(policy, np.finfo(np.float64).tiny))
    return Measures(
        reward=(policy * rewards).sum(axis=-1),
        entropy=-(policy * log_policy).sum(axis=-1),
        kl=(policy * (log_policy - np.log(reference))).sum(axis=-1),
    )


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Total variation of policies [seeds, A], in [0, 1]."""
    return 0.5 * np.abs(a - b).sum(axis=-1)


class Study(NamedTuple):
    """All policies by family and setting, [seeds, A], the references and rewards they belong to, and what is exact."""

    reference: np.ndarray
    rewards: np.ndarray
    optimum: np.ndarray
    trained: dict[str, dict[Any, np.ndarray]]
    exact: dict[str, dict[Any, np.ndarray]]

    def measured(self, policy: np.ndarray) -> Measures:
        """Measures of any policies of these bandits, [seeds, A]."""
        return measured(policy, self.reference, self.rewards)

    def measures(self, family: str) -> dict[Any, Measures]:
        """Those of the trained policies of a family, by setting."""
        return {setting: self.measured(policy) for setting, policy in self.trained[family].items()}

    def below(self, family: str, temperature: float) -> dict[Any, np.ndarray]:
        """J* - J of the trained policies of a family, by setting, [seeds] each."""
        highest = self.measured(self.optimum).objective(temperature)
        return {setting: highest - found.objective(temperature) for setting, found in self.measures(family).items()}


def study(config: Config, bandits: Bandit, logits: Policies) -> Study:
    """Trained policies by setting, with their counterparts that need no training."""
    rewards, reference_logits, *found = (np.asarray(leaf, np.float64) for leaf in (*bandits, *logits))
    reference, n = softmax(reference_logits), config.samples
    settings = {
        "SFT": ("",),
        "VAR": config.groups,
        "best-of-n": config.best_of,
        "RAFT": tuple(range(1, config.iterations + 1)),
        "SuperHF": config.betas,
    }
    raft = [reference]
    for _ in range(config.iterations):
        raft.append(best_of_n(raft[-1], rewards, n))
    return Study(
        reference=reference,
        rewards=rewards,
        optimum=tilted(reference, rewards, config.temperature),
        trained={
            family: dict(zip(values, softmax(policies).swapaxes(0, 1), strict=True))
            for (family, values), policies in zip(settings.items(), found, strict=True)
        },
        exact={
            "SFT": {"": reference},
            "best-of-n": {size: best_of_n(reference, rewards, size) for size in config.best_of},
            "RAFT": dict(enumerate(raft[1:], start=1)),
            "SuperHF": {beta: superhf_limit(reference, rewards, n, beta) for beta in config.betas},
        },
    )


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
    """Trains every policy on every bandit in one program, and returns the summary."""
    began = time.monotonic()
    check_config(config)
    folder = run_folder.create(config.out, "bandit", config, config.overwrite)

    def lane(seed: Array) -> tuple[Bandit, Policies]:
        bandit = make_bandit(config, seed)
        return bandit, train(config, bandit, jax.random.fold_in(jax.random.key(1), seed))

    seeds = jnp.arange(config.seeds)
    started = time.monotonic()
    program = jax.jit(over_lanes(lane)).lower(seeds).compile()
    compiled = time.monotonic() - started
    found = study(config, *program(seeds))
    draw(config, found, folder.path / "figures" / "bandit.png")
    rows, checks = rows_of(config, found), checks_of(config, found)
    result = run_folder.summary(folder, rows, checks, time.monotonic() - began, compiled)
    run_folder.write_summary(folder, result)
    run_folder.print_summary(result)
    return result


def check_config(config: Config) -> None:
    """Refuses options that the experiment cannot work with.

    Raises:
        ValueError: an option is out of range.
    """
    if config.seeds < 2 or config.arms < 2 or config.steps < 1 or config.iterations < 1:
        raise ValueError("bandit needs at least 2 seeds, 2 arms, 1 step and 1 iteration.")
    if config.temperature <= 0:
        raise ValueError(f"the temperature is {config.temperature}; it must be positive.")
    sizes = (*config.groups, *config.best_of, config.samples)
    if min(sizes) < 2 or any(config.responses % size for size in sizes):
        raise ValueError(
            f"groups, best_of and samples must be at least 2 and divide the {config.responses} responses of a step."
        )
    if len(config.groups) < 2 or list(config.groups) != sorted(set(config.groups)):
        raise ValueError(f"groups are {config.groups}; give at least two, in ascending order.")
    if len(config.betas) < 2 or config.betas[0] != 0 or list(config.betas) != sorted(set(config.betas)):
        raise ValueError(f"betas are {config.betas}; give 0 and at least one more, in ascending order.")


if __name__ == "__main__":
    use_all_cores()
    run(main, {"default": Config()}, __doc__)
