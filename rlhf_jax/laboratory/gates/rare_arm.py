"""A bandit of three arms, one of them compared once: where maximum likelihood has no answer, and smoothing has.

Arms 0 and 1 are compared often, and arm 2 once, with arm 0. The likelihood of that one comparison grows for ever with
the difference of the two rewards, so the logit of arm 2 diverges; Iterative Data Smoothing moves the label of the pair
to what the model says of it, and the logit stays near where it began.

Source: Zhu, Jordan and Jiao, "Iterative Data Smoothing: Mitigating Reward Overfitting and Overoptimization in RLHF",
arXiv:2401.16335.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import expit

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.gates.gate import Gate
from rlhf_jax.laboratory.gates.report import Stage
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.losses.smoothing import smoothed_labels

SOURCE = "Iterative Data Smoothing, 2401.16335"


class Comparisons(NamedTuple):
    """The pairs of one bandit.

    Attributes:
        winner: arm that won each comparison, int [N]; the last comparison is the only one of arm 2.
        loser: the other arm, int [N].
        rewards: what the arms are truly worth, float64 [3].
    """

    winner: np.ndarray
    loser: np.ndarray
    rewards: np.ndarray


def draw_comparisons(rng: np.random.Generator, often: int) -> Comparisons:
    """A bandit of standard normal rewards, whose comparisons follow Bradley and Terry.

    Args:
        rng: of rewards and comparisons.
        often: comparisons of arms 0 and 1.
    """
    rewards = rng.standard_normal(3)
    first = np.zeros(often + 1, int)
    second = np.append(np.ones(often, int), 2)
    wins = rng.random(often + 1) < expit(rewards[first] - rewards[second])
    return Comparisons(np.where(wins, first, second), np.where(wins, second, first), rewards)


def descend(
    winner: Array, loser: Array, steps: int, step_size: float, rate: float, reports: int
) -> Float[Array, "reports 3"]:
    """Rewards of the arms on the way: gradient descent on all comparisons, labels refreshed after each step.

    Args:
        winner: int [N].
        loser: int [N].
        steps: of descent; `reports` divides them.
        step_size: of the mean loss.
        rate: of the labels; 0 for maximum likelihood.
        reports: how often rewards are kept, the last time at the end.
    """

    def loss(rewards: Array, labels: Array) -> Array:
        return bradley_terry(rewards[winner], rewards[loser], label=labels).mean()

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        rewards, labels = carry
        rewards = rewards - step_size * jax.grad(loss)(rewards, labels)
        return (rewards, smoothed_labels(labels, rewards[winner], rewards[loser], rate)), None

    def report(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        carry, _ = jax.lax.scan(step, carry, None, length=steps // reports)
        return carry, carry[0]

    start = (jnp.zeros(3), jnp.ones(winner.shape[0]))
    return jax.lax.scan(report, start, None, length=reports)[1]


def rare_arm(seeds: int, often: int = 200, steps: int = 20_000, step_size: float = 2.0, rate: float = 0.02) -> Stage:
    """The logit of the arm that was compared once, by maximum likelihood and with smoothing.

    Args:
        seeds: bandits.
        often: comparisons of the other two arms.
        steps: of descent; a multiple of 10.
        step_size: of the mean loss.
        rate: of the labels.
    """
    drawn = [draw_comparisons(rng, often) for rng in np.random.default_rng(0).spawn(seeds)]
    lanes = {name: jnp.asarray([getattr(one, name) for one in drawn], jnp.int32) for name in ("winner", "loser")}
    truth = np.array([one.rewards for one in drawn])

    def run(rate: float) -> np.ndarray:
        def lane(lane: dict[str, Array]) -> Array:
            return descend(lane["winner"], lane["loser"], steps, step_size, rate, 10)

        return np.asarray(jax.jit(jax.vmap(lane))(lanes), np.float64)

    likelihood, smoothed = run(0.0), run(rate)

    def rare_logit(rewards: np.ndarray) -> np.ndarray:
        return np.abs(rewards[..., 2] - rewards[..., 0])

    def regret(rewards: np.ndarray) -> np.ndarray:
        chosen = rewards[:, -1].argmax(axis=1)
        return truth.max(axis=1) - truth[np.arange(seeds), chosen]

    def frequent_error(rewards: np.ndarray) -> np.ndarray:
        wins = np.array([np.mean(one.winner[:-1] == 1) for one in drawn])
        return np.abs(expit(rewards[:, -1, 1] - rewards[:, -1, 0]) - wins)

    tenfold = f"from {steps // 10} to {steps} steps"
    growth = {
        name: rare_logit(found[:, -1]) - rare_logit(found[:, 0])
        for name, found in {"likelihood": likelihood, "smoothing": smoothed}.items()
    }
    gates = [
        # The logit of a pair seen once grows as the logarithm of the steps: by log 10 over a decade.
        Gate(f"growth of the rare arm's logit {tenfold}, maximum likelihood", SOURCE, growth["likelihood"], low=1.0),
        Gate(f"growth of the rare arm's logit {tenfold}, smoothing", SOURCE, growth["smoothing"], high=0.1),
        Gate("size of the rare arm's logit at the end, smoothing", SOURCE, rare_logit(smoothed[:, -1]), high=1.0),
        Gate(
            "probability of the frequent pair, distance from its share of wins, smoothing",
            SOURCE,
            frequent_error(smoothed),
            high=0.05,
        ),
    ]
    rows = [
        row("size of the rare arm's logit at the end, maximum likelihood", "1", rare_logit(likelihood[:, -1])),
        row("regret of the best arm, maximum likelihood", "1", regret(likelihood)),
        row("regret of the best arm, smoothing", "1", regret(smoothed)),
    ]
    return Stage(gates, rows)
