"""Steps to time: each algorithm on a batch of random tokens, with the work in it by arithmetic.

Weights are random and nothing ever ends a response early, so that every step does the same work. The states of steps
are donated, as in the training scripts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.compose import ComposedState, compose
from rlhf_jax.algorithms.in_place import in_place
from rlhf_jax.algorithms.on_policy import PolicyState
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.ppo import PPOConfig, ppo
from rlhf_jax.algorithms.preference import preference
from rlhf_jax.algorithms.reward_modeling import reward_modeling
from rlhf_jax.algorithms.sft import sft
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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all workloads.

    Attributes:
        prompt_length: tokens of each prompt.
        response_length: tokens of each response.
        generated: responses of the row "generate".
        prompts: prompts of a step of GRPO.
        samples: responses to each of them; PPO has prompts x samples prompts.
        sequence_length: tokens of each demonstration, and of each completion of a pair with its prompt.
        demonstrations: rows of a step of SFT.
        pairs: rows of a step of DPO and of reward modelling.
        scored: sequences that are scored, and whose last-layer statistics are taken.
        kl_coefficient: weight of the KL from the reference.
    """

    prompt_length: int = 64
    response_length: int = 64
    generated: int = 32
    prompts: int = 8
    samples: int = 4
    sequence_length: int = 256
    demonstrations: int = 16
    pairs: int = 8
    scored: int = 32
    kl_coefficient: float = 0.04


class Workload(NamedTuple):
    """A step to time.

    Attributes:
        begin: makes the first state, which the step donates.
        step: `step(state, *rest) -> (state, found)`.
        rest: what it reads besides.
        tokens: tokens that count: those drawn by "generate", else all of the batch, prompts included.
        flops: of the step's matrix products, by arithmetic.
        read: bytes that decoding has to read, each weight and each cached key and value once a token; 0 where nothing
            is decoded.
    """

    begin: Callable[[], Any]
    step: Callable[..., tuple[Any, Any]]
    rest: tuple[Any, ...]
    tokens: int
    flops: float
    read: float = 0.0


