"""Claims on the inference error: theory's total variation against prompts that are sampled.

Predicted are `theory.inference`'s quasi-random expectations, constants and laws; measured is a sampling of sufficient
statistics, which have the law of raw prompts whatever the length (`tasks.mixtures`), with its standard error. No prompt
of infinite length can be drawn: `ENDLESS` examples stand for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.comparison import Comparison, standard_error, within
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.precision import in_float64
from rlhf_jax.icl.shift import NO_SHIFT, Law, Shift, shifted
from rlhf_jax.icl.tasks.mixtures import bayes_logits, draw_means, draw_statistics
from rlhf_jax.icl.theory import inference
from rlhf_jax.icl.theory.expansion import isotropic_coefficient
from rlhf_jax.icl.theory.minimiser import isotropic_weight, minimiser
from rlhf_jax.icl.theory.population import draw

ENDLESS = 2**26
BLOCK = 20_000  # prompts drawn at a time
LENGTHS = (16, 64, 256, 1024, 4096, 16384)
SHIFTS = {
    "no shift": NO_SHIFT,
    "class prior 0.7": Shift(class_probabilities=(0.3, 0.7)),
    "covariance doubled": Shift(covariance=2 * np.eye(3)),
    "covariance halved": Shift(covariance=np.eye(3) / 2),
    "mu_1 longer by half": Shift(norm_ratios=(1.0, 1.5)),
    "label noise 0.1": Shift(label_noise=0.1),
}


class Curves(NamedTuple):
    """Rows, and curves against the test length M.

    Attributes:
        comparisons: the rows.
        test_lengths: M, `inf` included, [lengths].
        measured: total variation, [curves, lengths].
        standard_error: of `measured`, [curves, lengths].
        predicted: total variation, [curves, lengths].
        names: of the curves.
        folded: total variation by the joint law of folded normals, [curves, lengths]; None where there is none.
    """

    comparisons: list[Comparison]
    test_lengths: np.ndarray
    measured: np.ndarray
    standard_error: np.ndarray
    predicted: np.ndarray
    names: tuple[str, ...]
    folded: np.ndarray | None = None


def sampler(law: Law, prompts: int) -> Callable[[np.ndarray, int | float, int], inference.Estimated]:
    """Makes `sample(weights, length, seed)`: mean total variation over sampled prompts, with its standard error.

    One compiled program serves every W and every length.

    Args:
        law: of the prompts.
        prompts: at least this many, rounded up to a multiple of `BLOCK` where there are more.
    """
    both = _sampler(law, prompts)

    def sample(weights: np.ndarray, length: int | float, seed: int) -> inference.Estimated:
        return both(weights, min(length, ENDLESS), seed)[0]

    return sample


def _sampler(
    law: Law, prompts: int, stratified: bool = False
) -> Callable[[np.ndarray, int | float, int], list[inference.Estimated]]:
    """`sampler` of total variation and of the excess cross-entropy sum_k q_k log(q_k / p_k), q of Bayes."""
    size = min(at_least("number of prompts", prompts, 2), BLOCK)

    @jax.jit
    def errors(weights: Array, length: Array, key: Array) -> Array:
        def block(number: Array) -> Array:
            task_key, context_key = jax.random.split(jax.random.fold_in(key, number))
            means = draw_means(task_key, law, size)
            given = draw_statistics(context_key, law, means, length, stratified)
            z = jnp.einsum("nkd,de,ne->nk", given.sums, weights, given.query, precision="highest")
            truth = bayes_logits(law, means, given.query)
            p, q = jax.nn.log_softmax(z, axis=1), jax.nn.log_softmax(truth, axis=1)
            apart = jnp.abs(jnp.exp(p) - jnp.exp(q)).sum(axis=1) / 2
            return jnp.stack([apart, jnp.sum(jnp.exp(q) * (q - p), axis=1)])

        return jax.lax.map(block, jnp.arange(math.ceil(prompts / size)))

    @in_float64
    def run(weights: np.ndarray, length: int | float, seed: int) -> Array:
        return errors(jnp.asarray(weights), jnp.asarray(float(length)), jax.random.key(seed))

    def sample(weights: np.ndarray, length: int | float, seed: int) -> list[inference.Estimated]:
        found = run(weights, length, seed).swapaxes(0, 1).reshape(2, -1)
        return [inference.Estimated(float(one.mean()), float(standard_error(one))) for one in found]

    return sample


def noise_decay(
    dimensions: Sequence[int] = (3, 5, 10),
    test_lengths: Sequence[int] = LENGTHS,
    prompts: int = 400_000,
    points: int = 2**18,
    seed: int = 0,
) -> Curves:
    """At W = 2 Lambda^-1 the error falls as C_TV / sqrt(M): sqrt(M) TV at each M within 1 %, and its slope.

    Args:
        dimensions: values of d; Lambda = I, two classes. A curve each.
        test_lengths: values of M.
        prompts: sampled at each for d = 2, and d / 2 times as many for another d: of 500,000, three standard errors are
            0.6 %, 0.7 % and 1.0 % at M = 16,384 with d = 3, 5 and 10.
        points: quasi-random draws of each of four sets.
        seed: of the sampling.
    """
    rows, measured, errors, predicted = [], [], [], []
    for d in dimensions:
        mixture = Mixture(d)
        weights, sample = 2 * np.eye(d), sampler(shifted(mixture), math.ceil(prompts * d / 2))
        found = [sample(weights, length, seed + i) for i, length in enumerate(test_lengths)]
        theory = _curve(mixture, weights, test_lengths, points)
        limit = inference.constants(mixture, points=points).total_variation
        for length, one, value in zip(test_lengths, found, theory, strict=True):
            root = math.sqrt(length)
            name = f"sqrt(M) TV at W=2I (d={d}, M={length})"
            error = root * math.hypot(one.standard_error, value.standard_error)
            rows.append(within(name, root * value.mean, root * one.mean, 0.01, error))
        root, last = math.sqrt(test_lengths[-1]), found[-1]
        name = f"C_TV by sqrt(M) TV (d={d}, M={test_lengths[-1]})"
        error = math.hypot(root * last.standard_error, limit.standard_error)
        rows.append(within(name, limit.mean, root * last.mean, 0.01, error))
        late = [i for i, length in enumerate(test_lengths) if length >= 256]
        slope = _slope(np.array(test_lengths)[late], [found[i] for i in late])
        rows.append(Comparison(f"slope of log TV against log M at W=2I (d={d})", -0.5, *slope, tolerance=0.01))
        measured.append([one.mean for one in found])
        errors.append([one.standard_error for one in found])
        predicted.append([one.mean for one in theory])
    names = tuple(f"d={d}" for d in dimensions)
    return Curves(rows, np.array(test_lengths, float), np.array(measured), np.array(errors), np.array(predicted), names)


def grid(
    dimension: int = 3,
    lengths: Sequence[int] = (20, 100, 500),
    test_lengths: Sequence[int | float] = (*LENGTHS, math.inf),
    prompts: int = 200_000,
    points: int = 2**16,
    joint_from: tuple[int, int] = (500, 256),
    seed: int = 0,
) -> Curves:
    """The error of the model trained on N examples against M: it bends from C_TV / sqrt(M) into its floor, C_N / N.

    Sampled prompts agree with theory within 2 % everywhere, and with the joint law of folded normals, at the exact
    W*_N, within 4 % for N and M that are large enough.

    Args:
        dimension: d; Lambda = I, two classes.
        lengths: values of N, a curve each.
        test_lengths: values of M.
        prompts: sampled at each.
        points: quasi-random draws of each of four sets.
        joint_from: the least N and M at which rows compare the joint law.
        seed: of the sampling.
    """
    mixture = Mixture(dimension)
    sample = sampler(shifted(mixture), prompts)
    rows, measured, errors, predicted, folded = [], [], [], [], []
    for number, length in enumerate(lengths):
        weights = minimiser(mixture, length)
        theory = _curve(mixture, weights, test_lengths, points)
        joint = [inference.joint_total_variation(mixture, weights, m, points).mean for m in test_lengths]
        found = [sample(weights, m, seed + 100 * number + i) for i, m in enumerate(test_lengths)]
        for m, one, value, law in zip(test_lengths, found, theory, joint, strict=True):
            name = f"(d={dimension}, N={length}, M={m:g})"
            error = math.hypot(one.standard_error, value.standard_error)
            rows.append(within(f"TV {name}", value.mean, one.mean, 0.02, error))
            if length >= joint_from[0] and m >= joint_from[1]:
                rows.append(within(f"TV by folded normals {name}", law, one.mean, 0.04, one.standard_error))
        measured.append([one.mean for one in found])
        errors.append([one.standard_error for one in found])
        predicted.append([one.mean for one in theory])
        folded.append(joint)
    names = tuple(f"N={length}" for length in lengths)
    arrays = (np.array(measured), np.array(errors), np.array(predicted))
    return Curves(rows, np.array(test_lengths, float), *arrays, names, np.array(folded))


def plateaus(
    test_lengths: Sequence[int | float] = (64, 1024, 16384, math.inf),
    prompts: int = 200_000,
    points: int = 2**16,
    shifts: dict[str, Shift] | None = None,
    seed: int = 0,
) -> Curves:
    """Where the guarantee must fail: under a shift the error of W = 2I stays on a plateau, predicted within 2 %.

    d = 3, Lambda = I. Without a shift the error goes on falling: it is below 0.004 at M = 16384.

    Args:
        test_lengths: values of M.
        prompts: sampled at each.
        points: quasi-random draws of each of four sets.
        shifts: by name, for d = 3 and two classes; None: `SHIFTS`. A curve each.
        seed: of the sampling.
    """
    mixture, weights = Mixture(3), 2 * np.eye(3)
    shifts = SHIFTS if shifts is None else shifts
    rows, measured, errors, predicted = [], [], [], []
    for number, (name, shift) in enumerate(shifts.items()):
        sample = sampler(shifted(mixture, shift), prompts)
        theory = _curve(mixture, weights, test_lengths, points, shift)
        found = [sample(weights, m, seed + 100 * number + i) for i, m in enumerate(test_lengths)]
        for m, one, value in zip(test_lengths, found, theory, strict=True):
            if value.mean > 1e-12:
                error = math.hypot(one.standard_error, value.standard_error)
                rows.append(within(f"TV at W=2I, {name} (M={m:g})", value.mean, one.mean, 0.02, error))
            if shift is NO_SHIFT and m == 16384:
                rows.append(Comparison("TV at W=2I below 0.004 (M=16384)", 0.0, one.mean, one.standard_error, 0.004))
        measured.append([one.mean for one in found])
        errors.append([one.standard_error for one in found])
        predicted.append([one.mean for one in theory])
    arrays = (np.array(measured), np.array(errors), np.array(predicted))
    return Curves(rows, np.array(test_lengths, float), *arrays, tuple(shifts))


def prior_is_harmless(
    scales: Sequence[int | float] = (0.5, 2.0),
    test_lengths: Sequence[int] = (2**12, 2**14, 2**16),
    prompts: int = 400_000,
    seed: int = 0,
) -> list[Comparison]:
    """Another prior scale of the means at the test leaves the decay as it was: slope -1/2 of log TV against log M.

    Args:
        scales: of the test, for a mixture with the scale 1, d = 3, at W = 2I.
        test_lengths: values of M; at the scale 2 the slope is still -0.483 between 256 and 4096.
        prompts: sampled at each.
        seed: of the sampling.
    """
    rows = []
    for number, scale in enumerate(scales):
        sample = sampler(shifted(Mixture(3), Shift(prior_scale=scale)), prompts)
        found = [sample(2 * np.eye(3), m, seed + 100 * number + i) for i, m in enumerate(test_lengths)]
        slope = _slope(np.array(test_lengths), found)
        name = f"slope of log TV against log M, prior scale {scale:g} in place of 1"
        rows.append(Comparison(name, -0.5, *slope, tolerance=0.01))
    return rows


def class_constants(
    classes: Sequence[int] = (2, 3, 5, 10),
    dimension: int = 4,
    test_length: int = 2**18,
    prompts: int = 500_000,
    points: int = 2**16,
    seed: int = 0,
) -> list[Comparison]:
    """C_TV and C_CE for c classes at W = cI and a long M: sqrt(M) TV within 1 %, M times the excess loss within 3 %.

    Each with contexts of random classes, and with stratified ones, which lack the noise of the number of each class.

    Args:
        classes: values of c.
        dimension: d; Lambda = I.
        test_length: M, so long that both are at their limits.
        prompts: sampled for each c and kind of context.
        points: quasi-random draws of each of four sets.
        seed: of the sampling.
    """
    rows, root = [], math.sqrt(test_length)
    for c in classes:
        mixture = Mixture(dimension, c)
        for stratified in (False, True):
            limits = inference.constants(mixture, stratified=stratified, points=points)
            found = _sampler(shifted(mixture), prompts, stratified)(c * np.eye(dimension), test_length, seed)
            for name, predicted, measured, scale, share in (
                ("C_TV", limits.total_variation, found[0], root, 0.01),
                ("C_CE", limits.cross_entropy, found[1], test_length, 0.03),
            ):
                label = f"{name}{', stratified' if stratified else ''} (d={dimension}, c={c})"
                error = math.hypot(scale * measured.standard_error, predicted.standard_error)
                rows.append(within(label, predicted.mean, scale * measured.mean, share, error))
    return rows


def floors(
    dimensions: Sequence[int] = (3, 5, 10),
    length: int = 2**14,
    prompts: int = 400_000,
    points: int = 2**16,
    seeds: int = 8,
    seed: int = 0,
) -> list[Comparison]:
    """C_N: N times the total variation at W*_N that contexts without end leave, within 2 % for a long N.

    C_N is predicted from g1 (`expansion.isotropic_coefficient`); measured are sampled prompts, at the W* of the solver.

    Args:
        dimensions: values of d; Lambda = I, two classes.
        length: N; N g_N is 0.3 % from g1 at 2^14.
        prompts: sampled for d = 2, and d / 2 times as many for another d.
        points: quasi-random draws of each set.
        seeds: sets of points of the solver.
        seed: of the sampling.
    """
    rows = []
    for d in dimensions:
        mixture = Mixture(d)
        predicted = inference.constants(mixture, isotropic_coefficient(mixture) * np.eye(d), points=points).floor
        weight, spread = isotropic_weight(mixture, length, seeds, points=points)
        found = _sampler(shifted(mixture), math.ceil(prompts * d / 2))(weight * np.eye(d), 2.0**40, seed)[0]
        relative = [found.standard_error / found.mean, spread / abs(2 - weight)]  # the distance is linear in 2 - w
        relative.append(predicted.standard_error / predicted.mean)
        measured = length * found.mean
        name = f"C_N by N TV at W*_N and M=inf (d={d}, N={length})"
        rows.append(within(name, predicted.mean, measured, 0.02, measured * math.hypot(*relative)))
    return rows


def _curve(
    mixture: Mixture, weights: np.ndarray, lengths: Sequence[int | float], points: int, shift: Shift = NO_SHIFT
) -> list[inference.Estimated]:
    """`inference.total_variation` at several lengths, on the same draws."""
    values = []
    for seed in inference.SEEDS:
        population = draw(mixture, points, seed, shift)
        logits = [population.model_logits(weights, length) for length in lengths]
        values.append([inference.distances(z, population.logits).mean() for z in logits])
    return [inference.estimated(column) for column in np.array(values).T]


def _slope(lengths: np.ndarray, found: Sequence[inference.Estimated]) -> inference.Estimated:
    """`inference.slope` of independent samples, and its standard error: sums of weights times log values."""
    centred = np.log(lengths) - np.log(lengths).mean()
    relative = [one.standard_error / one.mean for one in found]
    error = np.linalg.norm(centred * relative) / np.sum(centred**2)
    return inference.Estimated(inference.slope(lengths, np.array([one.mean for one in found])), float(error))
