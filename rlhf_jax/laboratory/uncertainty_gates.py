"""What a study of uncertain reward models found: its rows, and what the papers claim as gates.

Differences are paired by seed. A gate is left out where the study left out a kind or a rule that it needs, or where a
number is not defined; a gate that fails says that the effect was not found here. The fall of gold is that from the step
at which the *other* seeds peak, and "the best" of several is what the other seeds would choose, so that choosing is not
counted as a gain.

The claims on the slope of best-of-n are about noisy labels. There a paper that finds none below 0 "within error" is
met by "FAILED, within noise" too.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.frontier import common_distances
from rlhf_jax.evaluation.statistics import pearson, row
from rlhf_jax.evaluation.trajectories import at_matched_kl, chosen_by_others
from rlhf_jax.evaluation.uncertainty_figures import Policies, plain_of
from rlhf_jax.laboratory.gates.gate import PRECONDITION, Gate
from rlhf_jax.laboratory.uncertain_picks import MEMBER, Picked, final_slope
from rlhf_jax.laboratory.uncertainty_panel import MEASURES, Measured

INDEPENDENT = ("seeds", "bootstrap", "starts")
"""Ensembles of independent reward models."""
COMBINED = ("mean", "WCO", "UWO")
"""Rules of Coste et al."""
LEAST_FALL = 0.1
"""Fall of the plain policy's gold, in standard deviations, without which a study of over-optimisation is void."""
ADVERSARIAL = "AdvPO, 2403.05171"
ENSEMBLES = "Ensembles, 2310.02743"
EFFICIENT = "Efficient ensembles, 2401.16635"
RATINGS = "URM, 2410.00847"

Seeds = Float[np.ndarray, " seeds"]


class Found(NamedTuple):
    """What a study measured.

    Attributes:
        kinds: measures of each kind.
        policies: curves by kind, algorithm and rule.
        picked: best-of-n by kind, from `uncertain_picks.picked`.
        disagreement: of the members along the judged algorithm's training, by kind and rule, from
            `uncertain_picks.disagreement`.
        best_of: the largest n of best-of-n.
        noisy: whether labels were turned round.
    """

    kinds: Mapping[str, Measured]
    policies: Policies
    picked: Mapping[str, Picked]
    disagreement: Mapping[tuple[str, str], Float[np.ndarray, "seeds ends"]]
    best_of: int
    noisy: bool

    def final(self, kind: str, algorithm: str, rule: str) -> Seeds:
        """Gold at the end of training."""
        return self.policies[kind, algorithm, rule].gold[:, -1]

    def fall(self, kind: str, algorithm: str, rule: str) -> Seeds:
        """Fall of gold from where the other seeds peak to the end."""
        gold = self.policies[kind, algorithm, rule].gold
        return chosen_by_others(gold) - gold[:, -1]

    def growth(self, kind: str, rule: str) -> Seeds:
        """Variance over members on what the policy writes in the end, as a multiple of that at the start."""
        start, end = self.disagreement[kind, rule].T
        return np.divide(end, start, out=np.full(end.shape, np.nan), where=start > 0)


def along(measured: Measured) -> Seeds:
    """Pearson correlation of mean uncertainty and mean error over the reports of a run, by seed; nan if undefined."""
    lines = zip(measured.uncertainty, measured.error, strict=True)
    return np.array([pearson(uncertainty, error) for uncertainty, error in lines])


def gates(found: Found, algorithm: str) -> list[Gate]:
    """The gates that a study can judge.

    Args:
        found: what it measured.
        algorithm: whose policies are judged, the one that wrote the panel's `along`.
    """
    groups = (_adversarial(found, algorithm), _policies_of_ensembles(found, algorithm))
    groups += (_picks_of_ensembles(found), _efficient(found), _rated(found, algorithm))
    every = itertools.chain.from_iterable(groups)
    return [
        Gate(name, source, np.asarray(values, np.float64), **bounds)
        for name, source, values, bounds in every
        if np.isfinite(values).all()
    ]


