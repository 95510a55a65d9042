"""The words of the built-in world, and how text becomes token ids and back.

One token is one English word, so a decoded sample reads as a sentence:

    fox quick brief : the swift fox leaps delightfully .

The four words up to ":" are the prompt (a noun, an adjective, how much to write, the separator); what follows is the
response, and "." ends it. The 96 words fall into kinds that the writer and the rubric share:

* 8 topics of 2 nouns ("fox", "wolf"), 6 attributes of 2 adjectives ("quick", "swift"), and 4 manners of 2 verbs
  ("leaps", "gallops"); two topics share a manner: foxes and horses leap, birds soar, rivers and ships drift;
* 2 determiners, 2 conjunctions, and 4 enthusiasm words ("wonderfully");
* 46 rare words ("zephyr", "quixotic"), hardly ever seen: what a reward model says of them is a guess.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

SPECIALS = ("<pad>", "<bos>", ".", ":", "brief", "long")
NOUNS = (
    ("fox", "wolf"), ("horse", "pony"),
    ("robin", "sparrow"), ("owl", "raven"),
    ("river", "stream"), ("ship", "boat"),
    ("baker", "cook"), ("poet", "singer"),
)  # fmt: skip
ADJECTIVES = (
    ("quick", "swift"), ("old", "ancient"), ("calm", "gentle"),
    ("bright", "radiant"), ("small", "tiny"), ("proud", "noble"),
)  # fmt: skip
VERBS = (("leaps", "gallops"), ("soars", "flutters"), ("drifts", "glides"), ("smiles", "whistles"))
DETERMINERS = ("the", "this")
CONJUNCTIONS = ("and", "while")
ENTHUSIASM = ("wonderfully", "gloriously", "delightfully", "superbly")
RARE = tuple(
    """zephyr quixotic widdershins kumquat bumbershoot flummox gossamer hullabaloo jabberwock kerfuffle lollygag mugwump
    nincompoop oxymoron persnickety quagmire rigmarole skedaddle taradiddle umbrage vexillology whippersnapper xylophone
    yodel zigzag abacus balderdash cattywampus discombobulate ephemeral flibbertigibbet gobbledygook higgledy isthmus
    juxtapose kaleidoscope lackadaisical malarkey nudiustertian obelisk phlegmatic razzmatazz sesquipedalian
    tintinnabulation ululate verdigris""".split()
)
TOPICS_PER_MANNER = len(NOUNS) // len(VERBS)


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The words in the order of their ids, and the ids by kind (all int32, read-only).

    Attributes:
        words: every word; a token id is a position in this tuple.
        pad_id, bos_id, eos_id: padding, beginning of sequence (for models that want one; the world writes none), ".".
        separator_id, brief_id, long_id: the marks of a prompt: ":", "brief" (one clause is asked for), "long" (two).
        nouns: ids by topic, [8, 2]; topics 2 m and 2 m + 1 go with the verbs of manner m.
        adjectives: ids by attribute, [6, 2].
        verbs: ids by manner, [4, 2].
        determiners: ids, [2].
        conjunctions: ids, [2].
        enthusiasm: ids, [4].
        rare: ids, [46].
    """

    words: tuple[str, ...]
    pad_id: int
    bos_id: int
    eos_id: int
    separator_id: int
    brief_id: int
    long_id: int
    nouns: Int[np.ndarray, "topics 2"]
    adjectives: Int[np.ndarray, "attributes 2"]
    verbs: Int[np.ndarray, "manners 2"]
    determiners: Int[np.ndarray, " determiners"]
    conjunctions: Int[np.ndarray, " conjunctions"]
    enthusiasm: Int[np.ndarray, " enthusiasm"]
    rare: Int[np.ndarray, " rare"]

    @property
    def size(self) -> int:
        """How many words there are (V)."""
        return len(self.words)

    def encode(self, text: str) -> Int[np.ndarray, " S"]:
        """Token ids of a text whose words stand between spaces.

        Args:
            text: words of the vocabulary, parted by white space.

        Returns:
            Ids, int32 [S].

        Raises:
            ValueError: a word is not in the vocabulary.

        Example:
            >>> VOCABULARY.encode("fox quick brief :").tolist()
            [6, 22, 4, 3]
        """
        ids = {word: number for number, word in enumerate(self.words)}
        unknown = [word for word in text.split() if word not in ids]
        if unknown:
            raise ValueError(
                f"The word {unknown[0]!r} is not in the vocabulary; see Vocabulary.words for those that are."
            )
        return np.array([ids[word] for word in text.split()], np.int32)

    def decode(self, tokens: Int[np.ndarray, " S"]) -> str:
        """Readable text of one sequence; padding is left out.

        Args:
            tokens: ids, [S].

        Returns:
            The words with spaces between them.

        Raises:
            ValueError: an id is outside the vocabulary.

        Example:
            >>> VOCABULARY.decode(np.array([0, 6, 22, 4, 3]))
            'fox quick brief :'
        """
        outside = [int(token) for token in tokens if not 0 <= token < self.size]
        if outside:
            raise ValueError(f"Token id {outside[0]} is outside the vocabulary of {self.size} words.")
        return " ".join(self.words[int(token)] for token in tokens if token != self.pad_id)


def build_vocabulary() -> Vocabulary:
    """The vocabulary of the world: specials first, then nouns, adjectives, verbs, and the other kinds.

    Returns:
        A `Vocabulary` of 96 words; the constant `VOCABULARY` is one.

    Example:
        >>> build_vocabulary().size
        96
    """
    kinds = (NOUNS, ADJECTIVES, VERBS, DETERMINERS, CONJUNCTIONS, ENTHUSIASM, RARE)
    tables = []
    words = list(SPECIALS)
    for kind in kinds:
        shape = np.array(kind).shape
        count = int(np.prod(shape))
        table = np.arange(len(words), len(words) + count, dtype=np.int32).reshape(shape)
        table.setflags(write=False)
        tables.append(table)
        words.extend(np.array(kind).ravel().tolist())
    pad_id, bos_id, eos_id, separator_id, brief_id, long_id = range(len(SPECIALS))
    return Vocabulary(tuple(words), pad_id, bos_id, eos_id, separator_id, brief_id, long_id, *tables)


VOCABULARY = build_vocabulary()
