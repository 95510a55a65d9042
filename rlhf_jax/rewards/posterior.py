"""Last-layer posteriors: how uncertain a linear reward head is, by what the preferences have taught it.

Three geometries M say what was seen, and `u(e) = b sqrt(e^T M^{-1} e)` is the standard deviation of the reward of
features e:

- *individual responses*, `lambda I + sum e_c e_c^T + e_r e_r^T` (`ellipsoid.gram` and `ellipsoid.geometry`): AdvPO's,
  in which every response counts alike, compared or not;
- *pair differences*, `lambda I + sum z z^T` with `z = e_c - e_r` (`pair_geometry`): what a comparison can teach, since
  what both responses share cancels;
- *Bradley-Terry Laplace*, `lambda I + sum p (1 - p) z z^T` (`fisher_geometry`): the curvature of the loss at the fitted
  head. With b = 1 the posterior of the head is about `N(phi, M^{-1})`.

Nothing is inverted: M is factored once. `updated` adds pairs to a factor, `draw_heads` turns a posterior into an
ensemble.

Sources: Zhang et al., arXiv:2403.05171 (individual responses); Yang et al., "Bayesian Reward Models for LLM Alignment",
arXiv:2402.13210 (Laplace); RewardUQ, arXiv:2602.24040 (differences, with and without weights).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_head, reward_features
from rlhf_jax.rewards.ellipsoid import Geometry, Mask, Scalar, geometry, gram, solve, uncertainty
from rlhf_jax.types import Params, Score, wide

Number = Scalar | int


@chex.dataclass(frozen=True)
class PosteriorParams:
    """A reward model and the posterior of its head.

    Attributes:
        trunk: its trunk.
        head: its head, `{"kernel": [D], "bias": []}`, the mean of the posterior.
        geometry: M, factored; of the same trunk, features and chat template as the scores.
        radius: b; 1 for a Laplace posterior, else from `last_layer.radius_from`, float32 [].
        offset: mean score on reference samples, float32 []; 0 leaves the zero where training put it.
    """

    trunk: Params
    head: Params
    geometry: Geometry
    radius: Float[Array, ""]
    offset: Float[Array, ""]


def pair_geometry(
    chosen: Float[Array, "N D"],
    rejected: Float[Array, "N D"],
    regularisation: Number,
    mask: Mask | None = None,
) -> Geometry:
    """The geometry of pair differences, `M = lambda I + sum_i z_i z_i^T` with `z = e_chosen - e_rejected`.

    Which of the two is preferred does not matter, and what a prompt adds to the features of both cancels.

    Args:
        chosen: features of the preferred responses, [N, D].
        rejected: features of the other ones, [N, D].
        regularisation: lambda, at least 0, in squared units of the features.
        mask: pairs that count, [N]; None: all.

    Returns:
        The geometry. Under `jit`, where it cannot raise, a singular matrix gives NaN or no meaning.

    Raises:
        ValueError: M is singular in the precision of the features.

    Source: arXiv:2602.24040.

    Example:
        >>> pair_geometry(jnp.array([[4.0, 1.0]]), jnp.array([[0.0, 1.0]]), 9.0).cholesky.tolist()
        [[5.0, 0.0], [0.0, 3.0]]
    """
    return _factored(_differences(chosen, rejected), regularisation, mask, "covariance of the differences")


def fisher_geometry(
    chosen: Float[Array, "N D"],
    rejected: Float[Array, "N D"],
    head: Params,
    regularisation: Number,
    mask: Mask | None = None,
) -> Geometry:
    """The Laplace approximation of a Bradley-Terry head: its Fisher information and prior.

        M = lambda I + sum_i p_i (1 - p_i) z_i z_i^T,   z = e_chosen - e_rejected,   p = sigmoid(z . phi)

    M is the Hessian of `sum_i -log sigmoid(z_i . phi) + lambda/2 ||phi||^2`. Labels do not enter it but through phi, so
    it is the same for soft or smoothed labels.

    Args:
        chosen: features of the preferred responses, [N, D].
        rejected: features of the other ones, [N, D].
        head: phi as `{"kernel": [D], ...}`, fitted on these pairs.
        regularisation: lambda, the precision of the prior of phi: the coefficient of `||phi||^2 / 2` beside the
            *summed* loss (N times that beside the mean loss).
        mask: pairs that count, [N]; None: all.

    Returns:
        The geometry; the posterior is `N(phi, M^{-1})`, radius 1. Under `jit`, see `pair_geometry`.

    Raises:
        ValueError: M is singular in the precision of the features.

    Source: arXiv:2402.13210.

    Example:
        >>> flat = {"kernel": jnp.zeros(2)}  # p (1 - p) = 1/4
        >>> fisher_geometry(jnp.array([[8.0, 0.0]]), jnp.zeros((1, 2)), flat, 9.0).cholesky.tolist()
        [[5.0, 0.0], [0.0, 3.0]]
    """
    differences = _differences(chosen, rejected)
    kernel = head["kernel"].astype(differences.dtype)
    margins = jnp.matmul(differences, kernel, precision="highest")
    weights = jax.nn.sigmoid(margins) * jax.nn.sigmoid(-margins)
    weighted = jnp.sqrt(weights)[:, None] * differences
    return _factored(weighted, regularisation, mask, "Fisher information of the head")


def updated(geometry: Geometry, rows: Float[Array, "K D"]) -> Geometry:
    """The geometry of `M + sum_k e_k e_k^T`, from the factor of M: new data without the old.

    Give differences of pairs for `pair_geometry`, `sqrt(p (1 - p))` times them for `fisher_geometry`, responses for
    `ellipsoid.geometry`. One Householder reflection a column folds the rows into the factor, O(K D^2), and nothing is
    subtracted: M stays positive definite, and rounding does not build up as it does in an updated inverse.

    Args:
        geometry: of what was seen before.
        rows: K new rows, [K, D].

    Returns:
        The geometry, with a positive diagonal as `jnp.linalg.cholesky` gives it.

    Example:
        >>> seen = updated(Geometry(cholesky=jnp.diag(jnp.array([3.0, 1.0]))), jnp.array([[4.0, 0.0]]))
        >>> seen.cholesky.tolist()
        [[5.0, 0.0], [0.0, 1.0]]
    """
    dtype = geometry.cholesky.dtype
    one, two = jnp.asarray(1.0, dtype), jnp.asarray(2.0, dtype)

    def fold(
        place: Int[Array, ""], folded: tuple[Float[Array, "D D"], Float[Array, "K D"]]
    ) -> tuple[Float[Array, "D D"], Float[Array, "K D"]]:
        # The reflection along (first, rest) takes (pivot, column of the rows) to (length, 0).
        upper, rows = folded
        pivot, rest = upper[place, place], rows[:, place]
        squared = jnp.square(rest).sum()
        first = -squared / (pivot + jnp.sqrt(jnp.square(pivot) + squared))
        scale = jnp.where(squared > 0.0, two / jnp.where(squared > 0.0, jnp.square(first) + squared, one), 0.0)
        along = scale * (first * upper[place] + jnp.matmul(rest, rows, precision="highest"))
        return upper.at[place].add(-first * along), rows - rest[:, None] * along[None, :]

    upper, _ = jax.lax.fori_loop(0, geometry.cholesky.shape[0], fold, (geometry.cholesky.T, rows.astype(dtype)))
    return Geometry(cholesky=jnp.tril(upper.T))


def whitened(params: PosteriorParams, features: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Features in units of their uncertainty, `b L^{-1} e`.

    Their length is the deviation of a reward, `b sqrt(e^T M^{-1} e)`, and the length of the difference of two of them
    that of a margin: responses are scored by one head, so that what their features share cancels.

    Args:
        params: M and b.
        features: those that the head multiplies, [*N, D].
    """
    found = solve(params.geometry, features)
    return params.radius.astype(found.dtype) * found


