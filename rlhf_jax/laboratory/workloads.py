"""Steps to time: each algorithm on a batch of random tokens, with the work in it by arithmetic.

Weights are random and nothing ever ends a response early, so that every step does the same work. The states of steps
are donated, as in the training scripts.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.laboratory.work import (
    Sizes,
    Work,
    decoded_bytes,
    drawing_work,
    learning_work,
    rows_of_rollout,
    training_work,
)
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.losses.preference_choices import preference_loss
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy, init_reward_model, reward_features
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.parallel.plan import flops
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ellipsoid import geometry, gram
from rlhf_jax.rewards.ensemble import single
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Algorithm, Demonstrations, PreferenceBatch, Prompts, Score, Sequences


class Workload(NamedTuple):
    """A step to time.

    Attributes:
        begin: makes the first state, which the step donates.
        step: `step(state, *rest) -> (state, found)`, from `jax.jit`.
        rest: what it reads besides.
        tokens: tokens that count: those drawn by "generate", else all of the batch, prompts included.
        flops: of the step's matrix products, by arithmetic.
        again: those of them that a backward pass computes a second time.
        read: of "generate", bytes that decoding has to read: each weight and each cached key and value once a token.
    """

    begin: Callable[[], Any]
    step: Any
    rest: tuple[Any, ...]
    tokens: int
    flops: float
    again: float = 0.0
    read: float = 0.0


def workloads(config: ModelConfig, sizes: Sizes) -> dict[str, Callable[[], Workload]]:
    """Every workload by name, made when it is called.

    Args:
        config: shape of all models.
        sizes: of the batches.
    """
    several = len(sizes.generated) > 1
    return {
        **{
            f"generate, batch {rows}" if several else "generate": partial(generation, config, sizes, rows)
            for rows in sizes.generated
        },
        "SFT": lambda: fine_tuning(config, sizes),
        "reward model": lambda: reward_model(config, sizes),
        "DPO": lambda: direct_preference(config, sizes),
        "GRPO": lambda: group_relative(config, sizes),
        "GRPO rollout": lambda: drawing_of(config, sizes, sizes.prompts, _group_relative(config, sizes)),
        "GRPO update": lambda: learning_of(config, sizes, sizes.prompts, _group_relative(config, sizes)),
        "PPO": lambda: proximal(config, sizes),
        "PPO, shared trunk": lambda: proximal(config, sizes, "shared"),
        "PPO rollout": lambda: drawing_of(config, sizes, sizes.prompts * sizes.samples, _proximal(config, sizes)),
        "PPO update": lambda: learning_of(config, sizes, sizes.prompts * sizes.samples, _proximal(config, sizes)),
        "rollout score": lambda: scoring(config, rows_of_rollout(sizes)),
        "score": lambda: scoring(config, sizes),
        "last-layer statistics": lambda: statistics(config, sizes),
    }


def random_prompts(config: ModelConfig, rows: int, length: int) -> Prompts:
    """Full prompts of random tokens; token 0 is left out, which ends responses."""
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 1, config.vocab_size, jnp.int32)
    return Prompts(tokens=tokens, mask=jnp.ones(tokens.shape, bool), index=jnp.arange(rows, dtype=jnp.int32))


def random_sequences(config: ModelConfig, rows: int, length: int, seed: int = 2) -> Sequences:
    """Full rows of random tokens, the second half of each a completion."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, length), 1, config.vocab_size, jnp.int32)
    mask = jnp.ones(tokens.shape, bool)
    completion = jnp.broadcast_to(jnp.arange(length)[None] >= length // 2, tokens.shape)
    return Sequences(tokens=tokens, mask=mask, loss_mask=completion)


def endless(sizes: Sizes) -> SamplingConfig:
    """Sampling that nothing ends before the longest response."""
    return SamplingConfig(
        max_new_tokens=sizes.response_length, stop_tokens=(), cache=sizes.cache, weights=sizes.weights
    )


def generation(config: ModelConfig, sizes: Sizes, rows: int) -> Workload:
    """Drawing a response to each of so many prompts; parameters are kept in the dtype of the computation."""
    config, sampling = dataclasses.replace(config, param_dtype=config.dtype), endless(sizes)

    def draw(step: jax.Array, params: Any, prompts: Prompts):
        return step + 1, generate(config, params, prompts, jax.random.fold_in(jax.random.key(3), step), sampling)

    return Workload(
        begin=lambda: jnp.int32(0),
        step=jax.jit(draw, donate_argnums=0),
        rest=(init_policy(config, jax.random.key(0)), random_prompts(config, rows, sizes.prompt_length)),
        tokens=rows * sizes.response_length,
        flops=flops.generation_flops(config, rows, sizes.prompt_length, sizes.response_length),
        read=decoded_bytes(config, sizes, rows),
    )


def fine_tuning(config: ModelConfig, sizes: Sizes) -> Workload:
    """An update of SFT."""
    rows, length = sizes.demonstrations, sizes.sequence_length
    found = random_sequences(config, rows, length)
    batch = Demonstrations(tokens=found.tokens, mask=found.mask, loss_mask=found.mask.at[:, 0].set(False))
    algorithm = sft(config, adam(1e-5))
    return _update(algorithm, batch, rows * length, training_work(config, rows, length, length - 1))


def reward_model(config: ModelConfig, sizes: Sizes) -> Workload:
    """An update of a Bradley-Terry reward model."""
    rows, length = 2 * sizes.pairs, sizes.sequence_length
    algorithm = reward_modeling(config, adam(1e-5))
    return _update(algorithm, random_pairs(config, sizes), rows * length, training_work(config, rows, length, 0))


def direct_preference(config: ModelConfig, sizes: Sizes) -> Workload:
    """An update of DPO, the reference's forward pass included."""
    rows, length = 2 * sizes.pairs, sizes.sequence_length
    algorithm = preference(config, preference_loss("dpo"), adam(1e-5))
    work = training_work(config, rows, length, length - 1)
    work = work._replace(flops=work.flops + flops.scoring_flops(config, rows, length, length - 1))
    return _update(algorithm, random_pairs(config, sizes), rows * length, work)


def random_pairs(config: ModelConfig, sizes: Sizes) -> PreferenceBatch:
    """Pairs of random sequences."""
    chosen, rejected = (random_sequences(config, sizes.pairs, sizes.sequence_length, seed) for seed in (4, 5))
    return PreferenceBatch(chosen=chosen, rejected=rejected, margin=jnp.zeros(sizes.pairs))


def _update(algorithm: Algorithm, batch: Any, tokens: int, work: Work) -> Workload:
    return Workload(
        begin=lambda: algorithm.init(jax.random.key(0)),
        step=jax.jit(algorithm.update, donate_argnums=0),
        rest=(batch,),
        tokens=tokens,
        flops=work.flops,
        again=work.again,
    )


def _group_relative(config: ModelConfig, sizes: Sizes) -> Algorithm:
    options = PolicyGradientConfig(sampling=endless(sizes), samples=sizes.samples)
    return policy_gradient(config, options, adam(1e-5), fixed_kl(sizes.kl_coefficient))


def _proximal(config: ModelConfig, sizes: Sizes, value_net: str = "separate") -> Algorithm:
    options = PPOConfig(sampling=endless(sizes), epochs=1, minibatches=1, value_net=value_net)
    return ppo(config, options, adam(1e-5), fixed_kl(sizes.kl_coefficient))


def group_relative(config: ModelConfig, sizes: Sizes) -> Workload:
    """A step of GRPO: rollout, reward, reference, update."""
    algorithm = _group_relative(config, sizes)
    rollout = drawing_work(config, sizes, sizes.prompts * sizes.samples, sizes.prompts)
    return _on_policy(config, sizes, sizes.prompts, algorithm, rollout, learning_work(config, sizes, "none"))


def proximal(config: ModelConfig, sizes: Sizes, value_net: str = "separate") -> Workload:
    """A step of PPO: rollout, reward, reference, value net, update of policy and value net (see `PPOConfig`)."""
    rows = sizes.prompts * sizes.samples
    rollout, learn = drawing_work(config, sizes, rows, rows), learning_work(config, sizes, value_net)
    return _on_policy(config, sizes, rows, _proximal(config, sizes, value_net), rollout, learn)


def drawing_of(config: ModelConfig, sizes: Sizes, prompts: int, algorithm: Algorithm) -> Workload:
    """The first part of an on-policy step by itself: the rollout."""
    rows = sizes.prompts * sizes.samples
    return Workload(
        begin=lambda: algorithm.init(jax.random.key(0)),
        step=jax.jit(algorithm.rollout, donate_argnums=0),
        rest=(random_prompts(config, prompts, sizes.prompt_length),),
        tokens=rows * sizes.response_length,
        flops=drawing_work(config, sizes, rows, prompts),
    )


def learning_of(config: ModelConfig, sizes: Sizes, prompts: int, algorithm: Algorithm) -> Workload:
    """The last part of an on-policy step by itself: the reference (and the value net) and the update."""
    rows = sizes.prompts * sizes.samples
    drawing = jax.jit(algorithm.init)(jax.random.key(0))
    drawing, taken = jax.jit(algorithm.rollout)(drawing, random_prompts(config, prompts, sizes.prompt_length))
    work = learning_work(config, sizes, "none" if prompts < rows else "separate")
    return Workload(
        begin=lambda: algorithm.init(jax.random.key(0)),
        step=jax.jit(algorithm.update, donate_argnums=0),
        rest=(taken, jax.random.normal(jax.random.key(4), (rows,))),
        tokens=rows * (sizes.prompt_length + sizes.response_length),
        flops=work.flops,
        again=work.again,
    )


def low_tokens(params: Any, tokens: jax.Array, mask: jax.Array) -> Score:
    """A reward that costs nothing: the share of tokens with an even id."""
    return Score(mean=(mask & (tokens % 2 == 0)).mean(axis=1, dtype=jnp.float32))


def _on_policy(
    config: ModelConfig, sizes: Sizes, prompts: int, algorithm: Algorithm, rollout: float, learn: Work
) -> Workload:
    rows, length = sizes.prompts * sizes.samples, sizes.prompt_length
    whole, transform = compose(algorithm, low_tokens, single()), single()

    def step(state: ComposedState, prompts: Prompts):
        state, output = whole(state, prompts, None)
        return state, output.metrics

    return Workload(
        begin=lambda: ComposedState(algorithm=algorithm.init(jax.random.key(0)), transform=transform.init()),
        step=jax.jit(step, donate_argnums=0),
        rest=(random_prompts(config, prompts, length),),
        tokens=rows * (length + sizes.response_length),
        flops=rollout + learn.flops,
        again=learn.again,
    )


def scoring(config: ModelConfig, sizes: Sizes) -> Workload:
    """Scores of whole sequences by a reward model."""
    scorer, batch = reward_scorer(config), random_sequences(config, sizes.scored, sizes.sequence_length)

    def step(state: jax.Array, params: Any, batch: Sequences):
        return state + 1, scorer(params, batch.tokens, batch.mask).mean

    return _reading(config, sizes, step, init_reward_model(config, jax.random.key(0)), batch)


def statistics(config: ModelConfig, sizes: Sizes) -> Workload:
    """The geometry of last-layer features: forward passes, the Gram matrix and its factor."""
    batch = random_sequences(config, sizes.scored, sizes.sequence_length)

    def step(state: jax.Array, trunk: Any, batch: Sequences):
        features = reward_features(config, trunk, batch.tokens, batch.mask, "pre_norm")
        return state + 1, geometry(gram(features), 1.0)

    return _reading(config, sizes, step, init_trunk(config, jax.random.key(0)), batch)


def _reading(config: ModelConfig, sizes: Sizes, step: Callable, params: Any, batch: Sequences) -> Workload:
    rows, length = sizes.scored, sizes.sequence_length
    return Workload(
        begin=lambda: jnp.int32(0),
        step=jax.jit(step, donate_argnums=0),
        rest=(params, batch),
        tokens=rows * length,
        flops=flops.scoring_flops(config, rows, length),
    )
