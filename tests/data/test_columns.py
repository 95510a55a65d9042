import pytest

from rlhf_jax.data.columns import DEMONSTRATION_FORMATS, FORMATS, PROMPT_FORMATS, is_number, shape_of

CHAT = [{"role": "user", "content": "hi"}]
EXAMPLES = {
    "preference": {"chosen": "b", "rejected": "c"},
    "stepwise": {"prompt": "a", "completions": ["b", "c"], "labels": [True, 0]},
    "unpaired": {"prompt": "a", "completion": "b", "label": False},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": CHAT},
    "prompt": {"prompt": "a"},
    "text": {"text": "a"},
}


def test_each_format_is_told_from_its_columns():
    assert set(EXAMPLES) == set(FORMATS)
    for name, row in EXAMPLES.items():
        assert shape_of(row | {"source": "web"}, FORMATS, "line 1").format == name


def test_a_caller_gets_a_format_that_it_can_use():
    row = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
    assert shape_of(row, FORMATS, "line 1").format == "preference"
    assert shape_of(row, DEMONSTRATION_FORMATS, "line 1").format == "prompt_completion"
    assert shape_of({"prompt": "a", "text": "b"}, PROMPT_FORMATS, "line 1").format == "prompt"


def test_kinds_are_told_and_null_is_no_value():
    row = {"prompt": CHAT, "chosen": "b", "rejected": "c", "margin": None}
    assert shape_of(row, FORMATS, "line 1").kinds == {"chosen": "text", "rejected": "text", "prompt": "chat"}
    assert shape_of(row | {"margin": 1.5, "prompt": None}, FORMATS, "line 1").kinds["margin"] == "number"


@pytest.mark.parametrize("label", [0.5, 0.75, 1, 1.0])
def test_a_preference_may_have_a_probability_as_its_label(label):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert shape_of(row | {"label": label}, FORMATS, "line 1").kinds["label"] == "probability"
    assert "label" not in shape_of(row | {"label": None}, FORMATS, "line 1").kinds


@pytest.mark.parametrize("label", [0.25, 1.5, float("nan"), True, "yes"])
def test_other_labels_of_preferences_are_refused(label):
    with pytest.raises(ValueError, match=r"in column 'label': write a number from 0\.5 to 1.*swap the two"):
        shape_of({"chosen": "b", "rejected": "c", "label": label}, FORMATS, "line 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"line 7 has the columns \['question'\], not chosen \+ rejected or prompt \+ completions"),
        ({"prompt": None}, r"line 7 has the columns \[\]"),
        ({"prompt": 3}, r"line 7 has 3 in column 'prompt': write text or a chat"),
        ({"messages": []}, r"line 7 has \[\] in column 'messages': write a chat"),
        ({"messages": [{"role": "user", "content": None}]}, "write a chat"),
        ({"messages": [{"from": "user", "value": "a"}]}, "each with a role and a content that is text"),
        ({"text": ["a"]}, r"in column 'text': write text there"),
        ({"chosen": "b", "rejected": "c", "margin": "1"}, "'1' in column 'margin': write a finite number"),
        ({"chosen": "b", "rejected": "c", "margin": float("nan")}, "write a finite number"),
        ({"chosen": "b", "rejected": CHAT}, "line 7 has text chosen and chat rejected"),
        ({"prompt": "a", "completion": "b", "label": 2}, "2 in column 'label': write true or false"),
        ({"prompt": "a", "completions": ["b"], "labels": [1, 0]}, "line 7 has 1 completions and 2 labels"),
        ({"prompt": "a", "completions": [1], "labels": [1]}, "write a list of texts"),
    ],
)
def test_what_a_row_lacks_is_said_with_its_place(row, message):
    with pytest.raises(ValueError, match=message):
        shape_of(row, FORMATS, "rows.jsonl, line 7")


def test_a_number_is_finite_in_float32_and_true_is_none():
    assert all(map(is_number, (1, 0.5, -3e38)))
    assert not any(map(is_number, (True, float("inf"), float("nan"), 1e39, -(10**400), "1")))
