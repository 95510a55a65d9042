"""Judged rows of every known benchmark, told from their columns, and what is refused."""

import json

import numpy as np
import pytest

from rlhf_jax.data.judged import JUDGED, as_candidates, load_judged
from rlhf_jax.data.judged_formats import FORMATS, plurality


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def assistant(content):
    return [{"role": "assistant", "content": content}]


CHAT = [{"role": "user", "content": "Who?", "language": "English"}]
BOTH = {"instruction": "Add.", "input": "1+1"}

# A row of each format; its completions, its gold and its slices.
EXAMPLES = {
    "rmb_pairwise": (
        {
            "pair_uid": "17",
            "conversation_input": CHAT,
            "chosen": {"llm_name": "good", "answer": "I.", "score": 4.5},
            "reject": {"llm_name": "bad", "answer": "No.", "score": 2.0},
            "category_path": "Pairwise_set/Helpfulness/Open QA/Factual",
        },
        [assistant("I."), assistant("No.")],
        (1.0, 0.0),
        {"subset": "Helpfulness", "category": "Open QA/Factual"},
    ),
    "rmb_best_of_n": (
        {
            "bon_uid": "3",
            "conversation_input": CHAT,
            "bon_best": {"llm_name": "best", "answer": "I."},
            "loser_list": [{"llm_name": "a", "answer": "No."}, {"llm_name": "b", "answer": "Hm."}],
            "category_path": "BoN_set/Harmlessness/S1",
        },
        [assistant("No."), assistant("Hm."), assistant("I.")],
        (0.0, 0.0, 1.0),
        {"subset": "Harmlessness", "category": "S1"},
    ),
    "reward_bench_2": (
        {
            "id": "1",
            "prompt": "Who?",
            "chosen": ["I."],
            "rejected": ["No.", "Hm.", "Eh."],
            "num_correct": 1,
            "num_incorrect": 3,
            "total_completions": 4,
            "models": ["m"] * 4,
            "subset": "Math",
        },
        ["I.", "No.", "Hm.", "Eh."],
        (1.0, 0.0, 0.0, 0.0),
        {"subset": "Math"},
    ),
    "rm_bench": (
        {
            "id": "1",
            "prompt": "Who?",
            "chosen": ["I.", "It is I.", "*I.*"],
            "rejected": ["U.", "It is U.", "*U.*"],
            "domain": "chat",
        },
        ["I.", "It is I.", "*I.*", "U.", "It is U.", "*U.*"],
        (1.0, 1.0, 1.0, 0.0, 0.0, 0.0),
        {"domain": "chat"},
    ),
    "reward_bench": (
        {
            "prompt": "Who?",
            "chosen": "I.",
            "chosen_model": "good",
            "rejected": "No.",
            "rejected_model": "bad",
            "subset": "hep-go",
            "id": 30,
        },
        ["I.", "No."],
        (1.0, 0.0),
        {"section": "reasoning", "subset": "hep-go"},
    ),
    "ppe_human": (
        {
            "question_id": "q",
            "model_a": "a",
            "model_b": "b",
            "winner": "model_b",
            "prompt": "Who?",
            "response_1": "No.",
            "response_2": "I.",
            "language": "English",
            "is_code": False,
        },
        ["No.", "I."],
        (0.0, 1.0),
        {"language": "English", "is_code": "False"},
    ),
    "ppe_correctness": (
        {
            "question_id": "q",
            "model_name": "m",
            "prompt": "Who?",
            **{f"response_{number}": f"I {number}." for number in range(1, 5)},
            "scores": [False, True, True, False],
            "sampled_conflict_pairs": [[0, 1], [2, 3]],
        },
        ["I 1.", "I 2.", "I 3.", "I 4."],
        (0.0, 1.0, 1.0, 0.0),
        {"model_name": "m"},
    ),
    "judge_bench": (
        {"pair_id": "p", "source": "livebench", "question": "Who?", "response_A": "No.", "response_B": "I."}
        | {"response_model": "gpt", "label": "B>A"},
        ["No.", "I."],
        (0.0, 1.0),
        {"source": "livebench", "response_model": "gpt"},
    ),
    "llmbar": (
        {"input": "Who?", "output_1": "I.", "output_2": "No.", "label": 1, "subset": "Natural"},
        ["I.", "No."],
        (1.0, 0.0),
        {"subset": "Natural"},
    ),
    "pandalm": (
        BOTH | {"response1": "3", "response2": "2", "annotator1": 2, "annotator2": 0, "annotator3": 2, "idx": 4},
        ["3", "2"],
        (0.0, 1.0),
        {},
    ),
    "auto_j": (
        {"scenario": "planning", "label": 2, "prompt": "Who?", "response 1": "I.", "response 2": "Me."},
        ["I.", "Me."],
        (0.5, 0.5),
        {"scenario": "planning"},
    ),
    "alpaca_eval_best_of_n": (
        {"prompt": "Who?", "dataset": "koala", "candidates": [{"text": "I.", "gold": 0.9}, {"text": "No.", "gold": 0}]},
        ["I.", "No."],
        (0.9, 0.0),
        {"dataset": "koala"},
    ),
    "webgpt_comparisons": (
        {
            "text": ["## Human:\nWho?\n\n## Assistant:\n I.", "## Human:\nWho?\n\n## Assistant:\n No."],
            "score": [0.5, 1.5],
        },
        [" I.", " No."],
        (0.5, 1.5),
        {},
    ),
    "webgpt_answers": (
        {"question": {"full_text": "Who?", "dataset": "eli5"}, "answer_0": "I.", "answer_1": "No."}
        | {"score_0": 1.0, "score_1": -1.0},
        ["I.", "No."],
        (1.0, -1.0),
        {"subset": "eli5"},
    ),
    "instruction_pairs": (
        BOTH | {"output": "2", "chosen": "2", "rejected": "3"},
        ["2", "3"],
        (1.0, 0.0),
        {},
    ),
    "preference": (
        {"prompt": "Who?", "chosen": " I.", "rejected": " No.", "label": 0.9},
        [" I.", " No."],
        (1.0, 0.0),
        {},
    ),
    "choices": (
        {"prompt": "Who?", "completions": [" I.", " No."], "gold": [2, 1.5], "category": "names"},
        [" I.", " No."],
        (2.0, 1.5),
        {"category": "names"},
    ),
}


