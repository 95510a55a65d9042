"""The options that all on-policy algorithms have: how responses are drawn, read again, and passed over."""

import dataclasses
from typing import Literal

from rlhf_jax.sampling.filters import SamplingConfig


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """Options of every on-policy algorithm.

    Attributes:
        sampling: how responses are drawn; filters are refused, since they change the support of the behaviour policy.
        epochs: passes over each rollout.
        minibatches: optimiser steps a pass; divides what is shuffled (responses, or groups of them).
        accumulate: microbatches that an optimiser step sees one after the other, to need less memory.
        target_kl: once the approximate KL of a minibatch to the old policy exceeds this (nats a token), the rest of the
            update is skipped; None never stops.
        old_logprob: what ratios and KLs take for the log-probabilities of the policy that sampled. "rollout": those
            that the draws came with, which cost nothing. "recomputed": those of a forward pass of the policy before
            the first step, as the steps compute them: without the rounding of decoding (of a cache or weights in fewer
            bits above all). "truncated": the same, and each token's loss (of the policy gradient; not the value's, the
            entropy's or the KL's) is multiplied by `losses.policy.importance_weights`, since the draws are not quite
            the policy's.
        importance_cap: for "truncated", the largest weight.
        length_buckets: the update runs on responses cut to the shortest of so many lengths (T / n, 2 T / n, …, T) that
            holds all of a rollout: the same numbers, without much of the padding, for so many times the time to
            compile.

    Raises:
        ValueError: an option is out of range.
    """

    sampling: SamplingConfig
    epochs: int = 1
    minibatches: int = 1
    accumulate: int = 1
    target_kl: float | None = None
    old_logprob: Literal["rollout", "recomputed", "truncated"] = "rollout"
    importance_cap: float = 2.0
    length_buckets: int = 1

    def __post_init__(self):
        name = type(self).__name__
        if self.sampling.filtered:
            raise ValueError(
                f"{name} is of an algorithm that samples from the policy itself: "
                "set temperature > 0, top_k=None, top_p=1 and min_p=0 in its sampling."
            )
        passes = (self.epochs, self.minibatches, self.accumulate)
        if min(passes) < 1:
            raise ValueError(
                f"{name} needs at least 1 epoch, 1 minibatch and 1 microbatch, not {', '.join(map(str, passes))}."
            )
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"{name}.target_kl is {self.target_kl}: give more than 0, or None, which never stops.")
        if self.old_logprob not in ("rollout", "recomputed", "truncated"):
            raise ValueError(f"old_logprob is {self.old_logprob!r}: choose rollout, recomputed or truncated.")
        if not self.importance_cap > 0:
            raise ValueError(f"{name}.importance_cap is {self.importance_cap}: give more than 0 (2, say).")
        if self.length_buckets < 1:
            raise ValueError(f"{name}.length_buckets is {self.length_buckets}: give 1, which cuts nothing, or more.")