def rows_of(found: Found) -> list[dict[str, Any]]:
    """Rows of `summary.json`: measures of kinds, best-of-n, and of policies final gold, its gain, its fall and KL."""
    rows = []
    for name, one in found.kinds.items():
        every = one.values | {"Pearson of mean uncertainty and mean error along plain training": along(one)}
        every |= {
            f"gold of best of n by {rule}": gold[:, -1] for rule, gold in found.picked[name].items() if rule != "mean"
        }
        slopes = {rule: final_slope(gold, found.best_of) for rule, gold in found.picked[name].items()}
        every |= {f"slope of gold at the largest n by {rule}": slope for rule, slope in slopes.items()}
        every |= {
            f"growth of the members' variance under {rule}": found.growth(kind, rule)
            for kind, rule in found.disagreement
            if kind == name
        }
        for what, values in every.items():
            if np.isfinite(values).all():
                rows.append(row(f"{name}: {MEASURES.get(what, what)}", "", values))
    for (name, algorithm, rule), curves in found.policies.items():
        label, final = f"{name}, {algorithm}, {rule}", curves.gold[:, -1]
        plain = plain_of(found.policies, algorithm).gold[:, -1]
        rows.append(row(f"{label}: final gold", "s.d.", final))
        rows.append(row(f"{label}: final gold minus plain", "s.d.", final - plain))
        rows.append(row(f"{label}: fall of gold from its peak", "s.d.", found.fall(name, algorithm, rule)))
        rows.append(row(f"{label}: final KL", "nat", curves.kl[:, -1]))
    return rows


Claim = tuple[str, str, Seeds, dict[str, Any]]


def _deviations(name: str, source: str, values: Seeds, **bounds: float) -> Claim:
    return name, source, values, {"unit": "s.d."} | (bounds or {"low": 0.0})


def _adversarial(found: Found, algorithm: str) -> Iterable[Claim]:
    """Last-layer uncertainty rises along a run, with the error, as an ensemble's does; AdvPO ends higher."""
    plain, adversarial = (("single", algorithm, rule) for rule in ("mean", "AdvPO"))
    fall = f"plain {algorithm}: fall of gold from its peak"
    yield _deviations(fall, PRECONDITION, found.fall(*plain), low=LEAST_FALL)
    if "posterior" in found.kinds:
        own = found.kinds["posterior"]
        rise = own.uncertainty[:, -1] - own.uncertainty[:, 0]
        yield _deviations("last-layer uncertainty: rise along plain training", ADVERSARIAL, rise)
        name = "Pearson of last-layer uncertainty and error along plain training"
        yield name, ADVERSARIAL, along(own), {"low": 0.0}
        independent = [kind for kind in INDEPENDENT if kind in found.kinds][:1]
        for kind in (*(("linear",) if "linear" in found.kinds else ()), *independent):
            cost = "at the same compute" if kind == "linear" else "at more compute"
            difference = along(own) - along(found.kinds[kind])
            yield f"the same minus that of {kind}, an ensemble {cost}", ADVERSARIAL, difference, {"low": -0.1}
    if adversarial not in found.policies:
        return
    gain = found.final(*adversarial) - found.final(*plain)
    yield _deviations(f"AdvPO minus plain {algorithm}: final gold", ADVERSARIAL, gain)
    pair = {rule: found.policies["single", algorithm, rule] for rule in ("AdvPO", "mean")}
    distances = common_distances(pair)
    ours, theirs = (at_matched_kl(curves.kl, curves.gold, distances) for curves in pair.values())
    for distance, values in zip(distances, (ours - theirs).T, strict=True):
        name = f"AdvPO minus plain {algorithm}: gold at equal √KL, {distance:.2f} √nat"
        yield _deviations(name, ADVERSARIAL, values)


def _policies_of_ensembles(found: Found, algorithm: str) -> Iterable[Claim]:
    """Policies on independent ensembles end higher than on single models and fall less; members part less under UWO."""
    plain = ("single", algorithm, "mean")
    every = [(kind, algorithm, rule) for kind in INDEPENDENT for rule in COMBINED]
    arms = [arm for arm in every if arm in found.policies]
    gains = {arm: found.final(*arm) - found.final(*plain) for arm in arms}
    for (kind, _, rule), gain in gains.items():
        yield _deviations(f"{kind}, {rule} minus one model, {algorithm}: final gold", ENSEMBLES, gain)
    yield from _best(f"best ensemble and rule minus one model, {algorithm}: final gold", gains)
    for kind, _, rule in arms:
        if rule == "mean":
            continue
        own, mean = found.fall(kind, algorithm, rule), (kind, algorithm, "mean")
        yield _deviations(
            f"{kind}: fall of plain {algorithm} minus that of {rule}", ENSEMBLES, found.fall(*plain) - own
        )
        if mean in arms:
            name = f"{kind}: fall of the mean minus that of {rule}, {algorithm}"
            yield _deviations(name, ENSEMBLES, found.fall(*mean) - own)
    for kind in INDEPENDENT:
        if (kind, "mean") in found.disagreement and (kind, "UWO") in found.disagreement:
            difference = found.growth(kind, "mean") - found.growth(kind, "UWO")
            name = f"{kind}: growth of the members' variance along {algorithm}, mean minus UWO"
            yield name, ENSEMBLES, difference, {"low": 0.0}


