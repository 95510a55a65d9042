"""KL(reference || policy) over the whole vocabulary: against the plain softmax, in blocks, on meshes, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.models.divergence import hidden_forward_kl, token_forward_kl
from rlhf_jax.models.heads import unembed
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh


def example(dtype=jnp.float32):
    """States [2, 7, 5] and a kernel [5, 11] of the policy, and of its reference."""
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in ((2, 7, 5), (5, 11)) * 2]


def plain(states, kernel, reference_states, reference_kernel, temperature=1.0, softcap=None):
    def logprobs(states, kernel):
        logits = states @ kernel
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return jax.nn.log_softmax(logits / temperature)

    reference = logprobs(reference_states, reference_kernel)
    return (jnp.exp(reference) * (reference - logprobs(states, kernel))).sum(axis=-1)


@pytest.mark.parametrize(("softcap", "vocabulary_axis", "block"), [(None, 1, None), (1.5, 0, 3)])
def test_values_and_gradients_are_those_of_the_plain_softmax(softcap, vocabulary_axis, block):
    """In one block, and in three of which the last is not full; the kernel either way round."""
    with jax.enable_x64(True):
        given = example(jnp.float64)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7)))

        def found(states, kernel, reference_states, reference_kernel):
            kernels = [leaf if vocabulary_axis == 1 else leaf.T for leaf in (kernel, reference_kernel)]
            pair = (states, kernels[0], reference_states, kernels[1])
            return (weights * hidden_forward_kl(*pair, 0.7, softcap, vocabulary_axis, block)).sum()

        def expected(*given):
            return (weights * plain(*given, 0.7, softcap)).sum()

        value, gradient = jax.jit(jax.value_and_grad(found, (0, 1, 2, 3)))(*given)
        plain_value, plain_gradient = jax.jit(jax.value_and_grad(expected, (0, 1)))(*given)
        np.testing.assert_allclose(value, plain_value, rtol=1e-12)
        for mine, other in zip(gradient[:2], plain_gradient, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-12)
        assert not any(leaf.any() for leaf in gradient[2:])  # none flows to the reference
        if block is None:
            check_grads(jax.jit(lambda states, kernel: found(states, kernel, *given[2:])), given[:2], 1, modes=["rev"])


def test_it_is_zero_at_the_start_and_nowhere_below():
    states, kernel, *_ = example()
    same, gradient = jax.value_and_grad(lambda s: hidden_forward_kl(s, kernel, states, kernel).sum())(states)
    assert float(same) == 0.0
    np.testing.assert_allclose(gradient, jnp.zeros_like(states), atol=1e-6)
    near = hidden_forward_kl(states * (1 + 1e-6), kernel, states, kernel)  # a KL below what rounding tells from 0
    assert float(near.min()) >= 0.0


def test_rounding_below_0_does_not_cut_the_gradient_off():
    """Where policy and reference are so near that the sum is often rounded below 0, the gradient still is q - p."""
    keys = jax.random.split(jax.random.key(0), 3)
    reference, kernel = jax.random.normal(keys[0], (1, 256, 8)), jax.random.normal(keys[1], (8, 64))
    states = reference + 1e-4 * jax.random.normal(keys[2], reference.shape)
    found = jax.grad(lambda states: hidden_forward_kl(states, kernel, reference, kernel).sum())(states)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(each), jnp.float64) for each in (states, reference, kernel)]
        expected = jax.grad(lambda states: plain(states, exact[2], exact[1], exact[2]).sum())(exact[0])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (np.abs(found).max(axis=-1) > 0).all()


def test_bfloat16_states_give_float32():
    given = example()
    half = [leaf.astype(jnp.bfloat16) for leaf in given]
    found = hidden_forward_kl(*half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, plain(*(leaf.astype(jnp.float32) for leaf in half)), rtol=1e-4, atol=1e-5)


def test_logits_of_all_positions_never_exist():
    states, kernel = jnp.ones((2, 64, 8)), jnp.ones((8, 512))

    def program(block):
        step = jax.grad(lambda s, k: hidden_forward_kl(s, k, 2 * states, kernel, block=block).sum(), (0, 1))
        return jax.jit(step).lower(states, kernel).compile().as_text()

    assert "f32[2,64,512]" in program(64)
    assert "f32[2,4,512]" in (text := program(4)) and "f32[2,64,512]" not in text


def test_it_is_the_same_on_a_mesh_that_splits_rows_positions_and_vocabulary(config, params):
    states, other = jax.random.normal(jax.random.key(1), (2, 4, 6, config.width))
    reference = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    weights = jax.random.normal(jax.random.key(2), (4, 6))

    def total(params, states):
        kl = token_forward_kl(config, params, reference, states, other, 0.7)
        return (weights * kl).sum(), kl

    step = jax.value_and_grad(total, (0, 1), has_aux=True)
    (_, kl), gradient = jax.jit(step)(params, states)
    logits = [unembed(config, *pair) / 0.7 for pair in ((params, states), (reference, other))]
    identity = jnp.eye(config.vocab_size)
    np.testing.assert_allclose(kl, plain(logits[0], identity, logits[1], identity), rtol=1e-4, atol=1e-5)
    with jax.set_mesh(make_mesh(parse_mesh("data=2,tensor=2,sequence=2"))):
        (_, spread), spread_gradient = jax.block_until_ready(jax.jit(step)(params, states))
    np.testing.assert_allclose(spread, kl, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread_gradient, gradient)


def test_a_temperature_that_is_not_positive_is_an_error():
    with pytest.raises(ValueError, match="must be positive"):
        hidden_forward_kl(*example(), temperature=0.0)
