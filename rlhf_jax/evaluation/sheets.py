"""What a file of judged rows asks of a model and what the model answers: completions laid end to end, their scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.judged import JudgedRow
from rlhf_jax.evaluation.calibration import moderated_margin, rating_log_odds
from rlhf_jax.evaluation.uncertainty import log_wrong_sign, margin_deviation, margin_spread, pair_uncertainty

Numbers = Float[np.ndarray, " N"]
TRIVIAL = "-|margin|"
"""The name of the uncertainty that every model has: how small the margin of a pair is."""
WRONG_SIGN = "wrong sign by "
"""What begins the names of the uncertainties that weigh another one against the margin."""
MOST_PAIRS = 9
"""Most pairs of one row that are compared."""


@dataclass(frozen=True)
class Sheet:
    """Judged rows, their completions laid end to end.

    Attributes:
        name: of the file.
        format: of its rows, see `data.judged`.
        rows: the rows.
        starts: where the completions of each row begin, int [rows + 1]; the last is N.
        gold: of each completion, float64 [N].
        lengths: of each completion, in characters, float64 [N].
        better: the completion that is better in each pair, int [pairs], places in the N.
        worse: the other one, int [pairs].
        row: the row of each pair, int [pairs].
        prompt: of each row, int [rows]; rows of the same prompt share a number.
    """

    name: str
    format: str
    rows: Sequence[JudgedRow]
    starts: Int[np.ndarray, " _"]
    gold: Numbers
    lengths: Numbers
    better: Int[np.ndarray, " P"]
    worse: Int[np.ndarray, " P"]
    row: Int[np.ndarray, " P"]
    prompt: Int[np.ndarray, " R"]

    @property
    def groups(self) -> np.ndarray | None:
        """The prompt of each pair; None where each prompt has one, which is faster to resample."""
        return _several_a_group(self.prompt[self.row])

    @property
    def row_groups(self) -> np.ndarray | None:
        """The prompt of each row; None where each prompt has one."""
        return _several_a_group(self.prompt)

    @property
    def several(self) -> bool:
        """Whether rows have three completions or more, of which some are better."""
        return bool((np.diff(self.starts) > 2).any())

    def by_row(self, values: Numbers) -> list[np.ndarray]:
        """One number a completion, put together by row."""
        return np.split(values, self.starts[1:-1])


@dataclass(frozen=True)
class Scores:
    """A model's scores of the completions of a sheet.

    Attributes:
        mean: float64 [N].
        epistemic: [N], or None.
        aleatoric: [N], or None.
        members: [M, N], or None.
        states: what margins say of a pair: "log_odds" of the first being preferred; a difference of "ratings", which
            with their deviations gives a probability; or None: nothing that could be calibrated.
        whitened: features in units of their uncertainty, of one head with a posterior, [D, N]; or None.
    """

    mean: Numbers
    epistemic: Numbers | None = None
    aleatoric: Numbers | None = None
    members: Float[np.ndarray, "M N"] | None = None
    states: Literal["log_odds", "ratings"] | None = "log_odds"
    whitened: Float[np.ndarray, "D N"] | None = None


def sheet(name: str, format: str, rows: Sequence[JudgedRow], lengths: Sequence[int | float]) -> Sheet:
    """Lays judged rows end to end.

    Of rows with more than `MOST_PAIRS` pairs (graded completions make many, which say much the same), that many are
    drawn, always the same ones.

    Args:
        name: of the file.
        format: of its rows.
        rows: one or more.
        lengths: of all completions, in characters, in order.
    """
    starts = np.cumsum([0, *(len(row.completions) for row in rows)])
    generator = np.random.default_rng(0)
    pairs = [
        (starts[i] + one, starts[i] + other, i)
        for i, row in enumerate(rows)
        for one, other in _few(row.pairs, generator)
    ]
    better, worse, row = np.array(pairs, np.int64).reshape(-1, 3).T
    places: dict[str, int] = {}
    prompt = np.array([places.setdefault(repr(one.prompt), len(places)) for one in rows], np.int64)
    gold = np.array([value for row in rows for value in row.gold], np.float64)
    return Sheet(name, format, rows, starts, gold, np.asarray(lengths, np.float64), better, worse, row, prompt)


def _several_a_group(groups: np.ndarray) -> np.ndarray | None:
    return None if np.unique(groups).size == groups.size else groups


def _few(pairs: Sequence[tuple[int, int]], generator: np.random.Generator) -> Sequence[tuple[int, int]]:
    if len(pairs) <= MOST_PAIRS:
        return pairs
    return [pairs[i] for i in np.sort(generator.choice(len(pairs), MOST_PAIRS, replace=False))]


def margins(asked: Sheet, scores: Scores) -> np.ndarray:
    """Score of the better less that of the worse completion of each pair, float64 [P]."""
    return scores.mean[asked.better] - scores.mean[asked.worse]


def deviations(asked: Sheet, scores: Scores) -> dict[str, np.ndarray]:
    """Every standard deviation of the margins of pairs that a model states, by name, float64 [P]."""
    sides, found = (asked.better, asked.worse), {}
    if scores.members is not None:
        found["epistemic"] = margin_spread(*(scores.members[:, side] for side in sides))
    elif scores.whitened is not None:
        found["epistemic"] = margin_deviation(*(scores.whitened[:, side] for side in sides))
    elif scores.epistemic is not None:
        found["epistemic"] = pair_uncertainty(*(scores.epistemic[side] for side in sides))
    if scores.aleatoric is not None:
        found["aleatoric"] = pair_uncertainty(*(scores.aleatoric[side] for side in sides))
    return found


def uncertainties(asked: Sheet, scores: Scores) -> dict[str, np.ndarray]:
    """Every uncertainty of the pairs that a model has, by name, larger for a less certain pair.

    The trivial one; each of `deviations`; and, as a small error turns a small margin, each of them as the chance that
    the margin has the wrong sign.
    """
    margin, found = margins(asked, scores), deviations(asked, scores)
    signs = {f"{WRONG_SIGN}{name}": log_wrong_sign(margin, values) for name, values in found.items()}
    return {TRIVIAL: -np.abs(margin), **found, **signs}


def stated_log_odds(asked: Sheet, scores: Scores) -> dict[str, np.ndarray]:
    """Log-odds of the probabilities that a model gives the better completion of each pair, by what they come from.

    Returns:
        The model's own under "": its margins, or what Gaussian ratings say (`calibration.rating_log_odds`). Under the
        name of each deviation that is not in it yet, the same when the margin is as uncertain as that. Empty where the
        model states no probability: it has `states` None, or ratings without deviations above 0.
    """
    margin, sd = margins(asked, scores), deviations(asked, scores)
    if scores.states == "log_odds":
        return {"": margin} | {
            f"margins moderated by {name}": moderated_margin(margin, one) for name, one in sd.items()
        }
    rating = sd.pop("aleatoric", np.zeros(1))
    if scores.states is None or not (rating > 0.0).all():
        return {}
    found = {name: rating_log_odds(margin, np.hypot(rating, one)) for name, one in sd.items()}
    return {"": rating_log_odds(margin, rating)} | {f"{name} variance added": one for name, one in found.items()}
