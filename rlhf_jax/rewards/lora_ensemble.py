"""An ensemble of low-rank adapters on one frozen trunk: members with features of their own, for little memory.

Every member is an adapter and a head; the kernels of the base are held once. `algorithms.ensemble_modeling` trains the
members, on a base that was trained as a reward model before.

Source: Zhang et al., "Improving Reinforcement Learning from Human Feedback with Efficient Reward Model Ensemble",
arXiv:2401.16635 (LoRA-based ensemble); the diversity term: Zhai et al., "Uncertainty-Penalized Reinforcement Learning
from Human Feedback with Diverse Reward LoRA Ensembles", arXiv:2401.00243.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.adapters import Adapter, AdapterConfig, attach
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, reward_features
from rlhf_jax.rewards.bradley_terry import member_score
from rlhf_jax.types import Params, Score, at_least_float32


@chex.dataclass(frozen=True)
class LoRAEnsembleParams:
    """One frozen trunk, and M adapters and heads.

    Attributes:
        base: `{"trunk": tree}`, which all members share.
        adapters: an adapter of the base whose leaves have the M members on axis 0.
        heads: `{"kernel": [M, D], "bias": [M]}`.
        offset: mean score of each member on reference samples, from `ensemble.member_offset`, float32 [M].
    """

    base: Params
    adapters: Adapter
    heads: Params
    offset: Float[Array, " M"]


def lora_ensemble_scorer(
    config: ModelConfig,
    adapter: AdapterConfig,
    features: Literal["final_norm", "pre_norm"] = "final_norm",
    lead: int | None = None,
):
    """A scorer of M adapters on one trunk.

    `score(LoRAEnsembleParams, tokens, mask) -> Score(mean, features, members, epistemic)`. The trunk runs once a
    member, but its kernels are read and stored once for all of them.

    Args:
        config: shape of the trunk.
        adapter: the configuration that the adapters were made with.
        features: what the heads read, see `models.heads.reward_features`.
        lead: the member whose score is `mean` and whose features are returned; None: `mean` is the average over
            members and there are no features, as each member has its own.
    """

    def score(params: LoRAEnsembleParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        def member(one: Adapter, head: Params) -> tuple[Float[Array, " B"], Float[Array, "B D"]]:
            trunk = attach(params.base, one, adapter)["trunk"]
            vectors = reward_features(config, trunk, tokens, mask, features)
            return apply_head(head, vectors), vectors

        scores, vectors = jax.vmap(member)(params.adapters, params.heads)
        return member_score(scores, vectors, params.offset, lead)

    return score


def nuclear_diversity(adapters: Adapter) -> Float[Array, ""]:
    """How far the input matrices of M adapters span different spaces: `sum_{t,l} ||[A_1 | … | A_M]||_*`.

    The nuclear norm (the sum of the singular values) of the members' matrices `a` [I, R] side by side, [I, M R], summed
    over targets t and layers l. At given lengths of the columns it is largest where all are orthogonal, and smallest
    where they are parallel. UP-RLHF subtracts it from the loss. It is homogeneous: longer columns raise it as well, so
    a large weight lets the matrices grow without end.

    The gradient is U V^T of the singular value decomposition, which is finite at singular values that are 0 or equal.

    Args:
        adapters: adapters of a kind with `a`, their leaves [M, L, …].

    Returns:
        The norm, in at least float32.

    Raises:
        ValueError: a target without `a`.

    Source: arXiv:2401.00243.

    Example:
        >>> same, other = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
        >>> parallel, orthogonal = jnp.stack([same, same]), jnp.stack([same, other])
        >>> [f"{nuclear_diversity({'query': {'a': a[:, None]}}):.4f}" for a in (parallel, orthogonal)]
        ['1.4142', '2.0000']
    """
    bare = [target for target, leaves in adapters.items() if "a" not in leaves]
    if bare or not adapters:
        raise ValueError(f"the nuclear norm needs the leaves a, which targets {bare} do not have; use kind lora.")

    def norm(a: Float[Array, "M L I R"]) -> Float[Array, ""]:
        members, layers, inputs, rank = a.shape
        joined = at_least_float32(a).transpose(1, 2, 0, 3).reshape(layers, inputs, members * rank)
        return jnp.linalg.svd(joined, full_matrices=False, compute_uv=False).sum()

    return sum(norm(leaves["a"]) for leaves in adapters.values())
