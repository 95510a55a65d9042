"""What a file of judged rows asks of a model and what the model answers: completions laid end to end, their scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.judged import JudgedRow
from rlhf_jax.evaluation.uncertainty import margin_spread, pair_uncertainty

Numbers = Float[np.ndarray, " N"]
TRIVIAL = "-|margin|"
"""The name of the uncertainty that every model has: how small the margin of a pair is."""
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
    """

    mean: Numbers
    epistemic: Numbers | None = None
    aleatoric: Numbers | None = None
    members: Float[np.ndarray, "M N"] | None = None


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


def uncertainties(asked: Sheet, scores: Scores) -> dict[str, np.ndarray]:
    """Every uncertainty of the pairs that a model has, by name, larger for a less certain pair."""
    sides = asked.better, asked.worse
    margin = scores.mean[asked.better] - scores.mean[asked.worse]
    found = {TRIVIAL: -np.abs(margin)}
    if scores.members is not None:
        found["epistemic"] = margin_spread(*(scores.members[:, side] for side in sides))
    elif scores.epistemic is not None:
        found["epistemic"] = pair_uncertainty(*(scores.epistemic[side] for side in sides))
    if scores.aleatoric is not None:
        found["aleatoric"] = pair_uncertainty(*(scores.aleatoric[side] for side in sides))
    return found
