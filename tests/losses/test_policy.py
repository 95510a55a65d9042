"""Ratios and surrogates: hand-worked numbers, gradients, identities, and the invariants that every such loss keeps."""

from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.policy import (
    capped_surrogate,
    clipped_surrogate,
    ratio_metrics,
    reinforce_surrogate,
    sequence_log_ratio,
    token_log_ratio,
    total_log_ratio,
)
from rlhf_jax.losses.reduce import mean

ARGUMENTS = [("token_mean", None), ("sequence_mean", None), ("sequence_sum", None), ("constant", 5)]
RATIOS = [token_log_ratio, sequence_log_ratio, total_log_ratio]
SURROGATES = {
    "clipped": clipped_surrogate,
    "dual_clipped": partial(clipped_surrogate, dual_clip=1.5),
    "capped": capped_surrogate,
    "reinforce": reinforce_surrogate,
}
ROWS, STEPS = 6, 4


class Loss(NamedTuple):
    """The pieces of a policy-gradient loss."""

    ratio: object = token_log_ratio
    surrogate: str = "clipped"
    clip_low: float = 0.2
    clip_high: float = 0.2
    rule: str = "token_mean"
    constant: int | None = None
    k3: float = 0.0


LOSSES = {
    "ppo": Loss(),
    "dual_clip": Loss(surrogate="dual_clipped"),
    "grpo": Loss(rule="sequence_mean", k3=0.04),
    "dr_grpo": Loss(rule="constant", constant=5),
    "dapo": Loss(clip_high=0.28),
    "gspo": Loss(ratio=sequence_log_ratio, clip_low=3e-4, clip_high=4e-4, rule="sequence_mean"),
    "cispo": Loss(surrogate="capped", clip_high=0.1),
    "rloo": Loss(surrogate="reinforce", rule="sequence_sum"),
    "rloo_off_policy": Loss(ratio=total_log_ratio, rule="sequence_mean"),
}


def value_of(kind, logprob, old, advantages, mask, whole=None):
    """The loss of some rows, as their part of the loss of the `whole`."""
    log_ratio = kind.ratio(logprob, old, mask)
    losses = SURROGATES[kind.surrogate](logprob, log_ratio, advantages, kind.clip_low, kind.clip_high)
    # `old` stands in for the reference, which is one more array of log-probabilities.
    losses = losses + kind.k3 * kl_estimate(logprob, old, "k3")
    return mean(losses, mask, kind.rule, kind.constant, mask if whole is None else whole)


def all_losses(*batch):
    """Value and gradient of each of `LOSSES`."""
    return {name: jax.value_and_grad(partial(value_of, kind))(*batch) for name, kind in LOSSES.items()}


jitted_losses = jax.jit(all_losses)  # two shapes, all rows and half of them: two compilations for the whole file


def random_batch(seed=0, lengths=(4, 1, 3, 2, 4, 1)):
    """Log-probabilities, old ones, advantages, mask: ratios inside and outside the clips."""
    generator = np.random.default_rng(seed)
    logprob = -np.abs(generator.normal(1.0, 0.5, (ROWS, STEPS)))
    old = logprob + 0.3 * generator.normal(size=(ROWS, STEPS))
    advantages = generator.normal(size=(ROWS, STEPS))
    mask = np.arange(STEPS)[None] < np.array(lengths)[:, None]
    return (*(jnp.asarray(x.astype(np.float32)) for x in (logprob, old, advantages)), jnp.asarray(mask))


def in_float64(batch):
    """The batch with float64 numbers; call it where they are enabled."""
    return (*(jnp.asarray(np.asarray(x), jnp.float64) for x in batch[:3]), batch[3])


# Ratios.


