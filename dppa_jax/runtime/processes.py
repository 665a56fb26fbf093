"""Several processes on one job: how they start, tell each other values, and end together.

A merge needs no collective operations. Each process has its own layers, on its own devices, and tells the others only
statistics: a few numbers for each linear. They go through the key-value store of JAX's coordinator. The store works on
every platform. A process that waits for a value can look at the same time whether another process has failed. And the
store adds nothing up, so no sum depends on the number of processes.

Values travel as plain bytes (plain.py), with a code of the job in each (sealed.py). Nothing is unpickled: see "What is
trusted" in runtime/README.md.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Optional

import jax
import msgspec
import numpy as np
from absl import logging

from dppa_jax.runtime import signals
from dppa_jax.runtime.coordinator import is_local, meeting_place, split
from dppa_jax.runtime.plain import pack, unpack
from dppa_jax.runtime.reading import printable
from dppa_jax.runtime.sealed import SECRET, SealedStore, meet

HEARTBEAT_SECONDS = 20  # a process that is silent for this long is taken for dead, and JAX ends the others
LOOK_SECONDS = 2  # between two looks at whether another process has failed
START_SECONDS = 300  # until all processes must have joined
FAILURE = "failure"

_rounds = itertools.count()
_sealed: SealedStore | None = None  # once the processes have met


class ProcessFailedError(RuntimeError):
    """Another process of the job ended with an error; the message says which process and why."""


class ProcessEndedError(ProcessFailedError):
    """Another process was ended from outside, by a signal; the same command goes on where the run was."""


class _Failure(msgspec.Struct):
    """What a process tells when it ends before its work is done."""

    reason: str
    ended: bool  # from outside, by a signal


def start(coordinator: str, num_processes: int = 0, process_id: int = -1) -> None:
    """Join the other processes of the job, before JAX is first used.

    Args:
      coordinator: HOST:PORT of process 0, which listens there; or "auto" where JAX finds it by itself (Slurm, Open MPI,
        Kubernetes, TPU pods).
      num_processes, process_id: how many processes there are, and which one this is; with "auto", JAX finds both.

    Raises:
      ValueError: the address or a number is invalid, the port is in use, not all processes have joined within
        START_SECONDS, or one has another $DPPA_JAX_SECRET.
    """
    _check(coordinator, num_processes, process_id)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_share_binary_between_hosts", False)  # no machine code comes from the coordinator
    place = meeting_place(coordinator, num_processes, process_id, START_SECONDS)
    try:
        jax.distributed.initialize(
            **place, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=START_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--coordinator={coordinator}: the processes did not find each other: {str(error).splitlines()[0]} Start "
            f"all of them, each with --coordinator=HOST:PORT of process 0, --num_processes and its own --process_id."
        ) from error
    signals.end_on_signals()  # JAX has taken SIGTERM for itself, and only notes it
    if index() == 0 and not os.environ.get(SECRET) and not is_local(split(place["coordinator_address"])[0]):
        logging.warning(
            "$%s is not set: whoever reaches the port of --coordinator can feed false values into this job. Set it to "
            "the same random text in all processes.", SECRET,
        )  # fmt: skip
    _store()
    logging.info("process %d of %d, %d devices here", index(), count(), jax.local_device_count())
    threading.Thread(target=_watch, name="watch processes", daemon=True).start()


def count() -> int:
    """Return the number of processes of the job; 1 without a coordinator."""
    return jax.process_count() if _client() else 1


def index() -> int:
    """Return this process's number, from 0 on; 0 without a coordinator."""
    return jax.process_index() if _client() else 0


