"""Folders of reward models of every kind: an ordinary model that `transformers` loads, and what is uncertain about it.

    OUT/config.json, model.safetensors, tokenizer files    a `…ForSequenceClassification` with one label: the mean
    OUT/uncertainty.json                                   kind, options, and hashes of what the uncertainty belongs to
    OUT/uncertainty.safetensors                            all parameters but the trunk of the model, by their paths

    save_reward_folder("OUT", config, PosteriorParams(...), tokenizer, about={"regularisation": 1.0})
    kind, config, scorer, params = load_reward_folder("OUT")     # jax.jit(scorer)(params, tokens, mask) -> Score

Parameters come back bitwise in the dtypes that they had, but the trunks, which come in `param_dtype`. A folder without
`uncertainty.json` is a plain Bradley-Terry model.

A Gram matrix means nothing beside other weights or another chat template than those its features came from. So the
hashes of weights, template and tokenizer are written down and compared whenever the folder is loaded: one more reading
of the weights, at about 1 GB a second and core. The dtype of the computation is written down too; another one, whose
features differ by its rounding, gives a warning.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import Placement, load_config, load_reward_model, load_tokenizer, save_reward_model
from rlhf_jax.models.huggingface.folders import local_folder, read_json
from rlhf_jax.models.huggingface.replace import replaced
from rlhf_jax.models.huggingface.shards import on_host, write_file
from rlhf_jax.models.huggingface.tensors import locate, view
from rlhf_jax.training.folder_identity import Identity, check_identity, folder_identity, hash_tensors
from rlhf_jax.training.json_files import plain, write_json
from rlhf_jax.training.reward_kinds import KINDS, Kind, kind_of
from rlhf_jax.types import Params

JSON_FILE, TENSOR_FILE = "uncertainty.json", "uncertainty.safetensors"
Flat = dict[tuple[str, ...], Any]


class RewardFolder(NamedTuple):
    """A reward model of any kind.

    Attributes:
        kind: a name of `KINDS`.
        config: shape of its trunk.
        scorer: `scorer(params, tokens, mask) -> Score`.
        params: the kind's parameters.
    """

    kind: str
    config: ModelConfig
    scorer: Callable[..., Any]
    params: Params


class Description(NamedTuple):
    """What `uncertainty.json` says.

    Attributes:
        kind: a name of `KINDS`.
        options: keyword arguments of the kind's scorer.
        made_with: what the uncertainty belongs to.
        dtype: dtype of the computation that it was made in.
        tensors: hash of `uncertainty.safetensors`.
    """

    kind: str
    options: dict[str, Any]
    made_with: Identity
    dtype: str
    tensors: str


def save_reward_folder(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    source: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    made_with: Identity | None = None,
) -> Path:
    """Writes a folder of a reward model of any kind, whole or not at all.

    What `transformers` loads from it is one linear head on one trunk: of kinds with one trunk the mean (of ensembles
    with a lead, the lead), its bias less the offset; of an ensemble of trunks the lead, or else the first member; of a
    LoRA ensemble the base with the members' average head; of gated attributes their plain average. It reads the state
    after the last norm, which is another model where the option `features` is "pre_norm".

    All processes of a run call this function; the first one writes. What is not the trunk of the ordinary model is
    gathered in the memory of the host, M models for an ensemble of M.

    Args:
        folder: where to; a model folder that is there is replaced at the end, in one step.
        config: shape of the trunk.
        params: the parameters; their class says which kind it is.
        tokenizer: as for `huggingface.save_policy`.
        source: as for `huggingface.save_policy`.
        options: keyword arguments of the kind's scorer: `features`, `lead`, `adapter`, `softmax` …
        about: facts for the reader: names of attributes, lambda of the geometry, how many responses it was made from …
        made_with: `folder_identity` of the model whose features made the geometry, where that model was loaded from a
            folder: it must be the one that is saved, in the same dtype. None: the geometry was made with `params`.

    Returns:
        The folder.

    Raises:
        ValueError: parameters of no known kind, an option that the kind's scorer does not have, or an uncertainty that
            was made with another model; and as for `huggingface.save_reward_model`.
        OSError: the disk is full; what was in `folder` is unchanged.
    """
    kind, options = kind_of(params), dict(options or {})
    _scorer(kind, config, options)
    known, lead = KINDS[kind], options.get("lead")
    trunk, rest = _apart(_flat(params), known)
    if known.stacked:
        trunk = {path: on_host(leaf) for path, leaf in trunk.items()}
        rest |= {(*known.trunk, *path): np.delete(leaf, lead or 0, axis=0) for path, leaf in trunk.items()}
        trunk = {path: jnp.asarray(leaf[lead or 0]) for path, leaf in trunk.items()}
    model = {"trunk": traverse_util.unflatten_dict(trunk), "head": known.head(params, lead)}
    tensors = {"/".join(path): on_host(leaf) for path, leaf in rest.items() if leaf.size}
    if jax.process_index() != 0:
        return save_reward_model(folder, config, model, tokenizer, source)  # takes part in gathering the trunk
    folder = Path(folder).resolve()
    with replaced(folder) as new:
        save_reward_model(new, config, model, tokenizer, source)
        write_file(new / TENSOR_FILE, tensors)
        found = folder_identity(new)
        if made_with is not None:
            check_identity(folder, made_with, found)
        description = {
            "kind": kind,
            "options": options,
            "about": dict(about or {}),
            "pooling": "last_token",
            "dtype": config.dtype,
            "made_with": found._asdict(),
            "tensors": hash_tensors(locate(new / TENSOR_FILE)),
        }
        write_json(new / JSON_FILE, plain(description, JSON_FILE))
    return folder


def load_reward_folder(
    folder: str | Path, dtype: str = "float32", param_dtype: str = "float32", placement: Placement | None = None
) -> RewardFolder:
    """A reward model of any kind from its folder, with its scorer.

    Args:
        folder: from `save_reward_folder`, or any folder (or hub id) that `load_reward_model` takes.
        dtype: dtype of the computation.
        param_dtype: dtype in which trunks are kept; heads, adapters and geometries keep theirs.
        placement: as for `huggingface.load_policy`.

    Returns:
        The kind, the shape, the scorer and its parameters.

    Raises:
        ValueError: an unknown kind, a damaged file, an uncertainty that was made with other weights, another template
            or tokenizer than the model of the folder, or a folder without a head (see `load_reward_model`).

    Warns:
        UserWarning: the uncertainty was made in another dtype of the computation.
    """
    path = local_folder(folder)
    found = _description(path)
    if found is None:
        config, model = load_reward_model(path, dtype, param_dtype, placement)
        return RewardFolder("bradley_terry", config, scorer_in(path, config), model)
    scorer = _scorer(found.kind, load_config(path, dtype, param_dtype), found.options)
    known, lead = KINDS[found.kind], found.options.get("lead") or 0
    located = locate(path / TENSOR_FILE)
    if hash_tensors(located) != found.tensors:
        raise ValueError(f"{path / TENSOR_FILE} is not the file that {JSON_FILE} describes; copy both again.")
    check_identity(path, found.made_with, folder_identity(path))
    if found.dtype != dtype:
        warnings.warn(
            f"the uncertainty of {path} was made in {found.dtype} and is used in {dtype}, where features differ by "
            f"rounding: give --dtype {found.dtype}, or make it again in {dtype}.",
            stacklevel=2,
        )
    config, model = load_reward_model(path, dtype, param_dtype, placement)
    beside, rest = _apart({tuple(name.split("/")): np.array(view(where)) for name, where in located.items()}, known)
    trunk = traverse_util.flatten_dict(model["trunk"])
    if known.stacked:
        for place, leaf in trunk.items():
            leaf = on_host(leaf)
            others = beside[place].astype(leaf.dtype) if place in beside else leaf[None, ...][:0]
            rest[(*known.trunk, *place)] = np.insert(others, lead, leaf, axis=0)
    tree = traverse_util.unflatten_dict(rest)
    flat = traverse_util.flatten_dict(jax.device_put(tree, None if placement is None else placement(config, tree)))
    if not known.stacked:
        flat |= {(*known.trunk, *place): leaf for place, leaf in trunk.items()}
    return RewardFolder(found.kind, config, scorer, _record(known, flat))


def kind_in(folder: str | Path) -> str:
    """The kind of a folder or hub id, a name of `KINDS`; reads no parameters.

    Raises:
        ValueError: there is no such folder.
    """
    found = _description(local_folder(folder, weights=False))
    return "bradley_terry" if found is None else found.kind


def options_in(folder: str | Path) -> dict[str, Any]:
    """The options of a folder's scorer, none of a plain one; reads no parameters, see `kind_in`."""
    found = _description(local_folder(folder, weights=False))
    return {} if found is None else found.options


