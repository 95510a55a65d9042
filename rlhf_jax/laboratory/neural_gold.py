"""A gold reward that is itself a model (Gao et al. 2022, 2210.10760): larger than the proxies, on many clean labels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.proxies import compare
from rlhf_jax.laboratory.setting import Setting, fine_tune, tiny_model
from rlhf_jax.rewards.bradley_terry import reward_scorer

LABELS_PER_PROXY_LABEL = 16
BATCH = 128
EPOCHS = 2
# Responses are scored in chunks of a power of two, so that programs of few shapes are compiled.
LARGEST_CHUNK = 4096


def neural_gold(options: Options, setting: Setting, key: jax.Array) -> Callable[..., np.ndarray]:
    """A two-layer reward model of twice the proxies' width, trained on 16 times their comparisons without label noise.

    Args:
        options: of the study.
        setting: the built-in world with its rubric, which gives the labels.
        key: of the comparisons and of the model.

    Returns:
        A gold reward as `World.gold`: `(prompts, responses, mask) -> float64 [N]`.
    """
    compare_key, trunk_key, model_key, order_key = jax.random.split(key, 4)
    config, count = tiny_model(2, 2 * options.width), LABELS_PER_PROXY_LABEL * options.pairs
    data = compare(setting, compare_key, count, 0.0, np.random.default_rng(options.seed + 3))
    trunk = fine_tune(config, trunk_key[None], options.sft_steps, options.seed + 4)["trunk"]
    algorithm = reward_modeling(config, adam(1e-3))
    start = algorithm.init(model_key, {"trunk": jax.tree.map(lambda leaf: leaf[0], trunk)})
    state, _ = jax.jit(lambda state, data, order: fit(algorithm.update, state, data, order))(
        start, data, epoch_orders(order_key, count, BATCH, EPOCHS)
    )
    score = jax.jit(reward_scorer(config))

    def gold(prompts: np.ndarray, responses: np.ndarray, mask: np.ndarray) -> np.ndarray:
        count = len(prompts)
        chunk = min(LARGEST_CHUNK, 1 << (count - 1).bit_length())
        rows = np.arange(count + -count % chunk) % count
        tokens = np.concatenate([prompts, responses], axis=1)[rows]
        real = np.concatenate([np.ones(prompts.shape, bool), mask], axis=1)[rows]
        parts = [
            score(state.params, jnp.asarray(tokens[start : start + chunk]), jnp.asarray(real[start : start + chunk]))
            for start in range(0, count, chunk)
        ]
        return np.concatenate([np.asarray(part.mean, np.float64) for part in parts])[:count]

    return gold
