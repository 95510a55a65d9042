"""The precision that losses are computed in: float32, whatever comes in, or better where better comes in."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def at_least_float32(array: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The array in float32 if it is in a narrower float (bfloat16, float16), and as it is if it is float32 or float64.

    (`jnp.promote_types` would do, but refuses mixed dtypes under `jax_numpy_dtype_promotion="strict"`.)

    Args:
        array: floats of any width and shape.

    Returns:
        The same numbers and shape.

    Example:
        >>> import jax.numpy as jnp
        >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array
