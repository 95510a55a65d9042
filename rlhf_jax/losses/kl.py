"""The divergence of a policy from its reference: estimates from samples, and controllers of its coefficient."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.types import at_least_float32

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are held within this of 0 before they are exponentiated, here and in the other losses."""


def kl_estimate(
    logprob: Float[Array, "*batch"],
    reference_logprob: Float[Array, "*batch"],
    kind: Literal["k1", "k2", "k3"],
) -> Float[Array, "*batch"]:
    """Estimate of KL(policy || reference) from the log-probabilities of tokens sampled from the policy.

    With d = log pi(y) - log ref(y), y sampled from pi:

    | kind | formula          | its mean is                      | mean of its gradient through log pi, y held fixed |
    |------|------------------|----------------------------------|---------------------------------------------------|
    | `k1` | d                | KL(pi, ref); noisy, can be < 0   | 0                                                 |
    | `k2` | d^2 / 2          | close to KL(pi, ref) when small  | grad KL(pi, ref)                                  |
    | `k3` | exp(-d) - 1 + d  | KL(pi, ref); never < 0           | grad KL(ref, pi)                                  |

    So k1 belongs in the reward; in a loss, k2 gives the gradient of KL(pi, ref) and k3 that of the opposite divergence
    (as in GRPO). In k3, d is held at or above -20, so that the exponential stays finite: below, its gradient is 0.

    Args:
        logprob: log-probabilities of the tokens under the policy, [...], nats.
        reference_logprob: the same under the reference, [...]; no gradient flows to it.
        kind: which estimate.

    Returns:
        Per-token estimates, [...], nats; float32 for bfloat16 and float16 input.

    Raises:
        ValueError: the kind is unknown.

    Source: Schulman 2020, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html).

    Example:
        >>> import jax.numpy as jnp
        >>> logprob, reference = jnp.array([-1.0]), jnp.array([-1.5])
        >>> [f"{kl_estimate(logprob, reference, kind)[0]:.4f}" for kind in ("k1", "k2", "k3")]
        ['0.5000', '0.1250', '0.1065']
    """
    difference = at_least_float32(logprob) - at_least_float32(jax.lax.stop_gradient(reference_logprob))
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        difference = jnp.maximum(difference, -LARGEST_LOG_RATIO)
        return jnp.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimate {kind!r}: choose one of k1, k2, k3")


class KLController(NamedTuple):
    """How the coefficient of the KL penalty changes with the divergence that is measured.

    The state is the coefficient itself, a float32 scalar array, so that a study can batch over it.

    Attributes:
        init: `init() -> coefficient`.
        update: `update(coefficient, kl, n) -> coefficient`, with kl the mean divergence of a sequence (its tokens
            summed, in nats) and n the number of sequences it was measured on.
    """

    init: Callable[[], Float[Array, ""]]
    update: Callable[..., Float[Array, ""]]


def fixed_kl(coefficient: Float[Array, ""] | float | int) -> KLController:
    """A coefficient that stays what it is.

    Args:
        coefficient: reward units a nat.

    Returns:
        A controller whose update changes nothing.

    Raises:
        ValueError: the coefficient is a negative Python number.

    Example:
        >>> import jax.numpy as jnp
        >>> controller = fixed_kl(0.05)
        >>> print(f"{controller.update(controller.init(), jnp.array(7.0), 64):.2f}")
        0.05
        >>> fixed_kl(-0.05)
        Traceback (most recent call last):
            ...
        ValueError: the KL coefficient is -0.05, which rewards divergence; give 0 or more
    """
    _check_coefficient(coefficient)

    def init() -> Float[Array, ""]:
        return jnp.asarray(coefficient, dtype=jnp.float32)

    def update(
        coefficient: Float[Array, ""], kl: Float[Array, ""] | float, n: Float[Array, ""] | Int[Array, ""] | float | int
    ) -> Float[Array, ""]:
        del kl, n
        return coefficient

    return KLController(init, update)


def adaptive_kl(
    coefficient: Float[Array, ""] | float | int,
    target: Float[Array, ""] | float | int,
    horizon: Float[Array, ""] | float | int,
) -> KLController:
    """A coefficient that rises while the divergence is above a target and falls while it is below.

        e = clip(kl / target - 1, -0.2, 0.2);  coefficient <- coefficient (1 + e n / horizon)

    Args:
        coefficient: where it starts, reward units a nat.
        target: the divergence aimed at, nats a sequence.
        horizon: number of sequences over which an error of e changes the coefficient by the factor 1 + e; not below n.

    Returns:
        A controller; its state is the coefficient.

    Raises:
        ValueError: target or horizon is a Python number that is not positive, or the coefficient a negative one.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> controller = adaptive_kl(0.1, target=6.0, horizon=1000)
        >>> print(f"{controller.update(controller.init(), jnp.array(12.0), 100):.4f}")  # 0.1 (1 + 0.2 / 10)
        0.1020
    """
    _check_coefficient(coefficient)
    for name, value in (("target", target), ("horizon", horizon)):
        if isinstance(value, float | int) and not value > 0:
            raise ValueError(f"the {name} of an adaptive KL coefficient is {value!r}; it must be positive")

    def init() -> Float[Array, ""]:
        return jnp.asarray(coefficient, dtype=jnp.float32)

    def update(
        coefficient: Float[Array, ""], kl: Float[Array, ""] | float, n: Float[Array, ""] | Int[Array, ""] | float | int
    ) -> Float[Array, ""]:
        dtype = coefficient.dtype
        error = jnp.clip(jnp.asarray(kl, dtype=dtype) / target - 1.0, -0.2, 0.2)
        return coefficient * (1.0 + error * jnp.asarray(n, dtype=dtype) / horizon)

    return KLController(init, update)


def _check_coefficient(coefficient: Float[Array, ""] | float | int) -> None:
    if isinstance(coefficient, float | int) and not coefficient >= 0:
        raise ValueError(f"the KL coefficient is {coefficient!r}, which rewards divergence; give 0 or more")