def workloads(config: ModelConfig, sizes: Sizes) -> dict[str, Callable[[], Workload]]:
    """Every workload by name, made when it is called.

    Args:
        config: shape of all models.
        sizes: of the batches.
    """
    return {
        "generate": lambda: generation(config, sizes),
        "SFT": lambda: fine_tuning(config, sizes),
        "reward model": lambda: reward_model(config, sizes),
        "DPO": lambda: direct_preference(config, sizes),
        "GRPO": lambda: group_relative(config, sizes),
        "PPO": lambda: proximal(config, sizes),
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
    return SamplingConfig(max_new_tokens=sizes.response_length, stop_tokens=())


def decoded_bytes(config: ModelConfig, rows: int, prompt: int, new: int) -> float:
    """Bytes that decoding `new` tokens a row has to read: weights once a step, and the cache as far as it is filled.

    Example:
        >>> config = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, key_value_heads=1, feed_forward_width=8,
        ...                      context_length=8, dtype="float32")
        >>> decoded_bytes(config, rows=1, prompt=2, new=2)  # 176 weights; one step reads 3 slots of 2 x 2 numbers
        752.0
    """
    size = jnp.dtype(config.dtype).itemsize
    weights = flops.projection_flops(config) / 2 + config.width * config.vocab_size
    slot = 2 * config.layers * config.key_value_heads * config.head_size
    slots = sum(prompt + step for step in range(1, new))
    return float(size * ((new - 1) * weights + rows * slot * slots))


def generation(config: ModelConfig, sizes: Sizes) -> Workload:
    """Drawing responses to prompts."""
    rows, sampling = sizes.generated, endless(sizes)

    def draw(step: jax.Array, params: Any, prompts: Prompts):
        return step + 1, generate(config, params, prompts, jax.random.fold_in(jax.random.key(3), step), sampling)

    return Workload(
        begin=lambda: jnp.int32(0),
        step=in_place(draw),
        rest=(init_policy(config, jax.random.key(0)), random_prompts(config, rows, sizes.prompt_length)),
        tokens=rows * sizes.response_length,
        flops=flops.generation_flops(config, rows, sizes.prompt_length, sizes.response_length),
        read=decoded_bytes(config, rows, sizes.prompt_length, sizes.response_length),
    )


def fine_tuning(config: ModelConfig, sizes: Sizes) -> Workload:
    """An update of SFT."""
    rows, length = sizes.demonstrations, sizes.sequence_length
    found = random_sequences(config, rows, length)
    batch = Demonstrations(tokens=found.tokens, mask=found.mask, loss_mask=found.mask.at[:, 0].set(False))
    algorithm = sft(config, adam(1e-5))
    work = flops.training_flops(config, rows, length, length - 1)
    return _update(algorithm, batch, rows * length, work)


def reward_model(config: ModelConfig, sizes: Sizes) -> Workload:
    """An update of a Bradley-Terry reward model."""
    length = sizes.sequence_length
    work = flops.training_flops(config, 2 * sizes.pairs, length, 0)
    return _update(reward_modeling(config, adam(1e-5)), random_pairs(config, sizes), 2 * sizes.pairs * length, work)


def direct_preference(config: ModelConfig, sizes: Sizes) -> Workload:
    """An update of DPO, the reference's forward pass included."""
    rows, length = 2 * sizes.pairs, sizes.sequence_length
    algorithm = preference(config, preference_loss("dpo"), adam(1e-5))
    train = flops.training_flops(config, rows, length, length - 1)
    work = train + flops.scoring_flops(config, rows, length, length - 1)
    return _update(algorithm, random_pairs(config, sizes), rows * length, work)


def random_pairs(config: ModelConfig, sizes: Sizes) -> PreferenceBatch:
    """Pairs of random sequences."""
    chosen, rejected = (random_sequences(config, sizes.pairs, sizes.sequence_length, seed) for seed in (4, 5))
    return PreferenceBatch(chosen=chosen, rejected=rejected, margin=jnp.zeros(sizes.pairs))


def _update(algorithm: Algorithm, batch: Any, tokens: int, work: float) -> Workload:
    return Workload(
        begin=lambda: algorithm.init(jax.random.key(0)),
        step=in_place(algorithm.update),
        rest=(batch,),
        tokens=tokens,
        flops=work,
    )


def group_relative(config: ModelConfig, sizes: Sizes) -> Workload:
    """A step of GRPO: rollout, reward, reference, update."""
    rows, length, new = sizes.prompts * sizes.samples, sizes.prompt_length, sizes.response_length
    options = PolicyGradientConfig(sampling=endless(sizes), samples=sizes.samples)
    algorithm = policy_gradient(config, options, adam(1e-5), fixed_kl(sizes.kl_coefficient))
    prompts = random_prompts(config, sizes.prompts, length)
    work = flops.generation_flops(config, rows, length, new) + flops.scoring_flops(config, rows, length + new, new)
    work += flops.training_flops(config, rows, length + new, new)
    return _on_policy(config, sizes, algorithm, lambda: None, prompts, work)


def proximal(config: ModelConfig, sizes: Sizes) -> Workload:
    """A step of PPO: rollout, reward, reference, value net, update of policy and value net."""
    rows, length, new = sizes.prompts * sizes.samples, sizes.prompt_length, sizes.response_length
    options = PPOConfig(sampling=endless(sizes), epochs=1, minibatches=1)
    algorithm = ppo(config, options, adam(1e-5), fixed_kl(sizes.kl_coefficient))
    total = length + new
    work = flops.generation_flops(config, rows, length, new) + flops.scoring_flops(config, rows, total, new)
    work += flops.scoring_flops(config, rows, total) + flops.training_flops(config, rows, total, 0)
    work += flops.training_flops(config, rows, total, new)
    return _on_policy(config, sizes, algorithm, lambda: None, random_prompts(config, rows, length), work)


def low_tokens(params: Any, tokens: jax.Array, mask: jax.Array) -> Score:
    """A reward that costs nothing: the share of tokens with an even id."""
    return Score(mean=(mask & (tokens % 2 == 0)).mean(axis=1, dtype=jnp.float32))


def _on_policy(
    config: ModelConfig, sizes: Sizes, algorithm: Algorithm, reward: Callable[[], Any], prompts: Prompts, work: float
) -> Workload:
    rows, length, new = sizes.prompts * sizes.samples, sizes.prompt_length, sizes.response_length
    whole, transform = compose(algorithm, low_tokens, single()), single()

    def step(state: ComposedState, prompts: Prompts, params: Any):
        state, output = whole(state, prompts, params)
        return state, output.metrics

    def begin() -> ComposedState:
        state: PolicyState = algorithm.init(jax.random.key(0))
        return ComposedState(algorithm=state, transform=transform.init())

    return Workload(
        begin=begin,
        step=in_place(step),
        rest=(prompts, reward()),
        tokens=rows * (length + new),
        flops=work,
        read=decoded_bytes(config, rows, length, new),
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
        step=in_place(step),
        rest=(params, batch),
        tokens=rows * length,
        flops=flops.scoring_flops(config, rows, length),
    )
