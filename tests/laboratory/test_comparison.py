"""What an arm's history holds, and what becomes of reward models in a comparison."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.synthetic.modular import ModularSums
from rlhf_jax.laboratory import comparison
from rlhf_jax.laboratory.arms import Plan
from rlhf_jax.laboratory.comparison import (
    Contest,
    Schedule,
    checked,
    curves_of,
    modelled,
    proxies_of,
    run_arm,
)
from rlhf_jax.laboratory.setting import Setting, sampling_of, tiny_model
from rlhf_jax.laboratory.sums import modular_world
from rlhf_jax.types import Score

TASK = ModularSums(modulus=3, terms=2)


@pytest.fixture(scope="module")
def contest():
    """Without a policy: nothing is drawn from it here (the test of experiments/compare.py does that)."""
    world = modular_world(TASK, 5, 4, seed=0)
    model = tiny_model(1, 8)
    return Contest(
        plan=Plan(model=model, value=model, sampling=sampling_of(world), responses=8, samples=2, minibatches=1),
        setting=Setting(world, sampling_of(world), model, {}, model, {}),
        reward=checked(TASK, 2),
        schedule=Schedule(seeds=2, updates=4, report_every=2, measured=3),
        key=jax.random.key(1),
    )


@pytest.fixture(scope="module")
def history(contest):
    """Three measurements of two seeds: three random responses to each of four prompts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (2, 3, 12, TASK.response_length)).astype(np.int32)
    tokens[..., 1] = TASK.stop_token
    mask = np.broadcast_to(np.arange(TASK.response_length) < 2, tokens.shape)
    kl = np.abs(rng.normal(size=(2, 3))).astype(np.float32)
    prompts = np.repeat(np.asarray(contest.setting.world.held_out.tokens), 3, axis=0)
    right = tokens[..., 0] == prompts[:, :2].sum(axis=1) % 3
    return {"tokens": tokens, "mask": mask, "kl": kl, "proxy": right.mean(axis=-1).astype(np.float32)}


def test_curves_count_samples_and_ask_the_gold(contest, history):
    curves = curves_of(history, contest, lambda gold: 10 * gold)
    assert curves.samples.tolist() == [0, 16, 32]
    np.testing.assert_allclose(curves.gold, 10 * history["proxy"], rtol=1e-5)  # the checker is both
    np.testing.assert_array_equal(curves.kl[:, 0], 0.0)
    np.testing.assert_allclose(curves.kl[:, 1:], history["kl"][:, 1:])


def test_an_arm_goes_on_from_the_first_measurement(contest, history, monkeypatch):
    first = {name: values[:, 0] for name, values in history.items()}
    later = {name: values[:, 1:] for name, values in history.items()}
    monkeypatch.setattr(comparison, "_on_seeds", lambda lane, contest: (later, {"first_ratio": np.ones((2, 4))}))
    found = run_arm("sft", contest, first)
    for name, values in history.items():
        np.testing.assert_array_equal(found[name], values)
    assert found["first_ratio"].shape == (2, 4)


@pytest.mark.parametrize(("broken", "words"), [("proxy", "sft: the proxy reward"), ("kl", "sft: the KL")])
def test_a_nan_is_named(contest, history, monkeypatch, broken, words):
    first = {name: values[:, 0] for name, values in history.items()}
    later = {name: values[:, 1:] for name, values in history.items()}
    later[broken] = np.full_like(later[broken], np.nan)
    monkeypatch.setattr(comparison, "_on_seeds", lambda lane, contest: (later, {}))
    with pytest.raises(ValueError, match=words):
        run_arm("sft", contest, first)


def test_reward_models_of_a_seed_with_the_state_of_their_rule(options, setting, initial):
    proxies = proxies_of(options, setting, initial.sequences, jax.random.key(0))
    assert proxies.spread.shape == (options.seeds,)
    options = dataclasses.replace(options, uwo_coefficient=0.25)
    reward = modelled(options, setting, proxies, "UWO")
    mine = reward.of(jax.tree.map(lambda leaf: leaf[1], reward.data))
    assert float(mine.state) == 0.25
    assert float(mine.spread) == float(proxies.spread[1])
    members = np.array([[1.0, 2.0], [3.0, 2.0]], np.float32)
    score = Score(mean=jnp.asarray(members[0]), members=jnp.asarray(members))
    rewards, _, _ = reward.rule.apply(score, mine.reference, mine.state)
    np.testing.assert_allclose(rewards, [2.0 - 0.25 * 1.0, 2.0])