def test_ratios_worked_by_hand():
    logprob = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -5.0, -5.0], [-5.0, -5.0, -5.0]])
    old = jnp.array([[-1.5, -2.0, -1.0], [-1.25, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    mask = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
    assert token_log_ratio(logprob, old, mask).tolist() == [[0.5, 0.0, -2.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert sequence_log_ratio(logprob, old, mask).tolist() == [[-0.5, -0.5, -0.5], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert total_log_ratio(logprob, old, mask).tolist() == [[-1.5, -1.5, -1.5], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratios_ignore_what_is_masked_and_pass_no_gradient_to_the_old_policy(ratio):
    logprob, old, _, mask = random_batch()
    gradients = jax.grad(lambda *x: jnp.sum(ratio(*x, mask)), argnums=(0, 1))
    expected, expected_gradients = ratio(logprob, old, mask), gradients(logprob, old)
    assert not np.asarray(expected)[~np.asarray(mask)].any() and not np.asarray(expected_gradients[1]).any()
    for junk in (jnp.nan, jnp.inf, -3.0):
        spoilt = jnp.where(mask, logprob, junk), jnp.where(mask, old, -junk)
        np.testing.assert_array_equal(ratio(*spoilt, mask), expected)
        np.testing.assert_array_equal(gradients(*spoilt)[0], expected_gradients[0])
    np.testing.assert_array_equal(ratio(logprob, old, mask.astype(jnp.float32)), expected)


@pytest.mark.parametrize("ratio", RATIOS)
def test_huge_ratios_stay_finite_and_have_no_gradient(ratio):
    old, mask = jnp.zeros((ROWS, STEPS)), jnp.ones((ROWS, STEPS), bool)
    gradient = jax.grad(lambda x: jnp.sum(jnp.exp(ratio(x, old, mask))))
    for log_ratio, held in ((1e4, 20.0), (-1e4, -20.0), (-np.inf, -20.0)):
        logprob = jnp.full((ROWS, STEPS), log_ratio, jnp.float32)
        assert np.all(ratio(logprob, old, mask) == held)
        assert not np.asarray(gradient(logprob)).any()


def test_the_total_ratio_makes_an_old_policys_samples_stand_for_the_new_one():
    """Over all responses of two tokens: the surrogate's mean under the old policy has the gradient of minus E_pi A."""
    with jax.enable_x64(True):
        responses = np.array(list(product(range(3), repeat=2)))
        rewards = jnp.asarray(np.random.default_rng(0).normal(size=len(responses)))
        logits, old_logits = (jnp.asarray(x) for x in np.random.default_rng(1).normal(size=(2, 2, 3)))

        def logprobs(x):
            return jax.nn.log_softmax(x)[jnp.arange(2), responses]

        def expected_reward(x):
            return jnp.sum(jnp.exp(logprobs(x).sum(axis=1)) * rewards)

        def loss(x):
            log_ratio = total_log_ratio(logprobs(x), logprobs(old_logits), jnp.ones(responses.shape, bool))
            advantages = jnp.broadcast_to(rewards[:, None], responses.shape)
            losses = clipped_surrogate(log_ratio, log_ratio, advantages, 1.0, jnp.inf)[:, 0]
            return jnp.sum(jnp.exp(logprobs(old_logits).sum(axis=1)) * losses)

        np.testing.assert_allclose(jax.grad(loss)(logits), -jax.grad(expected_reward)(logits), atol=1e-12)


# Surrogates.


def test_the_four_corners_of_the_clip_worked_by_hand():
    log_ratio = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1]]))
    advantages = jnp.array([[2.0, -2.0, 2.0, -2.0, 1.0]])
    got = clipped_surrogate(log_ratio, log_ratio, advantages, 0.2, 0.28)
    np.testing.assert_allclose(got, [[-2.56, 3.0, -1.0, 1.6, -1.1]], rtol=1e-6)


def test_gradient_flows_unless_clipping_takes_the_gain_away():
    log_ratio, advantages = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5])), jnp.array([1.0, -1.0, 1.0, -1.0])
    gradient = jax.grad(lambda x: jnp.sum(clipped_surrogate(x, x, advantages, 0.2, 0.2)))(log_ratio)
    np.testing.assert_allclose(gradient, [0.0, 1.5, -0.5, 0.0], rtol=1e-6)


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    log_ratio = jnp.log(jnp.array([9.0, 9.0, 2.0, 0.5]))
    advantages = jnp.array([2.0, -2.0, -2.0, -2.0])

    def losses(x):
        return clipped_surrogate(x, x, advantages, 0.2, 0.2, dual_clip=3.0)

    np.testing.assert_allclose(losses(log_ratio), [-2.4, 6.0, 4.0, 1.6], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: losses(x).sum())(log_ratio), [0.0, 0.0, 4.0, 0.0], rtol=1e-6)
    for dual_clip in (1.0, 0.5):
        with pytest.raises(ValueError, match=f"dual_clip is {dual_clip}; it bounds a ratio"):
            clipped_surrogate(log_ratio, log_ratio, advantages, 0.2, 0.2, dual_clip=dual_clip)


