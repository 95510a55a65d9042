"""Models of prompts and their training: one layer of linear, softmax or ReLU attention, and a small transformer.

All read the same raw prompts and give logits of the classes of the query. What they learn is measured in
`claims.transformers`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from rlhf_jax.icl.checks import at_least
from rlhf_jax.icl.claims.training import linear_logits, make_prompt_loss
from rlhf_jax.icl.mixture import Mixture
from rlhf_jax.icl.models.attention import init_attention, predict
from rlhf_jax.icl.models.linear_attention import SelfAttention, embed
from rlhf_jax.icl.models.transformer import VectorModel, classification_logits, init_vector_model
from rlhf_jax.icl.sweep import Labels
from rlhf_jax.icl.tasks.mixtures import Prompt
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


def make_models(
    mixture: Mixture,
    context_length: int,
    width: int = 32,
    layers: int = 3,
    heads: int = 2,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Model]:
    """The four models by name: `linear`, `softmax`, `relu` (one layer each), `transformer`.

    The linear one starts at W = 0. ReLU and softmax start from normal matrices: standard deviations of 0.3, and for
    softmax of 0.1 in W_V and 0.5 in W_KQ, the best of a dozen starts for d = 3, N = 10 and 400 updates. All of 20 runs
    of ReLU then learn (loss .48 to .52), and 18 of softmax (.50 to .55); two stay at a saddle where no label is read
    (.65). Starts near the sparse form of the linear layer avoid it, but end in a worse minimum: .52 to .54 for ReLU,
    .54 to .55 for softmax.

    Args:
        mixture: gives the width of tokens, d + c.
        context_length: the longest prompt of training or test, in examples.
        width: of the transformer.
        layers: of the transformer.
        heads: of the transformer.
        rates: learning rates of models in place of their defaults.

    Raises:
        ValueError: a learning rate of a model that is none of these.
    """
    d, c = mixture.dimension, mixture.classes
    config = VectorModel(d + c, c, context_length + 1, layers, heads, width, positions="rotary")

    def one_layer(kind: str, rate: float, value: float, key_query: float) -> Model:
        def logits(params: Params, prompt: Prompt) -> Float[Array, "B c"]:
            shown = jax.nn.one_hot(prompt.labels, c, dtype=prompt.inputs.dtype)
            return predict(kind, params, embed(prompt.inputs, shown, prompt.query), c)

        def init(key: Key[Array, ""]) -> Params:
            normal = init_attention(key, d + c, scale=1.0)
            return SelfAttention(value=value * normal.value, key_query=key_query * normal.key_query)

        return Model(init, logits, rate)

    def deep(params: Params, prompt: Prompt) -> Float[Array, "B c"]:
        return classification_logits(config, params, prompt.inputs, prompt.labels, prompt.query)

    models = {
        "linear": Model(lambda key: jnp.zeros((d, d)), functools.partial(linear_logits, c), 0.1),
        "softmax": one_layer("softmax", 0.1, value=0.1, key_query=0.5),
        "relu": one_layer("relu", 0.1, value=0.3, key_query=0.3),
        "transformer": Model(lambda key: init_vector_model(config, key), deep, 3e-3),
    }
    unknown = [name for name in rates or {} if name not in models]
    if unknown:
        raise ValueError(f"there is a learning rate of {unknown[0]!r}: choose among {', '.join(models)}.")
    return {name: model._replace(rate=(rates or {}).get(name, model.rate)) for name, model in models.items()}


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
        The fits, seeds on axis 0, as NumPy arrays: nothing is under way on the devices any more.

    Raises:
        ValueError: steps, batch or length below 1, or other labels.
    """
    at_least("number of steps", steps, 1)
    loss = make_prompt_loss(mixture, length, batch, labels, model.logits)
    schedule = optax.warmup_cosine_decay_schedule(0.0, model.rate, max(steps // 10, 1), steps, 0.01 * model.rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def run(key: Key[Array, ""]) -> Fit:
        for_weights, for_prompts = jax.random.split(key)
        return fit(loss, model.init(for_weights), optimizer, steps, for_prompts)

    return jax.device_get(jax.jit(over_lanes(run))(key))
