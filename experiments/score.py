"""Scores of a reward model, or of several, for completions that are there already.

    python experiments/score.py --reward FOLDER --data FILE.jsonl --out OUT
    python experiments/score.py --reward A B C --rule worst_case --data FILE.jsonl --out OUT

Rows have `prompt` and `completion`; or `chosen` and `rejected` (and perhaps `prompt`); or `prompt` and `completions`, a
list (and perhaps `gold`, a number for each). OUT/scores.jsonl has the rows with `score`, or with `scores` in the order
of the completions (chosen, rejected); null where a completion is too long or empty. Beside it stand, where the reward
model says so or there are several, `epistemic` and `aleatoric`: standard deviations for what it was not taught and for
what the data leave open. OUT/summary.json has the accuracy on pairs; and where there is gold, that of the completion
with the best score against a random one, the longest (in tokens that the first reward model reads) and the best. Each
reward model reads the text through its own tokenizer; of several, each counts from its mean over the file.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.candidates import JUDGED_FORMATS, candidates
from rlhf_jax.data.formats import Rows, load_rows
from rlhf_jax.data.tokenization import describe_dropped
from rlhf_jax.evaluation.picks import pair_rows, pick_rows
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.parallel.meetings import on_first
from rlhf_jax.rewards.members import RULES, Rule, rule_state
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.completion_scores import CompletionScores, as_ensemble, load_scorer, read_completions
from rlhf_jax.training.devices import on_devices
from rlhf_jax.training.json_lines import write_lines
from rlhf_jax.training.options import SourceOptions
from rlhf_jax.training.reward_models import check_rule
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
            score of the end of the prompt, the first tokens of the completion and the last one ("cut").
    """

    reward: tuple[str, ...] = ()
    rule: Rule = "mean"
    penalty: float | None = None
    over_long: Literal["drop", "cut"] = "drop"


PRESETS = {"default": Config()}


def model_scores(config: Config, folder: str, flat: Rows) -> tuple[CompletionScores, np.ndarray]:
    """The scores of one reward model, and the tokens of each completion; NaN where it cannot read it."""
    options = dataclasses.replace(config, model=folder)
    source = open_source(options)
    examples, shorter = read_completions(source, flat, config.chat, cut=config.over_long == "cut")
    print(f"{folder} reads completions: {describe_dropped(examples)}; cut: {shorter}", flush=True)
    lengths = np.full(len(flat.values), np.nan, np.float32)
    lengths[examples.rows] = [item.loss_mask.sum() for item in examples.items]
    return load_scorer(options, source)(examples, len(flat.values)), lengths


def combined(config: Config, models: Sequence[CompletionScores]) -> CompletionScores:
    """One score a completion from those of several models, or from what one model says of itself."""
    found = models[0]
    if len(models) > 1:
        found = as_ensemble(models)
        found = found._replace(mean=found.members[0])  # of the rule single, the first model's
    read = ~np.isnan(found.mean)
    score = Score(
        **{name: jnp.asarray(values[..., read]) for name, values in found._asdict().items() if values is not None}
    )
    scores = np.full(len(read), np.nan, np.float32)
    scores[read] = RULES[config.rule].apply(score, None, rule_state(config.rule, config.penalty))[0]
    return found._replace(mean=scores)


def table_of(rows: Rows, scores: list[np.ndarray], lengths: list[np.ndarray]) -> list[dict]:
    """What the summary says of the rows whose completions all have a score."""
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
        prompts = [str(one.get("prompt")) for one in values]
        table += pick_rows(scores, lengths, [np.asarray(one["gold"], np.float64) for one in values], prompts)
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
    single = rows.format == "prompt_completion"
    columns = {"mean": "score" if single else "scores", "epistemic": "epistemic", "aleatoric": "aleatoric"}
    for column in columns.values():
        if column in rows.values[0]:
            raise ValueError(f"{config.data} has a column {column!r}, which is written here: rename it with --columns.")
    models, lengths = zip(*(model_scores(config, folder, made.flat) for folder in config.reward), strict=True)
    found = combined(config, models)._asdict()
    written = {column: made.by_row(found[name]) for name, column in columns.items() if found[name] is not None}
    table = table_of(rows, written[columns["mean"]], made.by_row(lengths[0]))
    folder = open_run(config, "score")

    def plain(values: np.ndarray) -> Any:
        numbers = [None if math.isnan(value) else value for value in values.tolist()]
        return numbers[0] if single else numbers

    lines = (
        one | {column: plain(values[number]) for column, values in written.items()}
        for number, one in enumerate(rows.values)
    )
    on_first(lambda: str(write_lines(folder.path / "scores.jsonl", lines)), "writing scores.jsonl")
    return run_folder.conclude(folder, table, [], began, clock.seconds)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
