import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from rlhf_jax.data.sentiment import train_sentiment

GOOD = ["a good story", "good and kind people", "it isn't dull", "kind words", "a lovely good day", "lovely"]
BAD = ["a bad story", "bad and dull people", "it isn't good", "dull words", "a dull bad day", "awful"]


def write(path, texts, labels):
    rows = ({"text": text, "label": label} for text, label in zip(texts, labels, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reviews") / "r.jsonl", GOOD * 4 + BAD * 4, [1] * 24 + [0] * 24)


@pytest.fixture(scope="module")
def gold(reviews):
    return train_sentiment(reviews)


def slow_score(gold, text: str) -> float:
    """w·x + b with x written out: (1 + log count)·idf over words and pairs, scaled to length 1."""
    words = text.lower().split()
    counts = Counter(words + [f"{one} {two}" for one, two in pairwise(words)])
    vocabulary, idf = gold.vectorizer.vocabulary_, gold.vectorizer.idf_
    known = {vocabulary[term]: count for term, count in counts.items() if term in vocabulary}
    x = {term: (1 + math.log(count)) * idf[term] for term, count in known.items()}
    length = math.sqrt(sum(value**2 for value in x.values()))
    weights, bias = gold.classifier.coef_[0], gold.classifier.intercept_[0]
    return sum(weights[term] * value for term, value in x.items()) / length + bias


def test_scores_are_the_log_odds_of_a_linear_model_of_words_and_pairs(gold):
    texts = ["A good good story", "dull bad words", "it isn't good", "kind"]
    np.testing.assert_allclose(gold(texts), [slow_score(gold, text) for text in texts], rtol=1e-12)
    scores = gold(texts)
    assert scores.dtype == np.float64 and scores.shape == (4,)
    probabilities = gold.classifier.predict_proba(gold.vectorizer.transform(texts))
    np.testing.assert_allclose(scores, np.log(probabilities[:, 1] / probabilities[:, 0]), rtol=1e-9)


def test_praise_scores_above_blame_and_pairs_of_words_count(gold):
    praise, blame, not_dull, not_good = gold(["good kind lovely", "bad dull awful", "isn't dull", "isn't good"])
    assert praise > 0 > blame
    assert not_dull - not_good > gold(["dull"])[0] - gold(["good"])[0]


def test_case_punctuation_and_the_kind_of_apostrophe_do_not_matter(gold):
    plain, stylish = gold(["it isn't dull , kind people .", "It ISN’T dull, “kind” people!!"])
    assert plain == stylish


def test_a_text_without_a_known_word_gets_the_intercept_and_no_texts_give_no_scores(gold):
    np.testing.assert_array_equal(gold(["", "...", "zzz 42"]), np.repeat(gold.classifier.intercept_, 3))
    assert gold([]).shape == (0,)


def test_a_score_does_not_depend_on_the_texts_beside_it(gold):
    texts = [*GOOD, *BAD]
    scores = gold(texts)
    np.testing.assert_array_equal(scores[::-1], gold(texts[::-1]))
    np.testing.assert_array_equal(scores, [gold([text])[0] for text in texts])


def test_a_seed_gives_the_same_model_again_and_another_seed_another_split(reviews, gold):
    again, other = train_sentiment(reviews, seed=0), train_sentiment(reviews, seed=1)
    np.testing.assert_array_equal(gold(GOOD + BAD), again(GOOD + BAD))
    assert gold.accuracy == again.accuracy
    assert not np.array_equal(gold(GOOD + BAD), other(GOOD + BAD))


def test_a_tenth_of_each_class_is_held_out_and_not_learned_from(tmp_path):
    texts = [f"word{chr(97 + index)} common" for index in range(20)]
    gold = train_sentiment(write(tmp_path / "r.jsonl", texts, [1, 0] * 10))
    assert gold.held_out == 2
    words = {text.split()[0] for text in texts}
    assert len(words & set(gold.vectorizer.vocabulary_)) == 18
    assert gold.accuracy in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 1, 1], r"r\.jsonl has 0 negative rows \(label 0\): give at least two of each class"),
        ([0, 0, 0, 1], "has 1 positive rows"),
        ([0, 0, 1, 2], "has 2 in column 'label': write 1 for positive and 0 for negative"),
        ([0, 0, 1, "1"], "line 4 has '1' in column 'label': write a whole number there"),
        ([0, 0, 1, None], "line 4 has None in column 'label'"),
    ],
)
def test_labels_that_nothing_can_be_learned_from_are_refused(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        train_sentiment(write(tmp_path / "r.jsonl", ["good"] * 4, labels))


def test_empty_files_and_texts_without_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"r\.jsonl holds no rows"):
        train_sentiment(write(tmp_path / "r.jsonl", [], []))
    with pytest.raises(ValueError, match=r"r\.jsonl has no words in column 'text'"):
        train_sentiment(write(tmp_path / "r.jsonl", ["...", "1"] * 2, [0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"line 1 has no column 'text'"):
        (tmp_path / "r.jsonl").write_text('{"review": "good", "label": 1}')
        train_sentiment(tmp_path / "r.jsonl")


def test_movie_reviews_are_told_apart_far_better_than_by_chance(shared_data):
    gold = train_sentiment(shared_data / "classification" / "mr_polarity.jsonl")
    assert gold.held_out == 801
    assert gold.accuracy > 0.65  # chance is 0.5 with a standard error of 0.018: no seed comes near this by luck.
    scores = gold(["A wonderful, beautiful day.", "A bad, boring day.", ""])
    assert scores[0] > scores[2] > scores[1]
