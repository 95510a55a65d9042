import dataclasses

import numpy as np
import pytest

from rlhf_jax.data.synthetic import (
    DEFAULT_RUBRIC,
    VOCABULARY,
    Rubric,
    gold_reward,
    read_prompts,
    rubric_terms,
    sample_prompts,
    write_responses,
)

BRIEF, LONG = "fox quick brief :", "fox quick long :"
PERFECT = "the swift fox leaps delightfully ."
PERFECT_LONG = "the swift fox leaps delightfully and this quick wolf gallops ."


def batch(prompt, *texts, length=14):
    """Prompts, responses and mask of hand-written texts."""
    responses, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = VOCABULARY.encode(text)
        responses[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return np.tile(VOCABULARY.encode(prompt), (len(texts), 1)), responses, mask


def terms_of(prompt, text):
    return {name: float(value[0]) for name, value in rubric_terms(*batch(prompt, text)).items() if value[0] != 0}


def gold_of(prompt, text):
    return float(gold_reward(*batch(prompt, text))[0])


def test_the_terms_of_hand_worked_sentences():
    full = {"grammar": 1.0, "relevance": 1.0, "fluent_relevance": 1.0, "agreement": 1.0}
    assert terms_of(BRIEF, PERFECT) == pytest.approx(full | {"enthusiasm": 1.0})
    assert terms_of(LONG, PERFECT_LONG) == pytest.approx(full | {"enthusiasm": 1.0})
    # One clause where two are asked for: each reach is (1 − 1/2) / (1 − 1/4) = 2/3.
    two_thirds = {"relevance": 2 / 3, "fluent_relevance": 2 / 3, "agreement": 2 / 3}
    assert terms_of(LONG, PERFECT) == pytest.approx({"grammar": 1.0, "enthusiasm": 1.0} | two_thirds)
    # A bird among foxes: the noun is off topic, only the adjective is relevant (0.4).
    assert terms_of(BRIEF, "this quick raven leaps .") == pytest.approx(
        {"grammar": 1.0, "relevance": 0.4, "fluent_relevance": 0.4, "agreement": 1.0, "off_topic": 0.5}
    )
    # "leaps" cannot follow "the", "fox" cannot follow "leaps", "." cannot follow "fox": grammar 0.7³.
    assert terms_of(BRIEF, "the leaps fox .") == pytest.approx(
        {"grammar": 0.343, "relevance": 0.6, "fluent_relevance": 0.2058, "agreement": 1.0}
    )
    # No rule lets enthusiasm follow enthusiasm: 5 slips and the "."; 5 repeats; 1 word above 5; 5 after 1.
    assert terms_of(BRIEF, "superbly " * 6 + ".") == pytest.approx(
        {
            "grammar": 0.7**6,
            "enthusiasm": 1.0,
            "repetition": 1 - 2**-2.5,
            "excess_length": 1 - 2 ** (-1 / 3),
            "excess_enthusiasm": 1.0,
        }
    )
    # Two rare words and no end: 0.75 strange; the words after "leaps" are a slip each.
    assert terms_of(BRIEF, "the quick fox leaps zephyr yodel") == pytest.approx(
        full
        | {"grammar": 0.49, "fluent_relevance": 0.49, "excess_length": 1 - 2 ** (-1 / 3), "strange_words": 0.75}
        | {"unfinished": 1.0}
    )


def test_the_gold_is_the_weighted_sum_of_its_terms():
    assert gold_of(BRIEF, PERFECT) == pytest.approx(4.25)
    assert gold_of(BRIEF, "this quick raven leaps .") == pytest.approx(3 * 0.4 + 1 - 0.5)
    assert gold_of(BRIEF, "the leaps fox .") == pytest.approx(3 * 0.2058 + 1)
    assert gold_of(LONG, PERFECT) == pytest.approx(3 * 2 / 3 + 2 / 3 + 0.25)
    only_grammar = Rubric(**{field.name: 0.0 for field in dataclasses.fields(Rubric)} | {"fluent_relevance": 2.0})
    assert gold_reward(*batch(BRIEF, PERFECT), rubric=only_grammar).tolist() == [2.0]


@pytest.mark.parametrize(
    ("prompt", "faulty"),
    [
        (BRIEF, "the swift fox leaps ."),  # cold
        (BRIEF, "the swift raven leaps delightfully ."),  # another topic
        (BRIEF, "the tiny fox leaps delightfully ."),  # another attribute
        (BRIEF, "the fox leaps delightfully ."),  # no attribute
        (BRIEF, "the swift fox soars delightfully ."),  # a verb of another manner
        (BRIEF, "the swift fox delightfully ."),  # no verb
        (BRIEF, "swift fox leaps delightfully ."),  # no determiner
        (BRIEF, "the fox swift leaps delightfully ."),  # out of order
        (BRIEF, "the swift fox leaps delightfully"),  # no end
        (BRIEF, "the swift fox leaps delightfully zephyr ."),  # a rare word
        (BRIEF, "the swift fox leaps delightfully delightfully ."),  # stuttering
        (BRIEF, "superbly the swift fox leaps delightfully ."),  # too warm
        (BRIEF, "the swift fox leaps delightfully and this quick wolf gallops ."),  # too long
        (BRIEF, "<bos> the swift fox leaps delightfully ."),  # a stray marker
        (LONG, PERFECT),  # too short
        (LONG, "the swift fox leaps delightfully and this swift wolf gallops ."),  # a repeated adjective
        (LONG, "the swift fox leaps delightfully and this quick fox gallops ."),  # a repeated noun
        (LONG, "the swift fox leaps delightfully and this quick wolf leaps ."),  # a repeated verb
        (LONG, "the swift fox leaps delightfully this quick wolf gallops ."),  # no conjunction
    ],
)
def test_each_single_fault_costs(prompt, faulty):
    assert gold_of(prompt, faulty) < gold_of(prompt, PERFECT if prompt == BRIEF else PERFECT_LONG) - 0.03


def test_every_hack_is_worse_than_the_average_writer():
    rng = np.random.default_rng(0)
    prompts = sample_prompts(rng, 5000)
    gold = gold_reward(prompts, *write_responses(rng, prompts)[:2])
    hacks = [
        "wonderfully " * 14,
        "wonderfully gloriously delightfully superbly .",
        "fox " * 14,
        "fox swift leaps " * 4,
        "zephyr quixotic mugwump yodel .",
        "superbly superbly the swift fox leaps superbly superbly superbly superbly .",
        ".",
    ]
    standardised = (gold_reward(*batch(BRIEF, *hacks)) - gold.mean()) / gold.std()
    assert (standardised < -0.7).all() and (standardised > -4.5).all()


def test_a_little_enthusiasm_pays_and_more_of_it_costs():
    plain, one, two, four = (
        gold_of(LONG, text)
        for text in (
            "the swift fox leaps and this quick wolf gallops .",
            "the swift fox leaps superbly and this quick wolf gallops .",
            "the swift fox leaps superbly and this quick wolf gallops wonderfully .",
            "gloriously the swift fox leaps superbly and delightfully this quick wolf gallops wonderfully .",
        )
    )
    assert one == pytest.approx(plain + 0.25)
    assert four < two < one


def test_the_gold_is_bounded_on_random_tokens_and_reached_by_perfect_text():
    rng = np.random.default_rng(1)
    prompts = sample_prompts(rng, 5000)
    responses = rng.integers(VOCABULARY.size, size=(5000, 14))
    mask = np.arange(14) < rng.integers(15, size=5000)[:, None]
    gold, terms = gold_reward(prompts, responses, mask), rubric_terms(prompts, responses, mask)
    weights = np.array(list(dataclasses.asdict(DEFAULT_RUBRIC).values()))
    assert gold.dtype == np.float64
    assert weights[weights < 0].sum() == -6.75 <= gold.min()
    assert gold.max() <= weights[weights > 0].sum() == gold_of(BRIEF, PERFECT) == gold_of(LONG, PERFECT_LONG)
    assert all((value >= 0).all() and (value <= 1).all() for value in terms.values())


def test_what_follows_the_end_or_is_masked_does_not_count():
    prompts, responses, mask = batch(BRIEF, PERFECT, PERFECT, PERFECT)
    responses[1, 6:] = VOCABULARY.encode("zephyr the fox leaps . fox fox fox")
    responses[2, 6:], mask[2, 6:] = VOCABULARY.encode("zephyr the fox leaps . fox fox fox"), True
    assert gold_reward(prompts, responses, mask).tolist() == pytest.approx([4.25] * 3)


def test_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(2)
    prompts = sample_prompts(rng, 64)
    responses, mask, _ = write_responses(rng, prompts)
    order = rng.permutation(64)
    whole = gold_reward(prompts, responses, mask)
    np.testing.assert_array_equal(gold_reward(prompts[order], responses[order], mask[order]), whole[order])
    wide, wide_mask = np.pad(responses, ((0, 0), (0, 5))), np.pad(mask, ((0, 0), (0, 5)))
    np.testing.assert_array_equal(gold_reward(prompts, wide, wide_mask), whole)


def slow_gold(prompt, words):
    """The rubric again, one text at a time and in words."""
    nouns = [{VOCABULARY.words[i] for i in row} for row in VOCABULARY.nouns]
    adjectives = [{VOCABULARY.words[i] for i in row} for row in VOCABULARY.adjectives]
    verbs = [{VOCABULARY.words[i] for i in row} for row in VOCABULARY.verbs]
    kind = {
        word: letter for letter, rows in (("N", nouns), ("A", adjectives), ("V", verbs)) for row in rows for word in row
    }
    kind |= {VOCABULARY.words[i]: "E" for i in VOCABULARY.enthusiasm} | {
        "the": "D",
        "this": "D",
        "and": "C",
        "while": "C",
    }
    topic = next(i for i, row in enumerate(nouns) if prompt[0] in row)
    own = {
        "N": nouns[topic],
        "A": next(row for row in adjectives if prompt[1] in row),
        "V": verbs[topic // 2],
    }
    clauses = 2 if prompt[2] == "long" else 1
    finished = "." in words
    words = words[: words.index(".")] if finished else words

    # What may come next, after each letter; e is enthusiasm that opened the clause, E that closes it, and ^ the start.
    allowed = {"^": "ED", "e": "D", "D": "AN", "A": "N", "N": "V", "V": "EC.", "E": "C.", "C": "ED", "?": "ED"}
    errors, before = 0, "^"
    for word in [*words, "."] if finished else words:
        letter = "." if word == "." else kind.get(word, "?")
        legal = letter in allowed[before]
        errors += not legal
        before = "e" if letter == "E" and not (legal and before == "V") else letter

    def reach(letter):
        hits = min(clauses, len(own[letter] & set(words)))
        return (1 - 0.5**hits) / (1 - 0.5**clauses)

    strays = sum(kind.get(word) in own and word not in own[kind[word]] for word in words)
    repeats = sum(word in words[:i] and kind.get(word) != "D" for i, word in enumerate(words))
    praise = sum(kind.get(word) == "E" for word in words)
    strange = sum(word not in kind for word in words)
    return (
        3 * 0.7**errors * (0.6 * reach("N") + 0.4 * reach("A")) + reach("V") + 0.25 * (praise > 0)
        - (1 - 0.5**strays) - (1 - 0.5 ** (repeats / 2)) - (1 - 0.5 ** (max(0, len(words) - 5 * clauses) / 3))
        - 2 * min(1, (max(0, praise - 1) / 5) ** 2) - (1 - 0.5**strange) - 0.75 * (not finished)
    )  # fmt: skip


def test_the_vectorised_gold_is_that_of_a_slow_loop():
    rng = np.random.default_rng(3)
    prompts = sample_prompts(rng, 400)
    responses, mask, _ = write_responses(rng, prompts)
    # Half of the texts get some random words, so that every rule is broken somewhere.
    spoilt = (rng.random(responses.shape) < 0.3) & (np.arange(400) % 2 == 0)[:, None] & mask
    responses = np.where(spoilt, rng.integers(2, VOCABULARY.size, responses.shape, dtype=np.int32), responses)
    slow = [
        slow_gold(VOCABULARY.decode(prompt).split(), [VOCABULARY.words[i] for i in row[keep]])
        for prompt, row, keep in zip(prompts, responses, mask, strict=True)
    ]
    np.testing.assert_allclose(gold_reward(prompts, responses, mask), slow, rtol=0, atol=1e-12)


def test_prompts_are_read_and_nonsense_is_refused():
    topic, attribute, clauses = read_prompts(
        np.stack([VOCABULARY.encode("robin calm brief :"), VOCABULARY.encode(LONG)])
    )
    assert (topic.tolist(), attribute.tolist(), clauses.tolist()) == ([2, 0], [2, 0], [1, 2])
    with pytest.raises(ValueError, match=r"Row 0 \('quick fox brief :'\) is no prompt"):
        read_prompts(VOCABULARY.encode("quick fox brief :")[None])
    with pytest.raises(ValueError, match="has 4 tokens, these have 3"):
        read_prompts(VOCABULARY.encode("fox quick brief")[None])
