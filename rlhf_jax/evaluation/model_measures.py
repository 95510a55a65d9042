"""What is measured of a reward model on judged rows: accuracy, calibration, uncertainty, length, best-of-n.

Models are compared on the same rows, those whose completions all of them read. Intervals resample prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.calibration import Reliability, reliability
from rlhf_jax.evaluation.judging import Rows, best_right, chance, pair_right, slice_rows
from rlhf_jax.evaluation.length import pair_length_rows, response_length_rows
from rlhf_jax.evaluation.mismatch import mismatch_report
from rlhf_jax.evaluation.official_scores import official_rows
from rlhf_jax.evaluation.picks import pick_rows, trivial_pick_rows
from rlhf_jax.evaluation.ppe import best_of_k
from rlhf_jax.evaluation.sheets import TRIVIAL, Scores, Sheet, margins, stated_log_odds, uncertainties
from rlhf_jax.evaluation.statistics import bootstrap_rows
from rlhf_jax.evaluation.uncertainty import (
    CoverageCurve,
    accuracy_coverage,
    error_auroc,
    error_rows,
    gap_rows,
    shift_rows,
)

# Slices of fewer prompts are left out of the summary, and correlations over fewer models have no interval: it would say
# nothing.
LEAST, LEAST_MODELS = 10, 5


@dataclass(frozen=True)
class Measured:
    """What is measured of one model on one sheet.

    Attributes:
        rows: rows of the summary.
        slices: by division, the accuracy of each slice as a row, whose name is the slice alone.
        reliability: the calibration of the probabilities that it states; None where there are none.
        coverage: by uncertainty, accuracy against the share of pairs kept.
        best_of_n: gold that the best of n by score gains over a random pick: columns n, mean, low, high, [n, 4]; None
            where a row has fewer than three completions.
    """

    rows: Rows
    slices: Mapping[str, Rows]
    reliability: Reliability | None
    coverage: Mapping[str, CoverageCurve]
    best_of_n: Float[np.ndarray, "n 4"] | None


def measure(asked: Sheet, scores: Scores) -> Measured:
    """Everything that is measured of one model on one file; see `Measured`."""
    margin = margins(asked, scores)
    rows, slices, curves, bins = [], {}, {}, None
    if margin.size:
        right = pair_right(margin, np.zeros_like(margin))
        rows += _accuracy_rows(asked, margin, right)
        slices = _slices(asked, right)
        rows += [row | {"name": f"accuracy, {name} = {row['name']}"} for name, part in slices.items() for row in part]
        for name, log_odds in stated_log_odds(asked, scores).items():
            bins = bins or reliability(log_odds)
            rows += _calibration_rows(asked, log_odds, f", {name}" if name else "")
        for name, values in uncertainties(asked, scores).items():
            rows += _named(name, error_rows(right, values, asked.groups))
            rows += [] if name == TRIVIAL else _named(name, _over_trivial_rows(asked, margin, right, values))
            curves[name] = accuracy_coverage(right, values)
    rows += _several_rows(asked, scores)
    rows += official_rows(asked, scores)
    rows += _length_rows(asked, scores.mean, margin)
    return Measured(rows, slices, bins, curves, _best_of_n(asked, scores.mean))


def baselines(asked: Sheet) -> Rows:
    """What needs no model: the longer completion, the first one and chance; of several a random, the longest, the best.

    There is no row on the first position where it is the format that puts the better completion there, as it does if
    no pair has it second.
    """
    rows = []
    if asked.better.size:
        longer = pair_right(asked.lengths[asked.better], asked.lengths[asked.worse])
        named, first = {"longer completion": longer}, asked.better < asked.worse
        if not first.all():
            named["first position"] = first.astype(np.float64)
        names = [f"accuracy of the {name}" for name in named]
        table = np.stack([*named.values(), np.full(first.size, 0.5)], axis=1)
        names.append("accuracy of chance")
        rows += bootstrap_rows(names, "", lambda part: part.mean(axis=0), table, groups=asked.groups)
    if asked.several:
        rows += trivial_pick_rows(asked.by_row(asked.lengths), asked.by_row(asked.gold), asked.row_groups)
    if asked.several and (kept := _decided(asked)):
        groups = _kept_groups(asked, kept)
        gold = [asked.by_row(asked.gold)[i] for i in kept]
        longest = best_right([asked.by_row(asked.lengths)[i] for i in kept], gold)
        rows += bootstrap_rows(["best found by the longest completion"], "", np.mean, longest, groups=groups)
        rows += bootstrap_rows(["best found by chance"], "", np.mean, chance(gold), groups=groups)
    return rows


def compare_rows(asked: Sheet, first: Scores, other: Scores) -> Rows:
    """Accuracy of one model less that of another on the same pairs."""
    if not asked.better.size:
        return []
    rights = [pair_right(one.mean[asked.better], one.mean[asked.worse]) for one in (first, other)]
    return bootstrap_rows(["accuracy gained"], "", np.mean, rights[0] - rights[1], groups=asked.groups)


def new_data_rows(inside: tuple[Sheet, Scores], outside: tuple[Sheet, Scores]) -> Rows:
    """Whether uncertainty is larger on data unlike those the model was taught: of completions; −|margin| of pairs."""
    rows = []
    for name in ("epistemic", "aleatoric"):
        sides = [getattr(scores, name) for _, scores in (inside, outside)]
        if all(side is not None for side in sides):
            prompts = _apart(*(np.repeat(asked.prompt, np.diff(asked.starts)) for asked, _ in (inside, outside)))
            rows += _named(name, shift_rows(*sides, prompts))
    if inside[0].better.size and outside[0].better.size:
        sides = (uncertainties(*side)[TRIVIAL] for side in (inside, outside))
        prompts = _apart(*(asked.prompt[asked.row] for asked, _ in (inside, outside)))
        rows += _named(TRIVIAL, shift_rows(*sides, prompts))
    return rows


def mismatch_rows(measured: Mapping[str, Sequence[Measured]]) -> Rows:
    """Over reward models: does accuracy or calibration on a file go with gold of best-of-n on a graded one?

    Args:
        measured: by file, one `Measured` a model, the same models in the same order. An ensemble of the others is no
            model more.

    Returns:
        Rows of `mismatch_report`; none for fewer than three models or without a graded file. For fewer than
        `LEAST_MODELS` they have no interval: a bootstrap over so few points often draws ones that lie on a line.
    """

    def column(several: Sequence[Measured], name: str) -> np.ndarray | None:
        found = [[row["mean"] for row in one.rows if row["name"] == name] for one in several]
        return np.array([values[0] for values in found]) if all(found) else None

    wanted = {"accuracy": "accuracy", "ECE": "ECE"}
    models = {
        f"{name} on {file}": values
        for file, several in measured.items()
        for name, row in wanted.items()
        if (values := column(several, row)) is not None
    }
    gold = {
        f"gold of best of n on {file}": np.array([one.best_of_n[-1, 1] for one in several])
        for file, several in measured.items()
        if all(one.best_of_n is not None for one in several)
    }
    count = min((len(several) for several in measured.values()), default=0)
    if not models or not gold or count < 3:
        return []
    rows = mismatch_report(models, {}, gold)
    return rows if count >= LEAST_MODELS else [row | {"ci95": [None, None]} for row in rows]


def _apart(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """The prompts of two files after each other."""
    return np.concatenate([inside, outside + inside.max(initial=0) + 1])


def _named(prefix: str, rows: Rows) -> Rows:
    return [row | {"name": f"{prefix}: {row['name']}"} for row in rows]


def _accuracy_rows(asked: Sheet, margin: np.ndarray, right: np.ndarray) -> Rows:
    strict = pair_right(margin, np.zeros_like(margin), "strict")
    longer = pair_right(asked.lengths[asked.better], asked.lengths[asked.worse])

    def statistic(right: np.ndarray, strict: np.ndarray, longer: np.ndarray) -> list[float]:
        return [right.mean(), strict.mean(), (right - longer).mean()]

    names = ["accuracy", "accuracy, ties wrong", "accuracy over the longer completion"]
    return bootstrap_rows(names, "", statistic, right, strict, longer, groups=asked.groups)


def _over_trivial_rows(asked: Sheet, margin: np.ndarray, right: np.ndarray, values: np.ndarray) -> Rows:
    """How much better an uncertainty finds the errors than −|margin|, on the same pairs."""

    def statistic(right: np.ndarray, values: np.ndarray, trivial: np.ndarray) -> float:
        return error_auroc(right, values) - error_auroc(right, trivial)

    name = f"AUROC of errors over {TRIVIAL}"
    return bootstrap_rows([name], "", statistic, right, values, -np.abs(margin), groups=asked.groups)


def _calibration_rows(asked: Sheet, log_odds: np.ndarray, suffix: str) -> Rows:
    """ECE, ACE and MCE; the last without an interval.

    The largest of several errors grows with their noise, and a draw of a bootstrap has more of it than the data: its
    interval may lie above the number that it is of.
    """

    def statistic(log_odds: np.ndarray) -> list[float]:
        bins = reliability(log_odds)
        return [bins.expected_error, bins.average_error, bins.largest_error]

    names = [f"{name}{suffix}" for name in ("ECE", "ACE", "MCE")]
    *others, largest = bootstrap_rows(names, "", statistic, log_odds, groups=asked.groups)
    return [*others, largest | {"ci95": [None, None]}]


def _slices(asked: Sheet, right: np.ndarray) -> dict[str, Rows]:
    """Accuracy of every slice of enough prompts, by division; a division of one slice says nothing new."""
    found = {}
    for name in dict.fromkeys(name for row in asked.rows for name in row.slices):
        labels = np.array([asked.rows[i].slices.get(name, "") for i in asked.row])
        count = {label: np.unique(asked.prompt[asked.row[labels == label]]).size for label in np.unique(labels)}
        kept = np.isin(labels, [label for label, prompts in count.items() if prompts >= LEAST and label])
        if kept.any() and np.unique(labels[kept]).size > 1:
            groups = None if asked.groups is None else asked.groups[kept]
            rows = slice_rows(right[kept], labels[kept], groups, "")
            found[name] = [row | {"name": row["name"].removeprefix(": ")} for row in rows]
    return found


def _decided(asked: Sheet) -> list[int]:
    """Rows with a completion that is worse than another."""
    return [i for i, gold in enumerate(asked.by_row(asked.gold)) if gold.min() < gold.max()]


def _kept_groups(asked: Sheet, kept: list[int]) -> np.ndarray | None:
    return None if asked.row_groups is None else asked.row_groups[kept]


def _graded(asked: Sheet) -> bool:
    """Whether gold says more than which completions are right."""
    return asked.several and bool(np.unique(asked.gold).size > 2)


def _several_rows(asked: Sheet, scores: Scores) -> Rows:
    """Of rows with several completions: is the best one found, and what is the gold of the pick."""
    if not asked.several:
        return []
    kept = _decided(asked)
    ours, gold = ([asked.by_row(values)[i] for i in kept] for values in (scores.mean, asked.gold))
    rows = []
    for name, ties in (("best found", "share"), ("best found, ties wrong", "strict")) if kept else ():
        rows += bootstrap_rows([name], "", np.mean, best_right(ours, gold, ties), groups=_kept_groups(asked, kept))
    rows += pick_rows(*(asked.by_row(values) for values in (scores.mean, asked.lengths, asked.gold)), asked.row_groups)
    if _graded(asked):
        error = _standard(scores.mean) - _standard(asked.gold)
        prompt = np.repeat(asked.prompt, np.diff(asked.starts))
        for name in ("epistemic", "aleatoric"):
            if getattr(scores, name) is not None:
                rows += _named(name, gap_rows(error, getattr(scores, name).astype(np.float64), prompt))
    return rows


def _standard(values: np.ndarray) -> np.ndarray:
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)


def _length_rows(asked: Sheet, mean: np.ndarray, margin: np.ndarray) -> Rows:
    rows = []
    if margin.size:
        rows += pair_length_rows(margin, asked.lengths[asked.better], asked.lengths[asked.worse], asked.groups)
    if asked.several:
        rows += response_length_rows(asked.by_row(mean), asked.by_row(asked.lengths), asked.row_groups)
    return _named("length", rows)


def _best_of_n(asked: Sheet, mean: np.ndarray) -> np.ndarray | None:
    """Gold that the best of n gains, n = 1 … the fewest completions of a row, each by exact expectation over subsets.

    As a difference within a row: how good all completions of a prompt are is no part of what models differ in.
    """
    counts = np.diff(asked.starts)
    if counts.min() < 3:
        return None
    most, curves = int(counts.min()), np.empty((len(asked.rows), int(counts.min())))
    ours, gold = asked.by_row(mean), asked.by_row(asked.gold)
    for count in np.unique(counts):
        inside = np.flatnonzero(counts == count)
        found = best_of_k(np.stack([ours[i] for i in inside]), np.stack([gold[i] for i in inside]))
        curves[inside] = found[:, :most] - found[:, :1]
    rows = bootstrap_rows(
        [str(n) for n in range(1, most + 1)], "", lambda part: part.mean(axis=0), curves, groups=asked.row_groups
    )
    return np.array([[float(row["name"]), row["mean"], *row["ci95"]] for row in rows])
