"""The table of algorithms: what is refused, how offline algorithms get their data, and that steps can be traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.data.synthetic.modular import ModularSums, modular_prompts, modular_scorer
from rlhf_jax.laboratory.arms import (
    ARMS,
    FAMILIES,
    ONE_STEP,
    Plan,
    better_ones,
    build,
    check_arms,
    labelled_pairs,
    marked_ones,
    on_initial_samples,
)
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.rewards.ensemble import single
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.types import Algorithm, Prompts, Rollout

TASK = ModularSums(modulus=3, terms=2)
MODEL = ModelConfig(
    vocab_size=TASK.vocabulary,
    width=8,
    layers=1,
    heads=2,
    key_value_heads=2,
    feed_forward_width=8,
    context_length=TASK.prompt_length + TASK.response_length,
)
SAMPLING = SamplingConfig(max_new_tokens=TASK.response_length, stop_tokens=(TASK.stop_token,), pad_token=TASK.pad_token)
PLAN = Plan(model=MODEL, value=MODEL, sampling=SAMPLING, responses=8, samples=4, minibatches=2)


@pytest.fixture(scope="module")
def policy():
    """Shapes alone: nothing here is computed with it."""
    return jax.eval_shape(lambda key: init_policy(MODEL, key), jax.random.key(0))


@pytest.fixture
def taken():
    """Four responses to two prompts of two tokens, the second one padded."""
    tokens = jnp.arange(100, 112).reshape(4, 3)
    mask = jnp.array([[True, True, True], [True, True, False], [True, False, False], [True, True, True]])
    prompts = Prompts(
        tokens=jnp.array([[1, 2], [1, 2], [0, 3], [0, 3]]),
        mask=jnp.array([[True, True], [True, True], [False, True], [False, True]]),
        index=jnp.arange(4),
    )
    nothing = jnp.zeros(tokens.shape)
    return Rollout(
        prompts=prompts,
        tokens=tokens,
        mask=mask,
        logprob=nothing,
        sampling_logprob=nothing,
        finished=jnp.ones(4, bool),
    )


def test_the_larger_reward_is_chosen_and_equal_ones_weigh_nothing(taken):
    pairs = labelled_pairs(taken, jnp.array([1.0, 2.0, 5.0, 5.0]))
    assert pairs.chosen.tokens.tolist() == [[1, 2, 103, 104, 105], [0, 3, 106, 107, 108]]
    assert pairs.rejected.tokens.tolist() == [[1, 2, 100, 101, 102], [0, 3, 109, 110, 111]]
    assert pairs.chosen.mask.tolist() == [[True] * 4 + [False], [False, True, True, False, False]]
    assert pairs.chosen.loss_mask.tolist() == [[False, False, True, True, False], [False] * 5]
    assert pairs.rejected.loss_mask.tolist() == [[False, False, True, True, True], [False] * 5]
    swapped = labelled_pairs(taken, jnp.array([2.0, 1.0, 4.0, 5.0]))
    assert swapped.chosen.tokens[:, 2].tolist() == [100, 109]
    assert better_ones(taken, jnp.array([2.0, 1.0, 4.0, 5.0])).tokens[:, 2].tolist() == [100, 109]


def test_mismatched_rows_have_another_prompts_completion(taken):
    batch = marked_ones(taken, jnp.array([1.0, 2.0, 6.0, 5.0]))
    assert batch.good.tolist() == [True, True, False, False]
    assert batch.completions.tokens[:, 2].tolist() == [103, 106, 100, 109]
    assert batch.mismatched.tokens.tolist() == [
        [1, 2, 106, 107, 108],
        [0, 3, 100, 101, 102],
        [1, 2, 109, 110, 111],
        [0, 3, 103, 104, 105],
    ]
    assert batch.mismatched.mask.tolist()[1] == [False, True, True, True, True]
    assert not batch.mismatched.loss_mask[:, :2].any()


def test_offline_algorithms_learn_from_the_initial_policy(taken, policy):
    """A learner that only counts: its state changes, and the responses do not depend on it."""

    def update(state, batch):
        return state + batch, {"seen": batch}

    learner = Algorithm(init=lambda key, params: jnp.zeros(()), rollout=None, update=update)
    algorithm = on_initial_samples(PLAN, learner, 2, lambda taken, rewards: rewards.sum())
    source = {"kernel": jnp.ones(2)}
    after, metrics = algorithm.update(algorithm.init(jax.random.key(1), {"policy": source}), taken, jnp.ones(4))
    assert (float(after.learner), float(metrics["seen"])) == (4.0, 4.0)
    assert after.source is source

    def draw(key, policy, prompts):
        blank = algorithm.init(key, {"policy": policy}).replace(learner=None)
        return algorithm.rollout(blank, prompts)[1].tokens

    prompts = modular_prompts(np.random.default_rng(0), TASK, 2)
    assert jax.eval_shape(draw, jax.random.key(1), policy, prompts).shape == (4, TASK.response_length)


def test_every_arm_builds_and_draws_the_same_number_of_responses():
    check_arms(tuple(ARMS), PLAN)
    for name, arm in ARMS.items():
        assert arm.family in FAMILIES
        assert PLAN.responses % arm.rows(PLAN) == 0, name
        assert build(name, PLAN).rollout is not None
    single_rows = [name for name, arm in ARMS.items() if arm.rows(PLAN) == 1]
    assert single_rows == ["ppo", "reinforce++"]
    from_others = {name for name, arm in ARMS.items() if not arm.own_samples}
    assert from_others - {name for name, arm in ARMS.items() if arm.family == "offline"} == {
        "var",
        "best_of_n_distillation",
    }
    # Those that take one optimiser step an update.
    assert {name for name, arm in ARMS.items() if arm.pace == ONE_STEP} == {"remax", "nash_md"} | {
        name for name, arm in ARMS.items() if arm.family == "offline"
    }


@pytest.mark.parametrize("name", ["remax", "kto"])
def test_a_step_draws_what_the_plan_says_and_keeps_the_policys_shape(name, policy):
    algorithm = build(name, PLAN)
    step = compose(algorithm, modular_scorer(TASK), single())
    asked = PLAN.responses // ARMS[name].rows(PLAN)
    prompts = jax.tree.map(lambda leaf: leaf[:asked], modular_prompts(np.random.default_rng(0), TASK, 9))

    def once(key, policy, prompts):
        state = ComposedState(algorithm=algorithm.init(key, {"policy": policy}), transform=())
        state, output = step(state, prompts, ())
        return ARMS[name].policy(state.algorithm), output.rollout.tokens

    trained, tokens = jax.eval_shape(once, jax.random.key(0), policy, prompts)
    assert tokens.shape == (PLAN.responses, TASK.response_length)
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, policy)


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (("ppo", "grop"), {}, "no algorithm 'grop'; choose some of ppo, rloo"),
        ((), {}, "no algorithm was named"),
        (("ppo", "ppo"), {}, "name each once"),
        (("dpo",), {"responses": 9, "samples": 3, "minibatches": 1}, "dpo draws 2 responses a prompt"),
        (("ppo",), {"samples": 1}, "samples is 1"),
        (("ppo",), {"responses": 12}, "12 responses are no multiple of 4 samples x 2 minibatches"),
        (("ppo",), {"epochs": 0}, "at least 1 epoch"),
        (("ppo",), {"kl_coefficient": -0.1}, "kl-coefficient is -0.1"),
        (("dpo",), {"beta": 0.0}, "beta 0.0"),
    ],
)
def test_refusals(names, changes, words):
    with pytest.raises(ValueError, match=words):
        check_arms(names, dataclasses.replace(PLAN, **changes))
