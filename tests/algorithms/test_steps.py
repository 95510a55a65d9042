"""What holds of every algorithm's step: it is traced once, and while it runs nothing passes between host and device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.imitation import IMITATION, ImitationConfig, imitation
from rlhf_jax.algorithms.kto import kto
from rlhf_jax.algorithms.online_preference import online, online_preference
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.laboratory.work import Sizes
from rlhf_jax.laboratory.workloads import (
    endless,
    low_tokens,
    random_pairs,
    random_prompts,
    random_sequences,
)
from rlhf_jax.losses.kl import adaptive_kl, fixed_kl
from rlhf_jax.losses.preference_choices import preference_loss
from rlhf_jax.rewards.ensemble import single
from rlhf_jax.types import Demonstrations, UnpairedBatch

SIZES = Sizes(prompt_length=3, response_length=2, prompts=4, samples=2, sequence_length=4, pairs=4)
HOST_TRAFFIC = re.compile(r"callback|infeed|outfeed|\b(?:send|recv)(?:-done)?\(|is_host_transfer=true")


def offline(algorithm, batch):
    """(step, state, what it reads besides)."""
    return algorithm.update, jax.jit(algorithm.init)(jax.random.key(0)), batch


def on_policy(config, algorithm):
    """The same of rollout, rewards and update together."""
    whole, transform = compose(algorithm, low_tokens, single()), single()

    def step(state, prompts):
        state, output = whole(state, prompts, None)
        return state, output.metrics

    state = ComposedState(algorithm=jax.jit(algorithm.init)(jax.random.key(0)), transform=transform.init())
    return step, state, random_prompts(config, SIZES.prompts, SIZES.prompt_length)


def demonstrations(config):
    found = random_sequences(config, 4, SIZES.sequence_length)
    return Demonstrations(tokens=found.tokens, mask=found.mask, loss_mask=found.loss_mask)


def unpaired(config):
    completions, mismatched = (random_sequences(config, 4, SIZES.sequence_length, seed) for seed in (2, 3))
    return UnpairedBatch(completions=completions, mismatched=mismatched, good=jnp.array([True, False, True, True]))


def schedule():
    """Adam with a learning rate that changes with the step."""
    return adam(optax.linear_schedule(1e-3, 0.0, 10))


SAMPLING = endless(SIZES)
STEPS = {
    "SFT": lambda config: offline(sft(config, schedule()), demonstrations(config)),
    "reward model": lambda config: offline(reward_modeling(config, schedule()), random_pairs(config, SIZES)),
    "DPO": lambda config: offline(preference(config, preference_loss("dpo"), schedule()), random_pairs(config, SIZES)),
    "KTO": lambda config: offline(kto(config, schedule()), unpaired(config)),
    "PPO": lambda config: on_policy(
        config,
        ppo(config, PPOConfig(sampling=SAMPLING, epochs=1, minibatches=1), schedule(), adaptive_kl(0.1, 1.0, 100)),
    ),
    "GRPO": lambda config: on_policy(
        config, policy_gradient(config, PolicyGradientConfig(sampling=SAMPLING, samples=2), schedule(), fixed_kl(0.1))
    ),
    "online DPO": lambda config: on_policy(
        config, online_preference(config, online("online_dpo", SAMPLING), schedule())
    ),
    "RAFT": lambda config: on_policy(
        config,
        imitation(config, ImitationConfig(sampling=SAMPLING, samples=2, method=IMITATION["raft"]), schedule()),
    ),
}


def traces_of(step, state, rest, steps):
    """How often `step` is traced in so many steps, the state donated; nothing may pass the host meanwhile."""
    traced = []

    def noticed(state, rest):
        traced.append(1)
        return step(state, rest)

    program = jax.jit(noticed, donate_argnums=0)
    text = program.lower(state, rest).compile().as_text()
    with jax.transfer_guard("disallow"):
        for _ in range(steps):
            state, found = program(state, rest)
        jax.block_until_ready(found)
    assert not HOST_TRAFFIC.search(text), HOST_TRAFFIC.search(text)[0]
    return len(traced)


@pytest.mark.parametrize("name", STEPS)
def test_three_steps_are_one_program_that_never_meets_the_host(name, config):
    assert traces_of(*STEPS[name](config), steps=3) == 1


def test_a_callback_in_a_step_is_found():
    def step(state, rest):
        jax.debug.callback(lambda number: None, state)
        return state + rest, state

    with pytest.raises(AssertionError, match="callback"):
        traces_of(step, jnp.float32(0), jnp.float32(1), steps=1)


def test_what_lies_on_the_host_is_found():
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        traces_of(lambda state, rest: (state + rest, state), jnp.ones(3), np.ones(3, np.float32), steps=1)


def test_a_state_that_changes_its_type_is_traced_again():
    """A Python number becomes an array of weak type, and after the first step one of its own."""

    def step(state, rest):
        return state * rest, state

    assert traces_of(step, jnp.float32(2.0), jnp.float32(3.0), steps=3) == 1
    assert traces_of(step, jnp.asarray(2.0), jnp.float32(3.0), steps=3) == 2