def _picks_of_ensembles(found: Found) -> Iterable[Claim]:
    """Best-of-n by independent ensembles: more gold than by a single model, and no fall under WCO and UWO."""
    kinds = [kind for kind in INDEPENDENT if kind in found.picked]
    if not kinds:
        return
    # Members that differ in their seed alone are single models trained on the same labels as "single".
    one = found.picked["seeds"][MEMBER] if "seeds" in kinds else found.picked["single"]["mean"]
    gains = {(kind, rule): (found.picked[kind][rule] - one)[:, -1] for kind in kinds for rule in COMBINED}
    for (kind, rule), gain in gains.items():
        yield _deviations(f"{kind}, {rule} minus one model: gold of best of {found.best_of}", ENSEMBLES, gain)
    yield from _best(f"best ensemble and rule minus one model: gold of best of {found.best_of}", gains)
    if not found.noisy:
        return
    slope = f"slope of gold at best of {found.best_of}, s.d. a √nat"
    yield f"one model: {slope}", ENSEMBLES, final_slope(one, found.best_of), {"high": 0.0}
    for kind, rule in itertools.product(kinds, ("WCO", "UWO")):
        values = final_slope(found.picked[kind][rule], found.best_of)
        yield f"{kind}, {rule}: {slope}", ENSEMBLES, values, {"low": 0.0}


def _best(name: str, gains: Mapping[tuple[str, ...], Seeds]) -> Iterable[Claim]:
    if len(gains) > 1:
        yield _deviations(
            f"{name} (chosen on the other seeds)", ENSEMBLES, chosen_by_others(np.stack([*gains.values()], 1))
        )


def _efficient(found: Found) -> Iterable[Claim]:
    """LoRA ensembles are no worse than linear heads, these than one model; members agree the more they share."""
    best = f"gold of best of {found.best_of}"
    for low, high in itertools.pairwise(name for name in ("single", "linear", "LoRA") if name in found.kinds):
        difference = found.picked[high]["mean"][:, -1] - found.picked[low]["mean"][:, -1]
        yield _deviations(f"{high} minus {low}: {best}", EFFICIENT, difference)
    for high, low in itertools.pairwise(name for name in ("linear", "LoRA", "seeds") if name in found.kinds):
        ours, theirs = (found.kinds[name].values["member_correlation"] for name in (high, low))
        yield f"member correlation: {high} minus {low}", EFFICIENT, ours - theirs, {"low": 0.0}


def _rated(found: Found, algorithm: str) -> Iterable[Claim]:
    """URME's uncertainty tells new texts and errors, and to mind it is no worse."""
    if "URME" not in found.kinds:
        return
    values, picked = found.kinds["URME"].values, found.picked["URME"]
    yield "URME: AUROC of responses after other prompts", RATINGS, values["moved_auroc"], {"low": 0.6}
    yield "URME: AUROC of optimised responses", RATINGS, values["optimised_auroc"], {"low": 0.6}
    halves = values["surest_half"] - values["other_half"]
    yield "URME: pair accuracy on the surest half minus on the other", RATINGS, halves, {"low": 0.0}
    difference = picked["LCB"][:, -1] - picked["mean"][:, -1]
    yield _deviations(f"URME: LCB minus mean, gold of best of {found.best_of}", RATINGS, difference)
    if all(("URME", algorithm, rule) in found.policies for rule in ("LCB", "mean")):
        difference = found.final("URME", algorithm, "LCB") - found.final("URME", algorithm, "mean")
        yield _deviations(f"URME: LCB minus mean, final gold of {algorithm}", RATINGS, difference)
