"""float64 for theory, without turning it on for the rest of the package."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import numpy as np

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_float64(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes a function compute in float64: NumPy arrays (or floats) in, NumPy arrays out, JAX in between.

    Inside, `jnp.asarray` of a NumPy float64 array stays float64, and so do programs that are jitted there. What comes
    out is NumPy, because a float64 JAX array is of no use outside. Such a function cannot be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> third = in_float64(lambda x: jnp.asarray(x) / 3)
        >>> third(np.float64(1.0)).item()
        0.3333333333333333
    """

    @functools.wraps(function)
    def computed(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, function(*arguments, **options))

    return computed
