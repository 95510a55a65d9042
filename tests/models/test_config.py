"""A `ModelConfig` that cannot be built says which size is wrong."""

import dataclasses

import pytest

from rlhf_jax.models.config import Experts, ModelConfig, RopeScaling

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
        ("head_width", 5, "rotates 5 of the 5 channels of a head"),
        ("rotary_width", 3, "even number"),
        ("rotary_width", 6, "rotates 6 of the 4 channels of a head"),
        ("window", 0, "window is 0"),
        ("local_layers", (True, False), "window is None"),
        ("experts", Experts(count=2, active=3), "3 of 2 experts"),
        ("norm", "batch", "norm"),
        ("norm_placement", "around", "norm_placement"),
        ("activation", "swish", "activation"),
        ("remat", "everything", "remat"),
        ("attention", "flash", "attention"),
        ("attention_block", 0, "attention_block is 0"),
        ("dtype", "float16", "dtype"),
        ("param_dtype", "int8", "param_dtype"),
    ],
)
def test_impossible_sizes_and_unknown_names_are_refused(config, name, value, message):
    with pytest.raises(REFUSED, match=message):
        dataclasses.replace(config, **{name: value})


def test_options_that_exclude_each_other_are_refused(config):
    with pytest.raises(ValueError, match="local_layers has 3 entries"):
        dataclasses.replace(config, window=2, local_layers=(True, False, True))
    with pytest.raises(ValueError, match="experts have no biases"):
        dataclasses.replace(config, experts=Experts(count=2, active=1), feed_forward_bias=True)
    with pytest.raises(ValueError, match=r"rotates 2 channels.*at least 4"):
        dataclasses.replace(config, rotary_width=2, rope_scaling=RopeScaling("dynamic", 2.0, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "linear", "factor": 0.5}, "factor is 0.5"),
        ({"kind": "yarn", "factor": 2.0}, 'kind "yarn" needs the number of tokens of the context trained on'),
        ({"kind": "dynamic", "factor": 2.0, "original_context": 0}, "original_context is 0"),
        ({"kind": "llama3", "factor": 2.0, "original_context": 8, "low_frequency_factor": 4.0}, "must exceed"),
        ({"kind": "longrope", "factor": 2.0}, "kind"),
    ],
)
def test_impossible_rope_scalings_are_refused(options, message):
    with pytest.raises(REFUSED, match=message):
        RopeScaling(**options)


def test_which_layers_are_local(config):
    assert config.is_local == (False, False)
    assert dataclasses.replace(config, window=2).is_local == (True, True)
    assert dataclasses.replace(config, window=2, local_layers=(True, False)).is_local == (True, False)


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
