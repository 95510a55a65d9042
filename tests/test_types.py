"""The records that travel, and the precision that they are computed in."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.types import at_least_float32


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_raised_and_keep_their_value(narrow):
    got = at_least_float32(jnp.array([0.1, -2.0], narrow))
    assert got.dtype == jnp.float32
    assert got.astype(narrow).tolist() == jnp.array([0.1, -2.0], narrow).tolist()


def test_float32_and_float64_stay_what_they_are():
    assert at_least_float32(jnp.ones(2, jnp.float32)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert at_least_float32(jnp.ones(2, jnp.float64)).dtype == jnp.float64
