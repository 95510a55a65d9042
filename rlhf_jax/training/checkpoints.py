"""A state on disk and back, by Orbax: any pytree of arrays, typed random keys and sharded arrays included.

A state may come back on other devices than it was saved from, and on another number of processes. Of a run of several
processes, all call these functions.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from rlhf_jax.parallel.meetings import on_first


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read back: an earlier one may still be whole."""


def save(path: Path | str, tree: Any, overwrite: bool = False) -> Path:
    """Writes a pytree of arrays into a folder, which appears only once it is complete; returns when it has.

    Save the whole state (parameters, optimiser, keys, counters, running averages): a run resumed from parameters alone
    differs from one that was never interrupted.

    Args:
        path: the folder to make.
        tree: a pytree of arrays and numbers.
        overwrite: whether a checkpoint that stands there may be replaced; it stays until the new one is complete.

    Returns:
        The folder.

    Raises:
        ValueError: the folder exists and `overwrite` is False.
    """
    import orbax.checkpoint as orbax

    path = Path(path).absolute()
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")

    def refuse() -> None:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: choose another folder for the checkpoint, or pass overwrite=True")

    def put_in_place() -> None:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)

    on_first(refuse, f"the checkpoint {path}")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(new, writable(tree), force=True)
    on_first(put_in_place, f"the checkpoint {path}")
    return path


def restore(path: Path | str, like: Any) -> Any:
    """Reads a pytree that `save` wrote. No process waits for another, and no device gets more than its own shards.

    Args:
        path: the folder.
        like: a pytree of the same structure, shapes and dtypes: arrays, or `jax.ShapeDtypeStruct` as from `shapes_of`
            or `jax.eval_shape`. Arrays come back with the shardings that stand in it, and on the first device where
            none does.

    Returns:
        The saved values in the structure of `like`.

    Raises:
        DamagedCheckpointError: it is absent, damaged or incomplete (a ValueError too).
        ValueError: it holds other leaves than `like`.
    """
    import orbax.checkpoint as orbax
    from etils.epath import Path as OrbaxPath

    path = Path(path).absolute()
    if not path.is_dir():
        raise DamagedCheckpointError(f"there is no checkpoint at {path}")
    like = jax.tree.map(_placed, writable(like))
    damaged = f"the checkpoint at {path} is damaged or incomplete: restore an earlier one"
    handler = orbax.StandardCheckpointHandler()
    try:
        stored = _described(handler.metadata(OrbaxPath(path)).tree)
    except Exception as error:
        raise DamagedCheckpointError(damaged) from error
    expected = _described(like)
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            there, here = stored.get(name, "absent"), expected.get(name, "absent")
            raise ValueError(f"the checkpoint at {path} is of another state: '{name}' is {there} there, {here} here")
    try:
        return handler.restore(OrbaxPath(path), args=orbax.args.StandardRestore(like))
    except Exception as error:
        raise DamagedCheckpointError(damaged) from error


def shapes_of(tree: Any) -> Any:
    """What `restore` needs to know of a tree of arrays: shapes, dtypes and shardings, without the values.

    With it the arrays themselves can be freed before others are read in their place.
    """

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(shape, tree)


def writable(tree: Any) -> Any:
    """The tree as Orbax takes it: numbers have become arrays."""
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), tree)


def _placed(leaf: Any) -> Any:
    """A shape with a sharding, where it has none."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))
    return leaf


def _described(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by its name; a typed key counts as the integers it is stored as."""
    described = {}
    for names, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        name = jax.tree_util.keystr(names, simple=True, separator=".")
        described[name] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return described
