"""Several processes on one job: their start, what they tell each other, and their end.

A merge needs no collectives: each process has its own layers, on its own devices, and only statistics, a few numbers a
linear, are told to the others. They go through the key-value store of JAX's coordinator, which works on every platform,
can be waited for with one eye on the other processes, and adds nothing up, so that no sum depends on their number.
"""

import itertools
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from absl import logging

from dppa_jax.runtime import signals

HEARTBEAT_SECONDS = 20  # a process that is silent for so long is taken for dead, and JAX ends the others
LOOK_SECONDS = 2  # between looks at whether another process has failed
START_SECONDS = 300  # for all processes to come
FAILURE = "dppa_jax/failure"

_rounds = itertools.count()


class ProcessFailedError(RuntimeError):
    """Another process of the job ended with an error; says which and why."""


class ProcessEndedError(ProcessFailedError):
    """Another process was ended from outside, so that the same command goes on from there."""


def start(coordinator: str, num_processes: int = 0, process_id: int = -1) -> None:
    """Join the other processes of the job, before JAX is first used.

    Args:
      coordinator: HOST:PORT of process 0, or "auto": as JAX finds it (Slurm, Open MPI, Kubernetes, TPU pods).
      num_processes, process_id: how many there are, and which this is; found by JAX with "auto".

    Raises:
      ValueError: an address or a number that cannot be meant; processes that do not come.
    """
    _check(coordinator, num_processes, process_id)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {} if coordinator == "auto" else {"coordinator_address": coordinator}
    if num_processes:
        given |= {"num_processes": num_processes, "process_id": process_id}
        given |= {"cluster_detection_method": "deactivate"}  # Slurm's would give this process one GPU of its host
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=START_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--coordinator={coordinator}: the processes did not find each other: {str(error).splitlines()[0]} Start "
            f"all of them, each with --coordinator=HOST:PORT of the first, --num_processes and its own --process_id."
        ) from error
    signals.end_on_signals()  # JAX has taken SIGTERM for itself, and only notes it
    logging.info("process %d of %d, %d devices here", index(), count(), jax.local_device_count())
    threading.Thread(target=_watch, name="watch processes", daemon=True).start()


def count() -> int:
    """Processes of the job."""
    return jax.process_count() if _client() else 1


def index() -> int:
    """Which of them this is."""
    return jax.process_index() if _client() else 0


def share(items: int, processes: int, process: int) -> range:
    """The consecutive items of a process; the first ones have one more where they cannot have as many.

    >>> [list(share(7, 3, process)) for process in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    each, more = divmod(items, processes)
    first = process * each + min(process, more)
    return range(first, first + each + (process < more))


def exchange(what: str, mine: Any) -> list[Any]:
    """What every process has of it, in their order; `mine` alone where there is one process.

    All processes must call this in the same order. Values are pickled: the processes are one program.

    Raises:
      ProcessFailedError: another process ended with an error.
    """
    client = _client()
    if client is None:
        return [mine]
    key = f"dppa_jax/{next(_rounds)}/{what}"
    client.key_value_set_bytes(f"{key}/{index()}", pickle.dumps(mine))
    return [pickle.loads(_wait(client, f"{key}/{process}")) for process in range(count())]


def of_first(what: str, find: Callable[[], Any]) -> Any:
    """What the first process finds, told to all; the others do not look."""
    return exchange(what, find() if index() == 0 else None)[0]


def barrier(what: str) -> None:
    """Go on when all processes have come here."""
    exchange(what, None)


def joined(what: str, array: np.ndarray, axis: int, owners: np.ndarray) -> np.ndarray:
    """Put together an array of which each process knows some places along an axis.

    Args:
      owners: the process that knows each place.
    """
    parts = exchange(what, array)
    places = [np.flatnonzero(owners == process) for process in range(len(parts))]
    whole = np.concatenate([part.take(own, axis) for part, own in zip(parts, places, strict=True)], axis)
    return whole.take(np.argsort(np.concatenate(places), kind="stable"), axis)


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """The first process does what is in the block before the others do: they find what it fetched or built."""
    if index():
        barrier(what)
    yield
    if not index():
        barrier(what)


def fail(reason: str, ended: bool = False) -> None:
    """Tell the other processes, which then end, that this one ends, and why: by an error, or `ended` from outside."""
    client = _client()
    if client is not None:
        kind = ProcessEndedError if ended else ProcessFailedError
        with suppress(Exception):  # another one was first, or the coordinator has gone
            client.key_value_set_bytes(FAILURE, pickle.dumps(kind(f"process {index()}: {reason}")))


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if coordinator != "auto" and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator={coordinator}: give HOST:PORT of the first process, or auto.")
    if not num_processes and process_id < 0:
        if coordinator != "auto":
            raise ValueError(f"--coordinator={coordinator} needs --num_processes and --process_id.")
        return
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--num_processes={num_processes} --process_id={process_id}: the processes are numbered from 0 on, "
            f"--process_id=0 to --process_id={max(num_processes - 1, 0)}."
        )


def _client():
    from jax._src import distributed  # there is no public way to the store; Orbax takes the same one

    return distributed.global_state.client


def _wait(client, key: str) -> bytes:
    while True:
        try:
            return client.blocking_key_value_get_bytes(key, LOOK_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                first = str(error).splitlines()[0]
                raise ProcessEndedError(f"the coordinator, process 0, has gone: {first}") from error
        signals.check()
        if failure := _failure(client):
            raise failure


def _failure(client) -> ProcessFailedError | None:
    """Of another process."""
    try:
        return pickle.loads(client.key_value_try_get_bytes(FAILURE))
    except jax.errors.JaxRuntimeError:
        return None


def _watch() -> None:
    """End this process's work at its next step when another one has failed."""
    pause = threading.Event()
    while (client := _client()) is not None:
        if failure := _failure(client):
            signals.stop(failure)
            return
        pause.wait(LOOK_SECONDS)
