"""A gold reward for text: sentiment, learned from labelled reviews by a linear model of words and pairs of words.

It is a model of another kind than the proxies (which are transformers), so it does not share their mistakes by
construction. It reads text only: reviews and stories pass through the same lower-casing and the same rule of what a
word is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from rlhf_jax.data.prompts import read_rows

# A word is letters, with at most one apostrophe inside ("doesn't"); digits and punctuation are no words.
_WORD = r"[^\W\d_]+(?:'[^\W\d_]+)?"
# Inverse strength of the L2 penalty; the best held-out log-loss by cross-validation on movie-review polarity.
_INVERSE_PENALTY = 10.0
_HELD_OUT = 0.1


def _normalise(text: str) -> str:
    """Lower case, and one kind of apostrophe."""
    return text.lower().replace("’", "'")


@dataclass(frozen=True)
class SentimentGold:
    """A trained sentiment model; calling it scores texts.

    Attributes:
        vectorizer: the fitted scikit-learn `TfidfVectorizer`.
        classifier: the fitted scikit-learn `LogisticRegression`.
        accuracy: the share of held-out rows it classifies rightly.
        held_out: how many rows were held out for that.
    """

    vectorizer: Any
    classifier: Any
    accuracy: float
    held_out: int

    def __call__(self, texts: Sequence[str]) -> Float64[np.ndarray, " N"]:
        """Log-odds log p(positive)/p(negative) of N texts, float64 [N]; without a known word, the intercept."""
        if len(texts) == 0:
            return np.zeros(0)
        return np.asarray(self.classifier.decision_function(self.vectorizer.transform(texts)), np.float64)


def _held_out_rows(labels: np.ndarray, seed: int) -> np.ndarray:
    """True on a tenth of each class (at least one row), drawn by `seed`."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        held_out[generator.permutation(rows)[: max(1, int(len(rows) * _HELD_OUT))]] = True
    return held_out


def train_sentiment(path: str | Path, seed: int = 0) -> SentimentGold:
    """Learns sentiment from rows of text and label.

    log p(positive | text)/p(negative | text) = w·x + b, where x are the TF-IDF weights of the words and the pairs of
    neighbouring words, (1 + log count)·idf, scaled to length 1, and w, b minimise the log-loss with an L2 penalty on
    nine tenths of the rows.

    Args:
        path: a JSONL file with columns `text` and `label` (1 positive, 0 negative).
        seed: draws the tenth of each class that is held out; the same file and seed give the same model.

    Returns:
        The model, with its accuracy on the rows held out.

    Raises:
        ValueError: the file cannot be read (see `read_rows`), has labels other than 0 and 1, fewer than two rows of
            either, or no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rows = read_rows(path, {"text": str, "label": int})
    texts = [row["text"] for row in rows]
    labels = np.asarray([int(row["label"]) for row in rows])
    strange = sorted(set(labels.tolist()) - {0, 1})
    if strange:
        raise ValueError(f"{path} has {strange[0]} in column 'label': write 1 for positive and 0 for negative.")
    for label, name in enumerate(("negative", "positive")):
        count = int((labels == label).sum())
        if count < 2:
            raise ValueError(f"{path} has {count} {name} rows (label {label}): give at least two of each class.")
    held_out = _held_out_rows(labels, seed)
    vectorizer = TfidfVectorizer(preprocessor=_normalise, token_pattern=_WORD, ngram_range=(1, 2), sublinear_tf=True)
    train = [text for text, out in zip(texts, held_out, strict=True) if not out]
    test = [text for text, out in zip(texts, held_out, strict=True) if out]
    try:
        features = vectorizer.fit_transform(train)
    except ValueError:
        raise ValueError(f"{path} has no words in column 'text': give rows of text to learn from.") from None
    classifier = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000).fit(features, labels[~held_out])
    accuracy = float(classifier.score(vectorizer.transform(test), labels[held_out]))
    return SentimentGold(vectorizer=vectorizer, classifier=classifier, accuracy=accuracy, held_out=len(test))
