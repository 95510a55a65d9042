"""Many runs of the reduced model in one compiled program: seeds × context lengths × prior scales.

A run minimises `E[logsumexp(z) - sum_k P(k | x) z_k]`, z_k = S_k' W x, over W by stochastic descent from W = 0. It
never sees a context: the class sums S_k have a known law given the task (`tasks.mixtures.draw_statistics`), in which
the length N is a number like any other. So N and the scale of the prior are traced, and one program serves them all.
Runs are independent lanes (`parallel.lanes`): over several devices they are split without communication. Drawing takes
most of the time, so that on a CPU lanes that are mapped, on every core, are as fast as any.

    runs = grid(seeds=range(4), lengths=(10, 100, 1000))
    found = train(Mixture(3), runs, optax.sgd(2.0), steps=1000, batch=4096, stride=100)
    found.weights                       # [12, d, d], beside theory.minimiser.minimiser(mixture, length)
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from rlhf_jax.icl.checks import at_least, positive
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.models.linear_attention import reduced_logits
from rlhf_jax.icl.shift import shifted
from rlhf_jax.icl.tasks.mixtures import Statistics, bayes_logits, draw_means, draw_statistics
from rlhf_jax.parallel.lanes import over_lanes

Labels = Literal["posterior", "hard"]
Counts = Literal["exact", "normal"]


class Runs(NamedTuple):
    """What tells the runs of a sweep apart.

    Attributes:
        seeds: int [runs].
        lengths: examples in a context N, int [runs].
        prior_scales: of the first mean (see `Mixture`), float [runs].
    """

    seeds: np.ndarray
    lengths: np.ndarray
    prior_scales: np.ndarray


class Lanes(NamedTuple):
    """The state of all runs, each leaf with the runs on axis 0.

    Attributes:
        weights: W.
        averaged: the mean of W over the updates from the one that averaging begins with; before it, W.
        optimizer: the state of the optimizer.
        key: of the run; step i draws with `fold_in(key, i)`.
        step: updates made so far.
        length: N.
        prior_scale: standard deviation of the entries of the first mean.
    """

    weights: Float[Array, "*runs d d"]
    averaged: Float[Array, "*runs d d"]
    optimizer: Any
    key: Key[Array, "*runs"]
    step: Int[Array, "*runs"]
    length: Int[Array, "*runs"]
    prior_scale: Float[Array, "*runs"]


class Log(NamedTuple):
    """What is written down every `stride` updates.

    Attributes:
        weights: W then.
        losses: mean loss of the batches since the last entry.
    """

    weights: Float[Array, "*runs logs d d"]
    losses: Float[Array, "*runs logs"]


class Sweep(NamedTuple):
    """What a sweep found, as NumPy arrays.

    Attributes:
        runs: the runs, in the order of axis 0 of all that follows.
        weights: W after the last update, [runs, d, d].
        averaged: the mean of W over the last updates, which has less noise, [runs, d, d].
        steps: updates made at each entry of the log, [logs].
        history: W then, [runs, logs, d, d].
        losses: mean loss of the batches since the entry before, [runs, logs].
    """

    runs: Runs
    weights: np.ndarray
    averaged: np.ndarray
    steps: np.ndarray
    history: np.ndarray
    losses: np.ndarray

    @property
    def traces(self) -> np.ndarray:
        """tr W / d along the log, [runs, logs]."""
        return np.trace(self.history, axis1=-2, axis2=-1) / self.weights.shape[-1]

    def distances(self, targets: np.ndarray) -> np.ndarray:
        """|W - W*| / |W*| (Frobenius) along the log, [runs, logs]; `targets` is W* of every run, [runs, d, d]."""
        difference = np.linalg.norm(self.history - targets[:, None], axis=(-2, -1))
        return difference / np.linalg.norm(targets, axis=(-2, -1))[:, None]


def grid(seeds: Sequence[int], lengths: Sequence[int], prior_scales: Sequence[float] = (1.0,)) -> Runs:
    """All combinations, the seed changing fastest.

    Raises:
        ValueError: an empty list, a seed that is not a whole number from 0 to 2^32 - 1, a length below 1, or a prior
            scale that is not above 0.

    Example:
        >>> grid(seeds=(0, 1), lengths=(10, 100)).lengths.tolist()
        [10, 10, 100, 100]
    """
    for name, values in (("seeds", seeds), ("lengths", lengths), ("prior scales", prior_scales)):
        if not len(values):
            raise ValueError(f"a sweep without {name} has no runs: give at least one.")
    seeds = [at_least("seed", seed, 0) for seed in seeds]
    lengths = [at_least("context length N", length, 1) for length in lengths]
    prior_scales = [positive("prior scale", scale) for scale in prior_scales]
    if max(seeds) >= 2**32:
        raise ValueError(f"the seed is {max(seeds)}: give a whole number below 2^32, what a key is made of.")
    scale, length, seed = zip(*itertools.product(prior_scales, lengths, seeds), strict=True)
    return Runs(np.array(seed), np.array(length), np.array(scale, np.float64))


def start(mixture: Mixture, runs: Runs, optimizer: optax.GradientTransformation) -> Lanes:
    """The state of every run before its first update: W = 0."""
    count, d = len(runs.seeds), mixture.dimension
    weights = jnp.zeros((count, d, d))
    return Lanes(
        weights=weights,
        averaged=jnp.zeros_like(weights),
        optimizer=jax.vmap(optimizer.init)(weights),
        key=jax.vmap(jax.random.key)(jnp.asarray(runs.seeds, jnp.uint32)),
        step=jnp.zeros(count, jnp.int32),
        length=jnp.asarray(runs.lengths, jnp.int32),
        prior_scale=jnp.asarray(runs.prior_scales, weights.dtype),
    )


def posterior_cross_entropy(logits: Float[Array, "B c"], target: Float[Array, "B c"]) -> Float[Array, ""]:
    """Mean of `logsumexp(z) - sum_k softmax(a)_k z_k`: the cross-entropy to Bayes' posterior in place of a label.

    Its expectation is that of the cross-entropy to labels, and its gradient has less variance: at the minimiser 4 times
    less for N = 30 and 12 times for N = 100 (d = 4).

    Args:
        logits: z of the model.
        target: a of Bayes.
    """
    return optax.softmax_cross_entropy(logits, jax.nn.softmax(target, axis=-1)).mean()


def make_cross_entropy(
    labels: str,
) -> Callable[[Float[Array, "B c"], Int[Array, " B"], Float[Array, "B c"]], Float[Array, ""]]:
    """The mean cross-entropy of a batch, `(logits, query_label, logits of Bayes) -> loss`.

    Args:
        labels: what the logits are compared with, "posterior" (`posterior_cross_entropy`) or "hard", the class drawn.

    Raises:
        ValueError: another name.

    Example:
        >>> hard = make_cross_entropy("hard")
        >>> round(float(hard(jnp.zeros((1, 2)), jnp.array([1]), jnp.zeros((1, 2)))), 4)
        0.6931
    """
    if labels not in ("posterior", "hard"):
        raise ValueError(f'the labels are {labels!r}: give "posterior" or "hard".')

    def cross_entropy(
        logits: Float[Array, "B c"], query_label: Int[Array, " B"], bayes: Float[Array, "B c"]
    ) -> Float[Array, ""]:
        if labels == "hard":
            return optax.softmax_cross_entropy_with_integer_labels(logits, query_label).mean()
        return posterior_cross_entropy(logits, bayes)

    return cross_entropy


def make_loss(
    mixture: Mixture, batch: int, labels: Labels = "posterior", counts: Counts = "exact"
) -> Callable[[Float[Array, "d d"], Key[Array, ""], Int[Array, ""], Float[Array, ""]], Float[Array, ""]]:
    """The mean loss of a fresh batch, `loss(weights, key, length, prior_scale)`; length and scale may be traced."""
    law, cross_entropy = shifted(mixture), make_cross_entropy(labels)

    def loss(
        weights: Float[Array, "d d"], key: Key[Array, ""], length: Int[Array, ""], prior_scale: Float[Array, ""]
    ) -> Float[Array, ""]:
        for_means, for_prompts = jax.random.split(key)
        means = draw_means(for_means, law, batch, prior_scale)
        prompts = draw_statistics(for_prompts, law, means, length, counts=counts)
        logits = reduced_logits(weights, prompts.sums, prompts.query)
        return cross_entropy(logits, prompts.query_label, bayes_logits(law, means, prompts.query))

    return loss


def make_sweep(
    mixture: Mixture,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch: int,
    stride: int | None = None,
    average_from: int = 0,
    labels: Labels = "posterior",
    counts: Counts = "exact",
    rule: Literal["auto", "vmap", "map"] = "auto",
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[Lanes], tuple[Lanes, Log]]:
    """One jitted program that makes `steps` updates of all runs; the state that it is given is donated to it.

    Calls can follow each other: a run's samples depend on its key and on how many updates it has made.

    Args:
        mixture: the family of tasks; its prior scale is replaced by that of each run.
        optimizer: of optax, such as `optax.sgd(schedule)`.
        steps: updates.
        batch: fresh prompts an update.
        stride: updates between entries of the log; None: one entry, at the end.
        average_from: the update (from 0) from which W is averaged; it may belong to a later call.
        labels: what the loss compares with, Bayes' posterior or the label drawn.
        counts: how label counts are drawn, see `tasks.mixtures.draw_statistics`.
        rule: how lanes are batched, see `parallel.lanes.over_lanes`.
        devices: to split the runs over; None: all.

    Returns:
        `advance(lanes) -> (lanes, log)`.

    Raises:
        ValueError: a count below 1, a stride that does not divide the steps, `average_from` below 0, or other labels.
    """
    stride = steps if stride is None else stride
    for name, value in (("number of steps", steps), ("batch", batch), ("stride of the log", stride)):
        at_least(name, value, 1)
    if steps % stride:
        raise ValueError(f"the stride of the log is {stride}: give a divisor of the {steps} steps.")
    at_least("first update that is averaged", average_from, 0)
    loss = make_loss(mixture, batch, labels, counts)

    def update(lane: Lanes, _: None) -> tuple[Lanes, Array]:
        key = jax.random.fold_in(lane.key, lane.step)
        value, gradient = jax.value_and_grad(loss)(lane.weights, key, lane.length, lane.prior_scale)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            change, state = optimizer.update(gradient, lane.optimizer, lane.weights)
            weights = optax.apply_updates(lane.weights, change)
        counted = jnp.maximum(lane.step - average_from + 1, 1).astype(weights.dtype)
        averaged = jnp.where(lane.step < average_from, weights, lane.averaged + (weights - lane.averaged) / counted)
        return lane._replace(weights=weights, averaged=averaged, optimizer=state, step=lane.step + 1), value

    def entry(lane: Lanes, _: None) -> tuple[Lanes, Log]:
        lane, values = jax.lax.scan(update, lane, length=stride)
        return lane, Log(weights=lane.weights, losses=values.mean())

    def run(lane: Lanes) -> tuple[Lanes, Log]:
        return jax.lax.scan(entry, lane, length=steps // stride)

    return jax.jit(over_lanes(run, rule, devices), donate_argnums=0)


def train(
    mixture: Mixture,
    runs: Runs,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch: int,
    stride: int | None = None,
    average_from: int = 0,
    counts: Counts = "exact",
    **options: Any,
) -> Sweep:
    """Trains all runs from W = 0 in one program and brings the results to the host.

    Descent here is stochastic, and a rate above 2 over the smoothness is not refused: large first steps are useful.

    Args:
        mixture: see `make_sweep`, as for what follows.
        runs: from `grid`.
        optimizer: of optax.
        steps: updates.
        batch: prompts an update.
        stride: updates between entries of the log.
        average_from: the update from which W is averaged, below `steps`.
        counts: how label counts are drawn; "normal" needs every length to be long enough for it.
        **options: `labels`, `rule` and `devices` of `make_sweep`.

    Raises:
        ValueError: what `make_sweep` refuses, an average that would begin after the last update, or a length that is
            too short for normal counts.
    """
    advance = make_sweep(mixture, optimizer, steps, batch, stride, average_from, counts=counts, **options)
    if average_from >= steps:
        raise ValueError(f"W is averaged from update {average_from} on: give one below the {steps} steps.")
    _check_counts(mixture, int(runs.lengths.min()), counts)
    lanes, log = advance(start(mixture, runs, optimizer))
    every = steps if stride is None else stride
    weights, averaged, history, losses = map(np.asarray, (lanes.weights, lanes.averaged, *log))
    return Sweep(runs, weights, averaged, np.arange(every, steps + 1, every), history, losses)


def _check_counts(mixture: Mixture, length: int, counts: Counts) -> None:
    """Refuses what `draw_statistics` refuses of a length that is not traced; nothing is computed."""
    law = shifted(mixture)

    def draw(key: Key[Array, ""]) -> Statistics:
        for_means, for_prompts = jax.random.split(key)
        return draw_statistics(for_prompts, law, draw_means(for_means, law, 1), length, counts=counts)

    jax.eval_shape(draw, jax.random.key(0))
