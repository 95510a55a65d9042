"""What a policy answers to held-out prompts: rewards, divergence, lengths and texts, beside one another."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import response_states, token_scores
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.parallel.meetings import gathered
from rlhf_jax.sampling.batches import generate_batches
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.training.prompting import PromptBatch, PromptRow, completions_of
from rlhf_jax.training.samples import readable, write_samples
from rlhf_jax.training.sources import Source
from rlhf_jax.types import Params, Rollout


class Answers(NamedTuple):
    """Answers to N prompts.

    Attributes:
        rewards: the reward of each, float32 [N].
        kl: log policy - log reference of each answer, its tokens summed, in nats, float32 [N]; its mean estimates the
            divergence.
        lengths: tokens of each, float32 [N].
        finished: 1 where the answer ended by itself, else 0, float32 [N].
        texts: the answers as people read them.
    """

    rewards: Float[np.ndarray, " N"]
    kl: Float[np.ndarray, " N"]
    lengths: Float[np.ndarray, " N"]
    finished: Float[np.ndarray, " N"]
    texts: list[str]

    @property
    def metrics(self) -> dict[str, float]:
        """The means, by the names of metrics."""
        return {
            "eval/objective/scores": float(self.rewards.mean()),
            "eval/objective/kl": float(self.kl.mean()),
            "eval/completions/mean_length": float(self.lengths.mean()),
            "eval/completions/clipped_ratio": float(1.0 - self.finished.mean()),
        }


def answer(
    source: Source,
    policy: Params,
    reference: Params,
    items: Sequence[PromptRow],
    collate: Callable[[Sequence[PromptRow]], PromptBatch],
    batch_size: int,
    key: Array,
    sampling: SamplingConfig,
    score: Callable[[Sequence[dict], Rollout], np.ndarray],
) -> Answers:
    """Draws an answer to each prompt and measures it.

    Args:
        source: shape and tokenizer of the policy.
        policy: its parameters.
        reference: those of the policy that the divergence is measured from.
        items: N prompts.
        collate: makes a batch of them.
        batch_size: rows a batch.
        key: of the draws; the same key gives equal policies equal answers.
        sampling: how answers are drawn.
        score: `score(rows, rollout)` gives the rewards, [B].
    """
    numbers, texts = np.zeros((4, len(items)), np.float32), [""] * len(items)
    drawn = generate_batches(
        source.config, policy, items, lambda some: collate(some).prompts, batch_size, key, sampling
    )
    for places, taken in drawn:
        rows = [items[place].row for place in places]
        ratio = log_ratio(source.config, reference, taken, sampling.logprob_temperature)
        measured = (ratio, taken.mask.sum(axis=-1), taken.finished)
        numbers[:, places] = score(rows, taken), *gathered(measured)
        for place, completion in zip(places, completions_of(source, rows, taken), strict=True):
            texts[place] = readable(completion)
    return Answers(*numbers, texts)


@partial(jax.jit, static_argnums=(0, 3))
def log_ratio(config: ModelConfig, reference: Params, rollout: Rollout, temperature: float) -> Float[Array, " B"]:
    """log policy - log reference of each response, its tokens summed, in nats, float32 [B]."""
    hidden = apply_trunk(config, reference["trunk"], rollout.sequences.tokens, rollout.sequences.mask).final
    states = response_states(hidden, rollout.tokens.shape[1])
    logprob, _ = token_scores(config, reference, states, rollout.tokens, temperature)
    return jnp.where(rollout.mask, rollout.logprob - logprob, 0.0).sum(axis=-1)


def write_answers(
    path: Path, title: str, items: Sequence[PromptRow], answers: Mapping[str, Answers], count: int
) -> Path:
    """Writes the first `count` prompts and what was answered, each answer with its reward; see `write_samples`.

    Args:
        path: the file; its folder is made.
        title: what the samples are.
        items: the prompts.
        answers: by heading.
        count: how many prompts.

    Returns:
        The path.
    """
    samples = [
        {"prompt": readable(item.row["prompt"])}
        | {f"{name}, reward {found.rewards[place]:.3f}": found.texts[place] for name, found in answers.items()}
        for place, item in enumerate(items[:count])
    ]
    return write_samples(path, title, samples)


def answer_rows(before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Rows of the summary: held-out rewards and lengths before and after training, and the divergence after it."""
    values = {
        ("held-out reward before", ""): before.rewards,
        ("held-out reward after", ""): after.rewards,
        ("held-out reward gained, by prompt", ""): after.rewards - before.rewards,
        ("KL of the policy from the initial one", "nats"): after.kl,
        ("held-out completions before", "tokens"): before.lengths,
        ("held-out completions after", "tokens"): after.lengths,
        ("held-out completions that ended by themselves before", ""): before.finished,
        ("held-out completions that ended by themselves after", ""): after.finished,
    }
    return [row(*name, numbers) for name, numbers in values.items()]
