"""Models that no closed form describes, beside the one that it does: where the theory of one linear layer ends.

Four models are trained on the same raw prompts: one layer of linear attention (the reduced form, whose minimiser and
distance to Bayes are predicted), one layer of softmax and one of ReLU attention with all matrices free, and a causal
transformer of several layers. Each is trained at several context lengths N by several seeds, and tested on the same
prompts of other lengths M and of shifted laws. The measure is the total variation between the model's and Bayes'
probabilities for one query, averaged over prompts. Two estimators that are not trained stand beside them: discriminant
analysis on the context alone, with the covariance known and not (`estimators.discriminant`).

The transformer has rotary positions, which are relative: so it can read contexts longer than any it was trained on,
where a learned position would still be as it was drawn. Whether it reads them well is what the measurement says.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.checks import at_least, power_of_two
from rlhf_jax.icl.claims.trained_models import Model, make_models, train_model
from rlhf_jax.icl.claims.training import STANDARD, setting_of
from rlhf_jax.icl.comparison import Comparison, standard_error, within_errors
from rlhf_jax.icl.estimators.discriminant import discriminant_logits
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.shift import NO_SHIFT, Shift, shifted
from rlhf_jax.icl.sweep import Labels, make_cross_entropy
from rlhf_jax.icl.tasks.mixtures import Prompt, bayes_logits, draw_means, draw_prompts
from rlhf_jax.icl.theory.inference import distances, total_variation
from rlhf_jax.icl.theory.minimiser import minimiser
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.types import Params

CHUNK = 64  # prompts that a model reads at a time in a test
PLUG_INS = ("plug-in, Λ known", "plug-in")


class ModelComparison(NamedTuple):
    """Distances to Bayes of all models, and those that theory predicts for the linear one.

    Attributes:
        comparisons: the linear model, trained, beside its prediction; one row a length N and a test.
        models: names, in the order of the axis `model` below.
        lengths: N of training, int [N].
        test_lengths: M, int [M].
        shifts: names, in the order of the axis `shift`.
        distances: mean total variation without a shift, [model, N, seed, M].
        shifted: the same under each shift on contexts of M = N examples, [shift, model, N, seed].
        predicted_distances: of W*_N, [N, M].
        predicted_shifted: of W*_N on contexts of N, [shift, N].
        losses: of every training step, [model, N, seed, steps].
        baselines: names, in the order of the axis `baseline`: what `plug_in_logits` gives.
        baseline_distances: their mean total variation without a shift, [baseline, M].
        baseline_shifted: the same under each shift on contexts of M = N examples, [shift, baseline, N].
    """

    comparisons: list[Comparison]
    models: tuple[str, ...]
    lengths: np.ndarray
    test_lengths: np.ndarray
    shifts: tuple[str, ...]
    distances: np.ndarray
    shifted: np.ndarray
    predicted_distances: np.ndarray
    predicted_shifted: np.ndarray
    losses: np.ndarray
    baselines: tuple[str, ...]
    baseline_distances: np.ndarray
    baseline_shifted: np.ndarray


def standard_shifts(mixture: Mixture) -> dict[str, Shift]:
    """The shifts by name: all but the last break the guarantee of the linear model.

    Class 1 has probability .7; the covariance is doubled or halved; the mean of class 1 is 1.5 times as long; a tenth
    of the labels of the context are wrong; and the means are half as long as in training, which theory says is harmless
    for long contexts.
    """
    c = mixture.classes
    probabilities, ratios = np.full(c, 0.3 / (c - 1)), np.ones(c)
    probabilities[1], ratios[1] = 0.7, 1.5
    return {
        "class probability .7": Shift(class_probabilities=tuple(probabilities)),
        "covariance doubled": Shift(covariance=2.0 * mixture.matrix),
        "covariance halved": Shift(covariance=0.5 * mixture.matrix),
        "mean 1.5 times as long": Shift(norm_ratios=tuple(ratios)),
        "label noise .1": Shift(label_noise=0.1),
        "prior scale halved": Shift(prior_scale=0.5 * mixture.prior_scale),
    }


def draw_test(
    mixture: Mixture, shift: Shift, length: int, prompts: int, key: Key[Array, ""]
) -> tuple[Prompt, np.ndarray]:
    """Test prompts of M examples under a shift, and the logits of Bayes, who knows it, float64 [prompts, c]."""
    law = shifted(mixture, shift)

    @jax.jit
    def drawn(key: Key[Array, ""]) -> tuple[Prompt, Float[Array, "B c"]]:
        for_means, for_prompts = jax.random.split(key)
        means = draw_means(for_means, law, prompts)
        prompt = draw_prompts(for_prompts, law, means, length)
        return prompt, bayes_logits(law, means, prompt.query)

    prompt, bayes = jax.block_until_ready(drawn(key))
    return prompt, np.asarray(bayes, np.float64)


@functools.partial(jax.jit, static_argnames="mixture")
def plug_in_logits(mixture: Mixture, prompt: Prompt) -> Float[Array, "baselines B c"]:
    """Logits of the two plug-in classifiers `PLUG_INS`, whose means and class shares are those of the context.

    The first takes Lambda of training for the covariance. The second estimates it, shrunk towards a multiple of the
    identity with the weight (d + c) / (M + d + c): short contexts show no matrix of full rank.

    Args:
        mixture: the family of tasks.
        prompt: contexts of M examples; with M <= c some show no covariance, and the second gives nan.
    """
    d, c = mixture.dimension, mixture.classes
    shrinkage = (d + c) / (prompt.inputs.shape[1] + d + c)
    known = jnp.asarray(mixture.matrix, prompt.inputs.dtype)
    seen = (prompt.inputs, prompt.labels, prompt.query, c)
    return jnp.stack([discriminant_logits(*seen, covariance=known), discriminant_logits(*seen, shrinkage=shrinkage)])


def make_evaluation(
    models: Mapping[str, Model], chunk: int = CHUNK
) -> Callable[[dict[str, Params], Prompt], dict[str, Float[Array, "runs B c"]]]:
    """`evaluate(params, prompt)`: the logits of all models, runs of each on axis 0 of its parameters.

    Args:
        models: by name.
        chunk: prompts that are read at a time, which bounds memory; it divides the number of prompts.
    """

    def logits(params: dict[str, Params], prompt: Prompt) -> dict[str, Float[Array, "B c"]]:
        chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), prompt)
        found = {}
        for name, model in models.items():
            by_chunk = jax.lax.map(lambda part: model.logits(params[name], part), chunks)  # noqa: B023
            found[name] = by_chunk.reshape(-1, by_chunk.shape[-1])
        return found

    return jax.jit(over_lanes(logits))


def compare_models(
    mixture: Mixture = STANDARD,
    lengths: Sequence[int] = (10, 40, 100),
    test_lengths: Sequence[int] = (10, 20, 40, 100, 200, 400),
    shifts: Mapping[str, Shift] | None = None,
    seeds: int = 4,
    steps: int = 400,
    batch: int = 128,
    labels: Labels = "posterior",
    width: int = 32,
    layers: int = 3,
    heads: int = 2,
    rates: Mapping[str, float] | None = None,
    prompts: int = 1024,
    points: int = 2**14,
    errors: float = 3.0,
) -> ModelComparison:
    """Distance to Bayes of four trained models against N, M and under shifts, beside the linear one's prediction.

    The prediction is `theory.inference.total_variation` at W*_N, never at the trained weights. A row passes within
    `errors` standard errors, of the test prompts, of the seeds of training and of the prediction together.

    Args:
        mixture: the family of tasks.
        lengths: N of training.
        test_lengths: M of the tests without a shift; tests under a shift have M = N.
        shifts: by name; None: `standard_shifts`.
        seeds: runs of each model and N, at least 2.
        steps: updates of each.
        batch: prompts an update.
        labels: "posterior" (less noise) or "hard".
        width: of the transformer.
        layers: of the transformer.
        heads: of the transformer.
        rates: learning rates of models in place of their defaults.
        prompts: of each test, at least 2; a multiple of 64 or less than that.
        points: quasi-random draws of a prediction, a power of two.
        errors: standard errors that a row of the linear model may be off.

    Returns:
        Arrays for tables and figures, and the rows.

    Raises:
        ValueError: one of these numbers cannot be, a shift is impossible, or a model has no such rate.
    """
    lengths = [at_least("context length N", one, 1) for one in lengths]
    test_lengths = [at_least("test length M", one, 1) for one in test_lengths]
    if not lengths or not test_lengths:
        raise ValueError("the comparison has no context length N, or no test length M: give at least one of each.")
    for name, value in (("number of steps", steps), ("batch", batch)):
        at_least(name, value, 1)
    for name, value in (("number of seeds", seeds), ("number of test prompts", prompts)):
        at_least(name, value, 2)  # errors are over seeds, and over prompts
    if prompts % min(prompts, CHUNK):
        raise ValueError(f"the number of test prompts is {prompts}: give a multiple of {CHUNK}, or less than that.")
    power_of_two("number of points", points)
    make_cross_entropy(labels)
    shifts = standard_shifts(mixture) if shifts is None else shifts
    for shift in shifts.values():
        shifted(mixture, shift)
    models = make_models(mixture, max(*lengths, *test_lengths), width, layers, heads, rates)
    evaluate = make_evaluation(models, min(prompts, CHUNK))
    fits = {
        name: [
            train_model(model, mixture, n, jax.random.split(jax.random.key(n), seeds), steps, batch, labels)
            for n in lengths
        ]
        for name, model in models.items()
    }

    def measured(shift: Shift, length: int, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Total variation of every prompt for the models trained at these N, [N, model, seed, prompts], and its mean
        for the baselines, [baseline]."""
        prompt, bayes = draw_test(mixture, shift, length, prompts, jax.random.key(2**31 + length))
        of_models = []
        for place in places:  # the lanes of one N at a time: one program serves all tests of this M
            found = jax.device_get(evaluate({name: fits[name][place].params for name in models}, prompt))
            of_models.append([[distances(run.astype(np.float64), bayes) for run in found[name]] for name in models])
        plug_ins = np.asarray(plug_in_logits(mixture, prompt), np.float64)
        return np.array(of_models), np.array([distances(one, bayes).mean() for one in plug_ins])

    by_run = (len(models), len(lengths), seeds)
    targets = [minimiser(mixture, n) for n in lengths]
    rows, plain, under = [], np.empty((*by_run, len(test_lengths))), np.empty((len(shifts), *by_run))
    plain_baselines, baselines_under = np.empty((2, len(test_lengths))), np.empty((len(shifts), 2, len(lengths)))
    predicted_plain, predicted_under = np.empty(plain.shape[1::2]), np.empty((len(shifts), len(lengths)))
    setting = setting_of(mixture)

    def row(number: int, shift: Shift, m: int, linear: np.ndarray, name: str) -> float:
        """Adds the row of the linear model; `linear` is its total variation, [seeds, prompts]."""
        theory = total_variation(mixture, targets[number], float(m), points, shift=shift)
        of_prompts, of_seeds = standard_error(linear.mean(axis=0)), standard_error(linear.mean(axis=1))
        error = float(np.linalg.norm([of_prompts, of_seeds, theory.standard_error]))
        quantity = f"TV of the trained linear model ({setting}, N={lengths[number]}, M={m}{name})"
        rows.append(within_errors(quantity, theory.mean, float(linear.mean()), error, errors))
        return theory.mean

    for j, m in enumerate(test_lengths):
        found, plain_baselines[:, j] = measured(NO_SHIFT, m, range(len(lengths)))
        plain[..., j] = found.mean(axis=-1).swapaxes(0, 1)
        for i in range(len(lengths)):
            predicted_plain[i, j] = row(i, NO_SHIFT, m, found[i, 0], "")
    for i, n in enumerate(lengths):
        for k, (name, shift) in enumerate(shifts.items()):
            found, baselines_under[k, :, i] = measured(shift, n, [i])
            under[k, :, i] = found[0].mean(axis=-1)
            predicted_under[k, i] = row(i, shift, n, found[0, 0], f", {name}")
    return ModelComparison(
        comparisons=rows,
        models=tuple(models),
        lengths=np.asarray(lengths),
        test_lengths=np.asarray(test_lengths),
        shifts=tuple(shifts),
        distances=plain,
        shifted=under,
        predicted_distances=predicted_plain,
        predicted_shifted=predicted_under,
        losses=np.stack([[one.losses for one in found] for found in fits.values()]),
        baselines=PLUG_INS,
        baseline_distances=plain_baselines,
        baseline_shifted=baselines_under,
    )
