"""Last-layer uncertainty of a linear reward head, and AdvPO: the worst head inside its confidence ellipsoid.

A reward `r = e . phi + c` was fitted on responses with features `e`; `ellipsoid` says what the fit has seen. Here are
the ellipsoid's radius, the head in it that is worst for a policy, and the two transforms that use them.

The way of a batch: `gram -> geometry -> advpo().init(geometry, radius) -> apply(score, reference, state)`.

Source: Zhang et al., "Overcoming Reward Overoptimization via Adversarial Policy Optimization with Lightweight
Uncertainty Estimation", arXiv:2403.05171.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.rewards.ellipsoid import (
    Geometry,
    Scalar,
    geometry,
    gram,
    leverage,
    qr_factor,
    solve,
    uncertainty,
)
from rlhf_jax.rewards.posterior import fisher_geometry
from rlhf_jax.rewards.transforms import report
from rlhf_jax.types import Metrics, Score, Transform, wide

__all__ = [
    "AdversarialState", "Geometry", "SamplewiseState", "adversarial_direction", "advpo", "displacement", "geometry",
    "gram", "leverage", "qr_factor", "radius_from", "samplewise", "solve", "statistical_scale", "uncertainty",
]  # fmt: skip

RESCALE_DECAY = 0.99


@chex.dataclass(frozen=True)
class AdversarialState:
    """The data of AdvPO.

    Attributes:
        geometry: the ellipsoid's shape, from the reward model's training features.
        radius: b, the ellipsoid's radius, [].
        displacement: uncorrected moving average of the mean displacement, [D]; None without `ema`.
        scale: uncorrected moving average of std(r) / std(r_adv), []; None without `rescale`.
        steps: batches seen, int32 [].
    """

    geometry: Geometry
    radius: Float[Array, ""]
    displacement: Float[Array, " D"] | None
    scale: Float[Array, ""] | None
    steps: Int[Array, ""]


@chex.dataclass(frozen=True)
class SamplewiseState:
    """The data of the sample-wise penalty.

    Attributes:
        geometry: the ellipsoid's shape.
        radius: b, [].
        offset: mean uncertainty on reference samples, [].
    """

    geometry: Geometry
    radius: Float[Array, ""]
    offset: Float[Array, ""]


def displacement(
    features: Float[Array, "B D"],
    reference_features: Float[Array, "R D"] | None = None,
    own: Bool[Array, " B"] | None = None,
) -> Float[Array, " D"]:
    """The mean displacement `g = mean e - mean e_ref` (without a reference `g = mean e`), float32 [D].

    Of sequences that are not the policy's `own` the features are left out.

    It is one vector for the *whole* batch: under `jit` with a sharded batch axis the means are over all devices; under
    `pmap`- or `shard_map`-style code, average over the mesh first, as means on each device are another algorithm.
    """
    mean = features.astype(wide(features)).mean(axis=0, where=None if own is None else own[:, None])
    return mean if reference_features is None else mean - displacement(reference_features).astype(mean.dtype)


def adversarial_direction(
    geometry: Geometry, displacement: Float[Array, " D"], radius: Scalar, eps: float = 1e-6
) -> Float[Array, " D"]:
    """How far the worst head in the ellipsoid stands from the fitted one, `v = b M^{-1} g / ||g||_{M^{-1}}`.

    The minimiser of `phi . g` over `||phi - phi_hat||_M <= b` is `phi_adv = phi_hat - v`, and the minimum is
    `phi_hat . g - b ||g||_{M^{-1}}`.

    Args:
        geometry: of the reward model's training features.
        displacement: g, [D].
        radius: b.
        eps: where `||g||_{M^{-1}}` is below it, v is zero.

    Returns:
        v, [D], with `||v||_M = b` (or 0).

    Example:
        >>> unit = geometry(jnp.zeros((2, 2)), 1.0)
        >>> adversarial_direction(unit, jnp.array([3.0, 4.0]), 5.0).tolist()
        [3.0, 4.0]
    """
    direction = solve(geometry, displacement)
    multiplier = _multiplier(jnp.linalg.norm(direction), radius, eps)
    return multiplier * solve(geometry, direction, transpose=True)


def statistical_scale(
    gram: Float[Array, "D D"],
    features_chosen: Float[Array, "N D"],
    features_rejected: Float[Array, "N D"],
    head: Float[Array, " D"],
    l2: Scalar,
    regularisation: Scalar = 0.0,
) -> Float[Array, ""]:
    """The natural unit of the squared radius, `B_cal = tr(M H^{-1})`.

    About `E ||phi_hat - phi*||_M^2` of a head fitted on the pairs.

    `H = sum_i p_i (1 - p_i) z_i z_i^T + l2 I` with `z = e_chosen - e_rejected` and `p = sigmoid(z . phi)` is the Fisher
    information of the Bradley-Terry fit.

    Args:
        gram: Gram matrix of chosen and rejected features, [D, D].
        features_chosen: [N, D].
        features_rejected: [N, D].
        head: phi, [D].
        l2: coefficient of the quadratic penalty `l2/2 ||phi||^2` on the *summed* loss that the head was fitted with.
        regularisation: the lambda that the geometry was built with, so that `M = regularisation I + gram`.

    Returns:
        B_cal, a squared radius, [].

    Raises:
        ValueError: H is singular in the precision of the features.
    """
    dtype = wide(features_chosen, head, gram)
    chosen, rejected = features_chosen.astype(dtype), features_rejected.astype(dtype)
    fisher = fisher_geometry(chosen, rejected, {"kernel": head}, l2)
    matrix = gram.astype(dtype) + jnp.asarray(regularisation, dtype) * jnp.eye(gram.shape[0], dtype=dtype)
    return jnp.trace(jax.scipy.linalg.cho_solve((fisher.cholesky, True), matrix))


def radius_from(
    value: Float[Array, "*lanes"] | float | None = None,
    multiple: Float[Array, "*lanes"] | float | None = None,
    scale: Scalar | None = None,
) -> Float[Array, "*lanes"]:
    """The radius `b = sqrt(B)` of the ellipsoid from its squared radius B, given one of two ways.

    B is not portable between feature sets: a value found for one reward model means another confidence for the next. A
    multiple of `statistical_scale` carries over; sweep it on a logarithmic grid.

    Args:
        value: B itself (the paper searches 1, 5, 10, 15); an array gives as many radii.
        multiple: B as a multiple of `scale`.
        scale: B_cal, from `statistical_scale`.

    Returns:
        b, in the shape of `value` or `multiple`.

    Raises:
        ValueError: neither or both ways are given, or a B that is known is negative.

    Example:
        >>> float(radius_from(value=9.0)), float(radius_from(multiple=2.0, scale=8.0))
        (3.0, 4.0)
    """
    if (value is None) == (multiple is None) or (multiple is None) != (scale is None):
        raise ValueError("Give the squared radius B exactly one way: value=B, or multiple= together with scale=B_cal.")
    squared = value if multiple is None else multiple * scale
    squared = jnp.asarray(squared, jnp.result_type(squared))
    if not isinstance(squared, jax.core.Tracer) and bool((squared < 0.0).any()):
        raise ValueError("The squared radius B is negative; give at least 0 (0 leaves the reward unchanged).")
    return jnp.sqrt(squared)


def advpo(
    use_reference: bool = True, ema: float | None = None, rescale: str | None = None, eps: float = 1e-6
) -> Transform:
    """Adversarial policy optimisation: the reward under the worst head in the ellipsoid, one head for the whole batch.

    `r_adv = r - e . v`, `v = (1/lambda*) M^{-1} g`, `lambda* = ||g||_{M^{-1}} / b`, `g = mean e - mean e_ref`. With g
    held constant (it is, by `stop_gradient`) the policy gradient of `r_adv` is that of the robust objective
    `phi . g - b ||g||_{M^{-1}}`, by Danskin's theorem. Rewards of the reference are constants there and are left out.

    g is the mean over the batch (over the policy's own responses in it): use the whole rollout batch, not minibatches,
    as noise inflates it (`E ||g_hat||^2 = ||g||^2 + tr(M^{-1} (S + S_ref)) / B`). Under `jit` with a sharded batch axis
    that mean is over all devices.
    Only the mean displacement is penalised: opposite moves out of the data cancel, so watch `uncertainty/mean` too.

    `init(geometry, radius)`; metrics: also `uncertainty/displacement` (||g||_{M^{-1}}), `uncertainty/multiplier`
    (1/lambda*), and with a reference `rewards/robust`, `mean r_adv - mean r_adv(reference)`, before any rescaling.

    Args:
        use_reference: False for the ablation without references, `g = mean e`.
        ema: decay in (0, 1) of a bias-corrected moving average of g over batches; None: each batch's own.
        rescale: "std" multiplies by a bias-corrected moving average (decay 0.99) of std(r) / std(r_adv);
            None: no rescaling.
        eps: where `||g||_{M^{-1}}` is below it, nothing is subtracted.

    Returns:
        The transform, with an `AdversarialState`.

    Raises:
        ValueError: an `ema` or `rescale` that is none of these; when traced, features or reference features missing.

    Example:
        >>> transform = advpo()
        >>> state = transform.init(geometry(jnp.zeros((2, 2)), 1.0), 5.0)
        >>> score = Score(mean=jnp.array([10.0, 10.0]), features=jnp.array([[6.0, 0.0], [0.0, 8.0]]))
        >>> rewards, _, _ = transform.apply(score, Score(mean=jnp.zeros(1), features=jnp.zeros((1, 2))), state)
        >>> rewards.tolist()
        [-8.0, -22.0]
    """
    if ema is not None and not 0.0 < ema < 1.0:
        raise ValueError(f"ema is {ema}; give a decay between 0 and 1, or None for each batch's own displacement.")
    if rescale not in (None, "std"):
        raise ValueError(f"rescale is {rescale!r}; give 'std' or None.")

    def init(geometry: Geometry, radius: Scalar) -> AdversarialState:
        dtype = geometry.cholesky.dtype
        return AdversarialState(
            geometry=geometry,
            radius=jnp.asarray(radius, dtype),
            displacement=None if ema is None else jnp.zeros(geometry.cholesky.shape[-1], dtype),
            scale=None if rescale is None else jnp.zeros((), dtype),
            steps=jnp.zeros((), jnp.int32),
        )

    def apply(
        score: Score, reference: Score | None, state: AdversarialState
    ) -> tuple[Float[Array, " B"], AdversarialState, Metrics]:
        dtype = state.geometry.cholesky.dtype
        features = _features(score, "advpo", "score")
        reference_features = _features(reference, "advpo", "reference") if use_reference else None
        current = jax.lax.stop_gradient(displacement(features, reference_features, score.own)).astype(dtype)
        steps = state.steps + 1
        smoothed, average = current, None
        if ema is not None:
            smoothed, average = _moving_average(state.displacement, current, ema, steps)
        length = jnp.linalg.norm(solve(state.geometry, smoothed))
        direction = adversarial_direction(state.geometry, smoothed, state.radius, eps)
        adversarial = score.mean - _dot(features, direction).astype(score.mean.dtype)
        metrics = {
            "uncertainty/displacement": length.astype(jnp.float32),
            "uncertainty/multiplier": _multiplier(length, state.radius, eps).astype(jnp.float32),
        }
        if use_reference:
            penalty = _dot(reference_features, direction).astype(reference.mean.dtype)
            metrics["rewards/robust"] = (adversarial.mean() - (reference.mean - penalty).mean()).astype(jnp.float32)
        rewards, scale = adversarial, None
        if rescale is not None:
            ratio = _ratio_of_spreads(score.mean, adversarial)
            factor, scale = _moving_average(state.scale, ratio, RESCALE_DECAY, steps)
            rewards = adversarial * factor.astype(adversarial.dtype)
        metrics |= report(score, rewards, uncertainty(state.geometry, features, state.radius))
        return rewards, state.replace(displacement=average, scale=scale, steps=steps), metrics

    return Transform(init, apply)


def samplewise() -> Transform:
    """The sample-wise baseline ("LWUN-s"), `r - (U - offset)`: each response pays for its own uncertainty.

    `init(geometry, radius, offset)`: the offset is the mean U on reference samples,
    `uncertainty(geometry, reference_features, radius).mean()`. It is asked for because a penalty that is not centred
    lowers every reward, and against terms that are no differences of rewards (a length or missing-stop penalty, a value
    head that starts at zero, clipping) that constant harms. This is not AdvPO: there all responses share one head.

    Raises (when traced):
        ValueError: the score has no features.
    """

    def init(geometry: Geometry, radius: Scalar, offset: Scalar) -> SamplewiseState:
        dtype = geometry.cholesky.dtype
        return SamplewiseState(geometry=geometry, radius=jnp.asarray(radius, dtype), offset=jnp.asarray(offset, dtype))

    def apply(
        score: Score, reference: Score | None, state: SamplewiseState
    ) -> tuple[Float[Array, " B"], SamplewiseState, Metrics]:
        unsure = uncertainty(state.geometry, _features(score, "samplewise", "score"), state.radius)
        rewards = score.mean - (unsure - state.offset.astype(unsure.dtype)).astype(score.mean.dtype)
        return rewards, state, report(score, rewards, unsure)

    return Transform(init, apply)


def _features(score: Score | None, rule: str, role: str) -> Float[Array, "B D"]:
    if score is None:
        raise ValueError(f"{rule} compares with reference responses; pass their Score, or use_reference=False.")
    if score.features is None:
        raise ValueError(f"{rule} needs the features that the reward head multiplies; fill features of the {role}.")
    return score.features


def _multiplier(length: Float[Array, ""], radius: Scalar, eps: float) -> Float[Array, ""]:
    far = length >= eps
    return jnp.where(far, jnp.asarray(radius, length.dtype) / jnp.where(far, length, 1.0), 0.0)


def _dot(features: Float[Array, "B D"], direction: Float[Array, " D"]) -> Float[Array, " B"]:
    dtype = wide(features, direction)
    return jnp.matmul(features.astype(dtype), direction.astype(dtype), precision="highest")


def _moving_average(
    average: Float[Array, "*D"], value: Float[Array, "*D"], decay: float, steps: Int[Array, ""]
) -> tuple[Float[Array, "*D"], Float[Array, "*D"]]:
    average = decay * average + (1.0 - decay) * value.astype(average.dtype)
    return average / (1.0 - jnp.asarray(decay, average.dtype) ** steps.astype(average.dtype)), average


def _ratio_of_spreads(rewards: Float[Array, " B"], adversarial: Float[Array, " B"]) -> Float[Array, ""]:
    spread = jnp.std(adversarial)
    known = spread > 0.0
    return jnp.where(known, jnp.std(rewards) / jnp.where(known, spread, 1.0), 1.0)
