"""What strangers write to the coordinator of a job: it runs nothing, ends nothing and is never taken for a value."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from jax._src.lib import _jax
from processes import free_port

from dppa_jax.runtime import processes, sealed
from dppa_jax.runtime.plain import pack
from dppa_jax.runtime.sealed import ForeignValueError, SealedStore, meet

SECRET = b"a secret of the job"


@pytest.fixture(scope="module")
def coordinator():
    """A client of a real coordinator."""
    address = f"127.0.0.1:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0)
    client.connect()
    yield client
    client.shutdown()
    service.shutdown()


@pytest.fixture
def client(coordinator):
    """The same without what earlier tests have written."""
    coordinator.key_value_delete("dppa_jax/")
    return coordinator


def met(client, *secrets: bytes) -> list[SealedStore | ForeignValueError]:
    """What each process gets that meets the others with these secrets."""
    fetch = partial(client.blocking_key_value_get_bytes, timeout_in_ms=10_000)

    def one(process: int) -> SealedStore | ForeignValueError:
        try:
            return meet(client, fetch, secrets[process], process, len(secrets))
        except ForeignValueError as error:
            return error

    with ThreadPoolExecutor(len(secrets)) as pool:
        return list(pool.map(one, range(len(secrets))))


@pytest.fixture
def second(client, monkeypatch) -> SealedStore:
    """The store as process 1 has it; this test is process 0 of two."""
    first, second = met(client, SECRET, SECRET)
    for name, value in {"_client": lambda: client, "index": lambda: 0, "count": lambda: 2, "_sealed": first}.items():
        monkeypatch.setattr(processes, name, value)
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.2)
    return second


def in_round(number: int, monkeypatch) -> None:
    """Makes the next exchange have this number."""
    monkeypatch.setattr(processes, "_rounds", iter(range(number, 99)))


def code(file) -> bytes:
    """A pickle that makes a file when it is read."""

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(file),)

    return pickle.dumps(Harm())
