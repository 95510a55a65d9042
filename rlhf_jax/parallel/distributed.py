"""Several processes as one run: how they find each other at the start, who writes and prints, and how they part.

A run on several hosts is the same program in several processes, each of which sees the devices of all. Process 0 is
the *first*: it writes the files and prints. For a run of one process everything here does nothing.

    initialise(Distributed(coordinator="10.0.0.1:8476", processes=2, process_id=0))   # before JAX is used

What processes tell one another afterwards is in `meetings`.
"""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax

# JAX has no public names for these: which cluster this is, the coordination service, and whether a backend is up.
from jax._src import clusters, distributed, xla_bridge

_connecting = threading.Event()  # JAX waits for the other processes, though this one may have given up


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Options of a run on several processes, each started by the same command.

    SLURM (under `srun`), TPU pods, Open MPI 4 and Kubernetes jobs (with the package `kubernetes`, and a service account
    that may read pods, jobs and services) say by themselves who takes part; elsewhere give the first three. A value
    that is given goes before what the cluster says; with all three the cluster is not asked.

    Where SLURM or Open MPI is asked, JAX gives each process the one GPU that has its number on the host: start one
    process a GPU. Else a process has all devices of its host.

    Attributes:
        coordinator: HOST:PORT, an address of process 0 that all processes reach, and a free port there.
        processes: how many processes take part; 1: this one alone, whatever the cluster says.
        process_id: which of them this one is, from 0.
        startup_seconds: how long processes wait for one another when they start.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    startup_seconds: int = 300


def initialise(options: Distributed | None = None) -> None:
    """Connects this process to the others of its run; call it before JAX is used.

    Nothing happens for a run of one process: no option given and no cluster around, or a cluster of one. Nothing
    happens either if the processes are connected already.

    Args:
        options: who takes part; None: as the cluster says.

    Raises:
        ValueError: options that are missing or contradict one another, or JAX was used before.
        TimeoutError: not all processes came in time.
    """
    options = options or Distributed()
    coordinator = options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    options = Distributed(coordinator, options.processes, options.process_id, options.startup_seconds)
    check_distributed(options)
    if options.processes == 1 or jax.distributed.is_initialized():
        return
    asked = None in _three(options)
    options = _completed(options) if asked else options
    if options.coordinator is None and options.processes is None:
        return
    names = ("--coordinator", "--processes", "--process-id")
    missing = [name for name, value in zip(names, _three(options), strict=True) if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given too: no cluster says who takes part in this run.")
    check_distributed(options)
    if options.processes == 1:
        return
    if xla_bridge.backends_are_initialized():
        raise ValueError("JAX was used before the processes were connected: call initialise before anything else.")
    _connect(options, asked)
    jax.devices()  # processes wait for one another here too: none may go on to a work of its own before


def check_distributed(options: Distributed) -> None:
    """Refuses options that cannot work.

    Raises:
        ValueError: an address without a port, a process that is not one of the processes, or no time to start.

    Example:
        >>> check_distributed(Distributed(processes=4, process_id=4))
        Traceback (most recent call last):
            ...
        ValueError: --process-id is 4, and 4 processes are numbered from 0 to 3.
    """
    if options.coordinator is not None:
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"--coordinator is {options.coordinator!r}: give HOST:PORT, such as 10.0.0.1:8476.")
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes is {options.processes}: give 1 or more.")
    if options.process_id is not None and options.process_id < 0:
        raise ValueError(f"--process-id is {options.process_id}: give 0 or more.")
    if None not in (options.process_id, options.processes) and options.process_id >= options.processes:
        raise ValueError(
            f"--process-id is {options.process_id}, and {options.processes} processes are numbered from 0 to "
            f"{options.processes - 1}."
        )
    if options.startup_seconds < 1:
        raise ValueError(f"--startup-seconds is {options.startup_seconds}: give 1 or more.")


def first_process() -> bool:
    """Whether this is process 0, which writes the files and prints; True for a run of one process."""
    return distributed.global_state.process_id == 0


def process_count() -> int:
    """How many processes take part in the run."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def leave(code: int, seconds: float = 10.0) -> NoReturn:
    """Ends this process without waiting for others that go on.

    If all processes come here within some seconds, because all had the same error, they part as usual. Else this one
    is gone at once, so that whatever started the processes sees its exit code and can end the others.

    Args:
        code: the exit code.
        seconds: how long to wait for the others.

    Raises:
        SystemExit: always, or the process is gone.
    """
    if process_count() > 1 and not _all_leave(seconds):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _all_leave(seconds: float) -> bool:
    if _connecting.is_set():
        return False
    try:
        distributed.global_state.client.wait_at_barrier("rlhf_jax/leave", int(seconds * 1000))
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextlib.contextmanager
def printing_first() -> Iterator[None]:
    """What is printed inside comes from process 0 only; errors and warnings come from all."""
    if first_process():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _three(options: Distributed) -> tuple[str | None, int | None, int | None]:
    return options.coordinator, options.processes, options.process_id


def _completed(options: Distributed) -> Distributed:
    """The options with what the cluster says in the place of None; as they are where there is no cluster."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            *_three(options), None, None, options.startup_seconds
        )
    except Exception as error:  # the libraries of clusters have errors of their own
        raise ValueError(
            f"the cluster does not say who takes part in this run ({error}): give --coordinator, --processes and "
            "--process-id."
        ) from error
    return Distributed(*found[:3], options.startup_seconds)


def _connect(options: Distributed, asked: bool) -> None:
    """`jax.distributed.initialize` with an error where JAX would abort the process when others do not come.

    Args:
        options: complete ones.
        asked: whether the cluster was asked; then it also says which devices are this process's.
    """
    (coordinator, processes, process_id), seconds = _three(options), options.startup_seconds
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process_id,
                cluster_detection_method=None if asked else "deactivate",
                initialization_timeout=seconds + 86_400,  # ours is the timeout that counts
            )
        except Exception as error:
            failures.append(error)

    _connecting.set()
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise ValueError(
            f"process {process_id} cannot connect at {coordinator} ({failures[0]}): see that the address is one of "
            "process 0's host, and that the port is free there."
        ) from failures[0]
    if not thread.is_alive():
        _connecting.clear()
        return
    if process_id == 0:
        found = f"fewer than {processes} processes came to process 0 at {coordinator} within {seconds} s"
        remedy = "see that all are started, each with its own --process-id, and that they reach this address and port"
    elif _reachable(coordinator):
        found = f"process 0 answers at {coordinator}, but not all {processes} processes came within {seconds} s"
        remedy = "see that all are started, each with its own --process-id"
    else:
        found = f"process {process_id} of {processes} did not reach process 0 at {coordinator} within {seconds} s"
        remedy = "see that process 0 is started, that the address is right, and that no firewall closes the port"
    raise TimeoutError(f"{found}: {remedy} (or give more --startup-seconds).")


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
            return True
    except OSError:
        return False
