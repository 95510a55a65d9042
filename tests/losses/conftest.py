"""For the losses of preferences: the pairs of the reference values, and gradients by finite differences."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads


@pytest.fixture
def golden_pairs(golden_losses):
    """`golden_pairs(dtype)`: sums of log-probabilities under policy and reference and lengths, chosen then rejected."""
    given = golden_losses["inputs"]
    mask = np.array(given["mask"])

    def pairs(dtype):
        sums = [jnp.asarray((np.array(given[name]) * mask).sum(axis=1), dtype) for name in ("logp", "ref")]
        lengths = jnp.asarray(mask.sum(axis=1), jnp.int32)
        return [side[start::2] for side in (*sums, lengths) for start in (0, 1)]

    return pairs


@pytest.fixture
def assert_gradient():
    """`assert_gradient(function, *arrays)`: that of a scalar function is that of central differences, in float64."""

    def check(function, *arrays):
        def of_jax_arrays(*rows):  # the differences are made of numpy arrays
            return function(*map(jnp.asarray, rows))

        check_grads(of_jax_arrays, arrays, 1, ["rev"], atol=1e-7, rtol=1e-7, eps=1e-6)

    return check