def test_there_is_an_example_of_every_format():
    assert set(EXAMPLES) == set(JUDGED)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_of_each_format(tmp_path, name):
    fields, completions, gold, slices = EXAMPLES[name]
    judged = load_judged(write(tmp_path / "rows.jsonl", [fields | {"note": {"kept": [1]}}] * 2))
    row = judged.rows[0]
    assert (judged.format, len(judged.rows), judged.dropped.total()) == (name, 2, 0)
    assert (row.completions, row.gold, row.slices) == (completions, gold, slices)
    assert row.extra["note"] == {"kept": [1]} and row.place.endswith("rows.jsonl, line 1")
    assert judged.chat == name.startswith("rmb")
    assert all(gold[better] > gold[worse] for better, worse in row.pairs)
    assert bool(row.pairs) == (len(set(gold)) > 1)
    # What the row is made of does not come twice, whatever else it has does.
    content = FORMATS[name].content if name in FORMATS else "prompt|chosen|rejected|completions|gold"
    assert not {"prompt", "chosen", "rejected", "completions", "scores"} & row.extra.keys(), content
    flat = as_candidates(judged)
    assert flat.counts == [len(completions)] * 2 and flat.flat.chat == judged.chat
    assert [one["completion"] for one in flat.flat.values] == completions * 2
    assert load_judged(tmp_path / "rows.jsonl", format=name).rows == judged.rows


def test_unknown_columns_of_a_benchmark_stay(tmp_path):
    row = load_judged(write(tmp_path / "a.jsonl", [EXAMPLES["rmb_pairwise"][0]])).rows[0]
    assert row.extra == {"pair_uid": "17", "category_path": "Pairwise_set/Helpfulness/Open QA/Factual"}
    assert row.prompt == [{"role": "user", "content": "Who?"}]


def test_pairs(tmp_path):
    def pairs(name):
        return load_judged(write(tmp_path / "a.jsonl", [EXAMPLES[name][0]])).rows[0].pairs

    assert pairs("rmb_best_of_n") == ((2, 0), (2, 1))
    assert pairs("rm_bench") == tuple((one, other) for one in (0, 1, 2) for other in (3, 4, 5))
    assert pairs("ppe_correctness") == ((1, 0), (2, 3))  # the sampled ones alone, the right response first
    assert pairs("auto_j") == ()


