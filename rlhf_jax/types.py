"""The records that travel between models, samplers, rewards and algorithms.

All are frozen `chex` dataclasses (pytrees), so `jit`, `vmap`, `scan` and sharding trees take them as they are. What a
transformation rebuilds has other axes and is not checked; functions check shapes and dtypes where they take records.

Symbols: B sequences, P prompt length, T response length, S = P + T, D feature width, M ensemble members.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params = Any
Metrics = dict[str, Array]


def wide(*arrays: Array) -> jnp.dtype:
    """The dtype to compute in where precision matters: float64 if one of the arrays has it, else float32."""
    return jnp.dtype("float64" if any(array.dtype == jnp.float64 for array in arrays) else "float32")


def at_least_float32(array: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The array in float32 if it is in a narrower float, and as it is if it is float32 or float64.

    Example:
        >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    return array.astype(wide(array))


@chex.dataclass(frozen=True)
class Prompts:
    """A batch of left-padded prompts.

    Attributes:
        tokens: token ids, int32 [B, P]; padding stands on the left.
        mask: True on real tokens, bool [B, P].
        index: which sequence of the data each row is, int32 [B]. Sampling keys fold it in, so that a sample does not
            depend on the batch it is drawn with; rows that should differ (K samples of one prompt) need different
            indices.
    """

    tokens: Int[Array, "B P"]
    mask: Bool[Array, "B P"]
    index: Int[Array, " B"]


@chex.dataclass(frozen=True)
class Sequences:
    """A batch of whole sequences: real tokens are contiguous, padding may stand on either side.

    Attributes:
        tokens: token ids, int32 [B, S].
        mask: True on real tokens, bool [B, S].
        loss_mask: True on the tokens of the completion (its stop token included), bool [B, S]; None where nobody asks
            where the prompt ends, as scorers do not.
    """

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    loss_mask: Bool[Array, "B S"] | None = None


@chex.dataclass(frozen=True)
class Rollout:
    """Prompts, the responses sampled for them, and the log-probabilities of the tokens taken.

    Attributes:
        prompts: the prompts.
        tokens: response ids, int32 [B, T], right-padded; a stop token is part of the response.
        mask: True through the stop token, bool [B, T].
        logprob: log-probability of each token under the temperature-scaled, unfiltered policy, float32 [B, T]; 0 at
            padding.
        sampling_logprob: the same under the distribution that was sampled from (after top-k, top-p, min-p), float32
            [B, T].
        finished: True where the response ended in a stop token, bool [B].
        own: True where the policy that is trained drew the response (and not its reference, say), bool [B]; None: all.
    """

    prompts: Prompts
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprob: Float[Array, "B T"]
    sampling_logprob: Float[Array, "B T"]
    finished: Bool[Array, " B"]
    own: Bool[Array, " B"] | None = None

    @property
    def own_rows(self) -> Bool[Array, " B"]:
        """`own`, with all rows True where it is None."""
        return jnp.ones(self.finished.shape, bool) if self.own is None else self.own

    @property
    def sequences(self) -> Sequences:
        """Prompt and response side by side, [B, P + T]."""
        return Sequences(
            tokens=jnp.concatenate([self.prompts.tokens, self.tokens], axis=-1),
            mask=jnp.concatenate([self.prompts.mask, self.mask], axis=-1),
        )


@chex.dataclass(frozen=True)
class Demonstrations:
    """Sequences to imitate.

    Attributes:
        tokens: token ids, int32 [B, S].
        mask: True on real tokens, bool [B, S].
        loss_mask: True on the tokens whose log-probability is maximised (the response with its stop token), bool [B,
            S]; never on the first token of a segment, which nothing predicts.
        segments: which of the sequences packed into its row a token belongs to, int32 [B, S], counted from 1; 0 at
            padding. None: every row is one sequence.
    """

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    loss_mask: Bool[Array, "B S"]
    segments: Int[Array, "B S"] | None = None


@chex.dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of whole sequences (prompt and response), the first preferred.

    Attributes:
        chosen: the preferred sequences, [B, S].
        rejected: the other ones, [B, S].
        margin: by how much the reward of the chosen one should exceed the other, float32 [B]; 0 for plain
            Bradley-Terry.
        label: probability that the first is indeed the better one, float32 [B]; None: 1 for all.
        index: which pair of the data each row is, int32 [B], for labels that are kept by pair; None where nobody asks.
    """

    chosen: Sequences
    rejected: Sequences
    margin: Float[Array, " B"]
    label: Float[Array, " B"] | None = None
    index: Int[Array, " B"] | None = None


@chex.dataclass(frozen=True)
class AttributeBatch:
    """Whole sequences (prompt and response) with ratings of K attributes each.

    Attributes:
        sequences: what was rated, [B, S].
        ratings: float32 [B, K]; what stands where nothing is known (NaN included) does not matter.
        known: which ratings there are, bool [B, K].
    """

    sequences: Sequences
    ratings: Float[Array, "B K"]
    known: Bool[Array, "B K"]


@chex.dataclass(frozen=True)
class UnpairedBatch:
    """Single completions that are marked good or bad, and prompts with the completions of other rows.

    Attributes:
        completions: prompts and their completions, [B, S].
        mismatched: each prompt with the completion of the next row (of the last one, the first row's), [B, R]; what the
            policy thinks of answers to something else.
        good: which completions are good, bool [B].
    """

    completions: Sequences
    mismatched: Sequences
    good: Bool[Array, " B"]


@chex.dataclass(frozen=True)
class Score:
    """What a scorer says of a batch of sequences; always float32.

    Attributes:
        mean: the reward estimate, [B].
        features: the vectors that the reward head multiplies, [B, D], for last-layer uncertainty; None if not asked
            for.
        members: the (centred) scores of ensemble members, [M, B]; None for one model.
        own: which sequences the policy that is trained drew, [B], for what is measured over a batch; None: all.
        epistemic: standard deviation of the mean, for what the model was not taught, in units of reward, [B]; None
            where nothing measures it. Of an ensemble it is the standard deviation over members.
        aleatoric: standard deviation of the reward itself, for what the data leave open, [B]; None likewise.
    """

    mean: Float[Array, " B"]
    features: Float[Array, "B D"] | None = None
    members: Float[Array, "M B"] | None = None
    own: Bool[Array, " B"] | None = None
    epistemic: Float[Array, " B"] | None = None
    aleatoric: Float[Array, " B"] | None = None


class Algorithm(NamedTuple):
    """A policy algorithm as three pure functions.

    Attributes:
        init: `init(key, params) -> state`; `params` maps roles to pretrained trees, a role that is absent is
            initialised.
        rollout: `rollout(state, prompts) -> (state, Rollout)`; None for offline algorithms.
        update: `update(state, rollout, rewards) -> (state, metrics)` with rewards [B] or [B, T]; offline:
            `update(state, batch)`.
    """

    init: Callable[..., Any]
    rollout: Callable[..., tuple[Any, Rollout]] | None
    update: Callable[..., tuple[Any, Metrics]]


class Transform(NamedTuple):
    """A reward transform: what is done with a score before a policy is trained on it.

    Attributes:
        init: `init(...) -> state`: the transform's data (coefficients, a geometry, running averages) as a pytree.
        apply: `apply(score, reference, state) -> (rewards [B], state, metrics)`; `reference` is the Score of the
            reference responses to each sequence's prompt (several follow each other), or None. The gold reward is never
            an argument.
    """

    init: Callable[..., Any]
    apply: Callable[[Score, Score | None, Any], tuple[Float[Array, " B"], Any, Metrics]]
