"""Model folders in: every tensor goes from its file straight to its place.

A leaf is built device by device: for each one, only the part that the device holds is read, oriented, cast and handed
over. So the host never holds more than one leaf's part beside what it keeps, and each process reads only its own.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_policy
from rlhf_jax.models.huggingface.config_json import from_hf_config, text_options
from rlhf_jax.models.huggingface.families import FAMILIES, Family
from rlhf_jax.models.huggingface.folders import local_folder, read_json
from rlhf_jax.models.huggingface.names import Leaves, Stored, copy_into, places, present, split, stored_shape
from rlhf_jax.models.huggingface.tensors import Location, locate, locate_all, view
from rlhf_jax.models.transformer import init_trunk
from rlhf_jax.types import Params

HEAD_FILE = "value_head.safetensors"
# A bias of the reward head has no tensor in `…ForSequenceClassification`; it is kept under this name in config.json.
SCORE_BIAS = "score_bias"
Placement = Callable[[ModelConfig, Params], Params]
"""`placement(config, shapes)`: a tree like `shapes` with the `jax.sharding.Sharding` of each leaf."""
_OTHER_PREFIXES = ("", "language_model.model.", "model.language_model.")


def read_config(folder: Path, dtype: str, param_dtype: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of a local folder, and the options of its `config.json`."""
    path = folder / "config.json"
    options = read_json(path)
    try:
        return from_hf_config(options, dtype, param_dtype), options
    except ValueError as error:
        raise ValueError(f"{path} does not load: {error}") from None


def load_config(folder: str | Path, dtype: str = "float32", param_dtype: str = "float32") -> ModelConfig:
    """The `ModelConfig` of a model folder.

    Args:
        folder: a folder with a `config.json` as `transformers` writes it, or a hub id.
        dtype: dtype of the computation.
        param_dtype: dtype in which parameters are kept.

    Raises:
        ValueError: no `config.json`, an incomplete one, or a model type or option that is not implemented.
    """
    return read_config(local_folder(folder, weights=False), dtype, param_dtype)[0]


@functools.lru_cache(maxsize=16)
def policy_leaves(config: ModelConfig) -> Leaves:
    """Shape and dtype of every leaf of a policy by its path."""
    return traverse_util.flatten_dict(jax.eval_shape(lambda key: init_policy(config, key), jax.random.key(0)))


@functools.lru_cache(maxsize=16)
def trunk_leaves(config: ModelConfig) -> Leaves:
    """Shape and dtype of every leaf of a trunk by its path, which begins with "trunk"."""
    trunk = jax.eval_shape(lambda key: init_trunk(config, key), jax.random.key(0))
    return traverse_util.flatten_dict({"trunk": trunk})


