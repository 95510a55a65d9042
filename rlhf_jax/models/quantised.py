"""Arrays in eight bits: whole numbers from -127 to 127, and a factor for each group of them.

For what is read far more often than it is written and whose rounding does little harm: the key-value cache, and the
weights of a policy that only draws. Decoding reads all of both for every token: where that takes the time, and the
conversion does not, fewer bytes are less time.
"""

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from rlhf_jax.types import Params, wide

Storage = Literal["computation", "bfloat16", "int8"]
"""How numbers are kept: in the dtype of the computation, or in 16 or 8 bits."""

STORAGES = get_args(Storage)
LARGEST = 127


@chex.dataclass(frozen=True)
class Quantised:
    """x as `values * scale`.

    Attributes:
        values: int8, the shape of x.
        scale: float32, the shape of x with 1 on the axis whose entries share a factor.
    """

    values: Int8[Array, "*shape"]
    scale: Float[Array, "*groups"]


def quantise(x: Float[Array, "*shape"], axis: int = -1) -> Quantised:
    """The nearest numbers in eight bits, the largest of each group exact.

        scale = max |x| / 127,  values = round(x / scale);  |x - values scale| <= scale / 2

    Args:
        x: any float dtype.
        axis: the axis along which entries share a factor.

    Example:
        >>> found = quantise(jnp.array([[0.0, 1.0, -2.54]]))
        >>> found.values.tolist(), [round(float(value), 3) for value in found.scale[0]]
        ([[0, 50, -127]], [0.02])
    """
    x = x.astype(wide(x))
    scale = jnp.abs(x).max(axis=axis, keepdims=True) / LARGEST
    values = jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantised(values=values, scale=scale.astype(jnp.float32))


def stored(x: Float[Array, "*shape"], storage: Storage, axis: int = -1) -> Array | Quantised:
    """An array as it is to be kept; in eight bits, entries along the axis share a factor."""
    if storage == "int8":
        return quantise(x, axis)
    return x if storage == "computation" else x.astype(jnp.bfloat16)


def stored_weights(params: Params, storage: Storage) -> Params:
    """A policy whose matrices are kept in fewer bits; norms, biases and adapters stay as they are.

    A kernel [..., I, O] in eight bits has one factor an output; it stands beside the kernel as `kernel_scale`
    [..., O], and `models.layers.Linear` multiplies with it after the product. Embedding and unembedding are kept in
    bfloat16 then: their rows are the tokens, whose log-probabilities are trained on. So are the experts of a mixture;
    its router stays as it is, for rounding could choose other experts.

    Args:
        params: a policy tree.
        storage: of its matrices.
    """
    if storage == "computation":
        return params

    def keep(tree: Params, name: str) -> Params:
        if name == "router":
            return tree
        if name == "experts":
            return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
        if not isinstance(tree, dict):
            return tree.astype(jnp.bfloat16) if name in ("embedding", "unembedding", "kernel") else tree
        if storage == "int8" and "kernel" in tree:
            found = quantise(tree["kernel"], axis=-2)
            rest = {key: keep(leaf, key) for key, leaf in tree.items() if key != "kernel"}
            return rest | {"kernel": found.values, "kernel_scale": found.scale.squeeze(-2)}
        return {key: leaf if key == "adapter" else keep(leaf, key) for key, leaf in tree.items()}

    return keep(params, "")


def as_computed(x: Array | Quantised, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """The numbers in the dtype of the computation, and the factor that products with them still need, if any."""
    if isinstance(x, Quantised):
        return x.values.astype(dtype), x.scale
    return x.astype(dtype), None
