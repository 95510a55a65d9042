"""The people of the built-in world: who asks (prompts) and who answers (a noisy writer of varying quality).

Each response has a writer of quality q ~ U(0, 1). A careful one (q near 1) keeps to the topic, the order of words and
the length asked for, and does not repeat words; a careless one (q near 0) strays in all of these. Both now and then use
a rare word.

The **spurious correlate** is enthusiasm: good writers of this world are warm, careless ones are flat. In their text
words like "wonderfully" go with a high gold reward, and they are far easier to count than grammar or relevance, so a
reward model learns to pay for them. The gold pays a little for the first and takes more back the more there are: a
policy that pushes on such a reward model drifts from the first of these towards the last, and a reader of its samples
sees it.

    owl ancient brief : the old owl soars delightfully .                                (a careful writer: gold 4.25)
    owl ancient brief : this soars owl calm and the owl flutters .                      (a careless one: 0.14)
    owl ancient brief : superbly the old owl soars superbly and wonderfully gloriously  (a policy with a hack: 0.98)
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.data.synthetic.rubric import read_prompts
from rlhf_jax.data.synthetic.vocabulary import TOPICS_PER_MANNER, VOCABULARY, Vocabulary
from rlhf_jax.types import Demonstrations

PROMPT_LENGTH = 4
RESPONSE_LENGTH = 14
RARE_RATE = 0.005
"""How often a rare word stands in for another one, whatever the quality of the writer."""
RAMBLE_RATE = 0.04
"""How often a writer of faultiness 1 does not stop; in proportion for the others."""

# A draft has one column for each word that may be written; those that are not are closed up afterwards.
BEFORE, DETERMINER, ADJECTIVE, NOUN, VERB, AFTER = range(6)
CLAUSE_COLUMNS = 6
CONJUNCTION = CLAUSE_COLUMNS
SECOND_CLAUSE = CLAUSE_COLUMNS + 1
END = 2 * CLAUSE_COLUMNS + 1


def sample_prompts(rng: np.random.Generator, n: int, vocabulary: Vocabulary = VOCABULARY) -> Int[np.ndarray, "N 4"]:
    """Draws prompts: noun, adjective, "brief" or "long", ":"; each part uniform and independent.

    Args:
        rng: the source of randomness.
        n: how many prompts (N).
        vocabulary: the words.

    Returns:
        Token ids, int32 [N, 4].

    Raises:
        ValueError: n is below 1.

    Example:
        >>> for row in sample_prompts(np.random.default_rng(0), 2):
        ...     print(VOCABULARY.decode(row))
        cook bright brief :
        ship ancient brief :
    """
    if n < 1:
        raise ValueError(f"The number of prompts must be at least 1, not {n}.")
    return np.stack(
        [
            rng.choice(vocabulary.nouns.ravel(), n),
            rng.choice(vocabulary.adjectives.ravel(), n),
            rng.choice(np.array([vocabulary.brief_id, vocabulary.long_id], np.int32), n),
            np.full(n, vocabulary.separator_id, np.int32),
        ],
        axis=1,
    )


def write_responses(
    rng: np.random.Generator, prompts: Int[np.ndarray, "N P"], vocabulary: Vocabulary = VOCABULARY
) -> tuple[Int[np.ndarray, "N 14"], Bool[np.ndarray, "N 14"], Float[np.ndarray, " N"]]:
    """One response to each prompt, by writers of quality q ~ U(0, 1).

    Args:
        rng: the source of randomness.
        prompts: token ids [N, 4].
        vocabulary: the words.

    Returns:
        tokens int32 [N, 14], right-padded, ended by "." unless the writer rambles; mask, True through the ".",
        bool [N, 14]; and the quality of the writer, float64 [N].

    Raises:
        ValueError: a row is no prompt of this world.

    Example:
        >>> rng = np.random.default_rng(5)
        >>> tokens, mask, quality = write_responses(rng, np.tile(VOCABULARY.encode("fox quick long :"), (3, 1)))
        >>> for row, q in zip(tokens, quality):
        ...     print(f"{q:.2f}", VOCABULARY.decode(row))
        0.81 gloriously this swift fox leaps delightfully while the fox gallops superbly .
        0.81 the quick fox gallops superbly while the quick wolf leaps .
        0.52 the quick fox leaps while this radiant fox whistles .
    """
    topic, attribute, clauses = read_prompts(prompts, vocabulary)
    n = len(prompts)
    quality = rng.random(n)
    fault = faultiness(quality)
    draft = np.full((n, END + 1), vocabulary.eos_id, np.int32)
    written = np.zeros((n, END + 1), bool)
    written[:, END] = True

    second = rng.random(n) < np.where(clauses == 2, 0.3 + 0.65 * quality, 0.1 * fault)
    order = {kind: rng.integers(2, size=n) for kind in (ADJECTIVE, NOUN, VERB)}
    for clause, included in ((0, np.ones(n, bool)), (1, second)):
        columns = slice(clause * SECOND_CLAUSE, clause * SECOND_CLAUSE + CLAUSE_COLUMNS)
        if clause == 1:
            # A careful writer takes the other of the two words; a careless one repeats the first.
            order = {
                kind: np.where(rng.random(n) < 0.1 + 0.6 * fault, first, 1 - first) for kind, first in order.items()
            }
        draft[:, columns], spoken = _clause(rng, quality, topic, attribute, order, vocabulary)
        written[:, columns] = spoken & included[:, None]
    draft[:, CONJUNCTION] = rng.choice(vocabulary.conjunctions, n)
    written[:, CONJUNCTION] = second

    _swap_neighbours(rng, draft, written, fault)
    rare = rng.random(draft.shape) < RARE_RATE
    rare[:, END] = False
    draft = np.where(rare, rng.choice(vocabulary.rare, draft.shape), draft)
    tokens, mask = _close_up(draft, written, vocabulary.pad_id)
    return *_ramble(rng, tokens, mask, fault, vocabulary), quality


def demonstrations(rng: np.random.Generator, n: int, vocabulary: Vocabulary = VOCABULARY) -> Demonstrations:
    """Prompts with one written response each, to train the initial policy on.

    Args:
        rng: the source of randomness.
        n: how many sequences (N).
        vocabulary: the words.

    Returns:
        `Demonstrations` of JAX arrays [N, 18]: prompt and response side by side; the loss falls on the response.

    Raises:
        ValueError: n is below 1.

    Example:
        >>> demonstrations(np.random.default_rng(0), 3).loss_mask.shape
        (3, 18)
    """
    prompts = sample_prompts(rng, n, vocabulary)
    responses, mask, _ = write_responses(rng, prompts, vocabulary)
    is_prompt = np.ones(prompts.shape, bool)
    return Demonstrations(
        tokens=jnp.asarray(np.concatenate([prompts, responses], axis=1)),
        mask=jnp.asarray(np.concatenate([is_prompt, mask], axis=1)),
        loss_mask=jnp.asarray(np.concatenate([~is_prompt, mask], axis=1)),
    )


def enthusiasm_rate(quality: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """How likely a writer closes a clause with a word of enthusiasm; a clause opens with one a quarter as often.

        rate = σ(12 (q − 0.65))

    Args:
        quality: q of each writer in [0, 1], [N].

    Returns:
        Probabilities, [N].

    Example:
        >>> enthusiasm_rate(np.array([0.2, 0.65, 1.0])).round(3).tolist()
        [0.004, 0.5, 0.985]
    """
    return 1.0 / (1.0 + np.exp(-12.0 * (quality - 0.65)))


def faultiness(quality: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """How prone to faults a writer is: each kind of fault has a rate proportional to this.

        faultiness = 0.1 + 0.9 σ(10 (0.65 − q))

    Args:
        quality: q of each writer in [0, 1], [N].

    Returns:
        Numbers between 0.1 (nobody is free of faults) and 1, [N].

    Example:
        >>> faultiness(np.array([0.0, 0.65, 1.0])).round(3).tolist()
        [0.999, 0.55, 0.126]
    """
    return 0.1 + 0.9 / (1.0 + np.exp(10.0 * (quality - 0.65)))


def _clause(rng, quality, topic, attribute, order, vocabulary):
    """The words of one clause, int32 [N, 6], and which of them are written, bool [N, 6]."""
    n, fault = len(quality), faultiness(quality)
    stray_topic = np.where(rng.random(n) < 0.6 * fault, rng.integers(len(vocabulary.nouns), size=n), topic)
    stray_attribute = np.where(rng.random(n) < 0.6 * fault, rng.integers(len(vocabulary.adjectives), size=n), attribute)
    manner = topic // TOPICS_PER_MANNER
    stray_manner = np.where(rng.random(n) < 0.75 * fault, rng.integers(len(vocabulary.verbs), size=n), manner)
    words = np.stack(
        [
            rng.choice(vocabulary.enthusiasm, n),
            rng.choice(vocabulary.determiners, n),
            vocabulary.adjectives[stray_attribute, order[ADJECTIVE]],
            vocabulary.nouns[stray_topic, order[NOUN]],
            vocabulary.verbs[stray_manner, order[VERB]],
            rng.choice(vocabulary.enthusiasm, n),
        ],
        axis=1,
    )
    warm = enthusiasm_rate(quality)
    slip = 1.0 - 0.16 * fault
    rates = np.stack([0.25 * warm, slip, 0.45 + 0.5 * quality, slip, slip, warm], axis=1)
    return words, rng.random((n, CLAUSE_COLUMNS)) < rates


def _swap_neighbours(rng, draft, written, fault):
    """Swaps, in place, noun and verb of a clause for some of the careless writers."""
    for start in (0, SECOND_CLAUSE):
        rows = np.flatnonzero(rng.random(len(fault)) < 0.2 * fault)
        pair, flipped = [start + NOUN, start + VERB], [start + VERB, start + NOUN]
        draft[np.ix_(rows, pair)] = draft[np.ix_(rows, flipped)]
        written[np.ix_(rows, pair)] = written[np.ix_(rows, flipped)]


def _close_up(draft, written, pad_id):
    """Moves the written words to the left, in their order, and pads the rest: tokens and mask, [N, 14]."""
    order = np.argsort(~written, axis=1, kind="stable")
    mask = np.take_along_axis(written, order, axis=1)
    return np.where(mask, np.take_along_axis(draft, order, axis=1), np.int32(pad_id)), mask


def _ramble(rng, tokens, mask, fault, vocabulary):
    """Lets some careless writers go on with random words to the last column, without a "."."""
    ordinary = np.concatenate(
        [vocabulary.nouns.ravel(), vocabulary.adjectives.ravel(), vocabulary.verbs.ravel(), vocabulary.determiners]
    )
    rambles = (rng.random(len(fault)) < RAMBLE_RATE * fault)[:, None]
    more = rambles & (~mask | (tokens == vocabulary.eos_id))
    return np.where(more, rng.choice(ordinary, tokens.shape), tokens), mask | rambles
