"""Preference as reward (PAR): how often a response beats reference responses to its prompt, by the reward model.

A Bradley-Terry model knows differences of rewards alone, and the probability that it gives to "this response is
preferred to that one" is bounded: past a clear win nothing more is gained, so a policy has little reason to chase ever
larger scores.
"""

import jax
from jaxtyping import Array, Float

from rlhf_jax.rewards.transforms import report
from rlhf_jax.types import Metrics, Score, Transform


def par() -> Transform:
    """The mean probability of being preferred to R reference responses to the same prompt; `init()` takes nothing.

        r_par = (1 / R) sum_m sigmoid(r - r_ref,m),  between 0 and 1

    References are responses of the initial policy, so that it begins near 1/2. A constant added to the reward model's
    scores of a prompt changes nothing. `reference` has R rows a response, which follow each other; `compose` sees to
    that where several responses share a prompt. Nothing is measured as `uncertainty/mean`, which is NaN.

    Raises (when traced):
        ValueError: there is no reference, or not the same number for every response.

    Source: Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF" (arXiv:2502.18770).

    Example:
        >>> import jax.numpy as jnp
        >>> transform = par()
        >>> score, reference = Score(mean=jnp.array([1.0])), Score(mean=jnp.array([1.0, 1.0 - jnp.log(3.0)]))
        >>> f"{transform.apply(score, reference, transform.init())[0][0]:.4f}"  # (1/2 + 3/4) / 2
        '0.6250'
    """

    def init() -> tuple[()]:
        return ()

    def apply(score: Score, reference: Score | None, state: tuple[()]) -> tuple[Float[Array, " B"], tuple[()], Metrics]:
        if reference is None:
            raise ValueError("par compares with reference responses: pass their Score.")
        responses, references = len(score.mean), len(reference.mean)
        if references % responses:
            raise ValueError(f"par has {references} reference responses for {responses} responses: give each as many.")
        margins = score.mean[:, None] - reference.mean.reshape(responses, -1)
        rewards = jax.nn.sigmoid(margins).mean(axis=1)
        return rewards, state, report(score, rewards, None)

    return Transform(init, apply)
