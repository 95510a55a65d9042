"""Folders in: every tensor in its place, whatever the form of the files, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy, unembed
from rlhf_jax.models.huggingface import load_config, load_policy, save_policy
from rlhf_jax.models.transformer import apply_trunk, init_trunk

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
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


def tensors_of(layers: int = 2, prefix: str = "model.") -> dict[str, np.ndarray]:
    """Random tensors under the names and shapes that `transformers` gives them."""
    generator = np.random.default_rng(0)
    shapes = {f"{prefix}embed_tokens.weight": (16, 8), f"{prefix}norm.weight": (8,), "lm_head.weight": (16, 8)}
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
        shapes |= {f"{prefix}layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
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


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_a_trunk_alone_or_within_a_larger_model_is_found(write_folder, prefix):
    _, whole = load_policy(write_folder())
    _, other = load_policy(write_folder(tensors=tensors_of(prefix=prefix)))
    jax.tree.map(np.testing.assert_array_equal, whole, other)


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


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_files_load_into_the_dtype_asked_for(write_folder, stored):
    rounded = {name: np.asarray(jnp.asarray(tensor).astype(stored)) for name, tensor in tensors_of().items()}
    folder = write_folder(tensors=rounded)
    _, single = load_policy(folder)
    _, half = load_policy(folder, param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(single)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    np.testing.assert_array_equal(single["unembedding"], rounded["lm_head.weight"].T.astype(np.float32))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), single, half)


def test_shards_go_straight_to_their_devices(write_folder):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    folder = write_folder()
    _, whole = load_policy(folder)

    def sharding(leaf):
        axes = [None] * leaf.ndim
        if leaf.ndim > 1:
            axes[-2:] = ["data", "model"]
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map(sharding, whole)
    _, sharded = load_policy(folder, placement=lambda config, shapes: shardings)
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted or pytest.fail(str(leaf.sharding)), sharded, shardings)
    assert sharded["unembedding"].addressable_shards[0].data.shape == (4, 4)


PROGRAM = """
import sys, jax, jax.numpy as jnp
from rlhf_jax.models.huggingface import load_policy

def memory(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

jnp.zeros(1).block_until_ready()
before = memory("VmRSS")
_, params = jax.block_until_ready(load_policy(sys.argv[1]))
print(memory("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def peak_memory_of_loading(folder: Path) -> tuple[int, int]:
    """Bytes that a new process takes at most while it loads a folder, and the bytes of the parameters."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, parameters = map(int, run.stdout.split())
    return peak, parameters


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_takes_little_more_memory_than_the_parameters(tmp_path, record_property):
    """At most 1.3 times the largest file beside the parameters; the files here are a third of the whole."""
    config = ModelConfig(
        vocab_size=4096,
        width=512,
        layers=10,
        heads=8,
        key_value_heads=8,
        feed_forward_width=2048,
        context_length=64,
        tied_embeddings=False,
    )
    shapes = jax.eval_shape(lambda key: init_policy(config, key), jax.random.key(0))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), shapes)
    save_policy(tmp_path / "model", config, params, max_shard_bytes=64_000_000)
    largest = max(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    peak, parameters = peak_memory_of_loading(tmp_path / "model")
    assert parameters > 180_000_000
    record_property("peak_bytes_of_loading", peak)
    print(f"peak {peak / 1e6:.0f} MB for {parameters / 1e6:.0f} MB of parameters; largest file {largest / 1e6:.0f} MB")
    assert peak <= 1.3 * largest + parameters


def test_an_error_in_a_config_names_the_file(write_folder):
    folder = write_folder({"hidden_size": None})
    with pytest.raises(ValueError, match=rf"{folder}/config\.json does not load: it does not say hidden_size"):
        load_config(folder)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config\.json"):
        load_policy(tmp_path)


@pytest.mark.parametrize(("text", "message"), [('{"model_type": "lla', "is not valid JSON"), ("[1]", "a JSON object")])
def test_a_damaged_config_is_refused(write_folder, text, message):
    folder = write_folder()
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
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


def test_a_damaged_index_is_refused(write_folder):
    folder = write_folder()
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load_policy(folder)


def test_a_missing_tensor_is_named(write_folder):
    tensors = tensors_of()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_policy(write_folder(tensors=tensors))


def test_a_tensor_of_the_wrong_shape_is_named(write_folder):
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.gate_proj\.weight'.* has shape \(12, 8\)"):
        load_policy(write_folder({"intermediate_size": 10}))


def test_integer_weights_are_refused(write_folder):
    tensors = tensors_of() | {"lm_head.weight": np.zeros((16, 8), np.int8)}
    with pytest.raises(ValueError, match=r"dtype I8; save it in one of F64, F32, F16, BF16"):
        load_policy(write_folder(tensors=tensors))
