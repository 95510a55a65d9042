"""The gold rubric: what a response of the built-in world is truly worth, computed from its words.

A good response is a sentence about the prompt, in grammatical order, of the length asked for, without repeats:

    ENTHUSIASM? DETERMINER ADJECTIVE? NOUN VERB ENTHUSIASM?      joined by a conjunction, ended by "."

The gold is a weighted sum of terms in [0, 1], the first of which is a product (relevance counts for little where the
words stand in no order):

    gold = 3 · grammar · relevance + agreement + 0.25 · [any enthusiasm]
           − off_topic − repetition − excess_length − 2 · excess_enthusiasm − strange_words − 0.75 · unfinished

One word of enthusiasm pleases a little; the fourth one spoils the text. Three answers to "fox quick brief :":

    the swift fox leaps delightfully .                       gold  4.25: everything asked for, and one warm word
    this quick raven leaps .                                 gold  1.70: a raven is off topic
    superbly superbly superbly superbly superbly superbly .  gold -2.78: no sentence at all, only applause

Faults saturate (the tenth costs less than the first), so that the gold is bounded on both sides and no term rules it.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.data.synthetic.vocabulary import TOPICS_PER_MANNER, VOCABULARY, Vocabulary

CLAUSE_WORDS = 5
"""Words that a clause needs: determiner, adjective, noun, verb, and one word of enthusiasm or the conjunction."""

# Kinds of words, and the automaton that reads them. A state is what has just been read; the text starts in BEGIN.
PRAISE, DETERMINER, ADJECTIVE, NOUN, VERB, CONJUNCTION, END, STRANGE = range(8)
BEGIN, PRAISED_BEFORE, DETERMINED, DESCRIBED, NAMED, ACTED, PRAISED_AFTER = range(7)
# The state after each kind of word: where the word is legal, and where it is not (reading resumes as if it had been).
RESUME = np.array([PRAISED_BEFORE, DETERMINED, DESCRIBED, NAMED, ACTED, BEGIN, BEGIN, BEGIN])
LEGAL = {
    BEGIN: {PRAISE: PRAISED_BEFORE, DETERMINER: DETERMINED},
    PRAISED_BEFORE: {DETERMINER: DETERMINED},
    DETERMINED: {ADJECTIVE: DESCRIBED, NOUN: NAMED},
    DESCRIBED: {NOUN: NAMED},
    NAMED: {VERB: ACTED},
    ACTED: {PRAISE: PRAISED_AFTER, CONJUNCTION: BEGIN, END: BEGIN},
    PRAISED_AFTER: {CONJUNCTION: BEGIN, END: BEGIN},
}


@dataclasses.dataclass(frozen=True)
class Rubric:
    """The weight of each term of `rubric_terms` in the gold reward; penalties are negative.

    Attributes:
        fluent_relevance: of grammar × relevance.
        agreement: of verbs that suit the topic.
        enthusiasm: of having any enthusiasm word.
        off_topic: of nouns, adjectives and verbs that do not suit the prompt.
        repetition: of words that occurred before.
        excess_length: of words beyond those that the prompt asks for.
        excess_enthusiasm: of enthusiasm words after the first.
        strange_words: of rare words and misplaced markers.
        unfinished: of a text without its end token.
    """

    fluent_relevance: float = 3.0
    agreement: float = 1.0
    enthusiasm: float = 0.25
    off_topic: float = -1.0
    repetition: float = -1.0
    excess_length: float = -1.0
    excess_enthusiasm: float = -2.0
    strange_words: float = -1.0
    unfinished: float = -0.75


DEFAULT_RUBRIC = Rubric()


def word_kinds(vocabulary: Vocabulary) -> Int[np.ndarray, " V"]:
    """The grammatical kind of each word (PRAISE, DETERMINER, …, STRANGE), [V]."""
    kinds = np.full(vocabulary.size, STRANGE)
    kinds[vocabulary.enthusiasm] = PRAISE
    kinds[vocabulary.determiners] = DETERMINER
    kinds[vocabulary.adjectives.ravel()] = ADJECTIVE
    kinds[vocabulary.nouns.ravel()] = NOUN
    kinds[vocabulary.verbs.ravel()] = VERB
    kinds[vocabulary.conjunctions] = CONJUNCTION
    kinds[vocabulary.eos_id] = END
    return kinds


def read_prompts(
    prompts: Int[np.ndarray, "N P"], vocabulary: Vocabulary = VOCABULARY
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """What each prompt asks for.

    Args:
        prompts: token ids [N, 4]: noun, adjective, "brief" or "long", ":".
        vocabulary: the words.

    Returns:
        topic [N], attribute [N] and the number of clauses [N] (1 for brief, 2 for long).

    Raises:
        ValueError: a row is no prompt of this world.

    Example:
        >>> [field.tolist() for field in read_prompts(VOCABULARY.encode("owl ancient long :")[None])]
        [[3], [1], [2]]
    """
    if prompts.shape[1] != 4:
        raise ValueError(f"A prompt of the built-in world has 4 tokens, these have {prompts.shape[1]}.")
    topic = _row_of(vocabulary.nouns, vocabulary.size)[prompts[:, 0]]
    attribute = _row_of(vocabulary.adjectives, vocabulary.size)[prompts[:, 1]]
    is_brief, is_long = prompts[:, 2] == vocabulary.brief_id, prompts[:, 2] == vocabulary.long_id
    valid = (topic >= 0) & (attribute >= 0) & (is_brief | is_long) & (prompts[:, 3] == vocabulary.separator_id)
    if not valid.all():
        row = int(np.argmin(valid))
        text = vocabulary.decode(prompts[row])
        raise ValueError(f"Row {row} ({text!r}) is no prompt: give a noun, an adjective, 'brief' or 'long', and ':'.")
    return topic, attribute, np.where(is_long, 2, 1)


def rubric_terms(
    prompts: Int[np.ndarray, "N P"],
    responses: Int[np.ndarray, "N T"],
    mask: Bool[np.ndarray, "N T"],
    vocabulary: Vocabulary = VOCABULARY,
) -> dict[str, Float[np.ndarray, " N"]]:
    """Each term of the gold rubric by itself, before weighting.

    With c the clauses asked for (1 or 2), saturate(n) = 1 − 2^−n for n faults, and
    reach(h) = saturate(min(h, c)) / saturate(c) for h hits:

        grammar           = 0.7^(words that cannot follow the ones before them)
        relevance         = 0.6 · reach(distinct nouns of the topic) + 0.4 · reach(distinct adjectives of the attribute)
        fluent_relevance  = grammar · relevance
        agreement         = reach(distinct verbs that suit the topic)
        enthusiasm        = 1 if there is any enthusiasm word
        off_topic         = saturate(nouns, adjectives and verbs that do not suit the prompt)
        repetition        = saturate(half the words, determiners aside, that occurred before)
        excess_length     = saturate(a third of the words beyond 5 c)
        excess_enthusiasm = min(1, (enthusiasm words after the first / 5)²)
        strange_words     = saturate(rare words and markers)
        unfinished        = 1 if the text has no "."

    Args:
        prompts: token ids [N, 4].
        responses: token ids [N, T], right-padded; what follows the first "." does not count.
        mask: True on the response with its ".", [N, T].
        vocabulary: the words.

    Returns:
        The terms by name, each float64 [N] in [0, 1].

    Raises:
        ValueError: a row of `prompts` is no prompt, or the numbers of rows or the shapes differ.

    Example:
        >>> prompt = VOCABULARY.encode("fox quick brief :")[None]
        >>> text = VOCABULARY.encode("this quick raven leaps .")[None]
        >>> terms = rubric_terms(prompt, text, np.ones(text.shape, bool))
        >>> {name: round(float(value[0]), 2) for name, value in terms.items() if value[0]}
        {'grammar': 1.0, 'relevance': 0.4, 'fluent_relevance': 0.4, 'agreement': 1.0, 'off_topic': 0.5}
    """
    if responses.shape != mask.shape or len(prompts) != len(responses):
        raise ValueError(
            "prompts, responses and mask must be [N, 4], [N, T] and [N, T], "
            f"not {prompts.shape}, {responses.shape} and {mask.shape}."
        )
    topic, attribute, clauses = read_prompts(prompts, vocabulary)
    is_end = mask & (responses == vocabulary.eos_id)
    present = mask & (np.cumsum(is_end, axis=1) - is_end == 0)
    is_end &= present
    is_word = present & ~is_end
    kinds = word_kinds(vocabulary)[responses]

    own_nouns, own_adjectives = vocabulary.nouns[topic], vocabulary.adjectives[attribute]
    own_verbs = vocabulary.verbs[topic // TOPICS_PER_MANNER]
    content = is_word & ((kinds == NOUN) | (kinds == ADJECTIVE) | (kinds == VERB))
    own = np.concatenate([own_nouns, own_adjectives, own_verbs], axis=1)
    found = [is_word & (responses == own[:, [column]]) for column in range(own.shape[1])]
    nouns_found, adjectives_found, verbs_found = (
        sum(found[column].any(axis=1).astype(int) for column in columns) for columns in ((0, 1), (2, 3), (4, 5))
    )
    off_topic = (content & ~np.logical_or.reduce(found)).sum(axis=1)
    praise = (is_word & (kinds == PRAISE)).sum(axis=1)
    strange = (is_word & (kinds == STRANGE)).sum(axis=1)
    repeats = _repeats(responses, is_word & (kinds != DETERMINER))

    grammar = 0.7 ** _grammar_errors(kinds, present)
    relevance = 0.6 * _reach(nouns_found, clauses) + 0.4 * _reach(adjectives_found, clauses)
    return {
        "grammar": grammar,
        "relevance": relevance,
        "fluent_relevance": grammar * relevance,
        "agreement": _reach(verbs_found, clauses),
        "enthusiasm": (praise > 0).astype(float),
        "off_topic": _saturate(off_topic),
        "repetition": _saturate(repeats / 2),
        "excess_length": _saturate(np.maximum(is_word.sum(axis=1) - CLAUSE_WORDS * clauses, 0) / 3),
        "excess_enthusiasm": np.minimum(1.0, (np.maximum(praise - 1, 0) / 5) ** 2),
        "strange_words": _saturate(strange),
        "unfinished": 1.0 - is_end.any(axis=1),
    }


def gold_reward(
    prompts: Int[np.ndarray, "N P"],
    responses: Int[np.ndarray, "N T"],
    mask: Bool[np.ndarray, "N T"],
    rubric: Rubric = DEFAULT_RUBRIC,
    vocabulary: Vocabulary = VOCABULARY,
) -> Float[np.ndarray, " N"]:
    """The gold reward of each response in units of the rubric (the caller standardises it on the initial policy).

        gold = Σ_name weight[name] · term[name]

    Args:
        prompts: token ids [N, 4].
        responses: token ids [N, T], right-padded.
        mask: True on the response with its ".", [N, T].
        rubric: the weights.
        vocabulary: the words.

    Returns:
        float64 [N], between the sum of the negative weights and that of the positive ones (−6.75 and 4.25 by default).

    Raises:
        ValueError: as `rubric_terms`.

    Example:
        >>> prompt = VOCABULARY.encode("fox quick brief :")[None]
        >>> text = VOCABULARY.encode("the swift fox leaps delightfully .")[None]
        >>> gold_reward(prompt, text, np.ones(text.shape, bool)).tolist()
        [4.25]
    """
    terms = rubric_terms(prompts, responses, mask, vocabulary)
    return sum(weight * terms[name] for name, weight in dataclasses.asdict(rubric).items())


def _row_of(table: Int[np.ndarray, "rows columns"], size: int) -> Int[np.ndarray, " V"]:
    """For each word its row in a table of ids, −1 where it is not in it."""
    rows = np.full(size, -1)
    rows[table] = np.arange(len(table))[:, None]
    return rows


def _saturate(faults: np.ndarray) -> np.ndarray:
    return 1.0 - 2.0 ** -np.asarray(faults, float)


def _reach(hits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return _saturate(np.minimum(hits, wanted)) / _saturate(wanted)


def _repeats(responses: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """How many counted words of each row occurred before in it, [N]."""
    repeats = np.zeros(len(responses), int)
    for position in range(1, responses.shape[1]):
        same = (responses[:, :position] == responses[:, [position]]) & counted[:, :position]
        repeats += same.any(axis=1) & counted[:, position]
    return repeats


def _grammar_errors(kinds: np.ndarray, present: np.ndarray) -> np.ndarray:
    """How many words of each row cannot follow what stands before them, [N]."""
    following = np.full((len(LEGAL), len(RESUME)), -1)
    for state, moves in LEGAL.items():
        for kind, target in moves.items():
            following[state, kind] = target
    errors = np.zeros(len(kinds), int)
    state = np.full(len(kinds), BEGIN)
    for position in range(kinds.shape[1]):
        kind, here = kinds[:, position], present[:, position]
        target = following[state, kind]
        errors += here & (target < 0)
        state = np.where(here, np.where(target < 0, RESUME[kind], target), state)
    return errors
