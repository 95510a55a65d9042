"""Scores of a reward model, or of several, for completions that are there already.

    python experiments/score.py --reward FOLDER --data FILE.jsonl --out OUT
    python experiments/score.py --reward A B C --rule worst_case --data FILE.jsonl --out OUT

Rows have `prompt` and `completion`; or `chosen` and `rejected` (and perhaps `prompt`); or `prompt` and `completions`, a
list (and perhaps `gold`, a number for each). OUT/scores.jsonl has the rows with `score`, or with `scores` in the order
of the completions (chosen, rejected); null where a completion is too long or empty. OUT/summary.json has the accuracy
on pairs; and where there is gold, that of the completion with the best score against a random one, the longest and the
best. Each reward model reads the text through its own tokenizer; of several, each counts from its mean over the file.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.candidates import JUDGED_FORMATS, Candidates, candidates
from rlhf_jax.data.formats import Rows, load_rows
from rlhf_jax.data.tokenization import describe_dropped
from rlhf_jax.evaluation.picks import pair_rows, pick_rows
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.parallel.meetings import on_first
from rlhf_jax.rewards.ensemble import centre, member_offset
from rlhf_jax.rewards.members import RULES, Rule, rule_state
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.completion_scores import CompletionScores, load_scorer, read_completions
from rlhf_jax.training.devices import on_devices
from rlhf_jax.training.json_lines import write_lines
from rlhf_jax.training.options import SourceOptions
from rlhf_jax.training.reward_models import check_rule
from rlhf_jax.training.samples import readable
from rlhf_jax.training.session import check_run, open_run
from rlhf_jax.training.sources import open_source
from rlhf_jax.types import Score


@dataclasses.dataclass(frozen=True)
class Config(SourceOptions):
    """Options of scoring.

    Attributes:
        reward: Hugging Face folders of reward models, of any kind that experiments/reward_model.py writes.
        rule: what becomes of the scores of several reward models, or of the members of one that has some: their mean,
            their minimum, their mean less a penalty for their variance or standard deviation, or the score of the first
            alone.
        penalty: coefficient of that penalty; None: 0.5 (uncertainty_weighted) or 1 (lower_confidence_bound).
        over_long: what is done with prompt and completion of more than --longest tokens: no score ("drop"), or the
            score of their first tokens and the last one ("cut").
    """

    reward: tuple[str, ...] = ()
    rule: Rule = "mean"
    penalty: float | None = None
    over_long: Literal["drop", "cut"] = "drop"


PRESETS = {"default": Config()}


def model_scores(config: Config, folder: str, flat: Rows) -> CompletionScores:
    """The scores of one reward model, one a completion; NaN where it cannot read it."""
    options = dataclasses.replace(config, model=folder)
    source = open_source(options)
    examples, shorter = read_completions(source, flat, config.chat, cut=config.over_long == "cut")
    print(f"{folder} reads completions: {describe_dropped(examples)}; cut: {shorter}", flush=True)
    return load_scorer(options, source)(examples, len(flat.values))


def combined(config: Config, models: list[CompletionScores]) -> np.ndarray:
    """One score a completion from those of several models, or from what one model says of itself."""
    means = np.stack([model.mean for model in models])
    read = ~np.isnan(means).any(axis=0)
    known = jnp.asarray(means[:, read])
    if len(models) > 1:
        known = centre(known, member_offset(known))
        score = Score(mean=known[0], members=known)
    else:
        found = {"members": models[0].members, "epistemic": models[0].epistemic}
        taken = {name: jnp.asarray(values[..., read]) for name, values in found.items() if values is not None}
        score = Score(mean=known[0], **taken)
    scores = np.full(means.shape[1], np.nan, np.float32)
    scores[read] = RULES[config.rule].apply(score, None, rule_state(config.rule, config.penalty))[0]
    return scores


def table_of(rows: Rows, made: Candidates, scores: list[np.ndarray]) -> list[dict]:
    """What the summary says of the rows whose completions all have a score."""
    lengths = made.by_row(np.array([len(readable(one["completion"])) for one in made.flat.values], np.float32))
    read = [number for number, values in enumerate(scores) if not np.isnan(values).any()]
    if not read:
        raise ValueError(f"{rows.source} has no row whose completions were all read: raise --longest, or shorten them.")
    scores, lengths, values = ([side[number] for number in read] for side in (scores, lengths, rows.values))
    table = [
        row("rows whose completions were all read", "", np.array([len(read) / len(rows.values)])),
        row("score of a completion", "", np.concatenate(scores)),
    ]
    if rows.format == "preference":
        table += pair_rows(scores, lengths)
    if all(one.get("completions") and one.get("gold") for one in values):
        table += pick_rows(scores, lengths, [np.asarray(one["gold"], np.float64) for one in values])
    return table


@on_devices
def main(config: Config) -> dict:
    """Scores the rows; returns the summary."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    if not config.reward:
        raise ValueError("--reward is missing: give the folder of a reward model, or see --help.")
    if config.model is not None or config.resume:
        raise ValueError("scoring takes its models from --reward and has no steps: leave out --model and --resume.")
    check_run(dataclasses.replace(config, model=config.reward[0]), "score")
    rule_state(config.rule, config.penalty)
    check_rule(config.rule, config.reward)
    rows = load_rows(config.data, JUDGED_FORMATS, config.columns, config.convert)
    made = candidates(rows)
    column = "score" if rows.format == "prompt_completion" else "scores"
    if column in rows.values[0]:
        raise ValueError(f"{config.data} has a column {column!r}, which is written here: rename it with --columns.")
    models = [model_scores(config, folder, made.flat) for folder in config.reward]
    scores = made.by_row(combined(config, models))
    table = table_of(rows, made, scores)
    folder = open_run(config, "score")
    plain = [[None if math.isnan(value) else value for value in values.tolist()] for values in scores]
    lines = (
        one | {column: values[0] if column == "score" else values}
        for one, values in zip(rows.values, plain, strict=True)
    )
    on_first(lambda: str(write_lines(folder.path / "scores.jsonl", lines)), "writing scores.jsonl")
    return run_folder.conclude(folder, table, [], began, clock.seconds)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
