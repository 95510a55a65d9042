"""What the processes of a run tell one another: values they agree on, errors that concern all, arrays in whole.

    path = on_first(lambda: make_folder(), "the run's folder")       # made once, known to all
    scores = gathered(scores)                                        # numpy on every process

Numbers and texts go through the coordination service that `jax.distributed` runs beside process 0, arrays through the
network of the devices. All processes must call these functions in the same order. A process that dies is noticed by
JAX within 100 seconds, and the others are ended; one that lives and does not come is named here. For a run of one
process every function gives what it was given.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

# JAX has no public name for its coordination service.
from jax._src import distributed
from jax.experimental import multihost_utils

from rlhf_jax.parallel.distributed import first_process, process_count

PATIENCE_SECONDS = 7200.0
"""How long processes wait for one that is alive: the first may have a large model to write."""

LARGEST_PIECE_BYTES = 2**30
"""What a device holds beside its own part while `gathered` puts a large array together."""

_meetings = itertools.count()  # each has a name of its own in the coordination service
_piece = partial(jax.jit, static_argnums=(2, 3))(jax.lax.dynamic_slice_in_dim)


def exchanged(value: Any, name: str, seconds: float = PATIENCE_SECONDS) -> list[Any]:
    """Every process's value, on every process; they wait for one another.

    Args:
        value: numbers, strings, lists and mappings that JSON can hold.
        name: what the processes meet for; in the message when one does not come.
        seconds: how long to wait for the last of them.

    Returns:
        The values by process number.

    Raises:
        TimeoutError: a process did not come; the sentence says which one.
        RuntimeError: the processes are at different places of the program.

    Example:
        >>> exchanged({"rows": 3}, "how many rows each process has")
        [{'rows': 3}]
    """
    count = process_count()
    if count == 1:
        return [value]
    number, client = next(_meetings), distributed.global_state.client
    place = f"rlhf_jax/{number}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps({"name": name, "value": value}))
    try:
        client.wait_at_barrier(place, max(1, int(seconds * 1000)))
    except jax.errors.JaxRuntimeError as error:
        absent = sorted(set(range(count)) - set(_posted(place)))
        if not absent:
            raise
        who = f"process {absent[0]}" if len(absent) == 1 else f"processes {', '.join(map(str, absent))}"
        raise TimeoutError(
            f"{who} of {count} (numbered from 0) did not come to the meeting of all processes for {name} within "
            f"{seconds:g} s: look at the output there, for an error or for work that takes longer."
        ) from error
    posted = _posted(place)
    if number and first_process():  # nobody can still be reading the values of the meeting before
        client.key_value_delete(f"rlhf_jax/{number - 1}")
    other = {record["name"] for record in posted.values()} - {name}
    if other:
        raise RuntimeError(f"processes are at different places of the program: one at {name}, one at {other.pop()}.")
    return [posted[process]["value"] for process in range(count)]


def barrier(name: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Waits until all processes are here; see `exchanged` for what is raised when one does not come."""
    exchanged(None, name, seconds)


def together(work: Callable[[], Any], name: str) -> list[Any]:
    """Does some work on every process; if it fails on one, it fails on all, so that none waits for the others in vain.

    Args:
        work: gives a value that JSON can hold.
        name: what is done, in a few words.

    Returns:
        The values by process number.

    Raises:
        ValueError: the work failed on another process; a ValueError or OSError there has the same sentence here.
    """
    if process_count() == 1:
        return [work()]
    outcome, failure = {}, None
    try:
        outcome["value"] = work()
    except Exception as error:
        failure = error
        for_users = isinstance(error, ValueError | OSError)
        outcome["error"] = str(error) if for_users else f"{name} failed with {type(error).__name__}: {error}"
    outcomes = exchanged(outcome, name)
    if failure is not None:
        raise failure
    for process, other in enumerate(outcomes):
        if "error" in other:
            raise ValueError(other["error"] or f"{name} failed on process {process}: look at the output there.")
    return [other["value"] for other in outcomes]


def on_first(work: Callable[[], Any], name: str) -> Any:
    """Does some work on process 0 alone while the others wait; its value and its errors reach all of them.

    Args:
        work: gives a value that JSON can hold.
        name: what is done, in a few words.

    Returns:
        The value of process 0. Of a run of one process it is the value itself, else what JSON makes of it.

    Raises:
        ValueError: as `together`.

    Example:
        >>> on_first(lambda: 2 + 2, "the sum")
        4
    """
    return together(lambda: work() if first_process() else None, name)[0]


