"""Benchmarks of reward models: RMB, RewardBench, AlpacaEval best-of-n.

Pairs have `prompt`, `chosen`, `rejected`; choices among several answers have `prompt`, `completions` and `gold`, a
number for each completion, larger for a better one.
"""

from collections.abc import Iterable, Iterator

from rlhf_jax.data.builders.columns import CHAT, NUMBER, NUMBERS, REPLIES, REPLY, TEXT, TEXTS, reply
from rlhf_jax.data.builders.source import Dropped, Made, Record, Source, each, published_form


def _rmb(record: Record) -> dict:
    """What both sets of RMB have: a conversation that ends with the user, and the path of its category."""
    _, goal, *category = record.fields["category_path"].split("/")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in record.fields["conversation_input"]]
    return {"prompt": turns, "subset": goal, "category": "/".join(category)}


def _rmb_pairwise(record: Record) -> Iterator[dict]:
    chosen, rejected = record.fields["chosen"], record.fields["reject"]
    yield _rmb(record) | {
        "chosen": reply(chosen["answer"]),
        "rejected": reply(rejected["answer"]),
        "margin": chosen["score"] - rejected["score"],
        "chosen_generator": chosen["llm_name"],
        "rejected_generator": rejected["llm_name"],
        "id": record.fields["pair_uid"],
    }


def _rmb_best_of_n(record: Record) -> Iterator[dict]:
    """One best answer and several that lose to it. The best comes last: picking the first of equals does not win."""
    answers = [*record.fields["loser_list"], record.fields["bon_best"]]
    yield _rmb(record) | {
        "completions": [reply(answer["answer"]) for answer in answers],
        "gold": [0.0] * (len(answers) - 1) + [1.0],
        "generators": [answer["llm_name"] for answer in answers],
        "id": record.fields["bon_uid"],
    }


_RMB_HOMEPAGE = "https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark"
_RMB_COLUMNS = {"prompt": CHAT, "subset": TEXT, "category": TEXT, "id": TEXT}

RMB_PAIRWISE = Source(
    description="Pairs of answers for 49 scenarios of helpfulness and harmlessness (RMB, pairwise set).",
    homepage=_RMB_HOMEPAGE,
    files={"test": ("RMB_dataset/Pairwise_set/**/*.json", "Pairwise_set/**/*.json")},
    columns=_RMB_COLUMNS
    | {"chosen": REPLY, "rejected": REPLY, "margin": NUMBER, "chosen_generator": TEXT, "rejected_generator": TEXT},
    rows=each(_rmb_pairwise),
)

RMB_BEST_OF_N = Source(
    description="A best answer among several for 49 scenarios of helpfulness and harmlessness (RMB, best-of-n set).",
    homepage=_RMB_HOMEPAGE,
    files={"test": ("RMB_dataset/BoN_set/**/*.json", "BoN_set/**/*.json")},
    columns=_RMB_COLUMNS | {"completions": REPLIES, "gold": NUMBERS, "generators": TEXTS},
    rows=each(_rmb_best_of_n),
)


# The sections that RewardBench reports, and their subsets.
_SECTIONS = {
    "chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "chat-hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
REWARD_BENCH_SECTION_OF = {subset: section for section, subsets in _SECTIONS.items() for subset in subsets}


def _reward_bench(record: Record) -> Iterator[dict]:
    fields = record.fields
    if fields["subset"] not in REWARD_BENCH_SECTION_OF:
        raise ValueError(f"there is no subset {fields['subset']!r}")
    yield {
        "prompt": fields["prompt"],
        "chosen": fields["chosen"],
        "rejected": fields["rejected"],
        "subset": fields["subset"],
        "category": REWARD_BENCH_SECTION_OF[fields["subset"]],
        "chosen_generator": fields["chosen_model"],
        "rejected_generator": fields["rejected_model"],
        "id": str(fields["id"]),
    }


REWARD_BENCH = Source(
    description="Pairs of a better and a worse answer in chat, safety and reasoning (RewardBench).",
    homepage="https://huggingface.co/datasets/allenai/reward-bench",
    files={
        split: (f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.json", f"{split}.jsonl")
        for split in ("filtered", "raw")
    },
    columns={
        "prompt": TEXT,
        "chosen": TEXT,
        "rejected": TEXT,
        "subset": TEXT,
        "category": TEXT,
        "chosen_generator": TEXT,
        "rejected_generator": TEXT,
        "id": TEXT,
    },
    rows=each(_reward_bench),
)


def _alpaca_eval(records: Iterable[Record]) -> Iterator[Made]:
    """Candidates for a prompt stand in one file a sample, each with the judge's preference over a reference answer.

    The preference is 1 where the judge is sure of the reference and 2 where it is sure of the candidate, so the
    probability that the candidate wins is one less. A second form of the file has the candidates together already.
    """
    prompts: dict[tuple, Made] = {}
    for record in records:
        with published_form(record):
            fields = record.fields
            if "candidates" in fields:
                completions = [candidate["text"] for candidate in fields["candidates"]]
                gold = [candidate["gold"] for candidate in fields["candidates"]]
                row = {"prompt": fields["prompt"], "reference": fields["reference"], "subset": fields["dataset"]}
                yield record.place, row | {"completions": completions, "gold": gold}
                continue
            if fields["preference"] is None:
                yield record.place, Dropped("candidate without a preference")
                continue
            new = {"prompt": fields["instruction"], "reference": fields["output_1"], "subset": fields["dataset"]}
            new |= {"completions": [], "gold": []}
            _, row = prompts.setdefault((fields["id"], fields["instruction"]), (record.place, new))
            row["completions"].append(fields["output_2"])
            row["gold"].append(fields["preference"] - 1)
    yield from prompts.values()


ALPACA_EVAL_BEST_OF_N = Source(
    description="Up to 16 answers of one model to each prompt of AlpacaEval, with a judge's preferences (RewardBench).",
    homepage="https://github.com/allenai/reward-bench (folder bon_eval of its history)",
    files={
        "test": (
            "annotations_ref=*/*/*/annotations.json",
            "**/annotations_ref=*/*/*/annotations.json",
            "alpaca_eval_bon*.jsonl",
        )
    },
    columns={
        "prompt": TEXT,
        "completions": TEXTS,
        "gold": NUMBERS,
        "reference": TEXT,
        "subset": TEXT,
    },
    rows=_alpaca_eval,
)
