"""Ensembles under pressure: best-of-n by each rule, and how far members part where a policy has gone.

Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.setting import Setting
from rlhf_jax.laboratory.uncertain_kinds import Kind
from rlhf_jax.laboratory.uncertainty_panel import Panel, score_panel, written
from rlhf_jax.laboratory.uncertainty_study import RULES, Coefficients, Prepared
from rlhf_jax.sampling.best_of_n import best_of_n_curve, best_of_n_kl
from rlhf_jax.types import Score

MEMBER = "one member"
"""The name under which `picked` has the mean over members, each picking by itself."""

Picked = Mapping[str, Float[np.ndarray, "seeds sizes"]]


def sizes(best_of: int) -> tuple[int, int]:
    """The two n between which the slope of a curve is taken: the largest one, and a quarter of it.

    Example:
        >>> sizes(512)
        (128, 512)
    """
    return max(1, best_of // 4), best_of


def picked(panel: Panel, scores: Mapping[str, np.ndarray], weights: Coefficients) -> Picked:
    """Gold of the best of n answers to the held-out prompts by every rule, for both n of `sizes`.

    Args:
        panel: the answers.
        scores: a kind's, from `uncertainty_panel.score_panel`.
        weights: of the penalties of UWO and LCB.

    Returns:
        By the kind's own score, "mean"; and of kinds with members by "WCO", "UWO", "LCB", and `MEMBER`: what a member
        would pick alone, averaged over members; [seeds, 2] each.
    """
    at = panel.parts["answers"]
    gold = panel.gold[:, at].reshape(len(panel.gold), panel.prompts, -1)

    def best(proxy: Float[np.ndarray, "seeds N"]) -> Float[np.ndarray, "seeds sizes"]:
        by_prompt = proxy.reshape(gold.shape)
        return np.stack([best_of_n_curve(*one, sizes(panel.best_of)).gold for one in zip(by_prompt, gold, strict=True)])

    found = {"mean": best(scores["mean"][:, at])}
    if "members" not in scores:
        return found
    members = scores["members"][:, :, at]
    arguments = {"WCO": (), "UWO": (weights.uwo,), "LCB": (weights.lcb,)}
    for name, given in arguments.items():
        rule = RULES[name].transform
        state = rule.init(*given)
        rewards = [
            rule.apply(Score(mean=one.mean(axis=0), members=one), None, state)[0]
            for one in jnp.asarray(members, jnp.float32)
        ]
        found[name] = best(np.asarray(rewards, np.float64))
    found[MEMBER] = np.mean([best(members[:, place]) for place in range(members.shape[1])], axis=0)
    return found


def final_slope(gold: Float[np.ndarray, "seeds sizes"], best_of: int) -> Float[np.ndarray, " seeds"]:
    """Slope of gold in the distance √KL of best-of-n at the largest n, between the two `sizes`.

    Example:
        >>> final_slope(np.array([[0.0, 1.0]]), 4).round(3).tolist()  # KL of best-of-4 is log 4 - 3/4
        [1.254]
    """
    near, far = (np.sqrt(best_of_n_kl(n)) for n in sizes(best_of))
    return (gold[:, 1] - gold[:, 0]) / (far - near)


def disagreement(
    options: Options,
    setting: Setting,
    kind: Kind,
    prepared: Prepared,
    history: Mapping[str, np.ndarray],
    rules: Sequence[str],
) -> dict[str, Float[np.ndarray, "seeds ends"]]:
    """Mean variance over a kind's members on what policies wrote at the start and at the end of their training.

    Args:
        options: features.
        setting: shape of the trunks, held-out prompts.
        kind: whose members are asked.
        prepared: of all seeds.
        history: of an algorithm on this kind, from `comparison.run_arm`, with lane `rule * seeds + seed`.
        rules: names of the rules, in the order of the lanes.

    Returns:
        By rule, in squared standard deviations of the kind's score on the initial policy's samples, [seeds, 2].
    """

    def ends(array: np.ndarray) -> np.ndarray:
        split = array[:, [0, -1]].reshape(len(rules), -1, 2, *array.shape[2:])
        return np.moveaxis(split, 0, 1).reshape(split.shape[1], -1, *array.shape[2:])

    sequences = written(setting.world.held_out, ends(history["tokens"]), ends(history["mask"]))
    members = score_panel(options, setting, kind, prepared, sequences)["members"]
    found = members.var(axis=1).reshape(len(members), len(rules), 2, -1).mean(axis=-1)
    return {name: found[:, place] for place, name in enumerate(rules)}
