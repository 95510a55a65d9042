"""Arrays in eight bits: the rounding, and which parameters of a policy are kept so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.adapters import AdapterConfig, attach, init_adapter
from rlhf_jax.models.quantised import Quantised, as_computed, quantise, stored, stored_weights

ADAPTER = AdapterConfig(kind="lora", rank=2, targets=("up",))


@pytest.mark.parametrize("axis", [-1, -2])
def test_numbers_are_within_half_a_step_and_the_largest_is_exact(axis):
    x = jax.random.normal(jax.random.key(0), (3, 5, 7)) * jnp.array([1e-3, 1.0, 1e4])[:, None, None]
    found = quantise(x, axis)
    assert found.values.dtype == jnp.int8
    back = np.asarray(found.values, np.float64) * np.asarray(found.scale, np.float64)
    error = np.abs(back - np.asarray(x, np.float64))
    assert (error <= np.asarray(found.scale) * 0.5001).all()
    largest = np.abs(np.asarray(x)).max(axis=axis)
    np.testing.assert_allclose(np.abs(back).max(axis=axis), largest, rtol=1e-6)


def test_zeros_stay_zeros():
    found = quantise(jnp.zeros((2, 4)))
    assert not found.values.any()
    assert np.isfinite(found.scale).all()


def test_a_wide_array_and_one_in_eight_bits_give_the_same_products():
    x = jax.random.normal(jax.random.key(1), (4, 8))
    numbers, factor = as_computed(stored(x, "int8"), x.dtype)
    np.testing.assert_allclose(numbers * factor, x, atol=float(jnp.abs(x).max()) / 250)
    numbers, factor = as_computed(stored(x, "computation"), x.dtype)
    assert factor is None
    np.testing.assert_array_equal(numbers, x)
    assert isinstance(stored(x, "int8"), Quantised)
    assert stored(x, "bfloat16").dtype == jnp.bfloat16


def test_matrices_are_rounded_and_nothing_else():
    layer = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}
    policy = {
        "trunk": {"embed": {"embedding": jnp.ones((5, 3))}, "layers": {"up": layer}, "norm": {"scale": jnp.ones(3)}}
    }
    with_adapter = attach(policy, init_adapter(ADAPTER, policy, jax.random.key(0)), ADAPTER)
    found = stored_weights(with_adapter, "int8")["trunk"]
    assert found["layers"]["up"]["kernel"].dtype == jnp.int8
    assert found["layers"]["up"]["kernel_scale"].shape == (2, 4)
    assert found["embed"]["embedding"].dtype == jnp.bfloat16
    assert found["layers"]["up"]["bias"].dtype == found["norm"]["scale"].dtype == jnp.float32
    jax.tree.map(
        np.testing.assert_array_equal,
        found["layers"]["up"]["adapter"],
        with_adapter["trunk"]["layers"]["up"]["adapter"],
    )
    assert stored_weights(with_adapter, "computation") is with_adapter
    experts = {"experts": {"up": jnp.ones((2, 3, 4))}, "router": {"kernel": jnp.ones((3, 2))}}
    for storage in ("bfloat16", "int8"):
        kept = stored_weights(experts, storage)
        assert kept["experts"]["up"].dtype == jnp.bfloat16
        assert kept["router"]["kernel"].dtype == jnp.float32  # rounding could choose other experts
    half = stored_weights(policy, "bfloat16")["trunk"]["layers"]["up"]
    assert half["kernel"].dtype == jnp.bfloat16
    assert half["bias"].dtype == jnp.float32
