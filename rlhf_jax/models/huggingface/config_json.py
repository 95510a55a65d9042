"""A `config.json` as a `ModelConfig`, and back."""

import dataclasses
from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface.families import FAMILIES
from rlhf_jax.models.huggingface.options import Options


def text_options(options: Options) -> Options:
    """The options of the language model: those of the text part where a folder (Gemma 3) has vision as well."""
    if options.get("model_type") != "gemma3":
        return options
    tokens = {name: value for name, value in options.items() if name.endswith("_token_id")}
    return tokens | options.get("text_config", {}) | {"model_type": "gemma3_text"}


def from_hf_config(options: Options, dtype: str = "float32", param_dtype: str = "float32") -> ModelConfig:
    """The configuration that the options of a `config.json` describe.

    Args:
        options: what the file holds.
        dtype: dtype of the computation.
        param_dtype: dtype in which parameters are kept.

    Raises:
        ValueError: a model type or an option that is not implemented, or an option that is missing.

    Example:
        >>> from_hf_config(dict(model_type="gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12,
        ...                     n_positions=1024)).feed_forward_width
        3072
    """
    options = text_options(options)
    kind = options.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"it has model_type {kind!r}; the types that load are: {', '.join(FAMILIES)}.")
    if options.get("quantization_config") is not None:
        raise ValueError("its weights are quantised (quantization_config); save them in float32, float16 or bfloat16.")
    options = FAMILIES[kind].defaults | options
    fields: dict[str, Any] = {}
    for part in FAMILIES[kind].parts:
        fields |= part.read(options)
    return ModelConfig(**fields, dtype=dtype, param_dtype=param_dtype)


def _explicit(config: ModelConfig) -> ModelConfig:
    """The configuration with what is implied said, and what is not stored or has no effect left at the default."""
    local, rotates = config.is_local, config.positions == "rotary"
    same_base = config.rope_scaling is None and config.local_rope_theta == config.rope_theta
    return dataclasses.replace(
        config,
        head_width=config.head_size,
        rotary_width=config.rotary_size if rotates else None,
        rope_theta=config.rope_theta if rotates else 10_000.0,
        rope_scaling=config.rope_scaling if rotates else None,
        local_rope_theta=None if same_base or not any(local) else config.local_rope_theta,
        window=config.window if any(local) else None,
        local_layers=local if any(local) else (),
        query_scale=config.head_size**-0.5 if config.query_scale is None else config.query_scale,
        embedding_scale=1.0 if config.embedding_scale is None else config.embedding_scale,
        dtype="float32",
        param_dtype="float32",
        attention="reference",
        attention_block=512,
        remat="none",
    )


def _written(config: ModelConfig, kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {"model_type": kind}
    for part in FAMILIES[kind].parts:
        options |= part.write(config)
    return options


def _differences(config: ModelConfig, options: Options) -> list[str]:
    """The fields that a reader of the options would get another value for."""
    ours, theirs = _explicit(config), _explicit(from_hf_config(options))
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    return [name for name in names if getattr(ours, name) != getattr(theirs, name)]


def _says(options: Options, config: ModelConfig) -> bool:
    """Whether the options describe the configuration."""
    try:
        return not _differences(config, options)
    except ValueError:
        return False


def family_of(config: ModelConfig) -> str:
    """The model type whose `config.json` says all of a configuration; of several, the first of the table.

    Raises:
        ValueError: no family has this combination of fields.

    Example:
        >>> family_of(ModelConfig(vocab_size=8, width=4, layers=1, heads=1, key_value_heads=1, feed_forward_width=8,
        ...                       context_length=8, query_key_norm="head"))
        'qwen3'
    """
    fitting = [kind for kind in FAMILIES if _says(_written(config, kind), config)]
    if not fitting:
        raise ValueError(f"no family of Hugging Face models has the shape of {config}; change it to that of one.")
    return fitting[0]


def to_hf_config(config: ModelConfig, source: Options | None = None) -> dict[str, Any]:
    """The options of a `config.json` for a configuration.

    Args:
        config: the configuration.
        source: the options of the folder that the model came from. They are returned as they are if they still
            describe the configuration; else it is written over them, in the same family. None: a model made here,
            saved as the first family that fits.

    Returns:
        All options but the class, the dtype and the special tokens.

    Raises:
        ValueError: the family cannot say one of the fields.
    """
    source = {} if source is None else text_options(source)
    if source and _says(source, config):
        return dict(source)
    kind = source.get("model_type") or family_of(config)
    # rope_parameters is the other spelling of options that are written here, and would contradict them
    options = {name: value for name, value in source.items() if name != "rope_parameters"} | _written(config, kind)
    lost = _differences(config, options)
    if lost:
        raise ValueError(
            f"a {kind} folder cannot say {', '.join(f'{name} = {getattr(config, name)!r}' for name in lost)}; "
            "save without a source, or keep the shape that was loaded."
        )
    return options
