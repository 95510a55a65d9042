"""A `ModelConfig` that cannot be built says which size is wrong."""

import dataclasses

import pytest

from rlhf_jax.models.config import ModelConfig

# Names are checked by the type hook of the tests as well, whose error is a TypeError.
REFUSED = (ValueError, TypeError)


def test_head_size_is_the_share_of_the_width_unless_given(config):
    assert config.head_size == 4
    assert dataclasses.replace(config, head_width=6).head_size == 6


def test_configurations_are_hashable_so_that_they_can_be_static(config):
    assert hash(config) == hash(dataclasses.replace(config))
    assert config != dataclasses.replace(config, rope_theta=500.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", 0, "layers is 0"),
        ("vocab_size", -1, "vocab_size is -1"),
        ("key_value_heads", 3, "key_value_heads = 3 does not divide heads = 4"),
        ("width", 18, "heads = 4 does not divide width = 18"),
        ("head_width", 5, "even width"),
        ("remat", "everything", "remat"),
        ("dtype", "float16", "dtype"),
        ("param_dtype", "int8", "param_dtype"),
    ],
)
def test_impossible_sizes_and_unknown_names_are_refused(config, name, value, message):
    with pytest.raises(REFUSED, match=message):
        dataclasses.replace(config, **{name: value})


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="n_heads"):
        ModelConfig(
            vocab_size=2,
            width=2,
            layers=1,
            heads=1,
            n_heads=1,
            key_value_heads=1,
            feed_forward_width=2,
            context_length=4,
        )
