"""A bandit whose policies can be worked out: what imitation makes of samples, beside what is exact.

A response is one arm, so that the reward, the entropy and the KL of a policy are sums over arms and need no samples;
only the training does. A seed is a bandit of its own: rewards and the logits of the reference are standard normal. All
policies see as many responses a step for as many steps (RAFT in each iteration), through the losses of the package.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.algorithms.imitation import Imitation, imitating
from rlhf_jax.algorithms.optimizer import adam, apply_gradients, learning_rate_schedule
from rlhf_jax.losses.imitation import equal_weights, top_rows, weighted_likelihood_loss
from rlhf_jax.models.divergence import hidden_forward_kl
from rlhf_jax.parallel.lanes import over_lanes


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained, on what.

    Attributes:
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


def check_options(options: Options) -> None:
    """Refuses options that the experiment cannot work with.

    Raises:
        ValueError: an option is out of range.
    """
    if options.seeds < 2 or options.arms < 2 or options.steps < 1 or options.iterations < 1:
        raise ValueError("bandit needs at least 2 seeds, 2 arms, 1 step and 1 iteration.")
    if not options.temperature > 0:
        raise ValueError(f"the temperature is {options.temperature}; it must be positive.")
    sizes = (*options.groups, *options.best_of, options.samples)
    if min(sizes) < 2 or any(options.responses % size for size in sizes):
        raise ValueError(
            f"groups, best_of and samples must be at least 2 and divide the {options.responses} responses of a step."
        )
    if len(options.groups) < 2 or list(options.groups) != sorted(set(options.groups)):
        raise ValueError(f"groups are {options.groups}; give at least two, in ascending order.")
    if len(options.betas) < 2 or options.betas[0] != 0 or list(options.betas) != sorted(set(options.betas)):
        raise ValueError(f"betas are {options.betas}; give 0 and at least one more, in ascending order.")


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


def make_bandit(options: Options, seed: Array) -> Bandit:
    """Rewards and reference of one seed."""
    return Bandit(*jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), (2, options.arms)))


def imitate(
    options: Options,
    bandit: Bandit,
    key: Array,
    chosen: Imitation,
    samples: int,
    source: Array | None,
    beta: Array | float = 0.0,
) -> Float[Array, " A"]:
    """Logits of a policy trained on samples of a fixed source, or of itself where there is none."""
    rate = learning_rate_schedule(options.learning_rate, options.steps, shape="cosine")
    optimizer = adam(rate, max_grad_norm=None)
    keep = samples if chosen.keep is None else chosen.keep
    identity = jnp.eye(options.arms)

    def step(carry, key):
        logits, optimizer_state = carry
        drawn = jax.nn.softmax(logits if source is None else source)
        arms = jax.random.choice(key, options.arms, (options.responses,), p=drawn)
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
    (logits, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, options.steps))
    return logits


def train(options: Options, bandit: Bandit, key: Array) -> Policies:
    """Every policy of one seed."""
    var, distilled = imitating("var", options.temperature), imitating("best_of_n_distillation")
    keys = iter(jax.random.split(key, 3 + len(options.groups) + len(options.best_of)))
    start = bandit.reference

    def iterate(logits, key):
        logits = imitate(options, bandit, key, imitating("raft"), options.samples, logits)
        return logits, logits

    def superhf(key, beta):
        return imitate(options, bandit, key, imitating("superhf"), options.samples, None, beta)

    plain = dataclasses.replace(var, weights=equal_weights)
    betas = jnp.asarray(options.betas)
    return Policies(
        sft=imitate(options, bandit, next(keys), plain, 1, start)[None],
        var=jnp.stack([imitate(options, bandit, next(keys), var, size, start) for size in options.groups]),
        best_of_n=jnp.stack([imitate(options, bandit, next(keys), distilled, n, start) for n in options.best_of]),
        raft=jax.lax.scan(iterate, start, jax.random.split(next(keys), options.iterations))[1],
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
    """Policies from logits, [..., A]."""
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


def study(options: Options, bandits: Bandit, logits: Policies) -> Study:
    """Trained policies by setting, with their counterparts that need no training."""
    rewards, reference_logits, *found = (np.asarray(leaf, np.float64) for leaf in (*bandits, *logits))
    reference, n = softmax(reference_logits), options.samples
    settings = {
        "SFT": ("",),
        "VAR": options.groups,
        "best-of-n": options.best_of,
        "RAFT": tuple(range(1, options.iterations + 1)),
        "SuperHF": options.betas,
    }
    raft = [reference]
    for _ in range(options.iterations):
        raft.append(best_of_n(raft[-1], rewards, n))
    return Study(
        reference=reference,
        rewards=rewards,
        optimum=tilted(reference, rewards, options.temperature),
        trained={
            family: dict(zip(values, softmax(policies).swapaxes(0, 1), strict=True))
            for (family, values), policies in zip(settings.items(), found, strict=True)
        },
        exact={
            "SFT": {"": reference},
            "best-of-n": {size: best_of_n(reference, rewards, size) for size in options.best_of},
            "RAFT": dict(enumerate(raft[1:], start=1)),
            "SuperHF": {beta: superhf_limit(reference, rewards, n, beta) for beta in options.betas},
        },
    )


def run_bandits(options: Options) -> tuple[Study, float]:
    """Trains every policy on every bandit in one program; returns them and the seconds that compiling took."""

    def lane(seed: Array) -> tuple[Bandit, Policies]:
        bandit = make_bandit(options, seed)
        return bandit, train(options, bandit, jax.random.fold_in(jax.random.key(1), seed))

    seeds = jnp.arange(options.seeds)
    began = time.monotonic()
    program = jax.jit(over_lanes(lane)).lower(seeds).compile()
    compiled = time.monotonic() - began
    return study(options, *program(seeds)), compiled