def test_prompts_end_where_answers_can_begin(tmp_path):
    def prompt(name):
        return load_judged(write(tmp_path / "a.jsonl", [EXAMPLES[name][0]])).rows[0].prompt

    assert prompt("llmbar") == "Who?\n" and prompt("pandalm") == "Add.\n\n1+1\n"
    assert prompt("preference") == "Who?"  # as it is: the answer brings its space
    assert prompt("webgpt_comparisons") == "## Human:\nWho?\n\n## Assistant:\n"


def test_votes_and_their_plurality(tmp_path):
    fields = EXAMPLES["pandalm"][0]
    votes = [(1, 1, 2), (0, 1, 2), (0, 0, 1), (2, 2, 2)]
    rows = [fields | {f"annotator{i}": vote for i, vote in enumerate(three, start=1)} for three in votes]
    judged = load_judged(write(tmp_path / "a.jsonl", rows))
    assert [row.votes for row in judged.rows] == votes
    assert [row.gold for row in judged.rows] == [(1.0, 0.0), (0.5, 0.5), (0.5, 0.5), (0.0, 1.0)]
    assert plurality([1, 1, 0, 0]) == 0 and plurality([1]) == 1 and plurality([1, 1, 0, 2]) == 1


@pytest.mark.parametrize(("label", "gold"), [(0, (1.0, 0.0)), (1, (0.0, 1.0)), (2, (0.5, 0.5))])
def test_labels_of_auto_j(tmp_path, label, gold):
    assert load_judged(write(tmp_path / "a.jsonl", [EXAMPLES["auto_j"][0] | {"label": label}])).rows[0].gold == gold


@pytest.mark.parametrize(
    ("winner", "gold"), [("model_a", (1.0, 0.0)), ("tie", (0.5, 0.5)), ("tie (bothbad)", (0.5, 0.5))]
)
def test_winners_of_ppe(tmp_path, winner, gold):
    assert (
        load_judged(write(tmp_path / "a.jsonl", [EXAMPLES["ppe_human"][0] | {"winner": winner}])).rows[0].gold == gold
    )


def test_a_folder_and_a_draw(tmp_path):
    fields = EXAMPLES["llmbar"][0]
    for name in ("one", "two"):
        write(tmp_path / "all" / name / "dataset.json", [fields | {"note": f"{name} {i}"} for i in range(20)])
    write(tmp_path / "all" / "README.md", [{"no": "rows"}])
    judged = load_judged(tmp_path / "all")
    assert [row.slices["file"] for row in judged.rows] == ["one/dataset.json"] * 20 + ["two/dataset.json"] * 20
    drawn = [load_judged(tmp_path / "all", most=7, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0].rows != drawn[2].rows
    assert len(drawn[0].rows) == 7 and drawn[0].dropped == {"not drawn": 33}
    assert [row for row in judged.rows if row in drawn[0].rows] == drawn[0].rows  # in the order of the file


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name in ("reward_bench", "reward_bench_2", "ppe_correctness"):
        fields, completions, gold, _ = EXAMPLES[name]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields]), tmp_path / f"{name}.parquet")
        judged = load_judged(tmp_path / f"{name}.parquet")
        assert (judged.format, judged.rows[0].completions, judged.rows[0].gold) == (name, completions, gold)


