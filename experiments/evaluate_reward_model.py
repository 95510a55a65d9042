r"""Evaluates reward models, several side by side, on files of judged completions: a table, a figure and an HTML page.

    python experiments/evaluate_reward_model.py --model FOLDER --data judge.jsonl --out OUT
    python experiments/evaluate_reward_model.py --model A B C --ensemble --data hh.jsonl alpaca_eval_bon11.jsonl \
        --out-of-distribution webgpt.jsonl --out OUT

Models are folders of any kind of reward model: plain ones, and those that know what they do not know (ensembles,
last-layer posteriors, Gaussian heads …), whose uncertainty is evaluated too, beside the trivial one, −|margin|.

Files are JSON, JSONL or Parquet, or folders of them, in the format of a benchmark (RewardBench 1 and 2, RM-Bench, RMB,
PPE, JudgeBench, LLMBar, PandaLM, Auto-J, AlpacaEval best-of-n, WebGPT comparisons) or plain: `chosen` and `rejected`,
or `prompt`, `completions` and `gold`. The format is told from the columns, see `rlhf_jax.data.judged`.

A short table is printed, a line a model and file. OUT/summary.json has every number with its 95 % interval over
prompts, OUT/scores.jsonl a line a row with the scores of all models (and none of the texts judged), OUT/report.html and
OUT/figures/report.png a page. Where a completion is too long to be read, its row is left out for all, and counted.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.data.judged import Judged, as_candidates, load_judged
from rlhf_jax.data.tokenization import Examples, describe_dropped
from rlhf_jax.evaluation.judging import Rows
from rlhf_jax.evaluation.model_measures import baselines, compare_rows, measure, mismatch_rows, new_data_rows
from rlhf_jax.evaluation.model_report import report_figure, report_html
from rlhf_jax.evaluation.official_scores import rmb_score_rows
from rlhf_jax.evaluation.overview import FileReport, print_overview, table_of
from rlhf_jax.evaluation.sheets import Scores, Sheet, sheet
from rlhf_jax.parallel.distributed import Distributed
from rlhf_jax.parallel.meetings import on_first
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run, started
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.completion_scores import (
    CompletionScores,
    as_ensemble,
    check_head,
    load_scorer,
    read_completions,
)
from rlhf_jax.training.devices import on_devices
from rlhf_jax.training.json_lines import write_lines
from rlhf_jax.training.options import Dtype, RunOptions, SourceOptions, check_options
from rlhf_jax.training.progress import ProgressReport
from rlhf_jax.training.reward_folders import check_same_tokenizer, kind_in
from rlhf_jax.training.reward_kinds import RATED
from rlhf_jax.training.samples import readable
from rlhf_jax.training.sources import Source, open_source

ENSEMBLE = "ensemble"


@dataclasses.dataclass(frozen=True)
class Config(RunOptions, Distributed):
    """Options of an evaluation.

    Attributes:
        model: folders of reward models.
        data: files or folders of judged rows.
        format: the format of all of them; None: told from their columns.
        ensemble: evaluate the models together too, as an ensemble: their average, and how far they disagree. Each
            counts from its mean over all completions of --data.
        out_of_distribution: files of rows unlike those that the models were trained on: does the uncertainty rise?
        in_distribution: those files of --data whose rows are like those that the models were trained on, which the new
            ones are set against; none: the first file of --data.
        most: most rows of a file, drawn at random; None: all.
        seed: of the draw.
        over_long: what is done with prompt and completion of more than --longest tokens: no score, and the row is left
            out ("drop"), or the score of the end of the prompt, the first tokens of the completion and the last one
            ("cut").
        chat: read texts as turns of a chat, for models that were tuned on chats.
        chat_template: file with a Jinja chat template, for a tokenizer that has none (or another one than its own).
        longest: most tokens a sequence may have. None: the model's context, at most 1024.
        batch_size: completions a batch.
        dtype: dtype of the computation; scores are float32.
        param_dtype: dtype in which parameters are kept.
        mesh: devices along each axis, such as data=2,fsdp=4; None: one device.
        mesh_between: how often each axis of the mesh is repeated over slices (or hosts).
    """

    model: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    format: str | None = None
    ensemble: bool = False
    out_of_distribution: tuple[Path, ...] = ()
    in_distribution: tuple[Path, ...] = ()
    most: int | None = None
    seed: int = 0
    over_long: Literal["drop", "cut"] = "drop"
    chat: bool = False
    chat_template: Path | None = None
    longest: int | None = None
    batch_size: int = 32
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    mesh: str | None = None
    mesh_between: str | None = None


PRESETS = {"default": Config()}


class File(NamedTuple):
    """Judged rows, and what each model made of all their completions."""

    name: str
    judged: Judged
    counts: list[int]
    scores: dict[str, CompletionScores]


class Asked(NamedTuple):
    """The rows of a file that all models read, and the scores that they have there, by model."""

    sheet: Sheet
    scores: dict[str, Scores]


def check(config: Config) -> dict[str, SourceOptions]:
    """Refuses what cannot work; returns how each model is read, by a short name."""
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing: give it, or see --help.")
    unknown = [path for path in config.in_distribution if path not in config.data]
    if unknown:
        raise ValueError(f"--in-distribution {unknown[0]} is not among the files of --data: add it there.")
    if config.in_distribution and not config.out_of_distribution:
        raise ValueError("--in-distribution needs --out-of-distribution: give files of new data, or leave it out.")
    if config.ensemble and len(config.model) < 2:
        raise ValueError("--ensemble needs at least 2 models: give more, or leave it out.")
    read = {name: options_of(config, folder) for name, folder in zip(names(config.model), config.model, strict=True)}
    if config.ensemble and ENSEMBLE in read:
        raise ValueError(
            f"{read[ENSEMBLE].model} is called {ENSEMBLE!r}, as all models together are by --ensemble: rename it."
        )
    for options in read.values():
        check_options(options, needed=("model",))
        check_head(options.model)
    if config.ensemble:
        check_same_tokenizer(config.model)
    run_folder.check_out(config.out, config.overwrite)
    if config.out is not None:
        inside = [
            place
            for place in (*config.model, *config.data, *config.out_of_distribution)
            if Path(place).resolve().is_relative_to(config.out.resolve())
        ]
        if inside:
            raise ValueError(
                f"{inside[0]} lies in --out {config.out}, which --overwrite deletes: choose another folder."
            )
    return read


def options_of(config: Config, folder: str | None = None) -> SourceOptions:
    """How a model is read and run."""
    shared = {field.name for field in dataclasses.fields(SourceOptions)} - {"model", "data"}
    return SourceOptions(model=folder, **{name: value for name, value in vars(config).items() if name in shared})


def names(paths: Sequence[str | Path]) -> list[str]:
    """Short names: the ends of the paths, long enough to differ, but for a folder "model" that all end with.

    Example:
        >>> names(["runs/a/model", "runs/b/model"]), names(["x/rm"])
        (['a', 'b'], ['rm'])
    """
    parts = [
        Path(path).with_suffix("").parts if Path(path).suffix in (".jsonl", ".json") else Path(path).parts
        for path in paths
    ]
    parts = [part[:-1] if len(part) > 1 and part[-1] == "model" else part for part in parts]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    raise ValueError(f"{paths[0]} is given twice, or two paths are the same folder: give each model and file once.")


def score_all(config: Config, read: dict[str, SourceOptions], files: dict[str, Judged]) -> list[File]:
    """Scores every completion of every file by every model; all texts are tokenised before the first score."""
    made = {name: as_candidates(judged) for name, judged in files.items()}
    sources: dict[str, Source] = {model: open_source(options) for model, options in read.items()}
    tokens: dict[tuple[str, str], Examples] = {}
    for model, source in sources.items():
        for name, one in made.items():
            tokens[model, name], cut = read_completions(source, one.flat, config.chat, config.over_long == "cut")
            dropped = describe_dropped(tokens[model, name]).replace("rows", "completions")
            print(f"{model} reads {name}: {dropped}; cut: {cut}", flush=True)
    found: dict[str, dict[str, CompletionScores]] = {name: {} for name in files}
    for model, source in sources.items():
        score = load_scorer(read[model], source, pairs=True)
        for name, one in made.items():
            found[name][model] = score(tokens[model, name], len(one.flat.values))
    if config.ensemble:
        inside = [found[name] for name in list(files)[: len(config.data)]]
        reference = [CompletionScores(np.concatenate([one[model].mean for one in inside])) for model in sources]
        for several in found.values():
            several[ENSEMBLE] = as_ensemble(list(several.values()), reference)
    return [File(name, judged, made[name].counts, found[name]) for name, judged in files.items()]


def states_of(read: dict[str, SourceOptions], ensemble: bool) -> dict[str, str | None]:
    """What the margins of each model say, see `Scores.states`; of models of both sorts together nothing."""
    states = {model: "ratings" if kind_in(options.model) in RATED else "log_odds" for model, options in read.items()}
    sorts = set(states.values())
    return states | ({ENSEMBLE: sorts.pop() if len(sorts) == 1 else None} if ensemble else {})


def asked_of(file: File, states: dict[str, str | None]) -> Asked:
    """What is evaluated: the rows that all models read."""
    read = np.all([~np.isnan(scores.mean) for scores in file.scores.values()], axis=0)
    ends = np.cumsum([0, *file.counts])
    kept = [i for i in range(len(file.counts)) if read[ends[i] : ends[i + 1]].all()]
    if not kept:
        raise ValueError(
            f"no row of {file.judged.source} was read by all models: raise --longest, or give --over-long cut."
        )
    inside = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in kept])
    rows = [file.judged.rows[i] for i in kept]
    lengths = [float(len(readable(completion))) for one in rows for completion in one.completions]
    scores = {}
    for model, one in file.scores.items():
        known = {part: values for part, values in one._asdict().items() if values is not None}
        known = {part: values[..., inside].astype(np.float64) for part, values in known.items()}
        scores[model] = Scores(**known, states=states[model])
    return Asked(sheet(file.name, file.judged.format, rows, lengths), scores)


def report_of(file: File, asked: Asked, progress: ProgressReport) -> FileReport:
    """Everything that is measured of a file."""
    measured, compared, first = {}, {}, next(iter(asked.scores))
    for model, scores in asked.scores.items():
        measured[model] = measure(asked.sheet, scores)
        if model != first:
            compared[model] = compare_rows(asked.sheet, scores, asked.scores[first])
        progress.advance()
    rows, read = len(file.judged.rows), len(asked.sheet.rows)
    return FileReport(file.name, file.judged.format, rows, read, measured, baselines(asked.sheet), compared)


def new_data(asked: Asked, outside: Sequence[Asked]) -> Rows:
    """Detection of data unlike those of a file, by each file of such data and each model."""
    return [
        one | {"name": f"{asked.sheet.name} against {other.sheet.name}, {model}: {one['name']}"}
        for other in outside
        for model, scores in asked.scores.items()
        for one in new_data_rows((asked.sheet, scores), (other.sheet, other.scores[model]))
    ]


def rmb_scores(asked: Sequence[Asked]) -> Rows:
    """RMB's score of each model over all files of RMB, see `rmb_score_rows`."""
    return [
        one | {"name": f"all files of RMB, {model}: {one['name']}"}
        for model in asked[0].scores
        for one in rmb_score_rows([each.sheet for each in asked], [each.scores[model] for each in asked])
    ]