def test_capped_weights_worked_by_hand():
    logprob, log_ratio = jnp.array([-1.0, -2.0, -3.0]), jnp.log(jnp.array([9.0, 0.5, 2.0]))
    advantages = jnp.array([1.0, -1.0, 0.5])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(capped_surrogate(x, log_ratio, advantages, 0.0, 2.0)))(
        logprob
    )
    np.testing.assert_allclose(value, 3.0 - 1.0 + 3.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-3.0, 0.5, -1.0], rtol=1e-6)  # none is lost, however large its ratio
    ratio_gradient = jax.grad(lambda x: jnp.sum(capped_surrogate(logprob, x, advantages, 0.0, 2.0)))(log_ratio)
    assert not np.asarray(ratio_gradient).any()


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_raise_bfloat16_and_pass_no_gradient_to_advantages(name):
    logprob, old, advantages, mask = random_batch()
    log_ratio = token_log_ratio(logprob, old, mask)
    surrogate = SURROGATES[name]
    gradient = jax.grad(lambda x: jnp.sum(surrogate(logprob, log_ratio, x, 0.2, 1.2)))(advantages)
    assert not np.asarray(gradient).any()
    half = [x.astype(jnp.bfloat16) for x in (logprob, log_ratio, advantages)]
    got = surrogate(*half, 0.2, 1.2)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, surrogate(*(x.astype(jnp.float32) for x in half), 0.2, 1.2))


def test_any_shape_and_traced_clips():
    logprob, old, advantages, mask = random_batch()
    log_ratio = token_log_ratio(logprob, old, mask)
    whole = clipped_surrogate(logprob, log_ratio, advantages, 0.2, 0.3, 1.5)
    column = clipped_surrogate(logprob[:, 0], log_ratio[:, 0], advantages[:, 0], 0.2, 0.3, 1.5)
    np.testing.assert_array_equal(column, whole[:, 0])
    bounds = [jnp.float32(x) for x in (0.2, 0.3, 1.5)]
    np.testing.assert_allclose(jax.jit(clipped_surrogate)(logprob, log_ratio, advantages, *bounds), whole, rtol=1e-5)


# Gradients and identities, under the reductions.


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gradient_equals_finite_differences(surrogate, rule, constant):
    check_finite_differences(Loss(surrogate=surrogate, clip_high=1.1, rule=rule, constant=constant))


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo_off_policy"])
def test_gradient_of_responses_ratios_and_of_the_divergence_equals_finite_differences(name):
    check_finite_differences(LOSSES[name])


def check_finite_differences(kind):
    """In float64, along a random direction; the weights of `capped` have no gradient, so they are held."""
    with jax.enable_x64(True):
        logprob, old, advantages, mask = in_float64(random_batch())
        held = kind.ratio(logprob, old, mask)
        if kind.surrogate == "capped":
            kind = kind._replace(ratio=lambda *_: held)
        direction = jnp.asarray(np.random.default_rng(7).normal(size=logprob.shape))
        gradient = jax.grad(partial(value_of, kind))(logprob, old, advantages, mask)
        step = 1e-6
        above, below = (value_of(kind, logprob + s * direction, old, advantages, mask) for s in (step, -step))
        np.testing.assert_allclose(jnp.sum(gradient * direction), (above - below) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rule", "constant"), ARGUMENTS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_gradient_is_minus_the_advantage_under_the_reduction(surrogate, rule, constant):
    logprob, _, advantages, mask = random_batch()
    kind = Loss(surrogate=surrogate, clip_high=1.1, rule=rule, constant=constant)
    gradient = jax.grad(partial(value_of, kind))(logprob, logprob, advantages, mask)
    expected = jax.grad(lambda x: mean(-advantages * x, mask, rule, constant))(logprob)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_on_policy_gradient_of_responses_ratios_of_any_lengths():
    logprob, _, advantages, mask = random_batch()
    advantages = jnp.broadcast_to(advantages[:, :1], mask.shape)
    grpo, gspo, total, rloo = (
        jax.grad(partial(value_of, kind))(logprob, logprob, advantages, mask)
        for kind in (
            Loss(rule="sequence_mean"),
            Loss(ratio=sequence_log_ratio, rule="sequence_mean"),
            Loss(ratio=total_log_ratio, rule="sequence_mean"),
            Loss(surrogate="reinforce", rule="sequence_sum"),
        )
    )
    np.testing.assert_allclose(gspo, grpo, rtol=1e-6)
    np.testing.assert_allclose(total, rloo, rtol=1e-6)
    assert not np.allclose(grpo, rloo)


def test_responses_of_one_token_have_one_ratio():
    batch = random_batch(lengths=[1] * ROWS)
    values = [value_of(Loss(ratio=ratio, rule="sequence_mean"), *batch) for ratio in RATIOS]
    np.testing.assert_allclose(values, [values[0]] * 3, rtol=1e-6)
    assert float(values[0]) != 0.0


def test_without_advantage_there_is_no_gradient_but_that_of_the_divergence():
    logprob, old, advantages, mask = random_batch()
    divergence = jax.grad(lambda x: mean(0.04 * kl_estimate(x, old, "k3"), mask, "sequence_mean"))(logprob)
    for name, (_, gradient) in jitted_losses(logprob, old, jnp.zeros_like(advantages), mask, mask).items():
        expected = divergence if LOSSES[name].k3 else jnp.zeros_like(logprob)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9, err_msg=name)