def draw_heads(key: Array, head: Params, geometry: Geometry, radius: Number, count: int) -> Params:
    """Heads drawn from the posterior, `phi_m = phi + b L^{-T} z_m` with standard normal z: a linear ensemble.

    The scores of features e over such heads have mean `phi . e + c` and standard deviation `b sqrt(e^T M^{-1} e)`, so
    that rules which need members (worst case) can be used. All have the same bias.

    Args:
        key: a typed key.
        head: `{"kernel": [D], "bias": []}`.
        geometry: M.
        radius: b.
        count: heads to draw, at least 1.

    Returns:
        `{"kernel": [count, D], "bias": [count]}`, for `linear_ensemble.LinearEnsembleParams`.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} heads cannot be drawn; give at least 1.")
    dtype = wide(head["kernel"], geometry.cholesky)
    noise = jax.random.normal(key, (count, geometry.cholesky.shape[0]), dtype)
    away = jnp.asarray(radius, dtype) * solve(geometry, noise, transpose=True)
    return {
        "kernel": head["kernel"].astype(dtype)[None, :] + away,
        "bias": jnp.broadcast_to(head["bias"].astype(dtype), (count,)),
    }


def posterior_scorer(config: ModelConfig, features: Literal["final_norm", "pre_norm"] = "final_norm"):
    """A scorer of one reward model and the posterior of its head.

    `score(PosteriorParams, tokens, mask) -> Score(mean, features, epistemic)` with
    `epistemic = b sqrt(e^T M^{-1} e)`; beside the trunk it costs one triangular solve, O(B D^2).

    Args:
        config: shape of the trunk.
        features: what the head reads, see `models.heads.reward_features`; the geometry must be of the same.
    """

    def score(params: PosteriorParams, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Score:
        vectors = reward_features(config, params.trunk, tokens, mask, features)
        return Score(
            mean=apply_head(params.head, vectors) - params.offset,
            features=vectors,
            epistemic=uncertainty(params.geometry, vectors, params.radius),
        )

    return score


def _differences(chosen: Float[Array, "N D"], rejected: Float[Array, "N D"]) -> Float[Array, "N D"]:
    dtype = wide(chosen, rejected)
    return chosen.astype(dtype) - rejected.astype(dtype)


def _factored(rows: Float[Array, "N D"], regularisation: Number, mask: Mask | None, name: str) -> Geometry:
    """The geometry of these rows; one sentence where their matrix is singular."""
    try:
        found = geometry(gram(rows, mask), jnp.asarray(regularisation, rows.dtype))
        singular = not isinstance(found.cholesky, jax.core.Tracer) and _is_noise(found.cholesky)
    except ValueError:
        singular = True
    if singular:
        raise ValueError(
            f"the {name} of {rows.shape[0]} pairs and {rows.shape[1]} features is singular in {rows.dtype} with "
            f"regularisation {float(regularisation)}: raise the regularisation."
        )
    return found


def _is_noise(cholesky: Float[Array, "D D"]) -> bool:
    """Whether a pivot is no larger than the rounding of the diagonal that it was subtracted from."""
    pivots, diagonal = jnp.square(jnp.diagonal(cholesky)), jnp.square(cholesky).sum(axis=1)
    return bool((pivots <= 8.0 * jnp.finfo(cholesky.dtype).eps * diagonal).any())
