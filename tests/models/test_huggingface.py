"""Llama folders in: every tensor in its place, and a clear sentence for every folder that does not load."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.models.heads import unembed
from rlhf_jax.models.huggingface import load_config, load_policy, load_tokenizer
from rlhf_jax.models.transformer import apply_trunk, init_trunk

CONFIG = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def tensors_of(layers: int = 2) -> dict[str, np.ndarray]:
    """Random tensors under the names and shapes that `transformers` gives them."""
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(layers):
        inside = {
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write_folder(tmp_path):
    """Writes a folder: `write_folder(config changes, tensors)`; None among the changes deletes an option."""

    def write(changes: dict | None = None, tensors: dict | None = None):
        config = {name: value for name, value in {**CONFIG, **(changes or {})}.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors_of() if tensors is None else tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


def test_config_options_are_read(write_folder):
    config = load_config(write_folder({"rope_theta": 500.0, "initializer_range": 0.1}), dtype="bfloat16")
    assert (config.vocab_size, config.width, config.feed_forward_width, config.layers) == (11, 8, 12, 2)
    assert (config.heads, config.key_value_heads, config.head_size, config.context_length) == (4, 2, 2, 16)
    assert (config.norm_epsilon, config.rope_theta, config.initializer_range) == (1e-6, 500.0, 0.1)
    assert (config.tied_embeddings, config.dtype, config.param_dtype) == (False, "bfloat16", "float32")


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 500}, 500.0),
        ({"rope_theta": 500, "rope_scaling": None}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 750.0}}, 750.0),
    ],
)
def test_both_spellings_of_the_rotary_base_are_read(write_folder, changes, theta):
    assert load_config(write_folder(changes)).rope_theta == theta


def test_without_key_value_heads_every_head_has_its_own(write_folder):
    assert load_config(write_folder({"num_key_value_heads": None})).key_value_heads == 4


def test_tensors_become_the_tree_that_init_makes(write_folder):
    config, params = load_policy(write_folder())
    tensors = tensors_of()
    fresh = jax.eval_shape(lambda key: init_trunk(config, key), jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(params["trunk"])
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params["trunk"])
    np.testing.assert_array_equal(params["unembedding"], tensors["lm_head.weight"].T)
    for layer in (0, 1):
        kernel = params["trunk"]["layers"]["down"]["kernel"][layer]
        np.testing.assert_array_equal(kernel, tensors[f"model.layers.{layer}.mlp.down_proj.weight"].T)


def test_untied_weights_are_not_the_embedding(write_folder):
    config, params = load_policy(write_folder())
    tokens = jnp.array([[1, 2, 3]], jnp.int32)
    hidden = apply_trunk(config, params["trunk"], tokens, jnp.ones((1, 3), bool)).final
    expected = np.asarray(hidden, np.float64) @ tensors_of()["lm_head.weight"].T
    np.testing.assert_allclose(unembed(config, params, hidden), expected, atol=1e-4)


def test_tied_weights_need_no_output_matrix(write_folder):
    tensors = tensors_of()
    del tensors["lm_head.weight"]
    _, params = load_policy(write_folder({"tie_word_embeddings": True}, tensors))
    assert set(params) == {"trunk"}


def test_several_files_with_an_index_load_like_one(write_folder):
    folder, tensors = write_folder(), tensors_of()
    _, whole = load_policy(folder)
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in chosen}, folder / f"model-{part}.safetensors")
        where |= dict.fromkeys(chosen, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    _, parts = load_policy(folder)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-1\.safetensors"):
        load_policy(folder)


def test_bfloat16_files_load_into_the_dtype_asked_for(write_folder):
    folder = write_folder(tensors={name: np.asarray(jnp.asarray(t, jnp.bfloat16)) for name, t in tensors_of().items()})
    _, single = load_policy(folder)
    _, half = load_policy(folder, param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(single)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), single, half)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; the types that load are: llama"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scales its rotary positions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales its rotary positions"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scales its rotary positions"),
    ],
)
def test_a_config_that_this_model_does_not_implement_is_refused(write_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_policy(write_folder(changes))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config\.json"):
        load_policy(tmp_path)


def test_a_damaged_config_is_refused(write_folder):
    folder = write_folder()
    (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_policy(folder)


def test_a_folder_without_weights_is_refused(write_folder):
    folder = write_folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_policy(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_refused(write_folder, kept):
    path = write_folder() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_policy(path.parent)


def test_a_missing_tensor_is_named(write_folder):
    tensors = tensors_of()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_policy(write_folder(tensors=tensors))


def test_a_tensor_of_the_wrong_shape_is_named(write_folder):
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.gate_proj\.weight'.* has shape \(12, 8\)"):
        load_policy(write_folder({"intermediate_size": 10}))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