def scorer_in(folder: str | Path, config: ModelConfig) -> Callable[..., Any]:
    """The scorer of a folder's kind, with its options, for a trunk that computes as `config` says."""
    return _scorer(kind_in(folder), config, options_in(folder))


def check_same_tokenizer(folders: Sequence[str | Path]) -> None:
    """Refuses reward models that do not read the same tokens: one tokenizer writes for all members of an ensemble.

    Tokens that only later folders have (a padding token of their own, say) are fine.

    Args:
        folders: the members' folders; reads no parameters.

    Raises:
        ValueError: a token of the first folder's tokenizer has another id, or none, in another folder.
    """
    first = load_tokenizer(folders[0]) if folders else None
    for folder in folders[1:]:
        other = other_tokens(first, folder, "here", "there")
        if other is not None:
            raise ValueError(
                f"{folder} has another tokenizer than {folders[0]} ({other}): an ensemble needs members with the same "
                "one."
            )


def other_tokens(tokenizer: Any, folder: str | Path, here: str, there: str) -> str | None:
    """How the tokens of a tokenizer have other ids, or none, in a folder's one; None: it knows all of them alike.

    Args:
        tokenizer: the tokenizer whose tokens are to be read.
        folder: where another one is, which may have more tokens.
        here: what to call the first in the sentence.
        there: what to call the other.
    """
    known = load_tokenizer(folder).get_vocab()
    other = [(id, token) for token, id in tokenizer.get_vocab().items() if known.get(token) != id]
    if not other:
        return None
    id, token = min(other)
    return f"{len(other)} tokens differ: {token!r} is {id} {here} and {known.get(token, 'no id')} {there}"


