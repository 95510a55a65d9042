"""AdvPO's closed form against a constrained solver and finite differences; the invariants of its rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import minimize

from rlhf_jax.rewards import last_layer
from rlhf_jax.types import Score

HEAD_BIAS = 0.7


def world(seed: int = 0, width: int = 5, batch: int = 12, dtype=np.float32) -> dict:
    """A linear reward head, the features it was trained on, a policy batch and one reference response a prompt."""
    generator = np.random.default_rng(seed)
    training = generator.normal(size=(60, width)) @ generator.normal(size=(width, width))
    features = (generator.normal(size=(batch, width)) + 0.8).astype(dtype)
    reference = generator.normal(size=(batch, width)).astype(dtype)
    head = generator.normal(size=width).astype(dtype)
    matrix = training.T @ training + 0.5 * np.eye(width)
    return {
        "matrix": matrix,
        "head": head,
        "features": features,
        "reference_features": reference,
        "geometry": last_layer.geometry(last_layer.gram(jnp.asarray(training.astype(dtype))), 0.5),
        "score": Score(mean=jnp.asarray(features @ head + dtype(HEAD_BIAS)), features=jnp.asarray(features)),
        "reference": Score(mean=jnp.asarray(reference @ head + dtype(HEAD_BIAS)), features=jnp.asarray(reference)),
    }


def advpo_rewards(data: dict, radius: float, **options):
    transform = last_layer.advpo(**options)
    return transform.apply(data["score"], data["reference"], transform.init(data["geometry"], radius))


@pytest.mark.parametrize("seed", range(5))
def test_the_closed_form_is_what_a_constrained_solver_finds(seed):
    with jax.enable_x64(True):
        data = world(seed, dtype=np.float64)
        radius, head, matrix = 1.7, data["head"], data["matrix"]
        shift = last_layer.displacement(jnp.asarray(data["features"]), jnp.asarray(data["reference_features"]))
        away = np.asarray(last_layer.adversarial_direction(data["geometry"], shift, radius))
        shift = np.asarray(shift)
        found = minimize(
            lambda phi: phi @ shift,
            head,
            jac=lambda phi: shift,
            constraints={
                "type": "ineq",
                "fun": lambda phi: radius**2 - (phi - head) @ matrix @ (phi - head),
                "jac": lambda phi: -2.0 * matrix @ (phi - head),
            },
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose((head - away) @ shift, found.fun, rtol=1e-7)
        np.testing.assert_allclose(head - away, found.x, atol=1e-4)
        length = np.sqrt(shift @ np.linalg.solve(matrix, shift))
        np.testing.assert_allclose((head - away) @ shift, head @ shift - radius * length, rtol=1e-10)
        np.testing.assert_allclose(away, radius * np.linalg.solve(matrix, shift) / length, rtol=1e-8)
        np.testing.assert_allclose(np.sqrt(away @ matrix @ away), radius, rtol=1e-10)


def test_no_head_in_the_ellipsoid_is_worse():
    with jax.enable_x64(True):
        data = world(dtype=np.float64)
        factor, head = np.asarray(data["geometry"].cholesky), data["head"]
        robust = float(advpo_rewards(data, 2.0)[2]["rewards/robust"])
        shift = data["features"].mean(axis=0) - data["reference_features"].mean(axis=0)
        directions = np.random.default_rng(1).normal(size=(5_000, 5))
        directions *= 2.0 / np.linalg.norm(directions, axis=1)[:, None]
        heads = head[None, :] + np.linalg.solve(factor.T, directions.T).T
        assert (heads @ shift).min() >= robust - 1e-6


def test_rewards_are_those_of_the_worst_head_with_the_same_bias():
    data = world()
    shift = last_layer.displacement(data["score"].features, data["reference"].features)
    away = last_layer.adversarial_direction(data["geometry"], shift, 2.0)
    expected = data["features"] @ (data["head"] - np.asarray(away)) + HEAD_BIAS
    np.testing.assert_allclose(advpo_rewards(data, 2.0)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_mean_gain_over_the_reference_is_the_robust_objective():
    with jax.enable_x64(True):
        data = world(dtype=np.float64)
        rewards, _, metrics = advpo_rewards(data, 2.0)
        shift = jnp.asarray(data["features"].mean(axis=0) - data["reference_features"].mean(axis=0))
        away = np.asarray(last_layer.adversarial_direction(data["geometry"], shift, 2.0))
        reference_rewards = data["reference_features"] @ (data["head"] - away) + HEAD_BIAS
        length = float(jnp.linalg.norm(last_layer.solve(data["geometry"], shift)))
        robust = data["head"] @ np.asarray(shift) - 2.0 * length
        np.testing.assert_allclose(float(rewards.mean()) - reference_rewards.mean(), robust, rtol=1e-10)
        np.testing.assert_allclose(metrics["rewards/robust"], robust, rtol=1e-6)
        np.testing.assert_allclose(metrics["uncertainty/displacement"], length, rtol=1e-6)
        np.testing.assert_allclose(metrics["uncertainty/multiplier"], 2.0 / length, rtol=1e-6)


@pytest.mark.parametrize("use_reference", [True, False])
def test_no_reward_moves_further_than_its_own_uncertainty(use_reference):
    data = world()
    rewards, _, metrics = advpo_rewards(data, 3.0, use_reference=use_reference)
    bound = last_layer.uncertainty(data["geometry"], data["score"].features, 3.0)
    assert np.all(np.abs(rewards - data["score"].mean) <= bound + 1e-5)
    np.testing.assert_allclose(metrics["uncertainty/mean"], bound.mean(), rtol=1e-5)


def test_radius_zero_is_the_plain_reward():
    data = world()
    np.testing.assert_array_equal(advpo_rewards(data, 0.0)[0], data["score"].mean)


def test_a_batch_equal_to_its_reference_pays_nothing_and_stays_finite():
    data = world()
    data["reference"] = data["score"]
    rewards, _, metrics = advpo_rewards(data, 5.0)
    np.testing.assert_array_equal(rewards, data["score"].mean)
    assert metrics["uncertainty/multiplier"] == 0.0 and all(np.isfinite(value) for value in metrics.values())
    gradient = jax.grad(
        lambda e: (
            last_layer.advpo()
            .apply(
                Score(mean=data["score"].mean, features=e),
                data["score"],
                last_layer.advpo().init(data["geometry"], 5.0),
            )[0]
            .sum()
        )
    )(data["score"].features)
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_policy_gradient_of_the_rewards_is_that_of_the_robust_objective():
    # A softmax policy over 5 actions with probabilities in multiples of 1/20: a batch of 20 is the exact expectation.
    with jax.enable_x64(True):
        generator = np.random.default_rng(3)
        counts = np.array([3, 1, 6, 4, 6])
        data = world(width=4, dtype=np.float64)
        actions, head = generator.normal(size=(5, 4)), data["head"]
        reference = generator.normal(size=(20, 4))
        logits, radius, factor = np.log(counts / 20.0), 1.3, np.asarray(data["geometry"].cholesky)

        def objective(logits):
            policy = np.exp(logits) / np.exp(logits).sum()
            shift = policy @ actions - reference.mean(axis=0)
            return head @ shift - radius * np.linalg.norm(np.linalg.solve(factor, shift))

        steps = 1e-6 * np.eye(5)
        numeric = np.array([(objective(logits + step) - objective(logits - step)) / 2e-6 for step in steps])
        batch = np.repeat(np.arange(5), counts)
        data["score"] = Score(mean=jnp.asarray(actions[batch] @ head), features=jnp.asarray(actions[batch]))
        data["reference"] = Score(mean=jnp.asarray(reference @ head), features=jnp.asarray(reference))
        rewards = jax.lax.stop_gradient(advpo_rewards(data, radius)[0])

        def surrogate(logits):
            return (jax.nn.log_softmax(logits)[batch] * rewards).mean()

        np.testing.assert_allclose(jax.grad(surrogate)(jnp.asarray(logits)), numeric, atol=1e-8)


def test_no_gradient_flows_through_the_displacement():
    data = world()
    transform = last_layer.advpo()
    state = transform.init(data["geometry"], 2.0)

    def total(features):
        return transform.apply(Score(mean=data["score"].mean, features=features), data["reference"], state)[0].sum()

    shift = last_layer.displacement(data["score"].features, data["reference"].features)
    away = last_layer.adversarial_direction(data["geometry"], shift, 2.0)
    np.testing.assert_allclose(jax.grad(total)(data["score"].features), np.tile(-away, (12, 1)), rtol=1e-5, atol=1e-6)


def test_the_batch_penalty_is_at_most_the_mean_of_sample_penalties():
    data = world()
    geometry, features, reference = data["geometry"], data["score"].features, data["reference"].features
    together = jnp.linalg.norm(last_layer.solve(geometry, last_layer.displacement(features, reference)))
    assert together <= last_layer.uncertainty(geometry, features - reference, 1.0).mean() + 1e-6
    alone = jnp.linalg.norm(last_layer.solve(geometry, last_layer.displacement(features)))
    assert alone <= last_layer.uncertainty(geometry, features, 1.0).mean() + 1e-6


def test_a_constant_added_to_all_rewards_leaves_the_robust_objective():
    data = world()
    plain = advpo_rewards(data, 2.0)[2]["rewards/robust"]
    for name in ("score", "reference"):
        data[name] = data[name].replace(mean=data[name].mean + 10.0)
    np.testing.assert_allclose(advpo_rewards(data, 2.0)[2]["rewards/robust"], plain, atol=1e-5)


def test_order_of_rows_does_not_matter():
    data = world()
    expected = advpo_rewards(data, 2.0)[0]
    order = np.random.default_rng(0).permutation(12)
    data["score"] = Score(mean=data["score"].mean[order], features=data["score"].features[order])
    np.testing.assert_allclose(advpo_rewards(data, 2.0)[0], expected[order], rtol=1e-5, atol=1e-5)


def test_hand_worked_without_a_reference():
    geometry = last_layer.geometry(jnp.diag(jnp.array([3.0, 8.0])), 1.0)  # M = diag(4, 9)
    score = Score(mean=jnp.array([1.0, 1.0]), features=jnp.array([[4.0, 0.0], [0.0, 0.0]]))
    transform = last_layer.advpo(use_reference=False)
    rewards, _, metrics = transform.apply(score, None, transform.init(geometry, 3.0))
    # g = (2, 0), ||g|| = 1, v = 3 (1/2, 0) and the penalties are 6 and 0; U = 3 * 2 and 0.
    np.testing.assert_allclose(rewards, [-5.0, 1.0])
    found = [metrics[f"uncertainty/{name}"] for name in ("displacement", "multiplier", "mean")]
    np.testing.assert_allclose(found, [1.0, 3.0, 3.0])
    assert "rewards/robust" not in metrics


def test_a_moving_average_of_the_displacement_is_corrected_for_its_start():
    data = world()
    transform = last_layer.advpo(ema=0.9)
    state = transform.init(data["geometry"], 2.0)
    first, state, _ = transform.apply(data["score"], data["reference"], state)
    np.testing.assert_allclose(first, advpo_rewards(data, 2.0)[0], rtol=1e-4, atol=1e-5)
    other = world(seed=1)
    second, state, _ = transform.apply(other["score"], other["reference"], state)
    shifts = [d["features"].mean(axis=0) - d["reference_features"].mean(axis=0) for d in (data, other)]
    mean = (0.9 * 0.1 * shifts[0] + 0.1 * shifts[1]) / (1.0 - 0.9**2)
    away = last_layer.adversarial_direction(data["geometry"], jnp.asarray(mean), 2.0)
    np.testing.assert_allclose(second, other["score"].mean - other["features"] @ np.asarray(away), rtol=1e-3, atol=1e-4)
    assert int(state.steps) == 2


def test_rescaling_keeps_the_spread_of_the_plain_reward():
    data = world()
    rewards, state, _ = advpo_rewards(data, 6.0, rescale="std")
    plain = advpo_rewards(data, 6.0)[0]
    ratio = np.std(data["score"].mean) / np.std(plain)
    np.testing.assert_allclose(rewards, plain * ratio, rtol=1e-3, atol=1e-5)
    transform, other = last_layer.advpo(rescale="std"), world(seed=1)
    other["geometry"] = data["geometry"]
    rewards = transform.apply(other["score"], other["reference"], state)[0]
    plain = advpo_rewards(other, 6.0)[0]
    mean = (0.99 * ratio + np.std(other["score"].mean) / np.std(plain)) / 1.99
    np.testing.assert_allclose(rewards, plain * mean, rtol=1e-3, atol=1e-4)


def test_rescaling_rewards_without_spread_leaves_them():
    geometry = last_layer.geometry(jnp.zeros((2, 2)), 1.0)
    score = Score(mean=jnp.ones(3), features=jnp.zeros((3, 2)))
    transform = last_layer.advpo(rescale="std")
    rewards = transform.apply(score, score, transform.init(geometry, 1.0))[0]
    np.testing.assert_allclose(rewards, 1.0, rtol=1e-5)


def test_samplewise_subtracts_the_centred_uncertainty():
    data = world()
    bound = last_layer.uncertainty(data["geometry"], data["score"].features, 2.0)
    offset = last_layer.uncertainty(data["geometry"], data["reference"].features, 2.0).mean()
    transform = last_layer.samplewise()
    rewards, _, metrics = transform.apply(data["score"], None, transform.init(data["geometry"], 2.0, offset))
    np.testing.assert_allclose(rewards, data["score"].mean - (bound - offset), rtol=1e-5)
    assert set(metrics) == {"rewards/proxy", "rewards/transformed", "uncertainty/mean"}
    at_home = transform.apply(data["reference"], None, transform.init(data["geometry"], 2.0, offset))[2]
    np.testing.assert_allclose(at_home["rewards/transformed"], at_home["rewards/proxy"], atol=1e-5)


def test_only_the_policys_own_responses_move_the_head():
    data = world()
    own = jnp.arange(12) % 3 != 2
    mine = data | {
        "score": Score(mean=data["score"].mean[own], features=data["score"].features[own]),
        "reference": data["reference"],
    }
    rewards, _, metrics = advpo_rewards(data | {"score": data["score"].replace(own=own)}, 3.0)
    expected, _, own_metrics = advpo_rewards(mine, 3.0)
    np.testing.assert_allclose(rewards[own], expected, rtol=1e-5)
    for name in ("uncertainty/displacement", "rewards/proxy", "rewards/transformed", "uncertainty/mean"):
        np.testing.assert_allclose(metrics[name], own_metrics[name], rtol=1e-5)


def test_jit_lanes_of_radii_and_bfloat16_features():
    data = world()
    transform = last_layer.advpo(ema=0.9, rescale="std")
    radii = last_layer.radius_from(value=jnp.array([0.0, 1.0, 25.0]))
    states = jax.vmap(transform.init, in_axes=(None, 0))(data["geometry"], radii)
    traced = []

    @jax.jit
    @jax.vmap
    def step(state):
        traced.append(state)
        return transform.apply(data["score"], data["reference"], state)

    rewards, states, metrics = step(states)
    for lane, radius in enumerate((0.0, 1.0, 5.0)):
        expected = advpo_rewards(data, radius, ema=0.9, rescale="std")[0]
        np.testing.assert_allclose(rewards[lane], expected, rtol=1e-4, atol=1e-5)
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    step(states)  # the new state has the structure and dtypes of the old one
    assert len(traced) == 1
    exact = advpo_rewards(data, 2.0)[0]
    data["score"] = data["score"].replace(features=data["score"].features.astype(jnp.bfloat16))
    rewards = advpo_rewards(data, 2.0)[0]
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, exact, atol=0.02)


def test_eight_devices_share_one_displacement():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices (tests/conftest.py makes fake ones)")
    data, transform = world(batch=32), last_layer.advpo()
    rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    score, reference = jax.device_put((data["score"], data["reference"]), rows)
    step = jax.jit(transform.apply)
    rewards, _, metrics = jax.block_until_ready(step(score, reference, transform.init(data["geometry"], 2.0)))
    expected, _, expected_metrics = advpo_rewards(data, 2.0)
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, err_msg=name)


def test_the_statistical_scale_is_the_trace_of_a_numpy_solve():
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        chosen, rejected = generator.normal(size=(2, 40, 5))
        head = generator.normal(size=5)
        matrix = chosen.T @ chosen + rejected.T @ rejected + 0.3 * np.eye(5)
        fisher = 0.2 * np.eye(5)
        for left, right in zip(chosen, rejected, strict=True):
            p = 1.0 / (1.0 + np.exp(-(left - right) @ head))
            fisher += p * (1.0 - p) * np.outer(left - right, left - right)
        total = last_layer.gram(jnp.asarray(np.concatenate([chosen, rejected])))
        found = last_layer.statistical_scale(
            total, jnp.asarray(chosen), jnp.asarray(rejected), jnp.asarray(head), 0.2, regularisation=0.3
        )
        np.testing.assert_allclose(found, np.trace(np.linalg.solve(fisher, matrix)), rtol=1e-10)


def test_radius_is_the_root_of_one_squared_radius():
    np.testing.assert_allclose(last_layer.radius_from(value=9.0), 3.0)
    np.testing.assert_allclose(last_layer.radius_from(multiple=0.5, scale=jnp.array(32.0)), 4.0)
    np.testing.assert_allclose(last_layer.radius_from(multiple=jnp.array([1.0, 4.0]), scale=4.0), [2.0, 4.0])
    np.testing.assert_allclose(jax.jit(lambda b: last_layer.radius_from(value=b))(jnp.array(4.0)), 2.0)
    for wrong in ({}, {"value": 1.0, "multiple": 2.0, "scale": 1.0}, {"multiple": 2.0}, {"value": 1.0, "scale": 2.0}):
        with pytest.raises(ValueError, match="exactly one way"):
            last_layer.radius_from(**wrong)
    with pytest.raises(ValueError, match="negative"):
        last_layer.radius_from(value=-1.0)


def test_wrong_use_is_an_error_with_a_remedy():
    data = world()
    bare = Score(mean=data["score"].mean)
    transform = last_layer.advpo()
    state = transform.init(data["geometry"], 1.0)
    with pytest.raises(ValueError, match="features of the score"):
        transform.apply(bare, data["reference"], state)
    with pytest.raises(ValueError, match="features of the reference"):
        transform.apply(data["score"], bare, state)
    with pytest.raises(ValueError, match="use_reference=False"):
        transform.apply(data["score"], None, state)
    with pytest.raises(ValueError, match="features of the score"):
        last_layer.samplewise().apply(bare, None, last_layer.samplewise().init(data["geometry"], 1.0, 0.0))
    with pytest.raises(ValueError, match="decay between 0 and 1"):
        last_layer.advpo(ema=1.0)
    with pytest.raises(ValueError, match="give 'std' or None"):
        last_layer.advpo(rescale="mean")
