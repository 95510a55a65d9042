"""Microbatches give the numbers of the whole batch, whatever the lengths in them, and need less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.algorithms.accumulation import accumulated_gradients, split_rows
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.losses.preference_choices import preference_loss
from rlhf_jax.losses.reduce import mean
from rlhf_jax.models.heads import init_policy
from rlhf_jax.types import Demonstrations, PreferenceBatch, Sequences

REWARDS = jnp.array([0.9, -1.6, 0.3, 2.5, -0.4, 0.0, 1.1, -2.2])
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def close(found, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def side(seed: int) -> Sequences:
    """Eight sequences of three to six tokens; the last one is empty: it only fills the batch."""
    length = jax.random.permutation(jax.random.key(seed), jnp.array([6, 3, 5, 4, 6, 3, 4]))
    mask = jnp.arange(6)[None] < jnp.append(length, 0)[:, None]
    tokens = jax.random.randint(jax.random.key(seed), (8, 6), 5, 12, jnp.int32)
    return Sequences(tokens=tokens, mask=mask, loss_mask=mask & (jnp.arange(6)[None] >= 2))


PAIRS = PreferenceBatch(chosen=side(1), rejected=side(2), margin=jnp.linspace(0.0, 1.0, 8))
DEMONSTRATIONS = Demonstrations(**{name: getattr(side(3), name) for name in ("tokens", "mask", "loss_mask")})
OFFLINE = {
    "sft": (lambda config, accumulate: sft(config, optax.sgd(0.1), accumulate=accumulate), DEMONSTRATIONS),
    "dpo": (
        lambda config, accumulate: preference(
            config, preference_loss("dpo", beta=0.3, label_smoothing=0.1), optax.sgd(0.1), accumulate=accumulate
        ),
        PAIRS,
    ),
    "reward_model": (
        lambda config, accumulate: reward_modeling(config, optax.sgd(0.1), centring=0.1, accumulate=accumulate),
        PAIRS,
    ),
}


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_algorithms_make_the_step_of_the_whole_batch(config, policy, name):
    build, batch = OFFLINE[name]
    reference = {"reference": init_policy(config, jax.random.key(7))} if name == "dpo" else {}
    given = {"trunk": policy["trunk"]} if name == "reward_model" else {"policy": policy} | reference
    state = build(config, 1).init(jax.random.key(0), given)
    expected, metrics = jax.jit(build(config, 1).update)(state, batch)
    for parts in (2, 8) if name == "sft" else (4,):  # 8: a microbatch of nothing but padding
        found, found_metrics = jax.jit(build(config, parts).update)(state, batch)
        close(found.params, expected.params)
        close(found_metrics, metrics)


@pytest.fixture(scope="module", params=["ppo", "ppo, shared value net", "grpo"])
def on_policy(request, config, policy, prompts, sampling):
    """An algorithm by its number of microbatches, a state, and a rollout of which one response is empty."""
    if request.param == "grpo":
        options = PolicyGradientConfig(sampling=sampling, samples=2, epochs=1, minibatches=2)
        prompts, build = jax.tree.map(lambda leaf: leaf[:4], prompts), policy_gradient
    else:
        shared = {"value_net": "shared", "reduction": "sequence_mean"} if "shared" in request.param else {}
        options, build = PPOConfig(sampling=sampling, epochs=1, entropy_coefficient=0.1, **shared), ppo

    def make(accumulate):
        return build(config, dataclasses.replace(options, accumulate=accumulate), optax.sgd(0.1), fixed_kl(0.3))

    given = {"policy": policy, "reference": init_policy(config, jax.random.key(7))}
    state, taken = jax.jit(make(1).rollout)(make(1).init(jax.random.key(3), given), prompts)
    return make, state, taken.replace(mask=taken.mask.at[3].set(False))


def test_on_policy_algorithms_make_the_steps_of_the_whole_minibatches(on_policy):
    make, state, taken = on_policy
    expected, metrics = jax.jit(make(1).update)(state, taken, REWARDS)
    found, found_metrics = jax.jit(make(4).update)(state, taken, REWARDS)  # 4 rows a step: one a microbatch
    close(found.params, expected.params)
    close(found_metrics, metrics, atol=1e-5)
    with pytest.raises(ValueError, match="8 responses in 2 minibatches are 4 an optimiser step, which do not split"):
        make(3).update(state, taken, REWARDS)


@pytest.mark.parametrize("rule", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_every_reduction_adds_up_over_microbatches(rule):
    values = jax.random.normal(jax.random.key(0), (8, 5))
    mask = jnp.arange(5)[None] < jnp.array([5, 1, 0, 3, 2, 4, 0, 1])[:, None]
    constant = 7 if rule == "constant" else None

    def loss(scale, part, batch):
        errors = jnp.square(scale * part["values"])
        return mean(errors, part["mask"], rule, constant, batch["mask"]), errors

    def run(parts):
        return accumulated_gradients(loss, jnp.float32(1.5), {"values": values, "mask": mask}, parts)

    expected = run(1)
    assert float(expected[0]) == pytest.approx(
        float(2 * 1.5 * mean(jnp.square(values), mask, rule, constant)), rel=1e-5
    )
    for parts in (2, 4, 8):
        close(run(parts), expected, atol=0.0)


def test_sums_are_taken_in_float32_and_gradients_come_back_in_the_dtype_of_the_parameters():
    def loss(slope, part, batch):
        return slope * part.astype(jnp.bfloat16).sum(), part

    # In bfloat16, a sum that has reached 256 no longer grows by ones.
    gradient, outputs = accumulated_gradients(loss, jnp.bfloat16(0.0), jnp.ones(1024), 1024)
    assert gradient.dtype == jnp.bfloat16 and float(gradient) == 1024.0
    assert outputs.tolist() == [1.0] * 1024


@pytest.mark.parametrize("parts", [0, 3])
def test_rows_that_do_not_split_are_refused_with_the_arithmetic(parts):
    with pytest.raises(ValueError, match=f"8 rows an optimiser step do not split into {parts} microbatches"):
        split_rows(jnp.arange(8), parts)


def test_rows_stay_on_their_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))

    def loss(kernel, part, batch):
        errors = jnp.square(part["x"] @ kernel - part["y"])
        return errors.sum() / len(batch["x"]), errors

    batch = {
        "x": jax.random.normal(jax.random.key(0), (32, 4)),
        "y": jax.random.normal(jax.random.key(1), (32,)),
    }
    kernel = jnp.arange(4.0)
    run = jax.jit(
        lambda kernel, batch: accumulated_gradients(loss, kernel, batch, 4),
        in_shardings=(whole, rows),
        out_shardings=(whole, rows),
    )
    text = run.lower(kernel, batch).compile().as_text()
    assert not [name for name in COLLECTIVES if name in text]
    found = jax.block_until_ready(run(kernel, jax.device_put(batch, rows)))
    close(found, accumulated_gradients(loss, kernel, batch, 1))


def test_less_memory_is_needed(config):
    """Twice as deep and with longer rows than the other tests have, so that activations are what takes room."""
    shape = dataclasses.replace(config, layers=2, width=32, feed_forward_width=64, context_length=64)
    rows, masks = jnp.zeros((64, 64), jnp.int32), jnp.ones((64, 64), bool)
    batch = Demonstrations(tokens=rows, mask=masks, loss_mask=masks)

    def temporaries(accumulate):
        algorithm = sft(shape, optax.sgd(0.1), accumulate=accumulate)
        state = jax.eval_shape(algorithm.init, jax.random.key(0))
        return jax.jit(algorithm.update).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.4 * temporaries(1)
