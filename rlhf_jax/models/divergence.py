"""How far a policy is from its reference at every position, over the whole vocabulary and not from samples.

As in `chunked_logprobs`, logits exist for a block of positions at a time; the backward pass computes them again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models.chunked_logprobs import in_blocks, positions_at_once, scaled_logits
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import unembedding_kernel
from rlhf_jax.models.partitioning import by_device, parts_of
from rlhf_jax.types import Params, wide


def hidden_forward_kl(
    states: Float[Array, "B N D"],
    kernel: Float[Array, "rows columns"],
    reference_states: Float[Array, "B N E"],
    reference_kernel: Float[Array, "reference_rows reference_columns"],
    temperature: Float[Array, ""] | float | int = 1.0,
    softcap: float | None = None,
    vocabulary_axis: int = 1,
    block: int | None = None,
) -> Float[Array, "B N"]:
    """KL(reference || policy) of the next token, reference first, from hidden states and unembedding kernels.

        sum_v p_v (log p_v - log q_v),   p = softmax(reference logits / tau),   q = softmax(logits / tau)

    Its gradient with respect to the policy's scaled logits is q - p, so where the two agree it is 0.

    Args:
        states: the policy's hidden states, [B, N, D].
        kernel: the policy's, [D, V], or [V, D] as an embedding is.
        reference_states: the reference's hidden states at the same positions; no gradient flows to them.
        reference_kernel: the reference's; no gradient flows to it.
        temperature: tau > 0.
        softcap: c where logits are c tanh(logits / c); None: they are not capped.
        vocabulary_axis: the axis of the kernels that counts tokens: 1, or 0 for an embedding.
        block: positions of each row at once; None: as many as the two logits fit in the budget of `chunked_logprobs`.
            It does not change the result.

    Returns:
        Nats, [B, N], at least 0 (rounding below is cut off), float32 (float64 for float64 states).

    Raises:
        ValueError: the temperature is a Python number that is not positive.

    Example:
        >>> logits, reference = jnp.log(jnp.array([[[0.25, 0.75]]])), jnp.log(jnp.array([[[0.5, 0.5]]]))
        >>> print(f"{hidden_forward_kl(logits, jnp.eye(2), reference, jnp.eye(2))[0, 0]:.4f}")  # log(4 / 3) / 2
        0.1438
    """
    if isinstance(temperature, float | int) and temperature <= 0:
        raise ValueError(f"temperature is {temperature!r}; it must be positive (greedy choice is a sampler's setting)")
    tau = jnp.asarray(temperature, wide(states))
    reference_states, reference_kernel = jax.lax.stop_gradient((reference_states, reference_kernel))
    kernel = kernel.astype(wide(kernel))  # its gradient adds up over the blocks in this dtype
    if block is None:
        block = positions_at_once(states.shape[0], 2 * kernel.shape[vocabulary_axis])

    def logprobs(states: Float[Array, "B n D"], kernel: Float[Array, "rows columns"]) -> Float[Array, "B n V"]:
        scaled, _ = scaled_logits(softcap, vocabulary_axis, kernel.astype(states.dtype), tau, states)
        return jax.nn.log_softmax(scaled, axis=-1)

    @jax.checkpoint
    def step(_, part):
        states, reference_states = part
        reference = logprobs(reference_states, reference_kernel)
        kl = (jnp.exp(reference) * (reference - logprobs(states, kernel))).sum(axis=-1)
        return (), kl - jax.lax.stop_gradient(jnp.minimum(kl, 0.0))  # not `maximum`, which would cut the gradient off

    return in_blocks(step, (), block, (states, reference_states))[1]


def token_forward_kl(
    config: ModelConfig,
    params: Params,
    reference: Params,
    states: Float[Array, "B N D"],
    reference_states: Float[Array, "B N D"],
    temperature: Float[Array, ""] | float | int = 1.0,
) -> Float[Array, "B N"]:
    """KL(reference || policy) of the next token at every position, from the hidden states of both.

    On a mesh each device walks the rows and positions that it has, and both kernels are gathered once, before the walk;
    where the vocabulary is split, the sums over it are taken over the devices.

    Args:
        config: the shape of both policies.
        params: the policy's parameters.
        reference: the reference's; no gradient flows to them.
        states: the policy's hidden states after the last norm, [B, N, D].
        reference_states: the reference's; no gradient flows to them.
        temperature: tau > 0.

    Returns:
        Nats, [B, N], at least 0, float32 or better.

    Raises:
        ValueError: the temperature is a Python number that is not positive.
    """
    kernel, vocabulary_axis = unembedding_kernel(config, params, states.dtype)
    reference_kernel, _ = unembedding_kernel(config, reference, reference_states.dtype)
    vocabulary = config.vocab_size // parts_of("vocabulary", config.vocab_size)
    rows = states.shape[0] // parts_of("batch", states.shape[0])

    def divergence(states: Array, reference_states: Array, kernel: Array, reference_kernel: Array) -> Array:
        return hidden_forward_kl(
            states,
            kernel,
            reference_states,
            reference_kernel,
            temperature,
            config.logit_softcap,
            vocabulary_axis,
            positions_at_once(rows, 2 * vocabulary),
        )

    return by_device(divergence, (states, reference_states), (kernel, reference_kernel))