def share(items: int, processes: int, process: int) -> range:
    """Return the items of one process when `items` are divided into consecutive shares.

    Where they do not divide evenly, the first processes have one item more.

    >>> [list(share(7, 3, process)) for process in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    each, more = divmod(items, processes)
    first = process * each + min(process, more)
    return range(first, first + each + (process < more))


def exchange(what: str, mine: Any, shape: Any = Any) -> list[Any]:
    """Tell the others a value, and return the values of all processes in their order.

    All processes must call this in the same order. Where there is one process, its value is returned as it is.

    Args:
      what: a name for the value, the same in every process.
      mine: this process's value, of what `plain.pack` takes.
      shape: the type that each value must have. Without it, tuples and dataclasses of several processes arrive as lists
        and dicts.

    Raises:
      ProcessFailedError: another process ended with an error.
      ValueError: a value was not told by a process of this job, or has another shape.
    """
    store = _store()
    if store is None:
        return [mine]
    key = f"{next(_rounds)}/{printable(what)}"
    with _coordinator():
        store.put(f"{key}/{index()}", pack(mine))
    return [_told(store, f"{key}/{process}", shape) for process in range(count())]


def of_first(what: str, find: Callable[[], Any], shape: Any = Any) -> Any:
    """Call `find` in process 0 alone, and return its result in every process; for `shape` see `exchange`."""
    return exchange(what, find() if index() == 0 else None, Optional[shape])[0]  # noqa: UP045 - the shape may be Any


def barrier(what: str) -> None:
    """Wait until all processes have come here."""
    exchange(what, None)


def joined(what: str, array: np.ndarray, axis: int, owners: np.ndarray) -> np.ndarray:
    """Join an array of which each process has computed some places along an axis.

    Args:
      what: a name for the array, the same in every process.
      array: of the whole shape; this process has filled the places that it owns.
      axis: along which the places lie.
      owners: the process that has computed each place.
    """
    parts = exchange(what, array, np.ndarray)
    places = [np.flatnonzero(owners == process) for process in range(len(parts))]
    whole = np.concatenate([part.take(own, axis) for part, own in zip(parts, places, strict=True)], axis)
    return whole.take(np.argsort(np.concatenate(places), kind="stable"), axis)


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """Let process 0 run the block first; the others run it afterwards and find what process 0 fetched or built."""
    if index():
        barrier(what)
    yield
    if not index():
        barrier(what)


def fail(reason: str, ended: bool = False) -> None:
    """Tell the other processes that this one ends, and why; they end, too.

    Args:
      reason: the message of the error.
      ended: this process was ended from outside, by a signal, and not by an error.
    """
    with suppress(Exception):  # the coordinator has gone
        if _sealed is not None and _failure() is None:  # else another process was first
            _sealed.put(FAILURE, pack(_Failure(printable(f"process {index()}: {reason}"), ended)), replace=True)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    """Refuse flags that cannot be meant."""
    if coordinator != "auto":
        split(coordinator)
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
    """Return JAX's client of the key-value store; None where there is one process."""
    from jax._src import distributed  # there is no public way to the store; Orbax takes the same one

    return distributed.global_state.client


def _store() -> SealedStore | None:
    """Return the store of the job, after the processes have met; None where there is one process."""
    global _sealed
    if _sealed is None and (client := _client()) is not None:
        secret = os.environb.pop(SECRET.encode(), b"")  # this process's children need not know it
        with _coordinator():
            _sealed = meet(client, partial(_wait, client), secret.strip(), index(), count())
    return _sealed


def _told(store: SealedStore, name: str, shape: Any) -> Any:
    """Wait for a value that a process tells."""
    content = store.get(name, partial(_wait, _client()))
    try:
        return unpack(content, shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. Start all processes from the same version of dppa_jax.") from None


@contextmanager
def _coordinator() -> Iterator[None]:
    """Turn an error of JAX's client in the block into one that says that the coordinator has gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise ProcessEndedError(f"the coordinator, process 0, has gone: {first}") from error


def _wait(client, key: str) -> bytes:
    """Wait for the value of a key. Raise the failure of another process, or what a signal asked for, if it comes."""
    while True:
        with _coordinator():
            try:
                return client.blocking_key_value_get_bytes(key, LOOK_SECONDS * 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        signals.check()
        if failure := _failure():
            raise failure


def _failure() -> ProcessFailedError | None:
    """Return the failure that another process has told of; None when there is none.

    What another program has written in its place is ignored.
    """
    if _sealed is None or (client := _client()) is None:
        return None
    try:
        failure = unpack(_sealed.get(FAILURE, client.key_value_try_get_bytes), _Failure)
    except jax.errors.JaxRuntimeError:
        return None  # nothing was told
    except ValueError as error:
        logging.log_first_n(logging.WARNING, "ignored, as no process of this job has written it: %s", 1, error)
        return None
    return (ProcessEndedError if failure.ended else ProcessFailedError)(failure.reason)


def _watch() -> None:
    """End this process at its next step when another process has failed. Runs in a thread of its own."""
    pause = threading.Event()
    while _client() is not None:
        if failure := _failure():
            signals.stop(failure)
            return
        pause.wait(LOOK_SECONDS)
