"""Where a study takes place: the world, the policy that starts in it, and the trunks its reward models start from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.fit import epoch_orders, fit
from rlhf_jax.algorithms.optimizer import adam
from rlhf_jax.algorithms.sft import sft
from rlhf_jax.data.synthetic.vocabulary import VOCABULARY
from rlhf_jax.data.synthetic.writer import demonstrations
from rlhf_jax.data.world import World, builtin_world, take_prompts, text_world
from rlhf_jax.laboratory.options import Options
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Params, Prompts, Rollout

SFT_BATCH = 64
SFT_BATCHES_OF_DATA = 80


class Setting(NamedTuple):
    """Where a study takes place.

    Attributes:
        world: prompts and gold reward.
        sampling: how responses are drawn, at any time of the study.
        policy_config: shape of the policy.
        policy: the initial policy.
        reward_config: shape of the reward models (and of the value net).
        trunks: the trunks that the members of an ensemble start from, [members, …].
    """

    world: World
    sampling: SamplingConfig
    policy_config: ModelConfig
    policy: Params
    reward_config: ModelConfig
    trunks: Params


def tiny_model(layers: int, width: int) -> ModelConfig:
    """A small Llama shape over the built-in vocabulary."""
    return ModelConfig(
        vocab_size=VOCABULARY.size,
        width=width,
        layers=layers,
        heads=2,
        key_value_heads=2,
        feed_forward_width=3 * width,
        context_length=32,
    )


def fine_tune(model: ModelConfig, keys: jax.Array, steps: int, seed: int) -> Params:
    """Policies fine-tuned on the built-in demonstrations: one for each of K keys, [K, …]."""
    data = demonstrations(np.random.default_rng(seed), SFT_BATCHES_OF_DATA * SFT_BATCH)
    algorithm = sft(model, adam(3e-3))

    def train(key: jax.Array, data: Any) -> Params:
        init_key, order_key = jax.random.split(key)
        order = epoch_orders(order_key, len(data.tokens), SFT_BATCH, -(-steps // SFT_BATCHES_OF_DATA))
        return fit(algorithm.update, algorithm.init(init_key), data, order[:steps])[0].params

    return jax.jit(over_lanes(train))(keys, data)


def sampling_of(world: World) -> SamplingConfig:
    """Plain sampling at temperature 1, up to the world's response length."""
    return SamplingConfig(
        max_new_tokens=world.response_length, stop_tokens=world.stop_tokens, pad_token=world.pad_token
    )


def builtin_setting(options: Options, key: jax.Array) -> Setting:
    """The built-in world, a policy fine-tuned on its writers, and reward trunks fine-tuned likewise."""
    world = builtin_world(options.pairs, options.held_out, options.seed)
    policy_config = tiny_model(options.policy_layers, options.width)
    reward_config = tiny_model(options.reward_layers, options.width)
    policy_key, trunk_key = jax.random.split(key)
    policy = fine_tune(policy_config, policy_key[None], options.sft_steps, options.seed + 1)
    trunks = fine_tune(reward_config, jax.random.split(trunk_key, options.members), options.sft_steps, options.seed + 2)
    return Setting(
        world=world,
        sampling=sampling_of(world),
        policy_config=policy_config,
        policy=jax.tree.map(lambda leaf: leaf[0], policy),
        reward_config=reward_config,
        trunks=trunks["trunk"],
    )


def text_setting(options: Options) -> Setting:
    """A pretrained policy, prompts from a file, sentiment as gold; reward models start from the policy's trunk."""
    from rlhf_jax.data.sentiment import train_sentiment
    from rlhf_jax.models.huggingface import load_policy, load_tokenizer

    policy_config, policy = load_policy(options.policy)
    tokenizer = load_tokenizer(options.policy)
    gold = train_sentiment(options.sentiment, options.seed)
    print(f"gold: sentiment of reviews, accuracy {gold.accuracy:.3f} on {gold.held_out} held-out rows")
    length, context = options.response_length, policy_config.context_length
    world = text_world(options.prompts, tokenizer, gold, length, context, options.held_out, options.longest_prompt)
    if len(world.prompts.tokens) > options.pairs:
        raise ValueError(
            f"{len(world.prompts.tokens)} training prompts need as many comparisons, for a reference response each; "
            f"give --pairs {len(world.prompts.tokens)} or more, or fewer prompts."
        )
    return Setting(
        world=world,
        sampling=sampling_of(world),
        policy_config=policy_config,
        policy=policy,
        reward_config=policy_config,
        trunks=jax.tree.map(lambda leaf: jnp.stack([leaf] * options.members), policy["trunk"]),
    )


_generate = jax.jit(generate, static_argnames=("config", "sampling"))


def sample(setting: Setting, prompts: Prompts, key: jax.Array, chunk: int = 2048) -> Rollout:
    """One response of the initial policy to every prompt, `chunk` prompts at a time."""
    count = len(prompts.tokens)
    size = min(chunk, count)
    filled = take_prompts(prompts, np.arange(count + -count % size) % count)
    parts = [
        _generate(
            setting.policy_config,
            setting.policy,
            take_prompts(filled, slice(start, start + size)),
            key,
            sampling=setting.sampling,
        )
        for start in range(0, count, size)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *parts)


def repeated(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """Prompts `rows` with a fresh index each, so that repetitions of a prompt are sampled independently."""
    return take_prompts(prompts, rows).replace(index=jnp.arange(len(rows), dtype=jnp.int32))


def gold_of(world: World, rollout: Rollout) -> np.ndarray:
    """The gold reward of a rollout's responses, float64 [B]."""
    prompts, tokens, mask = (np.asarray(part) for part in (rollout.prompts.tokens, rollout.tokens, rollout.mask))
    return world.gold(prompts, tokens, mask)
