"""What a study of uncertain reward models found: its rows, and what the papers claim as checks.

Differences are paired by seed. A check whose kinds or rules the study left out is left out too; a check that fails says
that the effect was not found here.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.statistics import pearson, row
from rlhf_jax.evaluation.trajectories import at_matched_kl, peak_and_fall
from rlhf_jax.evaluation.uncertainty_figures import Policies, plain_of
from rlhf_jax.laboratory.uncertainty_panel import MEASURES, Measured
from rlhf_jax.training.run_folder import check

INDEPENDENT = ("seeds", "bootstrap", "starts")
"""Ensembles of independent reward models."""

Kinds = Mapping[str, Measured]
Seeds = Float[np.ndarray, " seeds"]


def along(measured: Measured) -> Seeds:
    """Pearson correlation of mean doubt and mean error over the reports of a run, by seed; nan without doubt."""
    return np.array([pearson(doubt, error) for doubt, error in zip(measured.doubt, measured.error, strict=True)])


def in_standard_errors(values: Seeds) -> float:
    """A mean over seeds in its standard errors; infinite where all seeds agree on a number other than 0.

    Example:
        >>> in_standard_errors(np.array([1.0, 3.0]))
        2.0
    """
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


def gates(kinds: Kinds, policies: Policies, algorithm: str) -> list[dict[str, Any]]:
    """The checks that a study can judge.

    Args:
        kinds: measures of each kind.
        policies: curves by kind, algorithm and rule.
        algorithm: whose policies are judged, the one that wrote the panel's `along`.

    Returns:
        Checks for `summary.json`.
    """
    found = _doubt(kinds) + _adversarial(policies, algorithm)
    return found + _ensembles(kinds, policies, algorithm) + _ratings(kinds, policies, algorithm)


def rows_of(kinds: Kinds, policies: Policies) -> list[dict[str, Any]]:
    """Rows of `summary.json`: measures of kinds, final gold, its gain over the plain policy (paired), and KL."""
    rows = []
    for name, found in kinds.items():
        every = found.values | {"Pearson of mean uncertainty and mean error along plain training": along(found)}
        for what, values in every.items():
            if np.isfinite(values).all():
                rows.append(row(f"{name}: {MEASURES.get(what, what)}", "", values))
    for (name, algorithm, rule), curves in policies.items():
        label, final = f"{name}, {algorithm}, {rule}", curves.gold[:, -1]
        rows.append(row(f"{label}: final gold", "s.d.", final))
        rows.append(row(f"{label}: final gold minus plain", "s.d.", final - plain_of(policies, algorithm).gold[:, -1]))
        rows.append(row(f"{label}: final KL", "nat", curves.kl[:, -1]))
    return rows


def _at_least(name: str, value: float, bound: float) -> dict[str, Any]:
    return check(name, float(value), bound, "at least")


def _doubt(kinds: Kinds) -> list[dict[str, Any]]:
    """AdvPO (2403.05171): last-layer uncertainty rises along a run, with the error, as an ensemble's does."""
    if "posterior" not in kinds:
        return []
    own = kinds["posterior"]
    found = [
        _at_least(
            "last-layer uncertainty: rise along plain training, in standard errors",
            in_standard_errors(own.doubt[:, -1] - own.doubt[:, 0]),
            2.0,
        ),
        _at_least("last-layer uncertainty: correlation with the error along it", along(own).mean(), 0.0),
    ]
    other = next((name for name in INDEPENDENT if name in kinds), None)
    if other:
        difference = (along(own) - along(kinds[other])).mean()
        found.append(_at_least(f"the same minus that of the ensemble ({other})", difference, -0.1))
    return found