def over_processes(function: Callable[..., Sequence[float | None]]) -> Callable[..., Sequence[float | None]]:
    """A function of rows, such as a Python reward, that every process calls for its share of them.

    Args:
        function: takes lists with one item a row, by position or keyword, and gives one number (or None) a row.

    Returns:
        A function of the same form. Called with the same rows on all processes, it gives the numbers of all rows.
        What it raises on one process is raised on all, see `together`.

    Example:
        >>> over_processes(lambda texts: [float(len(text)) for text in texts])(["a", "bcd"])
        [1.0, 3.0]
    """
    name = getattr(function, "__name__", repr(function))

    @functools.wraps(function)
    def spread(*columns: Sequence[Any], **named: Sequence[Any]) -> Any:
        count, here = process_count(), jax.process_index()
        if count == 1:
            return function(*columns, **named)
        rows = {len(column) for column in (*columns, *named.values())}
        if len(rows) != 1:
            raise ValueError(f"{name} is called with lists of {sorted(rows)} rows: give lists of one length.")
        total = rows.pop()

        def share() -> list[float | None]:
            expected = len(range(here, total, count))
            if not expected:
                return []
            mine = [column[here::count] for column in columns]
            found = function(*mine, **{name: column[here::count] for name, column in named.items()})
            found = found.tolist() if hasattr(found, "tolist") else list(found)
            if len(found) != expected:
                raise ValueError(f"{name} returned {len(found)} numbers for {expected} rows: return one for each.")
            return [None if number is None else float(number) for number in found]

        shares = together(share, name)
        return [shares[row % count][row // count] for row in range(total)]

    return spread


def gathered(tree: Any, everywhere: bool = True) -> Any:
    """Arrays whose parts lie on several processes, as whole numpy arrays; all processes call it.

    One array at a time is put together, and a large one in pieces of `LARGEST_PIECE_BYTES`, which is then all that a
    device holds in addition. An array that is cut along every axis is put together in one piece.

    Args:
        tree: a pytree of arrays and numbers.
        everywhere: whether every process gets the arrays; else process 0 alone, and the others a tree of None.

    Returns:
        The tree with numpy arrays.

    Example:
        >>> gathered({"scores": jax.numpy.arange(3)})
        {'scores': array([0, 1, 2], dtype=int32)}
    """
    wanted = everywhere or first_process()
    return jax.tree.map(lambda leaf: _whole(leaf, wanted), tree)


def _posted(place: str) -> dict[int, dict[str, Any]]:
    """What processes have brought to a meeting, by process number."""
    found = distributed.global_state.client.key_value_dir_get(place)
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}


def _whole(leaf: Any, wanted: bool) -> Any:
    """An array as numpy, put together from all processes; None where it is not wanted."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return jax.device_get(leaf) if wanted else None
    axis, rows = _piece_of(leaf)
    if rows == leaf.shape[axis]:
        found = multihost_utils.process_allgather(leaf, tiled=True)
        return found if wanted else None
    whole = np.empty(leaf.shape, leaf.dtype) if wanted else None
    for start in range(0, leaf.shape[axis], rows):
        start = min(start, leaf.shape[axis] - rows)  # every piece has the same shape, and so the same program
        found = multihost_utils.process_allgather(_piece(leaf, start, rows, axis), tiled=True)
        if wanted:
            whole[(slice(None),) * axis + (slice(start, start + rows),)] = found
    return whole


def _piece_of(leaf: jax.Array) -> tuple[int, int]:
    """The axis along which an array is cut, one that no device holds a part of only, and the rows of a piece."""
    parts = leaf.sharding.shard_shape(leaf.shape)
    axis = max(range(leaf.ndim), key=lambda axis: (parts[axis] == leaf.shape[axis], leaf.shape[axis]))
    if parts[axis] < leaf.shape[axis]:
        return axis, leaf.shape[axis]
    return axis, min(leaf.shape[axis], max(1, LARGEST_PIECE_BYTES * leaf.shape[axis] // leaf.nbytes))
