import numpy as np
import pytest

from rlhf_jax.data.synthetic import VOCABULARY, build_vocabulary


def test_every_word_is_one_token_and_no_word_occurs_twice():
    assert len(set(VOCABULARY.words)) == VOCABULARY.size == 96
    assert all(len(word.split()) == 1 for word in VOCABULARY.words)


def test_every_id_belongs_to_exactly_one_kind():
    kinds = [
        VOCABULARY.nouns, VOCABULARY.adjectives, VOCABULARY.verbs, VOCABULARY.determiners,
        VOCABULARY.conjunctions, VOCABULARY.enthusiasm, VOCABULARY.rare,
    ]  # fmt: skip
    specials = [
        VOCABULARY.pad_id, VOCABULARY.bos_id, VOCABULARY.eos_id,
        VOCABULARY.separator_id, VOCABULARY.brief_id, VOCABULARY.long_id,
    ]  # fmt: skip
    ids = np.concatenate([np.array(specials), *(kind.ravel() for kind in kinds)])
    np.testing.assert_array_equal(np.sort(ids), np.arange(96))
    assert len(VOCABULARY.rare) >= 40


def test_ids_point_at_the_words_they_name():
    assert [VOCABULARY.words[i] for i in VOCABULARY.nouns[0]] == ["fox", "wolf"]
    assert [VOCABULARY.words[i] for i in VOCABULARY.verbs[1]] == ["soars", "flutters"]
    assert VOCABULARY.words[VOCABULARY.eos_id] == "."
    assert VOCABULARY.words[VOCABULARY.rare[0]] == "zephyr"


def test_decoding_undoes_encoding():
    text = " ".join(word for word in VOCABULARY.words if word != "<pad>")
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


def test_decoding_leaves_padding_out_wherever_it_stands():
    ids = np.concatenate([[VOCABULARY.pad_id] * 2, VOCABULARY.encode("the fox leaps ."), [VOCABULARY.pad_id]])
    assert VOCABULARY.decode(ids) == "the fox leaps ."


def test_an_unknown_word_and_an_id_outside_are_named():
    with pytest.raises(ValueError, match="'cabbage'"):
        VOCABULARY.encode("the cabbage leaps")
    with pytest.raises(ValueError, match="Token id 96"):
        VOCABULARY.decode(np.array([6, 96]))


def test_tables_cannot_be_written_to_and_two_builds_agree():
    with pytest.raises(ValueError, match="read-only"):
        VOCABULARY.nouns[0, 0] = 1
    assert build_vocabulary().words == VOCABULARY.words