def lines_of(file: File) -> list[dict[str, Any]]:
    """A line a row: where it stands, its gold, the scores, and all columns of the file but the texts."""
    ends, lines = np.cumsum([0, *file.counts]), []
    for place, one in enumerate(file.judged.rows):
        inside = slice(ends[place], ends[place + 1])
        line = {
            "file": file.name,
            "place": one.place,
            "gold": list(one.gold),
            "pairs": [list(pair) for pair in one.pairs],
        }
        line |= {"slices": one.slices} | ({"votes": list(one.votes)} if one.votes else {})
        line["extra"] = json.loads(json.dumps(one.extra, default=str))  # Parquet has dates
        for part in ("mean", "epistemic", "aleatoric"):
            known = {model: getattr(scores, part) for model, scores in file.scores.items()}
            key = "scores" if part == "mean" else part
            line[key] = {model: _plain(values[inside]) for model, values in known.items() if values is not None}
        lines.append(line)
    return lines


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def main(config: Config) -> dict:
    """Evaluates the models; returns the summary."""
    return on_devices(lambda options: evaluate(config))(options_of(config))


def evaluate(config: Config) -> dict:
    """`main`, on the devices that take part."""
    began, clock = started(__name__ == "__main__"), CompileClock()
    read = check(config)
    paths = [*config.data, *config.out_of_distribution]
    files = {
        name: load_judged(path, config.format, config.most, config.seed)
        for name, path in zip(names(paths), paths, strict=True)
    }
    scored = score_all(config, read, files)
    states = states_of(read, config.ensemble)
    asked = [asked_of(file, states) for file in scored]
    inside, outside = asked[: len(config.data)], asked[len(config.data) :]
    with ProgressReport("measuring", len(inside) * len(inside[0].scores)) as progress:
        reports = [report_of(file, one, progress) for file, one in zip(scored, inside, strict=False)]
    known = [asked[config.data.index(path)] for path in config.in_distribution or config.data[:1]]
    single = {one.name: [found for model, found in one.models.items() if model in read] for one in reports}
    others = {
        "RMB": rmb_scores(inside),
        "new data": [one for each in known for one in new_data(each, outside)],
        "objective mismatch, over models": mismatch_rows(single),
    }
    others = {title: rows for title, rows in others.items() if rows}
    folder = run_folder.create(config.out, "evaluate_reward_model", config, config.overwrite)
    print(f"writing to {folder.path}", flush=True)

    def write() -> str:
        write_lines(folder.path / "scores.jsonl", (line for file in scored for line in lines_of(file)))
        report_figure(reports, folder.path / "figures" / "report.png")
        about = {"models": ", ".join(config.model), "device": folder.device["kind"], "started": folder.started}
        about |= {"rows": ", ".join(f"{one.name}: {one.format}, {one.read} of {one.rows}" for one in reports)}
        (folder.path / "report.html").write_text(report_html(reports, others, about), encoding="utf-8")
        return str(folder.path)

    on_first(write, "writing the report")
    table = table_of(reports, others)
    result = run_folder.summary(folder, table, [], time.monotonic() - began, clock.seconds)
    run_folder.write_summary(folder, result)
    print_overview(reports, others.get("RMB", []))
    print(f"All {len(table)} numbers are in summary.json and report.html.", flush=True)
    return result


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
