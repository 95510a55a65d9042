"""One panel of stored responses that all kinds of reward models are asked about, and what their uncertainty is worth.

The uncertainty of a response is the epistemic one of the kind, or where it has none its aleatoric one. The parts of a
panel: `initial` responses of the initial policy; fresh pairs of them, `chosen` and `rejected` by the annotator;
`moved`, the same responses after other prompts; `answers` to the held-out prompts, for best-of-n; and `along`, what
plain policy optimisation against "single" wrote to the held-out prompts as it went.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.calibration import rating_log_odds, reliability
from rlhf_jax.evaluation.statistics import pearson, spearman
from rlhf_jax.evaluation.uncertainty import accuracy_coverage, auroc, margin_spread, pair_uncertainty
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.proxies import compare
from rlhf_jax.laboratory.setting import Setting, repeated, sample
from rlhf_jax.laboratory.uncertain_kinds import Kind
from rlhf_jax.laboratory.uncertainty_study import Prepared, Study, standardised
from rlhf_jax.parallel.lanes import over_lanes
from rlhf_jax.sampling.best_of_n import best_of_n_curve
from rlhf_jax.types import Prompts, Sequences

MEASURES = {
    "accuracy": "accuracy",
    "optimised_accuracy": "accuracy, optimised",
    "calibration_error": "ECE",
    "initial_correlation": "ρ(uncertainty, error)",
    "optimised_correlation": "ρ, optimised",
    "optimised_auroc": "AUROC optimised",
    "moved_auroc": "AUROC other prompt",
    "area": "coverage area",
    "margin_area": "coverage area by margin",
    "surest_half": "accuracy, surest half",
    "other_half": "accuracy, other half",
    "member_correlation": "member correlation",
    "best_gold": "gold of best of n",
}
"""What is measured, and its name in tables.

The error of a response is |standardised proxy - standardised gold|, and ρ is Spearman's. A coverage area is the mean
accuracy over all shares of the pairs that are kept, the least uncertain ones (or those of the widest margin) first. The
AUROC of optimised responses is against the initial policy's `answers` to the same prompts, that of other prompts'
responses against `initial`.
"""


class Panel(NamedTuple):
    """Stored responses, with their gold reward in standard deviations of the initial policy's.

    Attributes:
        sequences: all parts after each other, [seeds, N, S].
        gold: [seeds, N].
        parts: where each part stands.
        prompts: held-out prompts.
        reports: measurements along the run, the initial policy's included.
        best_of: n of best-of-n.
    """

    sequences: Sequences
    gold: Float[np.ndarray, "seeds N"]
    parts: Mapping[str, slice]
    prompts: int
    reports: int
    best_of: int


class Measured(NamedTuple):
    """What a kind's scores and uncertainty are worth, by seed; nan where something is not defined.

    Attributes:
        values: by the names of `MEASURES`, [seeds] each.
        uncertainty: its mean at every report along the run, [seeds, reports]; nan for a kind without.
        error: mean |proxy - gold| likewise.
    """

    values: dict[str, Float[np.ndarray, " seeds"]]
    uncertainty: Float[np.ndarray, "seeds reports"]
    error: Float[np.ndarray, "seeds reports"]


def moved(sequences: Sequences, prompt_length: int) -> Sequences:
    """Every response after the prompt of the next row."""

    def move(leaf: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.roll(leaf[:, :prompt_length], -1, axis=0), leaf[:, prompt_length:]], axis=1)

    return Sequences(tokens=move(sequences.tokens), mask=move(sequences.mask))


def written(held_out: Prompts, tokens: np.ndarray, mask: np.ndarray) -> Sequences:
    """What policies wrote to the held-out prompts, as whole sequences.

    Args:
        held_out: the prompts.
        tokens: responses, [seeds, reports, n, T], equally many to each prompt after each other.
        mask: likewise.

    Returns:
        [seeds, reports * n, S].
    """

    def whole(prompt: jax.Array, response: np.ndarray) -> jax.Array:
        before = np.repeat(np.asarray(prompt), response.shape[2] // len(prompt), axis=0)
        joined = np.concatenate([np.broadcast_to(before, (*response.shape[:2], *before.shape)), response], axis=-1)
        return jnp.asarray(joined.reshape(-1, joined.shape[-1]))

    every = Sequences(tokens=whole(held_out.tokens, tokens), mask=whole(held_out.mask, mask))
    return jax.tree.map(lambda leaf: leaf.reshape(len(tokens), -1, leaf.shape[-1]), every)


def gold_of_sequences(setting: Setting, sequences: Sequences) -> Float[np.ndarray, " B"]:
    """The gold reward of whole sequences of the setting's world."""
    tokens, mask, length = (
        np.asarray(sequences.tokens),
        np.asarray(sequences.mask),
        setting.world.prompts.tokens.shape[1],
    )
    return setting.world.gold(tokens[:, :length], tokens[:, length:], mask[:, length:])


