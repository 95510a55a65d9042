"""What the features of a model depend on, as hashes: its weights, its chat template and its tokenizer.

An uncertainty that was made from features means nothing beside another model; `reward_folders` writes these hashes down
and compares them.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models.huggingface import load_tokenizer
from rlhf_jax.models.huggingface.folders import local_folder, read_json
from rlhf_jax.models.huggingface.tensors import Location, locate_all, view

# What of tokenizer.json decides which tokens a text becomes; the rest changes with what was encoded last.
_TOKENIZATION = ("added_tokens", "normalizer", "pre_tokenizer", "model")
_CHUNK = 1 << 24


class Identity(NamedTuple):
    """What features depend on, as hexadecimal hashes.

    Attributes:
        weights: of all tensors of the model.
        template: of the chat template; None where the folder has no tokenizer.
        tokenizer: of the tokenizer; None likewise.
    """

    weights: str
    template: str | None
    tokenizer: str | None


def folder_identity(folder: str | Path) -> Identity:
    """Hashes of the weights, the chat template and the tokenizer of a model folder.

    The hash of the weights is that of the raw bytes, dtype and shape of every tensor of the model, by sorted name
    (BLAKE2b): it does not depend on how tensors are spread over files. All weights are read once, at about 1 GB a
    second and core, tensors in parallel.

    Args:
        folder: the folder, or a hub id.

    Raises:
        ValueError: its weights are missing, damaged or truncated.
    """
    path = local_folder(folder)
    weights = hash_tensors(locate_all(path))
    if not (path / "tokenizer.json").is_file():
        return Identity(weights, None, None)
    template = load_tokenizer(path).chat_template
    template = {"default": template} if isinstance(template, str) else template
    state = read_json(path / "tokenizer.json")
    return Identity(weights, _hash_json(template), _hash_json({name: state.get(name) for name in _TOKENIZATION}))


def check_identity(folder: Path, made_with: Identity, found: Identity) -> None:
    """Refuses an uncertainty beside another model than it was made with.

    Args:
        folder: the folder, for the sentence.
        made_with: of the model whose features the uncertainty was made from.
        found: of the model in the folder.

    Raises:
        ValueError: the weights, the chat template or the tokenizer differ; the sentence has both hashes.
    """
    names = {"weights": "weights", "template": "chat template", "tokenizer": "tokenizer"}
    for field, name in names.items():
        then, now = getattr(made_with, field), getattr(found, field)
        if then != now:
            raise ValueError(
                f"the uncertainty of {folder} was made with the {name} {then}, and its model has the {name} {now}: "
                f"make the uncertainty again with this model, or put back the {name} that it was made with."
            )


def hash_tensors(located: Mapping[str, Location]) -> str:
    """The hash of tensors on disk: of names, dtypes, shapes and raw bytes, in the order of the names."""
    names = sorted(located)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        digests = list(pool.map(_hash_tensor, (located[name] for name in names)))
    return _hash_json(
        [(name, located[name].dtype, located[name].shape, digest) for name, digest in zip(names, digests, strict=True)]
    )


def _hash_tensor(location: Location) -> str:
    digest, data = hashlib.blake2b(digest_size=16), view(location).reshape(-1).view(np.uint8)
    for start in range(0, data.size, _CHUNK):
        digest.update(data[start : start + _CHUNK])
    return digest.hexdigest()


def _hash_json(value: Mapping[str, Any] | Iterable[Any] | None) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
