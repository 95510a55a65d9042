"""What the last layer of a reward model has seen of its comparisons, in three geometries, and how unsure it is."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.setting import Setting
from rlhf_jax.models.heads import reward_features
from rlhf_jax.rewards.ellipsoid import Geometry, geometry, gram
from rlhf_jax.rewards.last_layer import statistical_scale
from rlhf_jax.rewards.posterior import fisher_geometry, pair_geometry
from rlhf_jax.types import Params, PreferenceBatch, Sequences

Pair = tuple[Float[Array, "N D"], Float[Array, "N D"]]
"""Features of the chosen and of the rejected responses that a reward model was trained on."""

GEOMETRIES: Mapping[str, Callable[..., Geometry]] = MappingProxyType(
    {
        "individual": lambda pair, head, weight: geometry(gram(jnp.concatenate(pair)), weight),
        "pair": lambda pair, head, weight: pair_geometry(*pair, weight),
        "fisher": lambda pair, head, weight: fisher_geometry(*pair, head, weight),
    }
)
"""Last-layer geometries `geometry(pair, head, regularisation)`: of responses, of pairs, of pairs by Fisher weight."""


def natural_square(shape: Geometry, pair: Pair, head: Params, regularisation: float) -> Float[Array, ""]:
    """B of `last_layer.statistical_scale` in any geometry: about `E ||phi_hat - phi*||_M^2`; D in the Fisher geometry.

    A standard deviation of the reward is `sqrt(B / D) sqrt(e^T M^{-1} e)`: the D directions share it.
    """
    matrix = jnp.matmul(shape.cholesky, shape.cholesky.T, precision="highest")
    return statistical_scale(matrix, *pair, head["kernel"], regularisation)


def pair_features(options: Options, setting: Setting, trunk: Params, pool: PreferenceBatch) -> Pair:
    """What the head reads of every pair, a few hundred sequences at a time."""

    def read(sequences: Sequences) -> Float[Array, "N D"]:
        return jax.lax.map(
            lambda row: reward_features(
                setting.reward_config, trunk, row.tokens[None], row.mask[None], options.features
            )[0],
            sequences,
            batch_size=256,
        )

    return read(pool.chosen), read(pool.rejected)