# What every such loss keeps.


@pytest.mark.parametrize("name", LOSSES)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, STEPS), min_size=ROWS, max_size=ROWS),
    junk=st.floats(-40, 40, width=32),
    order=st.permutations(range(ROWS)),
)
def test_invariants(name, seed, lengths, junk, order):
    *numbers, mask = batch = random_batch(seed, lengths)
    value, gradient = jitted_losses(*batch, mask)[name]
    # Masked positions change neither value nor gradient, and have none.
    spoilt = jitted_losses(*(jnp.where(mask, x, jnp.float32(junk)) for x in numbers), mask, mask)[name]
    np.testing.assert_array_equal(spoilt[0], value)
    np.testing.assert_array_equal(spoilt[1], gradient)
    assert not np.asarray(gradient)[~np.asarray(mask)].any()
    # Rows may stand in any order.
    order = np.array(order)
    permuted = jitted_losses(*(x[order] for x in batch), mask[order])[name]
    np.testing.assert_allclose(permuted[0], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(permuted[1], gradient[order], rtol=1e-4, atol=1e-6)
    # Microbatches, with the mask of the whole batch, add up to it.
    halves = [jitted_losses(*(x[rows] for x in batch), mask)[name] for rows in (slice(0, 3), slice(3, ROWS))]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([half[1] for half in halves]), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_jit_changes_nothing_and_bfloat16_is_raised_to_float32(name):
    batch = random_batch()
    function = jax.value_and_grad(partial(value_of, LOSSES[name]))
    value, gradient = function(*batch)
    jitted_value, jitted_gradient = jitted_losses(*batch, batch[3])[name]
    np.testing.assert_allclose(jitted_value, value, rtol=1e-5)
    np.testing.assert_allclose(jitted_gradient, gradient, rtol=1e-5, atol=1e-8)
    half = [x.astype(jnp.bfloat16) for x in batch[:3]]
    got = value_of(LOSSES[name], *half, batch[3])
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, value_of(LOSSES[name], *(x.astype(jnp.float32) for x in half), batch[3]))


# Metrics.


def test_metrics_worked_by_hand():
    ratios = np.array([2.0, 1.0, 0.5, 1.5])
    log_ratio = jnp.log(jnp.array([[2.0, 1.0, 9.0], [0.5, 1.5, 9.0]]))
    mask = jnp.array([[True, True, False], [True, True, False]])
    metrics = ratio_metrics(log_ratio, mask, 0.2, 0.6)
    assert set(metrics) == {"policy/approxkl", "policy/clipfrac", "val/ratio", "val/ratio_var"}
    np.testing.assert_allclose(metrics["policy/approxkl"], (ratios - 1 - np.log(ratios)).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/clipfrac"], 0.5)
    np.testing.assert_allclose(metrics["val/ratio"], 1.25, rtol=1e-6)
    np.testing.assert_allclose(metrics["val/ratio_var"], ratios.var(), rtol=1e-6)


def test_metrics_of_an_unchanged_policy_and_of_nothing():
    mask = random_batch()[3]
    unchanged = jnp.zeros(mask.shape)
    assert {name: float(value) for name, value in ratio_metrics(unchanged, mask, 0.2, 0.2).items()} == {
        "policy/approxkl": 0.0,
        "policy/clipfrac": 0.0,
        "val/ratio": 1.0,
        "val/ratio_var": 0.0,
    }
    assert not any(float(x) for x in ratio_metrics(unchanged, jnp.zeros_like(mask), 0.2, 0.2).values())
