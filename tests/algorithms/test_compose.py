"""The composed step is its parts, one after the other; several rules and seeds share one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.compose import ComposedState, compose, references_of_responses, rows_of
from rlhf_jax.algorithms.methods import METHODS
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.rewards.bradley_terry import EnsembleParams, ensemble_scorer
from rlhf_jax.rewards.ellipsoid import geometry, gram
from rlhf_jax.rewards.ensemble import ensemble_mean, single, uncertainty_weighted, worst_case
from rlhf_jax.rewards.last_layer import advpo, samplewise
from rlhf_jax.rewards.length import MeasuredScore
from rlhf_jax.rewards.par import par
from rlhf_jax.rewards.transforms import select
from rlhf_jax.types import Score

RULES = {
    "PPO": single(),
    "mean": ensemble_mean(),
    "WCO": worst_case(),
    "UWO": uncertainty_weighted(),
    "AdvPO": advpo(),
    "sample-wise": samplewise(),
}


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.fixture(scope="module")
def algorithm(config, sampling):
    return ppo(config, PPOConfig(sampling=sampling, minibatches=2, epochs=1), optax.sgd(0.1), fixed_kl(0.1))


@pytest.fixture(scope="module")
def reward_params(config):
    members = jax.vmap(lambda key: init_reward_model(config, key))(jax.random.split(jax.random.key(1), 3))
    return EnsembleParams(members=members, offset=jnp.array([0.1, -0.2, 0.3]))


@pytest.fixture(scope="module")
def reference(config):
    features = jax.random.normal(jax.random.key(4), (8, config.width))
    return Score(mean=jnp.linspace(-1.0, 1.0, 8), features=features)


@pytest.fixture(scope="module")
def rule_states(reference):
    shape = geometry(gram(reference.features), 1.0)
    return {
        "PPO": (),
        "mean": (),
        "WCO": (),
        "UWO": RULES["UWO"].init(0.5),
        "AdvPO": RULES["AdvPO"].init(shape, 2.0),
        "sample-wise": RULES["sample-wise"].init(shape, 2.0, 0.5),
    }


@pytest.fixture(scope="module")
def scorer(config):
    return ensemble_scorer(config, lead=0)


@pytest.fixture(scope="module")
def chosen(algorithm, scorer):
    """The step of all six rules, jitted once."""
    return jax.jit(compose(algorithm, scorer, select(list(RULES.values()))))


def start_of(algorithm, policy, key=None):
    return algorithm.init(jax.random.key(2) if key is None else key, {"policy": policy})


def state_of(algorithm, policy, rule_states, index):
    chooser = select(list(RULES.values()))
    return ComposedState(
        algorithm=start_of(algorithm, policy), transform=chooser.init(index, tuple(rule_states.values()))
    )


@pytest.mark.parametrize("name", list(RULES))
def test_one_program_of_all_rules_equals_each_rule_alone(
    algorithm, scorer, chosen, policy, prompts, reward_params, reference, rule_states, name
):
    state = state_of(algorithm, policy, rule_states, list(RULES).index(name))
    found_state, found = chosen(state, prompts, reward_params, reference)
    # Alone: rollout, score, transform, update, one call each.
    start, taken = jax.jit(algorithm.rollout)(state.algorithm, prompts)
    score = scorer(reward_params, taken.sequences.tokens, taken.sequences.mask)
    rewards, own, reward_metrics = RULES[name].apply(score, reference, rule_states[name])
    expected, metrics = jax.jit(algorithm.update)(start, taken, rewards)
    np.testing.assert_array_equal(found.rollout.tokens, taken.tokens)
    close(found.score, score)
    close(found.rewards, rewards)
    close(found_state.algorithm.params, expected.params)
    close(found_state.transform.states[list(RULES).index(name)], own)
    close({key: found.metrics[key] for key in metrics | reward_metrics}, metrics | reward_metrics)
    if name == "PPO":
        close(rewards, score.mean)
    else:
        assert float(jnp.abs(rewards - score.mean).max()) > 1e-3


def test_a_step_of_one_rule_is_the_same_as_chosen_from_six(
    algorithm, scorer, chosen, policy, prompts, reward_params, reference, rule_states
):
    step = jax.jit(compose(algorithm, scorer, RULES["AdvPO"]))
    alone = ComposedState(algorithm=start_of(algorithm, policy), transform=rule_states["AdvPO"])
    together = state_of(algorithm, policy, rule_states, 4)
    for _ in range(2):
        alone, expected = step(alone, prompts, reward_params, reference)
        together, found = chosen(together, prompts, reward_params, reference)
    close(together.algorithm.params, alone.algorithm.params)
    close(found.rewards, expected.rewards)


@pytest.mark.parametrize("rule", ["vmap", "map"])
def test_sixteen_lanes_give_the_numbers_of_each_alone(
    algorithm, chosen, policy, prompts, reward_params, reference, rule_states, rule
):
    """Lanes of all rules, six keys and two KL coefficients."""
    chooser = select(list(RULES.values()))
    count = 16
    lanes = {
        "index": jnp.arange(count, dtype=jnp.int32) % 6,
        "key": jax.random.split(jax.random.key(5), count),
        "coefficient": jnp.where(jnp.arange(count) % 2 == 0, 0.0, 0.5),
    }

    def run(lane):
        state = start_of(algorithm, policy, lane["key"]).replace(kl_coefficient=lane["coefficient"])
        transform = chooser.init(lane["index"], tuple(rule_states.values()))
        state = ComposedState(algorithm=state, transform=transform)
        state, out = chosen(state, prompts, reward_params, reference)
        return {"params": state.algorithm.params, "tokens": out.rollout.tokens, "rewards": out.rewards}

    together = jax.jit(over_lanes(run, rule, jax.devices()[:1]))(lanes)
    alone = jax.jit(run)
    for place in (0, 3, 10, 15):
        expected = alone(jax.tree.map(lambda leaf: leaf[place], lanes))  # noqa: B023
        close(jax.tree.map(lambda leaf: leaf[place], together), expected)  # noqa: B023
    assert len({np.asarray(tokens).tobytes() for tokens in together["tokens"]}) == count


@pytest.mark.parametrize(("method", "rule"), [("grpo", "UWO"), ("rloo", "AdvPO"), ("remax", "PAR")])
def test_groups_take_every_rule_and_each_response_meets_the_references_of_its_prompt(
    config, sampling, policy, prompts, scorer, reward_params, reference, rule_states, method, rule
):
    """Two of the eight references belong to each of four prompts."""
    four = jax.tree.map(lambda leaf: leaf[:4], prompts)
    options = PolicyGradientConfig(sampling=sampling, method=METHODS[method], samples=2)
    algorithm = policy_gradient(config, options, optax.sgd(0.1), fixed_kl(0.1))
    transform, begin = (par(), ()) if rule == "PAR" else (RULES[rule], rule_states[rule])
    start = start_of(algorithm, policy)
    state = ComposedState(algorithm=start, transform=begin)
    state, found = jax.jit(compose(algorithm, scorer, transform))(state, four, reward_params, reference)
    rows = options.rows
    assert rows == {"grpo": 2, "rloo": 2, "remax": 3}[method] and len(found.rewards) == 4 * rows
    if rule == "PAR":
        margins = found.score.mean.reshape(4, rows, 1) - reference.mean.reshape(4, 1, 2)
        expected = (1 / (1 + np.exp(-np.asarray(margins)))).mean(axis=-1).reshape(-1)
    else:  # AdvPO takes means over all references, so that it does not matter how often each one comes
        expected = transform.apply(found.score, reference, begin)[0]
    close(found.rewards, expected)
    assert float(found.metrics["rewards/transformed"]) == pytest.approx(
        float(found.rewards[found.rollout.own_rows].mean()), abs=1e-5
    )
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), start.params, state.algorithm.params)
    assert any(jax.tree.leaves(moved))
    unequal = found.rewards.reshape(4, rows)
    assert float(found.metrics["objective/equal_groups"]) == np.mean(np.ptp(unequal, axis=1) == 0)


def test_references_are_repeated_with_features_and_members_or_refused():
    score = Score(mean=jnp.arange(2.0), features=jnp.arange(4.0).reshape(2, 2), members=jnp.arange(6.0).reshape(3, 2))
    assert references_of_responses(score, 2, 2) is score and references_of_responses(None, 2, 4) is None
    found = references_of_responses(score, 2, 6)
    assert found.mean.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.features[2:4].tolist() == [[0, 1], [2, 3]] and found.members[1].tolist() == [2, 2, 2, 3, 3, 3]
    with pytest.raises(ValueError, match="2 reference responses for 4 prompts: give every prompt as many"):
        references_of_responses(score, 4, 8)


def test_rows_of_a_score_have_all_that_the_score_has():
    number, found = jnp.arange(3.0), {}
    for field in dataclasses.fields(MeasuredScore):
        found[field.name] = jnp.stack([number, -number]) if field.name == "members" else number
    found |= {"features": number[:, None], "own": number > 0}
    taken = rows_of(MeasuredScore(**found), jnp.array([2, 0]))
    for name, values in found.items():
        expected = values[:, np.array([2, 0])] if name == "members" else values[np.array([2, 0])]
        np.testing.assert_array_equal(getattr(taken, name), expected, err_msg=name)
    assert rows_of(Score(mean=number), jnp.array([1])).epistemic is None


def test_an_offline_algorithm_is_refused(config, scorer):
    with pytest.raises(ValueError, match="compose needs an on-policy algorithm; this one has no rollout"):
        compose(sft(config, optax.sgd(0.1)), scorer, single())