def panel_of(
    study: Study, history: Mapping[str, np.ndarray], pairs: int, answers: int, best_of: int, key: jax.Array
) -> Panel:
    """The panel of a study.

    Args:
        study: where, and samples of the initial policy.
        history: of plain optimisation, from `comparison.run_arm`: "tokens" and "mask", [seeds, reports, n, T], equally
            many responses to each held-out prompt after each other.
        pairs: fresh comparisons.
        answers: to each held-out prompt.
        best_of: n of best-of-n.
        key: of pairs and answers.
    """
    setting, options, (pairs_key, answers_key) = study.setting, study.options, jax.random.split(key)
    held_out, (seeds, reports, rows) = setting.world.held_out, history["tokens"].shape[:3]
    compared = compare(setting, pairs_key, pairs, options.label_noise, np.random.default_rng(options.seed))
    places = np.repeat(np.arange(len(held_out.tokens)), answers)
    shared = {
        "initial": study.initial,
        "chosen": compared.chosen,
        "rejected": compared.rejected,
        "moved": moved(study.initial, held_out.tokens.shape[1]),
        "answers": sample(setting, repeated(held_out, places), answers_key).sequences,
    }
    ends = np.cumsum([len(part.tokens) for part in shared.values()] + [reports * rows]).tolist()
    parts = dict(zip((*shared, "along"), map(slice, (0, *ends[:-1]), ends), strict=True))

    def joined(*leaves: jax.Array) -> jax.Array:
        first = jnp.concatenate(leaves[:-1])
        return jnp.concatenate([jnp.broadcast_to(first, (seeds, *first.shape)), leaves[-1]], axis=1)

    last = written(held_out, history["tokens"], history["mask"])
    sequences = jax.tree.map(joined, *shared.values(), last)
    last = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), last)
    gold = [study.scale(gold_of_sequences(setting, part)) for part in shared.values()]
    first = np.broadcast_to(np.concatenate(gold), (seeds, ends[-2]))
    gold = np.concatenate([first, study.scale(gold_of_sequences(setting, last)).reshape(seeds, -1)], axis=1)
    return Panel(sequences, gold, parts, len(held_out.tokens), reports, best_of)


def score_panel(
    options: Options, setting: Setting, kind: Kind, prepared: Prepared, sequences: Sequences, chunk: int = 1024
) -> dict[str, np.ndarray]:
    """What a kind says of stored responses, standardised.

    Args:
        options: features.
        setting: shape of the trunks.
        kind: whose scorer is asked.
        prepared: of all seeds.
        sequences: [seeds, N, S]; each seed's models score its own row.
        chunk: sequences scored at a time.

    Returns:
        "mean", and where there is one "epistemic" and "aleatoric", [seeds, N]; "members" [seeds, M, N].
    """
    scorer, count = standardised(kind.scorer(options, setting)), sequences.tokens.shape[1]
    chunks = jax.tree.map(
        lambda leaf: jnp.pad(leaf, ((0, 0), (0, -count % chunk), (0, 0))).reshape(len(leaf), -1, chunk, leaf.shape[-1]),
        sequences,
    )

    def score(lane: tuple[Prepared, Sequences]) -> dict[str, jax.Array]:
        own, parts = lane

        def part(rows: Sequences) -> dict[str, jax.Array]:
            found = scorer(own, rows.tokens, rows.mask)
            fields = {name: getattr(found, name) for name in ("mean", "epistemic", "aleatoric", "members")}
            return {name: values for name, values in fields.items() if values is not None}

        return jax.lax.map(part, parts)

    found = jax.device_get(jax.jit(over_lanes(score))((prepared, chunks)))
    joined = {name: np.moveaxis(values, 1, -2) for name, values in found.items()}  # chunks beside their rows
    return {
        name: values.reshape(*values.shape[:-2], -1)[..., :count].astype(np.float64) for name, values in joined.items()
    }


def begun(first: dict[str, np.ndarray], panel: Panel, mean: np.ndarray, rules: int) -> dict[str, np.ndarray]:
    """What `first_measurement` would find: the initial policy, which is the same for all kinds, by a kind's score."""
    proxy = mean[:, panel.parts["along"]].reshape(len(mean), panel.reports, -1)[:, 0].mean(axis=1)
    found = first | {"proxy": proxy.astype(np.float32)}
    return {what: np.concatenate([values] * rules) for what, values in found.items()}


