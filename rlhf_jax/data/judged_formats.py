"""How each benchmark of reward models writes a row, brought to one form: a prompt, its completions, and their gold.

Gold is one number a completion, larger for a better one and equal for a tie. Where a benchmark names the better one
of two, it is 1 and 0, and ½ each for a tie. Completions keep the order of the file.

| format | told by | gold |
|---|---|---|
| `rmb_pairwise`, `rmb_best_of_n` | `conversation_input` | 1 for the chosen or the best, 0 for others (2410.09893) |
| `reward_bench` | a subset of RewardBench 1 | 1, 0 (2403.13787) |
| `reward_bench_2` | `chosen` and `rejected` are lists, `num_correct` | 1 for the correct ones, 0 for others |
| `rm_bench` | `chosen` and `rejected` are lists of 3, `domain` | 1 for three styles, 0 for three styles (2410.16184) |
| `ppe_human` | `response_1`, `response_2`, `winner` | 1, 0; ties ½ (2410.14872) |
| `ppe_correctness` | `response_1` …, `scores` | 1 for a correct response (2410.14872) |
| `judge_bench` | `response_A`, `response_B`, `label` such as A>B | 1, 0 (2410.12784) |
| `llmbar` | `output_1`, `output_2`, `label` 1 or 2 | 1, 0 (2310.07641) |
| `pandalm` | `response1`, `response2`, `annotator1` … (0 tie, 1, 2) | that of most annotators (2306.05087) |
| `auto_j` | `response 1`, `response 2`, `label` 0, 1 or 2 (tie) | 1, 0; ties ½ (2310.05470) |
| `alpaca_eval_best_of_n` | `candidates`, each with a text and its gold | as given |
| `webgpt_comparisons` | two texts with two scores, or `answer_0`, `answer_1` | the scores |
| `instruction_pairs` | `instruction`, `chosen`, `rejected` | 1, 0 |
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rlhf_jax.data.builders.benchmarks import REWARD_BENCH, REWARD_BENCH_SECTION_OF, RMB_BEST_OF_N, RMB_PAIRWISE
from rlhf_jax.data.builders.source import Record, Source
from rlhf_jax.data.columns import is_number, is_text, is_texts
from rlhf_jax.data.converters import CONVERTERS
from rlhf_jax.data.formats import split_prompt

TIED = (0.5, 0.5)
STYLES = ("concise", "detailed", "markdown")
"""What the three chosen and the three rejected answers of RM-Bench differ in, in their order."""


class Answers(NamedTuple):
    """What a row has to judge.

    Attributes:
        prompt: text or a chat.
        completions: texts or chats of one message.
        gold: one number a completion.
        slices: the parts of the benchmark that the row belongs to, by the name of the division.
        pairs: which completions to compare, (better, worse); None: all whose gold differs.
        votes: what each annotator said: 0 for a tie, else the number of the better completion, from 1.
    """

    prompt: Any
    completions: list
    gold: tuple[float, ...]
    slices: Mapping[str, str] = MappingProxyType({})
    pairs: tuple[tuple[int, int], ...] | None = None
    votes: tuple[int, ...] = ()


@dataclass(frozen=True)
class JudgedFormat:
    """A format of rows.

    Attributes:
        columns: those that every row has; a row with them all (and that `fits`) has this format.
        read: `read(fields, place)`; raises KeyError, TypeError or ValueError for fields of another form.
        content: a pattern for the names of columns that the prompt, the completions and their gold are made of.
        slices: columns that divide the rows, where a row has them.
        fits: a test besides the columns.
    """

    columns: tuple[str, ...]
    read: Callable[[dict, str], Answers]
    content: str
    slices: tuple[str, ...] = ()
    fits: Callable[[dict], bool] = lambda fields: True


def _built(source: Source, fields: dict, place: str) -> dict:
    """The row that the builder of a published data set makes of a record."""
    _, row = next(iter(source.rows([Record(fields, "test", Path(), place)])))
    return row


def _rmb_pairwise(fields: dict, place: str) -> Answers:
    row = _built(RMB_PAIRWISE, fields, place)
    slices = {name: row[name] for name in ("subset", "category")}
    return Answers(row["prompt"], [row["chosen"], row["rejected"]], (1.0, 0.0), slices)


def _rmb_best_of_n(fields: dict, place: str) -> Answers:
    row = _built(RMB_BEST_OF_N, fields, place)
    slices = {name: row[name] for name in ("subset", "category")}
    return Answers(row["prompt"], row["completions"], tuple(row["gold"]), slices)


def _reward_bench(fields: dict, place: str) -> Answers:
    row = _built(REWARD_BENCH, fields, place)
    slices = {"section": row["category"], "subset": row["subset"]}
    return _answers(row["prompt"], [row["chosen"], row["rejected"]], (1.0, 0.0), slices)


def _several(fields: dict, place: str) -> Answers:
    """Several right and several wrong answers: RewardBench 2 and RM-Bench."""
    right, wrong = fields["chosen"], fields["rejected"]
    return _answers(fields["prompt"], [*right, *wrong], (1.0,) * len(right) + (0.0,) * len(wrong))


def _ppe_human(fields: dict, place: str) -> Answers:
    winner = fields["winner"]
    if winner not in ("model_a", "model_b") and not str(winner).startswith("tie"):
        raise ValueError(f"the winner is {winner!r:.40}, not model_a, model_b or tie")
    gold = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0)}.get(winner, TIED)
    return _answers(fields["prompt"], [fields["response_1"], fields["response_2"]], gold)


def _ppe_correctness(fields: dict, place: str) -> Answers:
    scores = fields["scores"]
    completions = [fields[f"response_{number}"] for number in range(1, len(scores) + 1)]
    gold = tuple(float(score) for score in scores)
    pairs = None
    if fields.get("sampled_conflict_pairs") is not None:
        pairs = tuple((one, other) if gold[one] > gold[other] else (other, one) for one, other in _pairs(fields, gold))
    return _answers(fields["prompt"], completions, gold, pairs=pairs)


def _pairs(fields: dict, gold: tuple[float, ...]) -> list[list[int]]:
    pairs = fields["sampled_conflict_pairs"]
    if any(min(pair) < 0 for pair in pairs):
        raise ValueError("a pair of sampled_conflict_pairs has a place below 0")
    if any(gold[one] == gold[other] for one, other in pairs):
        raise ValueError("a pair of sampled_conflict_pairs is of two right or two wrong responses")
    return pairs


def _judge_bench(fields: dict, place: str) -> Answers:
    gold = {"A>B": (1.0, 0.0), "B>A": (0.0, 1.0), "A=B": TIED}
    if fields["label"] not in gold:
        raise ValueError(f"the label is {fields['label']!r:.40}, not A>B or B>A")
    return _answers(fields["question"], [fields["response_A"], fields["response_B"]], gold[fields["label"]])


def _llmbar(fields: dict, place: str) -> Answers:
    return _answers(fields["input"], [fields["output_1"], fields["output_2"]], _voted(fields["label"], (1, 2)))


def _pandalm(fields: dict, place: str) -> Answers:
    named = sorted((name for name in fields if re.fullmatch(r"annotator\d+", name)), key=lambda name: int(name[9:]))
    votes = tuple(fields[name] for name in named)
    prompt = CONVERTERS["instructions"]({name: fields.get(name) for name in ("instruction", "input")}, place)["prompt"]
    gold = _voted(plurality([_checked(vote, (0, 1, 2)) for vote in votes]), (0, 1, 2))
    # A few of the published responses are the JSON value true, written for the text True.
    said = [
        str(answer) if isinstance(answer, bool) else answer for answer in (fields["response1"], fields["response2"])
    ]
    return _answers(prompt, said, gold)._replace(votes=votes)


def _auto_j(fields: dict, place: str) -> Answers:
    label = _checked(fields["label"], (0, 1, 2))
    return _answers(fields["prompt"], [fields["response 1"], fields["response 2"]], _voted((1, 2, 0)[label], (0, 1, 2)))


def _alpaca_eval(fields: dict, place: str) -> Answers:
    row = CONVERTERS["candidates"](fields, place)
    return _answers(row["prompt"], row["completions"], tuple(map(float, row["gold"])))


def _webgpt(fields: dict, place: str) -> Answers:
    """As training reads it: of two texts, the prompt is what both begin with, the headers of turns included."""
    texts, scores = fields["text"], fields["score"]
    if not (is_texts(texts) and len(texts) == len(scores) == 2 and all(map(is_number, scores))):
        raise ValueError("it has no two texts with two scores")
    parts = split_prompt(*texts)
    return Answers(parts["prompt"], [parts["chosen"], parts["rejected"]], tuple(map(float, scores)))


def _webgpt_answers(fields: dict, place: str) -> Answers:
    question = fields["question"]["full_text"]
    scores = (float(fields["score_0"]), float(fields["score_1"]))
    slices = {"subset": fields["question"]["dataset"]}
    return _answers(question, [fields["answer_0"], fields["answer_1"]], scores, slices)


def _instruction_pair(fields: dict, place: str) -> Answers:
    row = CONVERTERS["instructions"](fields, place)
    return _answers(row["prompt"], [row["chosen"], row["rejected"]], (1.0, 0.0))


def plurality(votes: list[int]) -> int:
    """The answer with more votes than every other, or 0, a tie, where there is none.

    It need not be a majority, more than half of the votes, which is what PandaLM's labels in `evaluation.verdicts` are.

    Example:
        >>> plurality([1, 2, 1]), plurality([0, 1, 2]), plurality([2])
        (1, 0, 2)
    """
    counts = {vote: votes.count(vote) for vote in votes}
    first = [vote for vote, count in counts.items() if count == max(counts.values())]
    return first[0] if len(first) == 1 else 0


def _voted(vote: int, known: tuple[int, ...]) -> tuple[float, float]:
    return (TIED, (1.0, 0.0), (0.0, 1.0))[_checked(vote, known)]


def _checked(vote: Any, known: tuple[int, ...]) -> int:
    if vote not in known or isinstance(vote, bool):
        raise ValueError(f"the label of an annotator is {vote!r:.40}, not one of {known}")
    return int(vote)


def _answers(
    prompt: Any,
    completions: list,
    gold: tuple[float, ...],
    slices: Mapping[str, str] = MappingProxyType({}),
    pairs: tuple[tuple[int, int], ...] | None = None,
) -> Answers:
    """Answers to a prompt that is a text: a newline ends it, so that it does not run into them."""
    if not is_text(prompt) or not is_texts(completions):
        raise ValueError("the prompt or an answer is not text")
    spaced = prompt if not prompt or prompt[-1].isspace() else prompt + "\n"
    return Answers(spaced, completions, gold, slices, pairs)


def _has_lists(fields: dict) -> bool:
    return is_texts(fields["chosen"]) and is_texts(fields["rejected"])


FORMATS: Mapping[str, JudgedFormat] = MappingProxyType(
    {
        "rmb_pairwise": JudgedFormat(
            ("conversation_input", "category_path", "chosen", "reject"),
            _rmb_pairwise,
            "conversation_input|chosen|reject",
        ),
        "rmb_best_of_n": JudgedFormat(
            ("conversation_input", "category_path", "bon_best", "loser_list"),
            _rmb_best_of_n,
            "conversation_input|bon_best|loser_list",
        ),
        "reward_bench_2": JudgedFormat(
            ("prompt", "chosen", "rejected", "subset", "num_correct"),
            _several,
            "prompt|chosen|rejected",
            ("subset",),
            _has_lists,
        ),
        "rm_bench": JudgedFormat(
            ("prompt", "chosen", "rejected", "domain"),
            _several,
            "prompt|chosen|rejected",
            ("domain",),
            lambda fields: _has_lists(fields) and len(fields["chosen"]) == len(fields["rejected"]) == len(STYLES),
        ),
        "reward_bench": JudgedFormat(
            ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset", "id"),
            _reward_bench,
            "prompt|chosen|rejected",
            fits=lambda fields: is_text(fields["subset"]) and fields["subset"] in REWARD_BENCH_SECTION_OF,
        ),
        "ppe_human": JudgedFormat(
            ("prompt", "response_1", "response_2", "winner"),
            _ppe_human,
            "prompt|response_[12]|winner",
            ("language", "is_code", "is_refusal"),
        ),
        "ppe_correctness": JudgedFormat(
            ("prompt", "response_1", "scores"),
            _ppe_correctness,
            r"prompt|response_\d+|scores|sampled_conflict_pairs",
            ("category", "model_name"),
        ),
        "judge_bench": JudgedFormat(
            ("question", "response_A", "response_B", "label"),
            _judge_bench,
            "question|response_[AB]|label",
            ("source", "response_model"),
        ),
        "llmbar": JudgedFormat(
            ("input", "output_1", "output_2", "label"), _llmbar, "input|output_[12]|label", ("subset",)
        ),
        "pandalm": JudgedFormat(
            ("instruction", "response1", "response2", "annotator1"),
            _pandalm,
            r"instruction|input|response[12]|annotator\d+",
            ("motivation_app",),
        ),
        "auto_j": JudgedFormat(
            ("prompt", "response 1", "response 2", "label"), _auto_j, "prompt|response [12]|label", ("scenario",)
        ),
        "alpaca_eval_best_of_n": JudgedFormat(
            ("prompt", "candidates"), _alpaca_eval, "prompt|candidates", ("dataset",)
        ),
        "webgpt_comparisons": JudgedFormat(("text", "score"), _webgpt, "text|score"),
        "webgpt_answers": JudgedFormat(
            ("question", "answer_0", "answer_1", "score_0", "score_1"),
            _webgpt_answers,
            "question|answer_[01]|score_[01]",
        ),
        "instruction_pairs": JudgedFormat(
            ("instruction", "chosen", "rejected"), _instruction_pair, "instruction|input|chosen|rejected"
        ),
    }
)
"""The formats of benchmarks, the more particular ones first."""
