"""Refusals of options that may be traced: what is known is checked, what is traced is taken as it is."""

from typing import Any

import jax
import numpy as np

from rlhf_jax.icl.checks import positive


def check_positive(name: str, value: Any, or_zero: bool = False) -> None:
    """Refuses a number, or an array with one, that is not finite and above 0 (or of at least 0), unless it is traced.

    Args:
        name: what it is called in the error.
        value: a Python number, an array, or a tracer, which is not looked at.
        or_zero: whether 0 is allowed.

    Raises:
        ValueError: naming the first such number.
    """
    if isinstance(value, jax.core.Tracer):
        return
    for one in np.asarray(value).ravel().tolist():
        positive(name, one, or_zero)
