"""Models that no closed form describes, beside the one that it does: where the theory of one linear layer ends.

Four models are trained on the same raw prompts: one layer of linear attention (the reduced form, whose minimiser and
distance to Bayes are predicted), one layer of softmax and one of ReLU attention with all matrices free, and a causal
transformer of several layers. Each is trained at several context lengths N by several seeds, and tested on the same
prompts of other lengths M and of shifted laws. The measure is the total variation between the model's and Bayes'
probabilities for one query, averaged over prompts.

The transformer has rotary positions, which are relative: so it can read contexts longer than any it was trained on,
where a learned position would still be as it was drawn. Whether it reads them well is what the measurement says.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.claims.training import STANDARD, make_prompt_loss, setting_of
from rlhf_jax.icl.comparison import Comparison, within_errors
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.models.attention import init_attention, predict
from rlhf_jax.icl.models.linear_attention import class_sums, embed, reduced_logits, sparse
from rlhf_jax.icl.models.transformer import VectorModel, classification_logits, init_vector_model
from rlhf_jax.icl.shift import NO_SHIFT, Shift, shifted
from rlhf_jax.icl.sweep import Labels
from rlhf_jax.icl.tasks.mixtures import Prompt, bayes_logits, draw_means, draw_prompts
from rlhf_jax.icl.theory.inference import distances, total_variation
from rlhf_jax.icl.theory.minimiser import minimiser
from rlhf_jax.icl.training import Fit, fit
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.types import Params


class Model(NamedTuple):
    """A model of prompts, and how fast Adam trains it.

    Attributes:
        init: `init(key) -> params`.
        logits: `logits(params, prompt) -> [B, c]`.
        rate: largest learning rate.
    """

    init: Callable[[Key[Array, ""]], Params]
    logits: Callable[[Params, Prompt], Float[Array, "B c"]]
    rate: float


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


def make_models(
    mixture: Mixture,
    context_length: int,
    width: int = 32,
    layers: int = 3,
    heads: int = 2,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Model]:
    """The four models by name: `linear`, `softmax`, `relu` (one layer each), `transformer`.

    The linear one starts at W = 0. Softmax and ReLU start near the sparse form with W = 0.3 I, all entries with noise
    of 0.1: from small matrices alone some runs stay at a saddle, where no label is read, for hundreds of updates.

    Args:
        mixture: gives the width of tokens, d + c.
        context_length: the longest prompt of training or test, in examples.
        width: of the transformer.
        layers: of the transformer.
        heads: of the transformer.
        rates: learning rates of models in place of their defaults.
    """
    d, c = mixture.dimension, mixture.classes
    config = VectorModel(d + c, c, context_length + 1, layers, heads, width, positions="rotary")

    def linear(weights: Float[Array, "d d"], prompt: Prompt) -> Float[Array, "B c"]:
        return reduced_logits(weights, class_sums(prompt.inputs, prompt.labels, c), prompt.query)

    def one_layer(kind: str, rate: float) -> Model:
        def logits(params: Params, prompt: Prompt) -> Float[Array, "B c"]:
            shown = jax.nn.one_hot(prompt.labels, c, dtype=prompt.inputs.dtype)
            return predict(kind, params, embed(prompt.inputs, shown, prompt.query), c)

        def init(key: Key[Array, ""]) -> Params:
            reading = jax.tree.map(lambda matrix: matrix[None], sparse(0.3 * jnp.eye(d), c))
            return jax.tree.map(jnp.add, reading, init_attention(key, d + c, scale=0.1))

        return Model(init, logits, rate)

    def deep(params: Params, prompt: Prompt) -> Float[Array, "B c"]:
        return classification_logits(config, params, prompt.inputs, prompt.labels, prompt.query)

    models = {
        "linear": Model(lambda key: jnp.zeros((d, d)), linear, 0.1),
        "softmax": one_layer("softmax", 0.1),
        "relu": one_layer("relu", 0.1),
        "transformer": Model(lambda key: init_vector_model(config, key), deep, 3e-3),
    }
    return {name: model._replace(rate=(rates or {}).get(name, model.rate)) for name, model in models.items()}


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


def train_model(
    model: Model,
    mixture: Mixture,
    length: int,
    key: Key[Array, " seeds"],
    steps: int,
    batch: int,
    labels: Labels = "posterior",
) -> Fit:
    """Trains a model on raw prompts, seeds as lanes: Adam, a tenth of the steps to warm up, then a cosine to 1 %.

    Args:
        model: of `make_models`.
        mixture: the family of tasks.
        length: examples in a context N.
        key: one a seed; models that are given the same keys see the same prompts.
        steps: updates.
        batch: fresh prompts an update.
        labels: see `training.make_prompt_loss`.

    Returns:
        The fits, seeds on axis 0.
    """
    loss = make_prompt_loss(mixture, length, batch, labels, model.logits)
    schedule = optax.warmup_cosine_decay_schedule(0.0, model.rate, max(steps // 10, 1), steps, 0.01 * model.rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def run(key: Key[Array, ""]) -> Fit:
        for_weights, for_prompts = jax.random.split(key)
        return fit(loss, model.init(for_weights), optimizer, steps, for_prompts)

    return jax.jit(over_lanes(run))(key)


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

    prompt, bayes = drawn(key)
    return prompt, np.asarray(bayes, np.float64)


def make_evaluation(
    models: Mapping[str, Model], chunk: int = 64
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
        prompts: of each test, a multiple of 64 or less than that.
        points: quasi-random draws of a prediction, a power of two.
        errors: standard errors that a row of the linear model may be off.

    Returns:
        Arrays for tables and figures, and the rows.

    Raises:
        ValueError: fewer than 2 seeds.
    """
    if seeds < 2:
        raise ValueError(f"the number of seeds is {seeds}: give at least 2, since intervals are over seeds.")
    shifts = standard_shifts(mixture) if shifts is None else shifts
    models = make_models(mixture, max(*lengths, *test_lengths), width, layers, heads, rates)
    evaluate = make_evaluation(models, min(prompts, 64))
    fits = {
        name: [
            train_model(model, mixture, n, jax.random.split(jax.random.key(n), seeds), steps, batch, labels)
            for n in lengths
        ]
        for name, model in models.items()
    }
    runs = {
        name: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[one.params for one in found])
        for name, found in fits.items()
    }

    def measured(params: dict[str, Params], shift: Shift, length: int) -> np.ndarray:
        """Total variation of every prompt, [model, runs, prompts]."""
        prompt, bayes = draw_test(mixture, shift, length, prompts, jax.random.key(2**31 + length))
        found = jax.device_get(evaluate(params, prompt))
        return np.stack([[distances(run.astype(np.float64), bayes) for run in found[name]] for name in models])

    by_run = (len(models), len(lengths), seeds)
    targets = [minimiser(mixture, n) for n in lengths]
    rows, plain, under = [], np.empty((*by_run, len(test_lengths))), np.empty((len(shifts), *by_run))
    predicted_plain, predicted_under = np.empty(plain.shape[1::2]), np.empty((len(shifts), len(lengths)))
    setting = setting_of(mixture)

    def row(number: int, shift: Shift, m: int, linear: np.ndarray, name: str) -> float:
        """Adds the row of the linear model; `linear` is its total variation, [seeds, prompts]."""
        theory = total_variation(mixture, targets[number], float(m), points, shift=shift)
        of_prompts = linear.mean(axis=0).std(ddof=1) / np.sqrt(prompts)
        of_seeds = linear.mean(axis=1).std(ddof=1) / np.sqrt(seeds)
        error = float(np.linalg.norm([of_prompts, of_seeds, theory.standard_error]))
        quantity = f"TV of the trained linear model ({setting}, N={lengths[number]}, M={m}{name})"
        rows.append(within_errors(quantity, theory.mean, float(linear.mean()), error, errors))
        return theory.mean

    for j, m in enumerate(test_lengths):
        found = measured(runs, NO_SHIFT, m).reshape(*by_run, prompts)
        plain[..., j] = found.mean(axis=-1)
        for i in range(len(lengths)):
            predicted_plain[i, j] = row(i, NO_SHIFT, m, found[0, i], "")
    for i, n in enumerate(lengths):
        params = jax.tree.map(lambda leaf: leaf[i * seeds : (i + 1) * seeds], runs)  # noqa: B023
        for k, (name, shift) in enumerate(shifts.items()):
            found = measured(params, shift, n)
            under[k, :, i] = found.mean(axis=-1)
            predicted_under[k, i] = row(i, shift, n, found[0], f", {name}")
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
        losses=np.stack([[np.asarray(one.losses) for one in found] for found in fits.values()]),
    )