def _scorer(kind: str, config: ModelConfig, options: Mapping[str, Any]) -> Callable[..., Any]:
    scorer = KINDS[kind].scorer
    known = [name for name in inspect.signature(scorer).parameters if name != "config"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"a reward model of kind {kind} has no option {unknown[0]!r}; it has {', '.join(known)}.")
    if "adapter" in known and options.get("adapter") is None:
        raise ValueError(f"a reward model of kind {kind} needs the option adapter, the AdapterConfig of its members.")
    return scorer(config, **options)


def _description(folder: Path) -> Description | None:
    """What a folder on this machine says of its uncertainty; None of a plain one."""
    path = folder / JSON_FILE
    if not path.is_file():
        return None
    found = read_json(path)
    if found.get("kind") not in KINDS:
        raise ValueError(
            f"{path} names the kind {found.get('kind')!r}, which is unknown: known are {', '.join(KINDS)}."
        )
    try:
        options = dict(found["options"])
        if "adapter" in options:
            adapter = {name: _tuples(value) for name, value in options["adapter"].items()}
            options["adapter"] = AdapterConfig(**adapter)
        made_with = Identity(**found["made_with"])
        return Description(found["kind"], options, made_with, found["dtype"], found["tensors"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is incomplete or of another version ({error}); save the folder again.") from None


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _flat(params: Params) -> Flat:
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _apart(flat: Flat, kind: Kind) -> tuple[Flat, Flat]:
    """The leaves of the trunk, by their paths in it, and the other ones."""
    depth = len(kind.trunk)
    trunk = {path[depth:]: leaf for path, leaf in flat.items() if path[:depth] == kind.trunk}
    return trunk, {path: leaf for path, leaf in flat.items() if path[:depth] != kind.trunk}


def _record(kind: Kind, flat: Flat) -> Params:
    fields = traverse_util.unflatten_dict(flat)
    for name, record in kind.records.items():
        one = jax.tree.map(lambda leaf: leaf[0], fields[name]) if kind.stacked else fields[name]
        leaves = traverse_util.flatten_dict(fields[name])
        fields[name] = jax.tree_util.tree_map_with_path(lambda path, _, of=leaves: of[_names(path)], record(**one))
    return kind.record(**fields)
