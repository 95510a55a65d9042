"""Nash-MD's loss: numbers by hand, reference values, and the gradient that it is in the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.losses.nash import nash_md_loss

PREFERENCE = [0.9, 0.2, 0.6, 0.5]


def test_hand_worked_numbers():
    """A = 0.75 - 0.5 - 0.1 (-2 + 3) = 0.15 and 0.5 - 0.5 - 0.1 (-4 + 1) = 0.3."""
    loss = nash_md_loss(jnp.array([-2.0, -4.0]), jnp.array([-3.0, -1.0]), jnp.array([0.75, 0.5]), 0.1)
    np.testing.assert_allclose(loss, [0.3, 1.2], rtol=1e-6)


@pytest.mark.parametrize(("double", "rtol"), [(True, 1e-6), (False, 1e-4)])
def test_reference_value(golden_losses, double, rtol):
    with jax.enable_x64(double):
        inputs = {name: jnp.asarray(golden_losses["inputs"][name]) for name in ("logp", "ref", "mask")}
        own, reference = ((inputs[name] * inputs["mask"]).sum(axis=1)[::2] for name in ("logp", "ref"))
        loss = nash_md_loss(own, reference, jnp.asarray(PREFERENCE), 0.125)
        np.testing.assert_allclose(loss.mean(), golden_losses["nash_md_pg_b.125_seqKL"], rtol=rtol)


def test_gradients_are_finite_differences_with_the_advantage_held():
    with jax.enable_x64(True):
        logprob, reference, preference = jnp.array([-3.0, -8.5]), jnp.array([-2.5, -9.0]), jnp.array([0.8, 0.1])
        found = jax.grad(lambda *inputs: nash_md_loss(*inputs, 0.2).sum(), argnums=(0, 1, 2))
        slopes = found(logprob, reference, preference)
        at_start, step = nash_md_loss(logprob, reference, preference, 0.2) / logprob, 1e-6
        for row in range(2):
            up, down = (at_start * logprob.at[row].add(sign * step) for sign in (1, -1))
            np.testing.assert_allclose(slopes[0][row], (up - down).sum() / (2 * step), rtol=1e-8)
        assert not slopes[1].any() and not slopes[2].any()


@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
def test_its_mean_gradient_is_that_of_the_regularised_game(seed, beta):
    """Over every response that there is: the gradient of -E P(y > y') + beta KL(pi || ref)."""
    draws = np.random.default_rng(seed)
    with jax.enable_x64(True):
        logits, reference = jnp.asarray(draws.normal(size=(2, 5)))
        preference, reference = jnp.asarray(draws.uniform(size=5)), jax.nn.log_softmax(reference)
        drawn = jax.nn.softmax(logits)

        def sampled(logits):
            return (drawn * nash_md_loss(jax.nn.log_softmax(logits), reference, preference, beta)).sum()

        def objective(logits):
            logprob = jax.nn.log_softmax(logits)
            return (jnp.exp(logprob) * (beta * (logprob - reference) - preference)).sum()

        np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(objective)(logits), rtol=1e-9, atol=1e-12)


def test_narrow_floats_are_widened_and_jit_changes_nothing():
    inputs = [jnp.array(values, jnp.bfloat16) for values in ([-2.0, -4.0], [-3.0, -1.0], [0.75, 0.5])]
    loss = nash_md_loss(*inputs, 0.1)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(nash_md_loss)(*inputs, jnp.float32(0.1)), loss, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(beta):
    with pytest.raises(ValueError, match="must be positive"):
        nash_md_loss(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), beta)
