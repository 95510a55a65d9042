"""Sizes of the workloads of the benchmark, and the work in them by arithmetic."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.quantised import Storage
from rlhf_jax.parallel.plan import flops


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all workloads.

    Attributes:
        prompt_length: tokens of each prompt.
        response_length: tokens of each response.
        generated: responses that the row "generate" draws at a time; of several numbers, each in a row of its own.
        prompts: prompts of a step of GRPO.
        samples: responses to each of them; PPO has prompts x samples prompts.
        sequence_length: tokens of each demonstration, and of each completion of a pair with its prompt.
        demonstrations: rows of a step of SFT.
        pairs: rows of a step of DPO and of reward modelling.
        scored: sequences that are scored, and whose last-layer statistics are taken.
        kl_coefficient: weight of the KL from the reference.
        cache: how keys and values are kept while drawing.
        weights: how the policy's matrices are kept while drawing.
    """

    prompt_length: int = 64
    response_length: int = 64
    generated: tuple[int, ...] = (32,)
    prompts: int = 8
    samples: int = 4
    sequence_length: int = 256
    demonstrations: int = 16
    pairs: int = 8
    scored: int = 32
    kl_coefficient: float = 0.04
    cache: Storage = "computation"
    weights: Storage = "computation"


def decoded_bytes(config: ModelConfig, sizes: Sizes, rows: int) -> float:
    """Bytes that decoding has to read: weights once a step, and the cache of every row as far as it is filled.

    In eight bits there is a factor of 4 bytes for each head of a cached token; those of the weights, one an output, are
    left out, and the unembedding has 2 bytes a number.

    Example:
        >>> config = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, key_value_heads=1, feed_forward_width=8,
        ...                      context_length=8, dtype="float32")
        >>> sizes = Sizes(prompt_length=2, response_length=2)
        >>> decoded_bytes(config, sizes, rows=1)  # 176 weights; one step reads 3 slots of 2 x 2 numbers
        752.0
        >>> decoded_bytes(config, dataclasses.replace(sizes, cache="int8", weights="int8"), rows=1)
        244.0
    """
    computed = jnp.dtype(config.dtype).itemsize
    weight = {"computation": computed, "bfloat16": 2, "int8": 1}[sizes.weights]
    token = {"computation": computed, "bfloat16": 2, "int8": 2}[sizes.weights]
    number = {"computation": computed, "bfloat16": 2, "int8": 1 + 4 / config.head_size}[sizes.cache]
    weights = weight * flops.projection_flops(config) / 2 + token * config.width * config.vocab_size
    slot = number * 2 * config.layers * config.key_value_heads * config.head_size
    new = sizes.response_length
    slots = sum(sizes.prompt_length + step for step in range(1, new))
    return float((new - 1) * weights + rows * slot * slots)


class Work(NamedTuple):
    """FLOPs of a step, and those of them that are computed a second time."""

    flops: float
    again: float


def training_work(config: ModelConfig, rows: int, tokens: int, scored: int) -> Work:
    """Work of a forward and a backward pass: what is more than three times the forward pass is computed again.

    Example:
        >>> config = ModelConfig(vocab_size=8, width=4, layers=1, heads=2, key_value_heads=1, feed_forward_width=8,
        ...                      context_length=8)
        >>> training_work(config, rows=1, tokens=2, scored=1)  # forward: 2 (288 + 32) and logits: 64, once more
        Work(flops=2176.0, again=64.0)
    """
    work = flops.training_flops(config, rows, tokens, scored)
    return Work(work, work - 3.0 * flops.scoring_flops(config, rows, tokens, scored))


def drawing_work(config: ModelConfig, sizes: Sizes, rows: int, prompts: int) -> float:
    """FLOPs of drawing `rows` responses to `prompts` prompts, each of which is read once."""
    work = flops.generation_flops(config, rows, sizes.prompt_length, sizes.response_length)
    return work - flops.forward_flops(config, rows - prompts, sizes.prompt_length)


def learning_work(config: ModelConfig, sizes: Sizes, value_net: str) -> Work:
    """Work of an on-policy update: reference, old values, and the training of the policy and the value net.

    Args:
        config: shape of all nets.
        sizes: of the rollout.
        value_net: "separate", "shared" (on the policy's trunk) or "none".
    """
    rows, total, new = sizes.prompts * sizes.samples, sizes.prompt_length + sizes.response_length, sizes.response_length
    policy = training_work(config, rows, total, new)
    value = training_work(config, rows, total, 0) if value_net == "separate" else Work(0.0, 0.0)
    read = flops.scoring_flops(config, rows, total, new)
    if value_net != "none":
        read += flops.scoring_flops(config, rows, total)
    return Work(read + policy.flops + value.flops, policy.again + value.again)


def rows_of_rollout(sizes: Sizes) -> Sizes:
    """The sizes whose scored sequences are those of a rollout.

    Example:
        >>> found = rows_of_rollout(Sizes(prompts=2, samples=3, prompt_length=4, response_length=5))
        >>> found.scored, found.sequence_length
        (6, 9)
    """
    return dataclasses.replace(
        sizes, scored=sizes.prompts * sizes.samples, sequence_length=sizes.prompt_length + sizes.response_length
    )
