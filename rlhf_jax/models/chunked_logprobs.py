"""Log-probabilities and entropies of tokens from hidden states, without logits of all positions.

With a vocabulary of V tokens, the logits of a batch are the largest array there is: [B, N, V]. Here they exist for a
block of positions at a time. The forward pass keeps the log-normaliser and the entropy of each position; the backward
pass computes a block's logits again, once, and has its gradient in closed form. With s = logits / tau, capped where the
model caps them, p = softmax(s) and H the entropy of p,

    d log p(y) / d s_v = [v = y] - p_v
    d H / d s_v        = -p_v (log p_v + H)
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import wide

LOGITS_AT_ONCE = 2**26
"""The largest block of logits that a device holds, in elements: 256 MiB in float32."""


def positions_at_once(rows: int, vocabulary: int) -> int:
    """Positions of each row whose logits fit the budget together; at least 1.

    Args:
        rows: rows of the batch that a device holds.
        vocabulary: tokens of the vocabulary that it holds.

    Example:
        >>> positions_at_once(rows=2, vocabulary=2**17)
        256
    """
    return max(1, LOGITS_AT_ONCE // (rows * vocabulary))


def hidden_logprob(
    states: Float[Array, "B N D"],
    kernel: Float[Array, "rows columns"],
    targets: Int[Array, "B N"],
    temperature: Float[Array, ""] | float | int = 1.0,
    softcap: float | None = None,
    vocabulary_axis: int = 1,
    block: int | None = None,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Log-probability of given tokens, and the entropy, under softmax(states . kernel / temperature).

    Logits are finite: nothing here masks a token. Reverse-mode gradients only.

    Args:
        states: the hidden states that predict the targets, [B, N, D]; products are taken in their dtype and accumulated
            in at least float32.
        kernel: [D, V], or [V, D] as an embedding is.
        targets: token ids in [0, V), int [B, N].
        temperature: tau > 0.
        softcap: c where logits are c tanh(logits / c); None: they are not capped.
        vocabulary_axis: the axis of the kernel that counts tokens: 1, or 0 for an embedding.
        block: positions of each row at once; None: as many as `LOGITS_AT_ONCE` holds. It does not change the result.

    Returns:
        Log-probabilities and entropies in nats, [B, N] each, float32 (float64 for float64 states).

    Raises:
        ValueError: the temperature is a Python number that is not positive, or the kernel does not fit the states.

    Example:
        >>> kernel = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
        >>> logprob, entropy = hidden_logprob(jnp.ones((1, 1, 1)), kernel, jnp.array([[1]]))
        >>> print(f"{logprob[0, 0]:.4f} {entropy[0, 0]:.4f}")  # log 1/4, 1.5 log 2
        -1.3863 1.0397
    """
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature is {temperature!r}; it must be positive (greedy choice is a sampler's setting)")
    if kernel.shape[1 - vocabulary_axis] != states.shape[-1]:
        raise ValueError(
            f"a kernel {list(kernel.shape)} whose axis {vocabulary_axis} counts tokens does not multiply states of "
            f"width {states.shape[-1]}: give [D, V] with vocabulary_axis=1, or [V, D] with vocabulary_axis=0."
        )
    if block is None:
        block = positions_at_once(states.shape[0], kernel.shape[vocabulary_axis])
    return _scores(softcap, vocabulary_axis, block, states, kernel, targets, jnp.asarray(temperature, wide(states)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scores(softcap, vocabulary_axis, block, states, kernel, targets, temperature):
    return _scores_forward(softcap, vocabulary_axis, block, states, kernel, targets, temperature)[0]


def _scores_forward(softcap, vocabulary_axis, block, states, kernel, targets, temperature):
    scale = partial(scaled_logits, softcap, vocabulary_axis, kernel.astype(states.dtype), temperature)

    def step(_, part):
        states, targets = part
        scaled, _ = scale(states)
        top = scaled.max(axis=-1)
        shifted = scaled - top[..., None]
        weights = jnp.exp(shifted)
        total = weights.sum(axis=-1)
        taken = jnp.where(_is_target(scaled, targets), shifted, 0.0).sum(axis=-1)
        entropy = jnp.log(total) - (weights * shifted).sum(axis=-1) / total
        return (), (taken - jnp.log(total), entropy, top + jnp.log(total))

    _, (logprob, entropy, normaliser) = in_blocks(step, (), block, (states, targets))
    return (logprob, entropy), (states, kernel, targets, temperature, normaliser, entropy)


def _scores_backward(softcap, vocabulary_axis, block, kept, cotangents):
    states, kernel, targets, temperature, normaliser, entropy = kept
    factor, accumulate = kernel.astype(states.dtype), wide(states)
    scale = partial(scaled_logits, softcap, vocabulary_axis, factor, temperature)

    def step(kernel_gradient, part):
        states, targets, normaliser, entropy, by_logprob, by_entropy = part
        scaled, slope = scale(states)
        logprobs = scaled - normaliser[..., None]
        probabilities = jnp.exp(logprobs)
        missing = _is_target(scaled, targets).astype(accumulate) - probabilities
        spread = probabilities * (logprobs + entropy[..., None])
        by_scaled = by_logprob[..., None] * missing - by_entropy[..., None] * spread
        by_temperature = -(by_scaled * scaled).sum(axis=-1) / temperature
        by_product = (by_scaled * slope / temperature).astype(states.dtype)
        into = ("bnv,bnd->dv", "bnv,bnd->vd")[1 - vocabulary_axis]
        kernel_gradient += jnp.einsum(into, by_product, states, preferred_element_type=accumulate)
        back = ("bnv,dv->bnd", "bnv,vd->bnd")[1 - vocabulary_axis]
        by_states = jnp.einsum(back, by_product, factor, preferred_element_type=accumulate)
        return kernel_gradient, (by_states.astype(states.dtype), by_temperature)

    start = jnp.zeros(kernel.shape, accumulate)
    parts = (states, targets, normaliser, entropy, *cotangents)
    by_kernel, (by_states, by_temperature) = in_blocks(step, start, block, parts)
    return by_states, by_kernel.astype(kernel.dtype), None, by_temperature.sum()


_scores.defvjp(_scores_forward, _scores_backward)


def scaled_logits(softcap, vocabulary_axis, kernel, temperature, states):
    """Capped logits over the temperature, [B, n, V], and the slope of the cap at each."""
    product = ("bnd,dv->bnv", "bnd,vd->bnv")[1 - vocabulary_axis]
    logits = jnp.einsum(product, states, kernel, preferred_element_type=wide(states))
    if softcap is None:
        return logits / temperature, jnp.ones((), logits.dtype)
    bounded = jnp.tanh(logits / softcap)
    return softcap * bounded / temperature, 1.0 - jnp.square(bounded)


def _is_target(scores: Float[Array, "B n V"], targets: Int[Array, "B n"]) -> Bool[Array, "B n V"]:
    """True at the target of each position; unlike an index, a comparison stays local where the vocabulary is split."""
    return jax.lax.broadcasted_iota(targets.dtype, scores.shape, 2) == targets[..., None]


def in_blocks(step: Callable, carry, block: int, arrays: tuple[Array, ...]):
    """`step(carry, arrays) -> (carry, outputs)` on one block of positions after another; outputs are put together.

    The last block is filled up with zeros, whose outputs are dropped.
    """
    length = arrays[0].shape[1]
    count = max(1, -(-length // block))
    if count == 1:
        return step(carry, arrays)
    size = -(-length // count)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, count * size - length)] + [(0, 0)] * (array.ndim - 2))
        return rearrange(padded, "b (count n) ... -> count b n ...", count=count)

    carry, outputs = jax.lax.scan(step, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(lambda out: rearrange(out, "count b n ... -> b (count n) ...")[:, :length], outputs)
