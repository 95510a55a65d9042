"""Gold reward along training: the fall from its peak, and comparison of methods at matched KL."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class PeakAndFall:
    """Peak and fall of gold reward along training; see `peak_and_fall` for which of the two drops is biased.

    Attributes:
        peak_step: index at which the seed-mean curve is highest.
        peak: its height there.
        final: seed-mean gold at the end.
        drop: peak − final (biased upwards).
        standard_error: of that drop over seeds.
        in_standard_errors: drop / standard_error.
        held_out_drop: mean over seeds of the drop from the peak that the *other* seeds chose.
        held_out_standard_error: of that drop over seeds.
        held_out_in_standard_errors: their ratio.
    """

    peak_step: int
    peak: float
    final: float
    drop: float
    standard_error: float
    in_standard_errors: float
    held_out_drop: float
    held_out_standard_error: float
    held_out_in_standard_errors: float


def peak_and_fall(curve: Float[np.ndarray, "seeds steps"]) -> PeakAndFall:
    """How far gold falls from its peak by the end of training, in standard errors over seeds.

    **The plain drop is biased upwards**: the peak step is the maximum of a noisy mean, and the same noise is counted in
    its height, so that even a flat curve shows a "fall". The held-out drop measures each seed at the peak step chosen
    on the other seeds (leave-one-out): its mean is unbiased for the drop from a step so chosen, and that is at most the
    true one. Claim a fall on the held-out drop. Its standard error treats the seeds as independent, though their chosen
    steps share data.

    Args:
        curve: gold reward, float [seeds, steps].

    Returns:
        Both drops; a ratio is inf (with the sign of the drop) when all seeds agree exactly, and 0 when there is no drop
        either.

    Raises:
        ValueError: fewer than two seeds, no step, or a value that is not finite.

    Example:
        >>> fall = peak_and_fall(np.array([[0.0, 2.0, 1.0], [0.0, 3.0, 1.0]]))
        >>> fall.peak_step, fall.peak, fall.drop, fall.standard_error, fall.held_out_drop
        (1, 2.5, 1.5, 0.5, 1.5)
    """
    if curve.shape[0] < 2 or curve.shape[1] < 1:
        raise ValueError(f"a fall with an error bar needs two seeds and a step; the curve has shape {curve.shape}")
    if not np.isfinite(curve).all():
        seed = np.flatnonzero(~np.isfinite(curve).all(axis=1))[0]
        raise ValueError(f"the curve of seed {seed} is not finite everywhere; leave failed runs out, and say so")
    values = curve.astype(np.float64)
    mean = values.mean(axis=0)
    step = int(mean.argmax())
    drop, error, ratio = _in_standard_errors(values[:, step] - values[:, -1])
    held_out_drop, held_out_error, held_out_ratio = _in_standard_errors(chosen_by_others(values) - values[:, -1])
    return PeakAndFall(
        peak_step=step,
        peak=float(mean[step]),
        final=float(mean[-1]),
        drop=drop,
        standard_error=error,
        in_standard_errors=ratio,
        held_out_drop=held_out_drop,
        held_out_standard_error=held_out_error,
        held_out_in_standard_errors=held_out_ratio,
    )


def chosen_by_others(values: Float[np.ndarray, "seeds choices"]) -> Float[np.ndarray, " seeds"]:
    """Each seed's value under the choice for which the *other* seeds' mean is highest.

    A maximum of noisy means is biased upwards; this one is not, as a seed's own noise has no part in the choice.

    Args:
        values: of at least two seeds, float [seeds, choices].

    Returns:
        One value a seed, float64 [seeds].

    Example:
        >>> chosen_by_others(np.array([[5.0, 1.0], [0.0, 2.0]])).tolist()
        [1.0, 0.0]
    """
    wide = values.astype(np.float64)
    return wide[np.arange(len(wide)), (wide.sum(axis=0) - wide).argmax(axis=1)]


def at_matched_kl(
    kl: Float[np.ndarray, "seeds steps"], gold: Float[np.ndarray, "seeds steps"], grid: Float[np.ndarray, " G"]
) -> Float[np.ndarray, "seeds G"]:
    """Gold reward of each run when it first reaches each distance, for comparing methods at matched √KL.

    Between the last step before the crossing and the first step beyond it, gold is linear in √KL. KL may go back and
    forth: only the first passage counts. Estimates of KL below 0 are taken as 0.

    Args:
        kl: KL from the initial policy in nats, float [seeds, steps].
        gold: gold reward at the same steps, float [seeds, steps].
        grid: distances √KL in √nats, float [G].

    Returns:
        Gold reward, float64 [seeds, G]; nan where a run never gets that far, or starts beyond it. Nothing is
        extrapolated.

    Raises:
        ValueError: a number is not finite.

    Example:
        >>> kl, gold = np.array([[0.0, 1.0, 4.0]]), np.array([[0.0, 2.0, 1.0]])
        >>> at_matched_kl(kl, gold, np.array([0.5, 1.5, 3.0])).tolist()
        [[1.0, 1.5, nan]]
    """
    if not all(np.isfinite(array).all() for array in (kl, gold, grid)):
        raise ValueError("KL, gold and grid must be finite; leave failed runs out, and say so")
    distance = np.sqrt(np.maximum(kl.astype(np.float64), 0.0))
    passed = distance[:, :, None] >= grid[None, None, :]
    after = passed.argmax(axis=1)
    before = np.maximum(after - 1, 0)
    d_before, d_after, gold_before, gold_after = (
        np.take_along_axis(array, step, axis=1).astype(np.float64)
        for array in (distance, gold)
        for step in (before, after)
    )
    gap = d_after - d_before
    share = np.where(gap > 0.0, (grid[None, :] - d_before) / np.where(gap > 0.0, gap, 1.0), 1.0)
    reached = passed.any(axis=1) & ((after > 0) | (d_after == grid[None, :]))
    return np.where(reached, gold_before + share * (gold_after - gold_before), np.nan)


def _in_standard_errors(drops: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds, its standard error, and their ratio."""
    drop, error = float(drops.mean()), float(drops.std(ddof=1) / math.sqrt(drops.size))
    if error > 0.0:
        return drop, error, drop / error
    return drop, error, math.copysign(math.inf, drop) if drop != 0.0 else 0.0
