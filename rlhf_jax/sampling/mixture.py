"""Responses from the mixture of two policies: both read every token that is drawn from what they say together."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import draw_all
from rlhf_jax.types import Params, Prompts, Rollout


def generate_mixture(
    config: ModelConfig,
    params: Params,
    other: Params,
    eta: Float[Array, ""] | float,
    prompts: Prompts,
    key: Array,
    sampling: SamplingConfig,
) -> Rollout:
    """Samples one response a prompt from the geometric mixture of two policies, token by token.

        mixture(a | s) = policy(a | s)^(1 - eta) other(a | s)^eta / Z(s)

    for the token a after the tokens s; Z(s) is found anew for every s, so this is not the mixture of whole responses.
    Both policies are at the temperature of `sampling`; its filters act on their mixture.

    Args:
        config: the shape of both policies.
        params: one policy's tree.
        other: the other's tree.
        eta: the other's weight, from 0 (the samples of `generate` with `params`) to 1 (those with `other`).
        prompts: as in `generate`.
        key: as in `generate`.
        sampling: as in `generate`.

    Returns:
        The rollout. Its `logprob` is the log-probability of each token under the mixture, unfiltered: that of neither
        policy.

    Raises:
        ValueError: as `generate`, or `eta` is a Python number outside [0, 1].

    Source: Munos et al. 2023 (arXiv:2312.00886), the one-step form of their regularised policy.
    """
    check_eta(eta)

    def mix(own: Float[Array, "B V"], others: Float[Array, "B V"]) -> Float[Array, "B V"]:
        weight = jnp.asarray(eta, own.dtype)
        return (1.0 - weight) * own + weight * others  # the logarithms, up to a constant a row

    return draw_all(config, (params, other), mix, prompts, key, sampling)


def check_eta(eta: Float[Array, ""] | float) -> None:
    """Refuses a weight of a mixture that is a Python number outside [0, 1].

    Raises:
        ValueError: it is.
    """
    if isinstance(eta, float | int) and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; give the second policy a weight from 0 to 1.")