def measure(
    panel: Panel, scores: Mapping[str, np.ndarray], spread: Float[np.ndarray, " seeds"], compared: bool = True
) -> Measured:
    """What a kind's scores and uncertainty are worth on a panel.

    Args:
        panel: the responses.
        scores: from `score_panel`.
        spread: the unit that scores were divided by, so that margins are log-odds again.
        compared: whether they are, see `Kind`.
    """
    uncertainty = scores.get("epistemic", scores.get("aleatoric"))
    each = []
    for seed in range(len(panel.gold)):
        own = {name: values[seed] for name, values in scores.items()}
        unsure = None if uncertainty is None else uncertainty[seed]
        each.append(_of_one_seed(panel, own, unsure, panel.gold[seed], float(spread[seed]) if compared else None))
    along = panel.parts["along"]
    shape = (len(panel.gold), panel.reports, -1)
    error = np.abs(scores["mean"][:, along] - panel.gold[:, along]).reshape(shape).mean(axis=-1)
    return Measured(
        values={name: np.array([one[name] for one in each]) for name in MEASURES},
        uncertainty=np.full(error.shape, np.nan)
        if uncertainty is None
        else uncertainty[:, along].reshape(shape).mean(axis=-1),
        error=error,
    )


def _of_one_seed(
    panel: Panel, own: dict[str, np.ndarray], uncertainty: np.ndarray | None, gold: np.ndarray, spread: float | None
) -> dict[str, float]:
    at, score = panel.parts, own["mean"]
    sides = [(score[at[side]], gold[at[side]]) for side in ("chosen", "rejected")]
    margin, gold_margin = sides[0][0] - sides[1][0], sides[0][1] - sides[1][1]
    right, untied = _ranked(margin, gold_margin), gold_margin != 0
    if spread is None:
        log_odds = rating_log_odds(margin, np.hypot(*(own["aleatoric"][at[side]] for side in ("chosen", "rejected"))))
    else:
        log_odds = margin * spread
    by_margin = accuracy_coverage(right[untied], -np.abs(margin[untied]))
    late = slice(at["along"].start + (at["along"].stop - at["along"].start) // panel.reports * _late(panel), None)
    first, second = (values[: len(values) // 2 * 2].reshape(-1, 2).T for values in (score[late], gold[late]))
    optimised = _ranked(first[0] - first[1], second[0] - second[1])[second[0] != second[1]]
    answers = [values[at["answers"]].reshape(panel.prompts, -1) for values in (score, gold)]
    found = dict.fromkeys(MEASURES, np.nan) | {
        "accuracy": right[untied].mean(),
        "optimised_accuracy": optimised.mean() if optimised.size else np.nan,
        "calibration_error": reliability(log_odds).expected_error,
        "margin_area": by_margin.area,
        "best_gold": float(best_of_n_curve(*answers, [panel.best_of]).gold[-1]),
    }
    if "members" in own:
        found["member_correlation"] = _mean_correlation(own["members"][:, at["initial"]])
    if uncertainty is None:
        return found
    if "members" in own:
        unsure = margin_spread(*(own["members"][:, at[side]] for side in ("chosen", "rejected")))
    else:
        unsure = pair_uncertainty(*(uncertainty[at[side]] for side in ("chosen", "rejected")))
    curve = accuracy_coverage(right[untied], unsure[untied])
    surest = float(curve.at(0.5))
    return found | {
        "initial_correlation": spearman(uncertainty[at["initial"]], np.abs(score - gold)[at["initial"]]),
        "optimised_correlation": spearman(uncertainty[late], np.abs(score - gold)[late]),
        # Against the initial policy's answers to the same held-out prompts: new prompts alone would raise it too.
        "optimised_auroc": auroc(uncertainty[at["answers"]], uncertainty[late]),
        "moved_auroc": auroc(uncertainty[at["initial"]], uncertainty[at["moved"]]),
        "area": curve.area,
        "surest_half": surest,
        "other_half": 2 * float(curve.accuracy[-1]) - surest,
    }


def _late(panel: Panel) -> int:
    """The first report of the second half of a run, whose responses count as those of an optimised policy."""
    return panel.reports // 2


def _ranked(margin: np.ndarray, gold_margin: np.ndarray) -> np.ndarray:
    """1 where two responses are ranked as the gold ranks them, 0 where not, one half where the margin is 0."""
    return np.where(margin == 0, 0.5, np.sign(margin) == np.sign(gold_margin))


def _mean_correlation(members: Float[np.ndarray, "M n"]) -> float:
    """Mean Pearson correlation of the scores of two members."""
    count = len(members)
    found = [pearson(members[i], members[j]) for i in range(count) for j in range(i)]
    return float(np.mean(found)) if found else np.nan