def test_equal_completions_are_dropped(tmp_path):
    fields = EXAMPLES["llmbar"][0]
    judged = load_judged(write(tmp_path / "a.jsonl", [fields, fields | {"output_2": "I."}]))
    assert len(judged.rows) == 1 and judged.dropped == {"two equal completions": 1}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{"query": "Who?", "answer": "I."}],
            r"the columns \['answer', 'query'\].*no known format.*rmb_pairwise.*choices",
        ),
        ([EXAMPLES["llmbar"][0], EXAMPLES["auto_j"][0]], "line 2 has the format auto_j, but .* line 1 has llmbar"),
        (
            [EXAMPLES["llmbar"][0] | {"label": 3}],
            "line 1 is no row of the format llmbar .the label of an annotator is 3",
        ),
        ([EXAMPLES["pandalm"][0] | {"annotator2": 5}], "is no row of the format pandalm"),
        ([EXAMPLES["ppe_human"][0] | {"winner": "c"}], "the winner is 'c'"),
        ([EXAMPLES["ppe_correctness"][0] | {"scores": [True] * 5}], "has no column 'response_5'"),
        ([EXAMPLES["ppe_correctness"][0] | {"sampled_conflict_pairs": [[1, 2]]}], "two right or two wrong"),
        ([EXAMPLES["ppe_correctness"][0] | {"sampled_conflict_pairs": [[-1, 1]]}], "a place below 0"),
        (
            [EXAMPLES["ppe_correctness"][0] | {"scores": [True, float("nan")], "sampled_conflict_pairs": None}],
            "gold of a completion is not a finite",
        ),
        ([EXAMPLES["reward_bench"][0] | {"subset": ["x"], "prompt": 1}], "prompt"),
        ([EXAMPLES["judge_bench"][0] | {"label": "A"}], "not A>B or B>A"),
        ([EXAMPLES["rmb_pairwise"][0] | {"category_path": "x"}], "is no row of the format rmb_pairwise"),
        ([EXAMPLES["choices"][0] | {"gold": [1]}], "has 2 completions: write as many finite numbers in column 'gold'"),
        ([EXAMPLES["llmbar"][0] | {"output_2": "I."}], "has no row left that can be judged"),
        ([EXAMPLES["llmbar"][0] | {"output_2": None}], "the prompt or an answer is not text"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_judged(write(tmp_path / "a.jsonl", rows))


def test_bad_files_are_one_sentence(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no JSON, JSONL or Parquet file"):
        load_judged(tmp_path / "none")
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="holds no rows"):
        load_judged(empty)
    with pytest.raises(ValueError, match="is not a file"):
        load_judged(tmp_path / "absent.jsonl")
    one = write(tmp_path / "two" / "a.jsonl", [EXAMPLES["llmbar"][0]])
    write(tmp_path / "two" / "b.jsonl", [EXAMPLES["auto_j"][0]])
    with pytest.raises(ValueError, match=r"of the format llmbar \(a.jsonl\) and of auto_j \(b.jsonl\)"):
        load_judged(tmp_path / "two")
    with pytest.raises(ValueError, match="there is no format 'mtbench'"):
        load_judged(one, format="mtbench")
    with pytest.raises(ValueError, match="has no column 'prompt', which rows of the format auto_j have"):
        load_judged(one, format="auto_j")
    with pytest.raises(ValueError, match="most is 0"):
        load_judged(one, most=0)


@pytest.mark.parametrize(
    ("file", "format", "rows", "longest"),
    [
        ("preference/hh_harmless_base.jsonl", "preference", 1612, 0.451),
        ("preference/hh_helpful_base.jsonl", "preference", 1640, 0.594),
        ("preference/instruction_pref_synthetic.jsonl", "instruction_pairs", 792, 0.521),
    ],
)
def test_real_files_give_the_accuracy_of_the_longer_answer(shared_data, file, format, rows, longest):
    judged = load_judged(shared_data / file)
    lengths = [[len(completion) for completion in row.completions] for row in judged.rows]
    signs = [
        np.sign(one[better] - one[worse])
        for row, one in zip(judged.rows, lengths, strict=True)
        for better, worse in row.pairs
    ]
    assert (judged.format, len(judged.rows)) == (format, rows)
    assert (1 + np.mean(signs)) / 2 == pytest.approx(longest, abs=1e-3)


def test_real_llmbar_gives_the_accuracy_of_the_longer_answer(shared_data):
    rows = load_judged(shared_data / "judge" / "llmbar.jsonl").rows
    # Of two answers of one length, the README beside the data picks the second.
    right = [(len(row.completions[0]) > len(row.completions[1])) == (row.gold == (1.0, 0.0)) for row in rows]
    assert len(rows) == 717 and np.mean(right) == pytest.approx(0.462, abs=5e-4)


def test_real_annotators_agree(shared_data):
    rows = load_judged(shared_data / "judge" / "pandalm_testset.jsonl").rows
    assert np.mean([len(set(row.votes)) == 1 for row in rows]) == pytest.approx(0.875, abs=5e-4)
    assert sum(not row.pairs for row in rows) == sum(row.gold == (0.5, 0.5) for row in rows) > 0
