"""Llama-layout Hugging Face folders in: `config.json` and safetensors become a `ModelConfig` and a parameter tree."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import Params

# (our path below trunk/layers, their name below model.layers.N); matrices are stored [out, in] there, [in, out] here.
_LAYER_TENSORS = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("query", "kernel"): "self_attn.q_proj.weight",
    ("key", "kernel"): "self_attn.k_proj.weight",
    ("value", "kernel"): "self_attn.v_proj.weight",
    ("output", "kernel"): "self_attn.o_proj.weight",
    ("feed_forward_norm", "scale"): "post_attention_layernorm.weight",
    ("gate", "kernel"): "mlp.gate_proj.weight",
    ("up", "kernel"): "mlp.up_proj.weight",
    ("down", "kernel"): "mlp.down_proj.weight",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Options of a Llama config that change the computation in ways this model does not have, with the only value we take.
_UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a model folder: it has no {path.name}; give the folder that holds one.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the model folder again.") from None


def load_config(folder: str | Path, dtype: str = "float32", param_dtype: str = "float32") -> ModelConfig:
    """The `ModelConfig` of a Llama folder.

    Args:
        folder: holds `config.json` as `transformers` writes it.
        dtype: dtype of the computation.
        param_dtype: dtype in which parameters are kept.

    Raises:
        ValueError: no `config.json`, an incomplete one, another model type, or an option this model does not implement.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    if raw.get("model_type") != "llama":
        raise ValueError(f"{path} has model_type {raw.get('model_type')!r}; the types that load are: llama.")
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}; copy the model folder again.")
    for name, wanted in _UNSUPPORTED.items():
        if raw.get(name, wanted) != wanted:
            raise ValueError(f"{path} sets {name} = {raw[name]!r}; only {wanted!r} is implemented.")
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path} scales its rotary positions ({rope}); only the default is implemented.")
    heads = raw["num_attention_heads"]
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        key_value_heads=raw.get("num_key_value_heads") or heads,
        feed_forward_width=raw["intermediate_size"],
        context_length=raw["max_position_embeddings"],
        head_width=raw.get("head_dim"),
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        initializer_range=raw.get("initializer_range", 0.02),
        dtype=dtype,
        param_dtype=param_dtype,
    )


class _Tensors:
    """All tensors of a folder by name, each read when asked for (one or many safetensors files)."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        self.folder, self.where = folder, {}
        for name in files:
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; copy the model folder again.")
            try:
                handle = safe_open(folder / name, framework="flax")
            except Exception as error:
                raise ValueError(f"{folder / name} is damaged or truncated ({error}); copy it again.") from None
            self.where.update(dict.fromkeys(handle.keys(), handle))

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.where:
            raise ValueError(
                f"{self.folder} has no tensor {name!r}; its config.json and weights do not belong together."
            )
        tensor = np.asarray(self.where[name].get_tensor(name))
        if tensor.shape != shape:
            raise ValueError(
                f"tensor {name!r} of {self.folder} has shape {tensor.shape}, but its config.json says {shape}."
            )
        return tensor


def load_policy(folder: str | Path, dtype: str = "float32", param_dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """A policy from a Llama folder.

    Args:
        folder: holds `config.json` and `model.safetensors` (or several, with an index).
        dtype: dtype of the computation.
        param_dtype: dtype in which parameters are kept.

    Returns:
        The configuration and the policy tree `{"trunk", "unembedding"}` (no `unembedding` where embeddings are tied).

    Raises:
        ValueError: a file or tensor is missing, damaged, or of another shape than `config.json` says.
    """
    folder = Path(folder)
    config = load_config(folder, dtype, param_dtype)
    read = _Tensors(folder)
    query, key_value = config.heads * config.head_size, config.key_value_heads * config.head_size
    inner, width = config.feed_forward_width, config.width
    stored_shapes = {
        "scale": (width,),
        "query": (query, width),
        "key": (key_value, width),
        "value": (key_value, width),
        "output": (width, query),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
    }

    def stacked(module: str, leaf: str, name: str) -> jnp.ndarray:
        shape = stored_shapes["scale" if leaf == "scale" else module]
        layers = [read(f"model.layers.{layer}.{name}", shape).T for layer in range(config.layers)]
        return jnp.asarray(np.stack(layers), param_dtype)

    layers: dict = {}
    for (module, leaf), name in _LAYER_TENSORS.items():
        layers.setdefault(module, {})[leaf] = stacked(module, leaf, name)
    embedding = jnp.asarray(read("model.embed_tokens.weight", (config.vocab_size, width)), param_dtype)
    trunk = {
        "embed": {"embedding": embedding},
        "layers": layers,
        "final_norm": {"scale": jnp.asarray(read("model.norm.weight", (width,)), param_dtype)},
    }
    params = {"trunk": trunk}
    if not config.tied_embeddings:
        params["unembedding"] = jnp.asarray(read("lm_head.weight", (config.vocab_size, width)).T, param_dtype)
    return config, params


def load_tokenizer(folder: str | Path):
    """The tokenizer of a folder (a `transformers` fast tokenizer).

    Raises:
        ValueError: the folder has no `tokenizer.json`.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; copy the tokenizer files of the model into it.")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))
