"""Ensemble rules against hand-worked numbers and numpy loops; what must hold among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards import ensemble
from rlhf_jax.types import Score

RULES = {
    "ensemble_mean": (ensemble.ensemble_mean(), ()),
    "worst_case": (ensemble.worst_case(), ()),
    "uncertainty_weighted": (ensemble.uncertainty_weighted(), (0.5,)),
    "lower_confidence_bound": (ensemble.lower_confidence_bound(), (1.5,)),
}


def score_of(members) -> Score:
    members = jnp.asarray(members)
    return Score(mean=members.mean(axis=0), members=members)


def rewards_of(transform, score, *arguments):
    return np.asarray(transform.apply(score, None, transform.init(*arguments))[0])


@pytest.fixture
def members(key):
    return jax.random.normal(key, (4, 7)) * 1.3


def test_hand_worked_rules():
    score = score_of([[1.0, -2.0], [2.0, 0.0], [6.0, 2.0]])
    np.testing.assert_allclose(rewards_of(ensemble.ensemble_mean(), score), [3.0, 0.0])
    np.testing.assert_allclose(rewards_of(ensemble.worst_case(), score), [1.0, -2.0])
    np.testing.assert_allclose(
        rewards_of(ensemble.uncertainty_weighted(), score, 0.5), [3.0 - 7.0 / 3.0, -4.0 / 3.0], rtol=1e-6
    )
    np.testing.assert_allclose(rewards_of(ensemble.uncertainty_weighted(ddof=1), score, 0.5), [-0.5, -2.0], rtol=1e-6)
    np.testing.assert_allclose(
        rewards_of(ensemble.lower_confidence_bound(ddof=1), score, 1.0), [3.0 - 7.0**0.5, -2.0], rtol=1e-6
    )


def test_rules_equal_a_loop_over_members(members):
    table = np.asarray(members, np.float64)
    for column in range(table.shape[1]):
        values = [table[row, column] for row in range(table.shape[0])]
        mean = sum(values) / len(values)
        spread = sum((value - mean) ** 2 for value in values) / len(values)
        expected = [mean, min(values), mean - 0.5 * spread, mean - 1.5 * spread**0.5]
        found = [rewards_of(rule, score_of(members), *arguments)[column] for rule, arguments in RULES.values()]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_default_coefficient_is_the_papers(members):
    rule = ensemble.uncertainty_weighted()
    np.testing.assert_array_equal(rewards_of(rule, score_of(members)), rewards_of(rule, score_of(members), 0.5))


def test_single_is_the_mean_of_the_score_bit_for_bit(members):
    score = Score(mean=members[0], members=members)
    np.testing.assert_array_equal(rewards_of(ensemble.single(), score), np.asarray(members[0]))


@pytest.mark.parametrize("name", RULES)
def test_members_that_agree_make_all_rules_equal(name):
    one = jnp.array([0.3, -1.7, 2.2])
    rule, arguments = RULES[name]
    np.testing.assert_allclose(rewards_of(rule, score_of(jnp.tile(one, (3, 1))), *arguments), one, rtol=1e-6)


def test_with_one_member_mean_and_worst_case_are_that_member():
    score = score_of([[0.3, -1.7, 2.2]])
    for rule in (ensemble.single(), ensemble.ensemble_mean(), ensemble.worst_case()):
        np.testing.assert_array_equal(rewards_of(rule, score), score.mean)


def test_pessimistic_rules_never_exceed_the_mean(members):
    mean = rewards_of(ensemble.ensemble_mean(), score_of(members))
    for rule, arguments in RULES.values():
        assert np.all(rewards_of(rule, score_of(members), *arguments) <= mean + 1e-6)


@pytest.mark.parametrize("rule", [ensemble.uncertainty_weighted(), ensemble.lower_confidence_bound()])
def test_coefficient_zero_is_the_mean(rule, members):
    np.testing.assert_allclose(
        rewards_of(rule, score_of(members), 0.0), rewards_of(ensemble.ensemble_mean(), score_of(members)), rtol=1e-6
    )


@pytest.mark.parametrize("name", RULES)
def test_centred_rules_ignore_constants_of_members(name, members, key):
    rule, arguments = RULES[name]
    reference = jax.random.normal(jax.random.fold_in(key, 1), (4, 9))
    constants = jnp.array([5.0, -3.0, 0.5, 100.0])[:, None]
    plain = ensemble.centre(members, ensemble.member_offset(reference))
    shifted = ensemble.centre(members + constants, ensemble.member_offset(reference + constants))
    np.testing.assert_allclose(
        rewards_of(rule, score_of(shifted), *arguments), rewards_of(rule, score_of(plain), *arguments), atol=2e-4
    )


def test_without_centring_constants_change_the_ranking_of_the_worst_case():
    # Member 1's constant decides who is the minimum, and so what is compared: the reason for `centre`.
    table = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    shifted = table + jnp.array([0.0, 10.0])[:, None]
    assert np.argmax(rewards_of(ensemble.worst_case(), score_of(shifted))) == 1
    assert rewards_of(ensemble.worst_case(), score_of(table)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", RULES)
def test_order_of_members_and_rows_does_not_matter(name, members):
    rule, arguments = RULES[name]
    rows = np.array([3, 0, 6, 1, 5, 2, 4])
    expected = rewards_of(rule, score_of(members), *arguments)
    found = rewards_of(rule, score_of(members[::-1][:, rows]), *arguments)
    np.testing.assert_allclose(found, expected[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_jit_gives_the_same_and_metrics_are_float32_scalars(name, members):
    rule, arguments = RULES[name]
    state = rule.init(*arguments)
    rewards, _, metrics = rule.apply(score_of(members), None, state)
    jitted, _, jitted_metrics = jax.jit(rule.apply)(score_of(members), None, state)
    np.testing.assert_allclose(jitted, rewards, rtol=1e-6, atol=1e-6)
    assert set(metrics) == {"rewards/proxy", "rewards/transformed", "uncertainty/mean"}
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())
    np.testing.assert_allclose(metrics["rewards/transformed"], np.mean(rewards), rtol=1e-5)
    np.testing.assert_allclose(metrics["uncertainty/mean"], np.std(members, axis=0).mean(), rtol=1e-5)
    np.testing.assert_allclose(jitted_metrics["rewards/proxy"], metrics["rewards/proxy"], rtol=1e-6)


def test_coefficients_can_be_lanes(members):
    rule = ensemble.uncertainty_weighted()
    coefficients = jnp.array([0.0, 0.1, 0.5, 2.0])
    states = jax.vmap(rule.init)(coefficients)
    rewards = jax.vmap(lambda state: rule.apply(score_of(members), None, state)[0])(states)
    for lane, coefficient in enumerate(coefficients):
        np.testing.assert_allclose(rewards[lane], rewards_of(rule, score_of(members), coefficient), rtol=1e-6)


def test_a_sweep_compiles_once(members):
    rule = ensemble.uncertainty_weighted()
    traced = []

    @jax.jit
    def step(state):
        traced.append(state)
        return rule.apply(score_of(members), None, state)[0]

    for coefficient in (0.1, 0.5, 2.0):
        step(rule.init(coefficient))
    assert len(traced) == 1


def test_what_is_not_measured_is_nan_not_zero():
    metrics = ensemble.single().apply(Score(mean=jnp.array([1.0, 2.0])), None, ())[2]
    assert np.isnan(metrics["uncertainty/mean"]) and metrics["rewards/transformed"] == 1.5


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"ensemble_mean"}))
def test_missing_members_are_an_error_when_traced(name):
    rule, arguments = RULES[name]
    with pytest.raises(ValueError, match=r"needs the scores of ensemble members; use a scorer"):
        jax.eval_shape(rule.apply, Score(mean=jnp.zeros(3)), None, rule.init(*arguments))


def test_a_model_without_members_is_taken_at_its_word():
    score = Score(mean=jnp.array([1.0, -2.0]), epistemic=jnp.array([2.0, 0.5]))
    expected = {
        "ensemble_mean": [1.0, -2.0],
        "uncertainty_weighted": [-1.0, -2.125],
        "lower_confidence_bound": [-2.0, -2.75],
    }
    for name, rewards in expected.items():
        rule, arguments = RULES[name]
        found, _, metrics = rule.apply(score, None, rule.init(*arguments))
        np.testing.assert_allclose(found, rewards)
        assert float(metrics["uncertainty/mean"]) == 1.25


@pytest.mark.parametrize("name", ["uncertainty_weighted", "lower_confidence_bound"])
def test_one_member_is_an_error_for_a_rule_of_spread(name):
    rule, arguments = RULES[name]
    with pytest.raises(ValueError, match="at least 2 ensemble members, not 1"):
        rule.apply(score_of([[1.0, 2.0]]), None, rule.init(*arguments))


def test_a_variance_that_is_not_defined_is_an_error():
    with pytest.raises(ValueError, match=r"give 0 .* or 1"):
        ensemble.variance(jnp.zeros((3, 2)), ddof=2)
    with pytest.raises(ValueError, match="more than 1 ensemble members"):
        ensemble.variance(jnp.zeros((1, 2)), ddof=1)


def test_float64_is_kept():
    with jax.enable_x64(True):
        members = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
        for rule, arguments in RULES.values():
            assert rule.apply(score_of(members), None, rule.init(*arguments))[0].dtype == jnp.float64