def _find(located: dict[str, Location], folder: Path, name: str, shape: tuple[int, ...]) -> Location:
    if name not in located:
        raise ValueError(f"{folder} has no tensor {name!r}; its config.json and weights do not belong together.")
    if located[name].shape != shape:
        raise ValueError(
            f"tensor {name!r} of {folder} has shape {located[name].shape}, but its config.json says {shape}."
        )
    return located[name]


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at a 64-byte boundary, which JAX on a CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _place(
    entry: Stored,
    number: int,
    leaves: Leaves,
    located: dict[str, Location],
    heads: int,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """One leaf on its devices."""
    leaf = leaves[entry.leaves[number]]
    widths = [leaves[path].shape[-1] for path in entry.leaves]

    @functools.cache  # several devices may hold the same part
    def part(*ranges: range) -> np.ndarray:
        out = _empty(tuple(map(len, ranges)), leaf.dtype)
        inner = tuple(slice(where.start, where.stop) for where in ranges[entry.leading :])
        for place in np.ndindex(*out.shape[: entry.leading]):
            layer = [ranges[axis][position] for axis, position in enumerate(place)]
            tensor = view(located[entry.name.format(*layer)])
            copy_into(out[place], split(entry, tensor, widths, number, heads)[inner])
        return out

    if sharding is None:
        return jax.device_put(part(*map(range, leaf.shape)))

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        return part(*(range(size)[where] for size, where in zip(leaf.shape, index, strict=True)))

    return jax.make_array_from_callback(leaf.shape, sharding, of_device)


def _load(
    folder: Path,
    config: ModelConfig,
    family: Family,
    leaves: Leaves,
    located: dict[str, Location],
    placement: Placement | None,
) -> Params:
    embedding = next(entry.name for entry in family.tensors if entry.leaves[0][1:] == ("embed", "embedding"))
    prefixes = [family.prefix, *_OTHER_PREFIXES]
    prefix = next((prefix for prefix in prefixes if prefix + embedding in located), family.prefix)
    entries = present(family.tensors, family.unembedding, leaves, prefix)
    for entry in entries:
        for place in places(entry, leaves):
            _find(located, folder, entry.name.format(*place), stored_shape(entry, leaves))
    shapes = traverse_util.unflatten_dict(leaves)
    where = {} if placement is None else traverse_util.flatten_dict(placement(config, shapes))
    params = {
        path: _place(entry, number, leaves, located, config.heads, where.get(path))
        for entry in entries
        for number, path in enumerate(entry.leaves)
    }
    return traverse_util.unflatten_dict(params)


def load_policy(
    folder: str | Path, dtype: str = "float32", param_dtype: str = "float32", placement: Placement | None = None
) -> tuple[ModelConfig, Params]:
    """A policy from a model folder.

    Args:
        folder: a folder as `transformers` writes it (`config.json` and `model.safetensors`, or several with an index),
            or a hub id.
        dtype: dtype of the computation.
        param_dtype: dtype in which parameters are kept, whatever the files have.
        placement: `placement(config, shapes)` gives the `jax.sharding.Sharding` of each leaf, as
            `parallel.sharding.on(mesh)` does; None: the default device.

    Returns:
        The configuration and the policy tree `{"trunk", "unembedding"}` (no `unembedding` where embeddings are tied).

    Raises:
        ValueError: a file or tensor is missing, damaged, or of another shape than `config.json` says.
    """
    folder = local_folder(folder)
    config, options = read_config(folder, dtype, param_dtype)
    family = FAMILIES[text_options(options)["model_type"]]
    return config, _load(folder, config, family, policy_leaves(config), locate_all(folder), placement)


def _load_scalar(
    folder: str | Path, dtype: str, param_dtype: str, placement: Placement | None, what: str
) -> tuple[ModelConfig, Params]:
    """A trunk with a head of one output, under any of the names that such heads have."""
    folder = local_folder(folder)
    config, options = read_config(folder, dtype, param_dtype)
    family = FAMILIES[text_options(options)["model_type"]]
    located = locate_all(folder)
    if (folder / HEAD_FILE).is_file():
        located |= {f"{HEAD_FILE}/{name}": location for name, location in locate(folder / HEAD_FILE).items()}
    names = ("score.", "classifier.", f"{HEAD_FILE}/")
    name = next((name for name in names if f"{name}weight" in located), None)
    if name is None:
        raise ValueError(
            f"{folder} is not a {what}: it has neither score.weight nor classifier.weight nor a file {HEAD_FILE}; "
            "give a folder that has a head, or load it as a policy."
        )
    kernel = view(_find(located, folder, f"{name}weight", (1, config.width)))[0]
    bias: Any = options.get(SCORE_BIAS, 0.0)
    if f"{name}bias" in located:
        bias = view(_find(located, folder, f"{name}bias", (1,)))[0]
    params = _load(folder, config, family, trunk_leaves(config), located, placement)
    head = {"kernel": np.array(kernel, config.param_dtype), "bias": np.array(bias, config.param_dtype)}
    where = None if placement is None else placement(config, {"head": head})["head"]
    return config, params | {"head": jax.device_put(head, where)}


def load_reward_model(
    folder: str | Path, dtype: str = "float32", param_dtype: str = "float32", placement: Placement | None = None
) -> tuple[ModelConfig, Params]:
    """A reward model from a folder of a `…ForSequenceClassification` with one label.

    Args:
        folder: a folder with `score.weight` [1, D] beside the trunk, or a hub id.
        dtype: dtype of the computation.
        param_dtype: dtype in which parameters are kept.
        placement: as for `load_policy`.

    Returns:
        The configuration and the tree `{"trunk", "head": {"kernel" [D], "bias" []}}`; the bias is 0 where the folder
        has none.

    Raises:
        ValueError: as for `load_policy`, or the folder has no head with one output.
    """
    return _load_scalar(folder, dtype, param_dtype, placement, "reward model")


def load_value_model(
    folder: str | Path, dtype: str = "float32", param_dtype: str = "float32", placement: Placement | None = None
) -> tuple[ModelConfig, Params]:
    """A value model from a folder that `save_value_model` wrote, or of any class with one output a token or sequence.

    The head is `score` or `classifier` of a `…ForTokenClassification` with one label, or `score` of a reward model (the
    usual start of a value model), or, for families without such a class, the file `value_head.safetensors` with
    `weight` [1, D] and `bias` [1] beside a folder of the trunk alone.

    Args:
        folder: the folder, or a hub id.
        dtype: dtype of the computation.
        param_dtype: dtype in which parameters are kept.
        placement: as for `load_policy`.

    Returns:
        The configuration and the tree `{"trunk", "head": {"kernel" [D], "bias" []}}`.

    Raises:
        ValueError: as for `load_policy`, or the folder has no head with one output.
    """
    return _load_scalar(folder, dtype, param_dtype, placement, "value model")
