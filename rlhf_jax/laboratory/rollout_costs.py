"""Three measurements of responses: drawn and learnt from at unequal lengths, and log-probabilities beside training's.

A random policy draws all tokens about equally often. Where one in n of the vocabulary ends a response, its length is
geometric with mean n: many are short, and the longest of a batch are several times the mean.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms.policy_gradient import PolicyGradientConfig, policy_gradient
from rlhf_jax.algorithms.rollouts import taken_scores
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.evaluation.timing import ratio, seconds_of
from rlhf_jax.laboratory.step_costs import Found, median_row
from rlhf_jax.laboratory.work import Sizes
from rlhf_jax.laboratory.workloads import endless, random_prompts
from rlhf_jax.losses.kl import fixed_kl
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.sampling.queue import InTurns
from rlhf_jax.training.run_folder import check
from rlhf_jax.types import Rollout

LARGEST_GAP = 1e-4
"""Nats a token that the sampler may be off in float32."""


def geometric_lengths(config: ModelConfig, mean_length: int, longest: int, slots: int | None = None) -> SamplingConfig:
    """Sampling in which one of `mean_length` tokens ends a response.

    Args:
        config: the policy's shape.
        mean_length: of responses, were none cut off.
        longest: where they are cut off.
        slots: see `InTurns`; None: all at once.

    Raises:
        ValueError: the vocabulary is too small for the mean.
    """
    if not 1 <= mean_length <= config.vocab_size:
        raise ValueError(f"a mean length of {mean_length} needs as many tokens; there are {config.vocab_size}.")
    return SamplingConfig(
        max_new_tokens=longest,
        stop_tokens=tuple(range(0, config.vocab_size, mean_length)),
        decode=None if slots is None else InTurns(slots),
    )


def drawn_both_ways(
    config: ModelConfig, rows: int, prompt_length: int, slots: int, mean_length: int, longest: int
) -> tuple[Callable[[], Rollout], Callable[[], list[Rollout]]]:
    """The same responses from a queue of slots, and in batches of as many rows one after the other.

    Args:
        config: the policy's shape.
        rows: responses in all.
        prompt_length: tokens of each prompt.
        slots: rows that are drawn at a time.
        mean_length: see `geometric_lengths`.
        longest: the same.

    Raises:
        ValueError: the slots do not divide the rows.
    """
    if rows % slots:
        raise ValueError(f"{rows} responses do not split into batches of {slots}: choose a divisor.")
    params, prompts = init_policy(config, jax.random.key(0)), random_prompts(config, rows, prompt_length)
    parts = jax.tree.map(lambda leaf: jnp.split(leaf, rows // slots), prompts)
    batches = jax.tree.transpose(jax.tree.structure(prompts), None, parts)
    key = jax.random.key(1)
    queue, plain = (
        jax.jit(partial(generate, config, sampling=geometric_lengths(config, mean_length, longest, kept)))
        for kept in (slots, None)
    )
    return (
        lambda: queue(params, prompts, key),
        lambda: [jax.block_until_ready(plain(params, batch, key)) for batch in batches],
    )


def share_identical(one: Rollout, parts: list[Rollout]) -> float:
    """The share of responses of which every token is the same."""
    tokens = np.concatenate([np.asarray(part.tokens) for part in parts])
    return float((np.asarray(one.tokens) == tokens).all(axis=1).mean())


def measure_queue(
    config: ModelConfig, rows: int, prompt_length: int, slots: int, mean_length: int, longest: int, repeats: int
) -> Found:
    """Slots that are refilled beside plain batches: rows and checks of the summary.

    Args:
        config: the policy's shape.
        rows: see `drawn_both_ways`, as all but the last.
        prompt_length: tokens of each prompt.
        slots: rows that are drawn at a time.
        mean_length: of responses.
        longest: where they are cut off.
        repeats: timed calls of each, in turns.
    """
    queue, plain = drawn_both_ways(config, rows, prompt_length, slots, mean_length, longest)
    one, parts = queue(), plain()
    seconds = seconds_of(lambda: plain, lambda: queue, repeats=repeats)
    drawn = np.asarray(one.mask).sum(axis=1)
    found = [
        ratio("queue: plain batches over slots that are refilled, time", *seconds),
        median_row("queue: tokens", "a second", drawn.sum() / seconds[1]),
        median_row("queue: tokens in plain batches", "a second", drawn.sum() / seconds[0]),
        row("queue: length of responses", "tokens", drawn.astype(np.float64)),
        row("queue: longest response", "tokens", np.array([float(drawn.max())])),
    ]
    checks = [check("queue: plain batches over slots that are refilled, time", found[0]["mean"], 1.0, "at least")]
    if config.dtype == "float32":  # with fewer bits the rounding of a product depends on the rows beside
        checks.append(check("queue: share of identical responses", share_identical(one, parts), 1.0))
    return found, checks


def measure_buckets(
    config: ModelConfig, sizes: Sizes, buckets: int, mean_length: int, longest: int, repeats: int
) -> Found:
    """An update of GRPO on responses of unequal lengths, cut to a bucket beside whole: rows and checks of the summary.

    Args:
        config: the policy's shape.
        sizes: `prompts`, `samples` and `prompt_length`.
        buckets: see `OnPolicyConfig.length_buckets`.
        mean_length: of responses.
        longest: where they are cut off.
        repeats: timed calls of each, in turns.
    """
    sampling, prompts = geometric_lengths(config, mean_length, longest), sizes.prompts
    whole, cut = (
        policy_gradient(
            config,
            PolicyGradientConfig(sampling=sampling, samples=sizes.samples, length_buckets=count),
            optax.sgd(1.0),  # so that parameters show the gradient
            fixed_kl(sizes.kl_coefficient),
        )
        for count in (1, buckets)
    )
    begin = jax.jit(whole.init)
    state, taken = jax.jit(whole.rollout)(
        begin(jax.random.key(0)), random_prompts(config, prompts, sizes.prompt_length)
    )
    rewards = jax.random.normal(jax.random.key(1), (prompts * sizes.samples,))
    updates = [jax.jit(algorithm.update) for algorithm in (whole, cut)]
    before, one, other = (
        jax.tree.leaves(params)
        for params in (state.params, *(update(state, taken, rewards)[0].params for update in updates))
    )
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(one, other, strict=True))
    apart /= max(float(jnp.abs(a - b).max()) for a, b in zip(one, before, strict=True))
    seconds = seconds_of(
        *(lambda update=update: lambda: update(state, taken, rewards) for update in updates), repeats=repeats
    )
    drawn = np.asarray(taken.mask).sum(axis=1)
    found = [
        ratio(f"buckets: an update on whole responses over one of {buckets} lengths, time", *seconds),
        median_row("buckets: an update on whole responses", "s", seconds[0]),
        median_row("buckets: an update on those cut", "s", seconds[1]),
        row("buckets: longest response", "tokens", np.array([float(drawn.max())])),
    ]
    return found, [check("buckets: largest difference over the largest gradient", apart, 1e-5, "at most")]


def logprob_gap(config: ModelConfig, sizes: Sizes) -> float:
    """The largest difference, in nats a token, between the sampler's log-probabilities and those of a training forward.

    Args:
        config: the policy's shape.
        sizes: `generated[0]` responses; `cache` and `weights` while drawing.
    """
    params, sampling = init_policy(config, jax.random.key(0)), endless(sizes)
    prompts = random_prompts(config, sizes.generated[0], sizes.prompt_length)

    @jax.jit
    def gap(params, prompts) -> jax.Array:
        taken = generate(config, params, prompts, jax.random.key(2), sampling)
        logprob = taken_scores(config, params, taken, sampling.logprob_temperature)[0]
        return jnp.max(jnp.where(taken.mask, jnp.abs(logprob - taken.logprob), 0.0))

    return float(gap(params, prompts))


def measure_gap(config: ModelConfig, sizes: Sizes) -> Found:
    """The gap in each dtype, and with cache and weights in fewer bits while drawing: rows and checks of the summary."""
    kinds = [
        ("float32", "computation"),
        ("bfloat16", "computation"),
        (config.dtype, "bfloat16"),
        (config.dtype, "int8"),
    ]
    found = []
    for dtype, storage in dict.fromkeys(kinds):
        kept = "" if storage == "computation" else f", cache and weights in {storage}"
        changed = dataclasses.replace(config, dtype=dtype), dataclasses.replace(sizes, cache=storage, weights=storage)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):  # GPUs have 19 bits for it
            gap = logprob_gap(*changed)
        found.append(row(f"gap: log-probabilities in {dtype}{kept}", "nats", np.array([gap])))
    return found, [check("gap: log-probabilities in float32", found[0]["mean"], LARGEST_GAP, "at most")]
