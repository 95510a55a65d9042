import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.icl.precision import in_float64


def test_float64_inside_and_nothing_changed_outside():
    @in_float64
    def gradient(x):
        return {"gradient": jax.jit(jax.grad(lambda x: jnp.sum(jnp.exp(x))))(jnp.asarray(x))}

    found = gradient(np.array([1.0]))["gradient"]
    assert type(found) is np.ndarray and found.dtype == np.float64
    np.testing.assert_allclose(found, np.exp(1.0), rtol=1e-15)
    assert jnp.asarray(np.array([1.0])).dtype == jnp.float32
