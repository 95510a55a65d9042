"""The whole step of an algorithm with its reward: models inside one program, a function between two."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.compose import ComposedState
from rlhf_jax.algorithms.methods import METHODS
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.rewarded import function_reward, model_reward
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ellipsoid import geometry
from rlhf_jax.rewards.last_layer import advpo
from rlhf_jax.rewards.members import RULES, Member, centred, members_scorer
from rlhf_jax.types import Algorithm, Rollout, Score, Transform

ROWS = [{"prompt": f"p{number}", "answer": number} for number in range(8)]


@pytest.fixture(scope="module")
def algorithm(config, sampling):
    return ppo(config, PPOConfig(sampling=sampling, minibatches=2, epochs=1), optax.sgd(0.1))


@pytest.fixture
def state(algorithm, policy):
    return algorithm.init(jax.random.key(3), {"policy": jax.tree.map(jnp.copy, policy)})


def rollout_of(prompts):
    """Empty responses of one token."""
    shape = (len(prompts.tokens), 1)
    return Rollout(
        prompts=prompts,
        tokens=jnp.zeros(shape, jnp.int32),
        mask=jnp.zeros(shape, bool),
        logprob=jnp.zeros(shape),
        sampling_logprob=jnp.zeros(shape),
        finished=jnp.zeros(shape[0], bool),
    )


@pytest.fixture(scope="module")
def batch(prompts):
    return SimpleNamespace(prompts=prompts, rows=ROWS)


def test_reward_models_count_from_their_mean_on_reference_samples(config, algorithm, state, batch):
    members = [Member(config, init_reward_model(config, jax.random.key(seed))) for seed in (5, 6)]
    _, taken = jax.jit(algorithm.rollout)(state, batch.prompts)
    params = centred(members, [(list(range(len(ROWS))), taken), ([0] * len(ROWS), taken)])  # filled up with row 0
    rewarded = model_reward(algorithm, members_scorer(members), params, RULES["worst_case"], ())
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
    params, scorer, rule = centred(members, [(list(range(len(ROWS))), taken)]), members_scorer(members), advpo(ema=0.9)
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


def test_several_references_of_a_prompt_are_looked_up_together(config, batch):
    """Rows 2 i and 2 i + 1 of the table belong to the prompts of index i; nothing is trained here."""
    table = Score(mean=jnp.arange(20.0), members=jnp.arange(40.0).reshape(2, 20))

    def see(score, reference, state):
        return reference.mean[::2], (), {"odd": reference.mean[1::2], "members": reference.members}

    seen = Transform(tuple, see)
    echo = Algorithm(
        init=tuple,
        rollout=lambda state, prompts: (state, rollout_of(prompts)),
        update=lambda state, taken, rewards: (state, {"even": rewards}),
    )
    index = jnp.array([7, 0, 9], jnp.int32)
    prompts = jax.tree.map(lambda leaf: leaf[:3], batch.prompts).replace(index=index)
    rewarded = model_reward(echo, lambda *_: Score(mean=jnp.zeros(3)), (), seen, (), table, each=2)
    _, metrics = rewarded.step(ComposedState(algorithm=jnp.zeros(1), transform=()), SimpleNamespace(prompts=prompts))
    np.testing.assert_array_equal(metrics["even"], 2 * index)
    np.testing.assert_array_equal(metrics["odd"], 2 * index + 1)
    np.testing.assert_array_equal(metrics["members"][1], [34, 35, 20, 21, 38, 39])


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


def test_a_function_gets_the_row_of_each_response_and_the_greedy_one_is_not_counted(config, sampling, policy, batch):
    options = PolicyGradientConfig(sampling=sampling, samples=2, method=METHODS["remax"])
    algorithm = policy_gradient(config, options, optax.sgd(0.1))
    state = algorithm.init(jax.random.key(3), {"policy": jax.tree.map(jnp.copy, policy)})
    two = SimpleNamespace(prompts=jax.tree.map(lambda leaf: leaf[:2], batch.prompts), rows=ROWS[:2])

    def reward(prompts, completions, answer):
        assert prompts == ["p0"] * 3 + ["p1"] * 3 and answer == [0, 0, 0, 1, 1, 1]
        return [0.0, 1.0, 50.0, 2.0, 3.0, 70.0]

    rewarded = function_reward(algorithm, reward, lambda rows, taken: [row["prompt"] for row in rows])
    _, metrics = rewarded.step(ComposedState(algorithm=state, transform=rewarded.transform), two)
    assert float(metrics["objective/scores"]) == pytest.approx(1.5)


def test_where_all_groups_are_equal_dapo_changes_nothing_but_the_counters_of_the_optimiser(
    config, sampling, policy, batch
):
    options = PolicyGradientConfig(sampling=sampling, samples=2, method=METHODS["dapo"])
    algorithm = policy_gradient(config, options, adam(0.1), fixed_kl(0.1))
    start = algorithm.init(jax.random.key(3), {"policy": jax.tree.map(jnp.copy, policy)})
    kept = jax.tree.map(np.asarray, (start.params, start.optimizer_state))
    two = SimpleNamespace(prompts=jax.tree.map(lambda leaf: leaf[:2], batch.prompts), rows=ROWS[:2])

    def reward(prompts, completions, answer):
        assert prompts == ["p0", "p0", "p1", "p1"]
        return answer

    rewarded = function_reward(algorithm, reward, lambda rows, taken: [""] * len(rows))
    new, metrics = rewarded.step(ComposedState(algorithm=start, transform=()), two)
    assert metrics["objective/equal_groups"] == 1.0 and metrics["objective/trained"] == 0.0
    found = (new.algorithm.params, new.algorithm.optimizer_state)
    for before, after in zip(jax.tree.leaves(kept), jax.tree.leaves(found), strict=True):
        counts = jnp.issubdtype(after.dtype, jnp.integer)
        np.testing.assert_array_equal(after, before + 1 if counts else before)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ([0.0] * 2 + [None] + [0.0] * 5, r"returned None for row 2 .1 of 8 rows."),
        ([None] * 8, r"returned None for row 0 .8 of 8 rows."),
        ([0.0] * 7, "returned 7 rewards for 8 completions; return one for each"),
    ],
)
def test_rewards_that_cannot_be_used_are_an_error_before_the_update(algorithm, state, batch, returned, sentence):
    def update(*_):
        raise AssertionError("nothing may be updated")

    rewarded = function_reward(
        algorithm._replace(update=update),
        lambda prompts, completions, answer: returned,
        lambda rows, _: [""] * len(rows),
    )
    with pytest.raises(ValueError, match=sentence):
        rewarded.step(ComposedState(algorithm=state, transform=rewarded.transform), batch)


def test_a_reward_model_that_gives_nan_is_named(config, algorithm, state, batch):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, init_reward_model(config, jax.random.key(5)))
    _, taken = jax.jit(algorithm.rollout)(state, batch.prompts)
    with pytest.raises(ValueError, match=r"reward model 0 .counting from 0. returned nan for row 0"):
        centred([Member(config, broken)], [(list(range(len(ROWS))), taken)])