def _adversarial(policies: Policies, algorithm: str) -> list[dict[str, Any]]:
    """The study is void unless plain gold falls; AdvPO ends higher, and is no worse at equal KL."""
    plain = plain_of(policies, algorithm)
    fall = peak_and_fall(plain.gold).held_out_in_standard_errors
    found = [_at_least(f"plain {algorithm}: fall of gold from its peak, in standard errors", fall, 2.0)]
    if ("single", algorithm, "AdvPO") not in policies:
        return found
    own = policies["single", algorithm, "AdvPO"]
    gain = in_standard_errors(own.gold[:, -1] - plain.gold[:, -1])
    found.append(_at_least(f"AdvPO minus plain {algorithm}: final gold, in standard errors", gain, 2.0))
    reached = min(np.sqrt(np.maximum(curves.kl, 0.0)).max(axis=1).min() for curves in (own, plain))
    grid = reached * np.array([1 / 3, 2 / 3, 1.0])
    difference = at_matched_kl(own.kl, own.gold, grid) - at_matched_kl(plain.kl, plain.gold, grid)
    known = [in_standard_errors(column) for column in difference.T if np.isfinite(column).all()]
    if known:
        name = f"AdvPO minus plain {algorithm} at equal KL: the least of {len(known)} distances, in standard errors"
        found.append(_at_least(name, min(known), -2.0))
    return found


def _ensembles(kinds: Kinds, policies: Policies, algorithm: str) -> list[dict[str, Any]]:
    """Coste et al. (2310.02743) and Zhang et al. (2401.16635)."""
    found, single = [], plain_of(policies, algorithm).gold
    plain, fall = single[:, -1], peak_and_fall(single).held_out_drop
    combined = {
        f"{kind}, {rule}": curves.gold[:, -1] - plain
        for (kind, other, rule), curves in policies.items()
        if kind in INDEPENDENT and other == algorithm and rule in ("mean", "WCO", "UWO")
    }
    if combined:
        best = max(combined, key=lambda name: combined[name].mean())
        found.append(_at_least(f"best ensemble ({best}) minus plain: final gold", combined[best].mean(), 0.0))
    for kind in INDEPENDENT:
        for rule in ("WCO", "UWO"):
            if (kind, algorithm, rule) not in policies:
                continue
            own = peak_and_fall(policies[kind, algorithm, rule].gold).held_out_drop
            found.append(_at_least(f"{kind}: fall of plain {algorithm} minus that of {rule}", fall - own, 0.0))
            if (kind, algorithm, "mean") in policies:
                mean = peak_and_fall(policies[kind, algorithm, "mean"].gold).held_out_drop
                found.append(_at_least(f"{kind}: fall of the mean minus that of {rule}", mean - own, 0.0))
    ladder = [name for name in ("single", "linear", "LoRA") if name in kinds]
    for low, high in itertools.pairwise(ladder):
        difference = (kinds[high].values["best_gold"] - kinds[low].values["best_gold"]).mean()
        found.append(_at_least(f"best of n by {high} minus by {low}: gold", difference, 0.0))
    agreeing = [name for name in ("linear", "LoRA", "seeds") if name in kinds]
    for high, low in itertools.pairwise(agreeing):
        values = [kinds[name].values["member_correlation"].mean() for name in (high, low)]
        found.append(_at_least(f"member correlation of {high} minus that of {low}", values[0] - values[1], 0.0))
    return found


def _ratings(kinds: Kinds, policies: Policies, algorithm: str) -> list[dict[str, Any]]:
    """URME (2410.00847): its doubt detects new texts and errors, and policies that mind it are no worse."""
    if "URME" not in kinds:
        return []
    values = kinds["URME"].values
    found = [
        _at_least("URME: AUROC of other prompts' responses", values["moved_auroc"].mean(), 0.6),
        _at_least("URME: AUROC of optimised responses", values["optimised_auroc"].mean(), 0.6),
        _at_least(
            "URME: accuracy on the surest half minus on the other",
            (values["surest_half"] - values["other_half"]).mean(),
            0.0,
        ),
    ]
    if ("URME", algorithm, "LCB") in policies and ("URME", algorithm, "mean") in policies:
        low, mean = (policies["URME", algorithm, rule].gold[:, -1] for rule in ("LCB", "mean"))
        found.append(_at_least("URME: LCB minus mean: final gold", (low - mean).mean(), 0.0))
    return found
