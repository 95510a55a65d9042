"""The whole step of an algorithm with its reward: models inside one program, a function between two."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.compose import ComposedState
from rlhf_jax.algorithms.grpo import GRPOConfig, grpo
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.rewarded import function_reward, model_reward
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ellipsoid import geometry
from rlhf_jax.rewards.last_layer import advpo
from rlhf_jax.rewards.members import RULES, Member, centred, members_scorer
from rlhf_jax.types import Score

ROWS = [{"prompt": f"p{number}", "answer": number} for number in range(8)]


@pytest.fixture(scope="module")
def algorithm(config, sampling):
    return ppo(config, PPOConfig(sampling=sampling, minibatches=2, epochs=1), optax.sgd(0.1))


@pytest.fixture
def state(algorithm, policy):
    return algorithm.init(jax.random.key(3), {"policy": jax.tree.map(jnp.copy, policy)})


@pytest.fixture(scope="module")
def batch(prompts):
    return SimpleNamespace(prompts=prompts, rows=ROWS)


def test_reward_models_count_from_their_mean_on_reference_samples(config, algorithm, state, batch):
    members = [Member(config, init_reward_model(config, jax.random.key(seed))) for seed in (5, 6)]
    _, taken = jax.jit(algorithm.rollout)(state, batch.prompts)
    params = centred(members, [(list(range(len(ROWS))), taken), ([0] * len(ROWS), taken)])  # filled up with row 0
    rewarded = model_reward(algorithm, members_scorer([config, config]), params, RULES["worst_case"], ())
    scores = np.stack(
        [reward_scorer(config)(member.params, taken.sequences.tokens, taken.sequences.mask).mean for member in members]
    )
    expected = (scores - scores.mean(axis=1, keepdims=True)).min(axis=0)
    np.testing.assert_allclose(rewarded.score(ROWS, taken), expected, rtol=1e-4, atol=1e-5)
    new, metrics = rewarded.step(ComposedState(algorithm=state, transform=rewarded.transform), batch)
    np.testing.assert_allclose(metrics["objective/scores"], expected.mean(), rtol=1e-4, atol=1e-5)
    assert int(new.algorithm.step) == 1


def test_references_are_looked_up_by_the_index_of_a_prompt_and_averages_go_on(config, algorithm, policy, batch):
    state = algorithm.init(jax.random.key(3), {"policy": jax.tree.map(jnp.copy, policy)})
    members = [Member(config, init_reward_model(config, jax.random.key(5)))]
    _, taken = jax.jit(algorithm.rollout)(state, batch.prompts)
    params, scorer, rule = centred(members, [(list(range(len(ROWS))), taken)]), members_scorer([config]), advpo(ema=0.9)
    rows = jax.random.normal(jax.random.key(6), (20, config.width))
    table = Score(mean=jnp.zeros(20), features=rows)
    elsewhere = batch.prompts.replace(index=batch.prompts.index[::-1] + 12)
    begin = rule.init(geometry(jnp.eye(config.width), 1.0), 0.5)
    rewarded = model_reward(algorithm, scorer, params, rule, begin, table)
    score = scorer(params, taken.sequences.tokens, taken.sequences.mask)
    np.testing.assert_allclose(rewarded.score(ROWS, taken), score.mean, rtol=1e-5, atol=1e-6)

    first, metrics = rewarded.step(
        ComposedState(algorithm=state, transform=rewarded.transform), SimpleNamespace(prompts=elsewhere, rows=ROWS)
    )
    assert int(first.transform.steps) == 1 and metrics["uncertainty/displacement"] > 0
    own = algorithm.init(jax.random.key(3), {"policy": jax.tree.map(jnp.copy, policy)})
    _, drawn = jax.jit(algorithm.rollout)(own, elsewhere)
    moved = scorer(params, drawn.sequences.tokens, drawn.sequences.mask).features.mean(axis=0) - rows[12:].mean(axis=0)
    np.testing.assert_allclose(first.transform.displacement, 0.1 * moved, rtol=1e-4, atol=1e-6)
    second, _ = rewarded.step(first, batch)
    assert int(second.transform.steps) == 2 and int(second.algorithm.step) == 2


def test_a_function_gets_the_rows_and_its_rewards_are_those_trained_on(algorithm, state, batch):
    seen = {}

    def reward(prompts, completions, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [float(number) for number in answer]

    rewarded = function_reward(algorithm, reward, lambda rows, taken: [f"{len(rows)} {row['prompt']}" for row in rows])
    before = jax.tree.map(np.asarray, state.params)
    new, metrics = rewarded.step(ComposedState(algorithm=state, transform=rewarded.transform), batch)
    assert seen["prompts"] == [f"p{number}" for number in range(8)] and seen["answer"] == list(range(8))
    assert seen["completions"][3] == "8 p3"
    assert float(metrics["objective/scores"]) == pytest.approx(3.5)
    assert metrics["time/rollout"] > 0 and metrics["time/score"] > 0
    moved = jax.tree.map(lambda old, now: bool((old != now).any()), before, new.algorithm.params)
    assert any(jax.tree.leaves(moved["policy"]))


def test_a_function_gets_the_row_of_each_of_several_responses_to_a_prompt(config, sampling, policy, batch):
    algorithm = grpo(config, GRPOConfig(sampling=sampling, samples=2), optax.sgd(0.1))
    state = algorithm.init(jax.random.key(3), {"policy": jax.tree.map(jnp.copy, policy)})
    two = SimpleNamespace(prompts=jax.tree.map(lambda leaf: leaf[:2], batch.prompts), rows=ROWS[:2])

    def reward(prompts, completions, answer):
        assert prompts == ["p0", "p0", "p1", "p1"] and answer == [0, 0, 1, 1]
        return [0.0, 1.0, 2.0, 3.0]

    rewarded = function_reward(algorithm, reward, lambda rows, taken: [row["prompt"] for row in rows])
    _, metrics = rewarded.step(ComposedState(algorithm=state, transform=rewarded.transform), two)
    assert float(metrics["objective/scores"]) == pytest.approx(1.5)


def test_a_row_without_a_reward_is_an_error(algorithm, state, batch):
    def reward(prompts, completions, answer):
        return [None if number == 2 else 0.0 for number in answer]

    rewarded = function_reward(algorithm, reward, lambda rows, taken: [""] * len(rows))
    with pytest.raises(ValueError, match="returned None for row 2"):
        rewarded.step(ComposedState(algorithm=state, transform=rewarded.transform), batch)


def test_a_reward_model_that_gives_nan_is_named(config, algorithm, state, batch):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, init_reward_model(config, jax.random.key(5)))
    _, taken = jax.jit(algorithm.rollout)(state, batch.prompts)
    with pytest.raises(ValueError, match=r"reward model 0 .counting from 0. returned nan for row 0"):
        centred([Member(config, broken)], [(list(range(len(ROWS))), taken)])
