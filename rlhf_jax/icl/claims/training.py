"""Trained weights of one layer of linear attention, beside the minimiser that theory says they reach.

Both trainings are stochastic. `sweep_reaches_minimisers` draws sufficient statistics for all context lengths and seeds
in one program; `raw_prompts_reach_minimisers` draws every example of every prompt and compares with the drawn label, as
one trains a model of which no theory is known. Training ends near W*_N, which for short contexts is far from the
limit c Lambda^-1: that is no under-training.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.comparison import Comparison, standard_error
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.models.linear_attention import class_sums, reduced_logits
from rlhf_jax.icl.shift import shifted
from rlhf_jax.icl.sweep import Labels, grid, make_cross_entropy, train
from rlhf_jax.icl.tasks.mixtures import Prompt, bayes_logits, draw_means, draw_prompts
from rlhf_jax.icl.theory.minimiser import minimiser
from rlhf_jax.icl.training import Fit, fit
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.types import Params

STANDARD = Mixture(3)


class SweepClaim(NamedTuple):
    """What a sweep over context lengths gave.

    Attributes:
        comparisons: tr W / d of each length, beside that of W*.
        lengths: N, int [lengths].
        steps: updates made at each entry of the log, int [logs].
        traces: tr W / d, [lengths, seeds, logs].
        distances: |W - W*| / |W*|, [lengths, seeds, logs].
        losses: mean loss since the entry before, [lengths, seeds, logs].
        targets: W* of each length, [lengths, d, d].
        predicted: tr W* / d of each length, what `traces` should reach, [lengths].
    """

    comparisons: list[Comparison]
    lengths: np.ndarray
    steps: np.ndarray
    traces: np.ndarray
    distances: np.ndarray
    losses: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray


def sweep_reaches_minimisers(
    mixture: Mixture = STANDARD,
    lengths: Sequence[int] = (10, 20, 40, 80, 160, 320, 640, 1280),
    seeds: int = 4,
    steps: tuple[int, int] = (1000, 500),
    rates: tuple[float, float] = (8.0, 2.0),
    batch: int = 4096,
    stride: int | None = None,
    tolerance: float = 0.003,
) -> SweepClaim:
    """All context lengths and seeds, trained in one program, end at W*_N: tr W / d beside tr W* / d.

    Descent takes `steps[0]` updates at `rates[0]` and `steps[1]` at `rates[1]`, on Bayes' posterior in place of labels
    (see `sweep.posterior_cross_entropy`). What is compared is the mean over seeds of W averaged over the updates at the
    second rate: at a constant rate the last W alone has several times the noise. Runs of one seed share the randomness
    of their tasks whatever their length, so the errors of rows are alike.

    Args:
        mixture: the family of tasks.
        lengths: N.
        seeds: runs of each length.
        steps: updates at each rate.
        rates: learning rates.
        batch: prompts an update.
        stride: updates between entries of the log; divides the sum of the steps; None: 50, or the largest number that
            divides 50 and both steps.
        tolerance: of tr W / d.

    Raises:
        ValueError: a count below 1, a rate that is not above 0, or a stride that does not divide the steps.
    """
    steps = tuple(at_least("number of steps at a rate", one, 1) for one in steps)
    rates = tuple(positive("learning rate", one) for one in rates)
    stride = math.gcd(50, *steps) if stride is None else stride
    schedule = optax.piecewise_constant_schedule(rates[0], {steps[0]: rates[1] / rates[0]})
    runs = grid(range(at_least("number of seeds", seeds, 1)), lengths, (mixture.prior_scale,))
    found = train(mixture, runs, optax.sgd(schedule), sum(steps), batch, stride, average_from=steps[0])
    targets = np.stack([minimiser(mixture, length) for length in lengths])
    by_length = (len(lengths), seeds, -1)
    predicted = np.trace(targets, axis1=1, axis2=2) / mixture.dimension
    averaged = (np.trace(found.averaged, axis1=1, axis2=2) / mixture.dimension).reshape(len(lengths), seeds)
    rows = []
    for length, target, ends in zip(lengths, predicted, averaged, strict=True):
        error = standard_error(ends)
        quantity = f"tr W / d after a sweep ({setting_of(mixture)}, N={length})"
        rows.append(Comparison(quantity, float(target), float(ends.mean()), float(error), tolerance))
    return SweepClaim(
        comparisons=rows,
        lengths=np.asarray(lengths),
        steps=found.steps,
        traces=found.traces.reshape(by_length),
        distances=found.distances(np.repeat(targets, seeds, axis=0)).reshape(by_length),
        losses=found.losses.reshape(by_length),
        targets=targets,
        predicted=predicted,
    )


def linear_logits(classes: int, weights: Float[Array, "d d"], prompt: Prompt) -> Float[Array, "B c"]:
    """The logits of the reduced linear layer for raw prompts, `models.linear_attention.reduced_logits`."""
    return reduced_logits(weights, class_sums(prompt.inputs, prompt.labels, classes), prompt.query)


def make_prompt_loss(
    mixture: Mixture,
    length: int,
    batch: int,
    labels: Labels,
    logits: Callable[[Params, Prompt], Float[Array, "B c"]],
) -> Callable[[Params, Key[Array, ""]], Float[Array, ""]]:
    """The mean loss of a model on fresh raw prompts, `loss(params, key)`, for `training.fit`.

    Args:
        mixture: the family of tasks.
        length: examples in a context N.
        batch: prompts.
        labels: what the loss compares with, "posterior" (see `sweep.posterior_cross_entropy`) or "hard", the class.
        logits: the model, `logits(params, prompt)`.

    Raises:
        ValueError: a length or batch below 1, or other labels.
    """
    at_least("context length N", length, 1)
    at_least("batch", batch, 1)
    law, cross_entropy = shifted(mixture), make_cross_entropy(labels)

    def loss(params: Params, key: Key[Array, ""]) -> Float[Array, ""]:
        for_means, for_prompts = jax.random.split(key)
        means = draw_means(for_means, law, batch)
        prompt = draw_prompts(for_prompts, law, means, length)
        return cross_entropy(logits(params, prompt), prompt.query_label, bayes_logits(law, means, prompt.query))

    return loss


def make_raw_training(
    mixture: Mixture, length: int, steps: int = 3000, batch: int = 1024, rate: float = 3e-2
) -> Callable[[Key[Array, " runs"]], Fit]:
    """Training of W on whole prompts and drawn labels, by Adam with a cosine schedule down to 1 % of the rate.

    Args:
        mixture: the family of tasks.
        length: N.
        steps: updates.
        batch: fresh prompts an update.
        rate: the first learning rate.

    Returns:
        A jitted function of one key a run; its fits have the runs on axis 0.
    """
    at_least("number of steps", steps, 1)
    loss = make_prompt_loss(mixture, length, batch, "hard", functools.partial(linear_logits, mixture.classes))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.01))

    def run(key: Key[Array, ""]) -> Fit:
        return fit(loss, jnp.zeros((mixture.dimension, mixture.dimension)), optimizer, steps, key)

    return jax.jit(over_lanes(run))


def raw_prompts_reach_minimisers(
    settings: Sequence[tuple[Mixture, int]] = (
        (Mixture(3), 20),
        (Mixture(3), 100),
        (Mixture(5), 40),
        (Mixture(3, 3), 40),
    ),
    seeds: int = 4,
    steps: int = 3000,
    batch: int = 1024,
    rate: float = 3e-2,
    shares: tuple[float, float] = (0.015, 0.01),
) -> list[Comparison]:
    """Training on raw prompts with drawn labels ends at W*_N, and as far from c Lambda^-1 as theory says.

    The weights are the mean over the second half of training. Two rows a setting: |W - W*_N| / |W*_N| of the worst
    seed, which should be 0, and the mean over seeds of |W - c Lambda^-1| / |c Lambda^-1|, beside that of W*_N
    (Frobenius norms; Shen et al. 2024, arXiv 2410.11778, for what the limit is).

    Args:
        settings: mixtures and lengths N.
        seeds: runs of each.
        steps: updates.
        batch: prompts an update.
        rate: of Adam, at the start.
        shares: the tolerance of either row.
    """
    at_least("number of seeds", seeds, 1)
    rows = []
    for mixture, length in settings:
        keys = jax.random.split(jax.random.key(0), seeds)
        weights = np.asarray(make_raw_training(mixture, length, steps, batch, rate)(keys).averaged, np.float64)
        target, limit = minimiser(mixture, length), mixture.classes * mixture.inverse
        name = f"({setting_of(mixture)}, N={length})"
        errors = [_relative(one, target) for one in weights]
        rows.append(
            Comparison(f"|W - W*| / |W*|, raw prompts, worst of {seeds} {name}", 0.0, max(errors), tolerance=shares[0])
        )
        apart = np.array([_relative(one, limit) for one in weights])
        quantity = f"|W - c Λ^-1| / |c Λ^-1|, raw prompts {name}"
        rows.append(
            Comparison(quantity, _relative(target, limit), float(apart.mean()), float(standard_error(apart)), shares[1])
        )
    return rows


def setting_of(mixture: Mixture) -> str:
    """What tells the mixture from the standard one, in a few letters.

    Example:
        >>> setting_of(Mixture(3)), setting_of(Mixture(3, classes=5, prior_scale=0.5))
        ('d=3', 'd=3, c=5, prior scale 0.5')
    """
    parts = [f"d={mixture.dimension}"]
    if mixture.classes != 2:
        parts.append(f"c={mixture.classes}")
    if not np.array_equal(mixture.matrix, np.eye(mixture.dimension)):
        parts.append(f"Λ with eigenvalues {', '.join(f'{value:.3g}' for value in mixture.eigen[0])}")
    if mixture.prior_scale != 1:
        parts.append(f"prior scale {mixture.prior_scale:g}")
    return ", ".join(parts)


def _relative(weights: np.ndarray, target: np.ndarray) -> float:
    return float(np.linalg.norm(weights - target) / np.linalg.norm(target))
