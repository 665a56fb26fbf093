"""What strangers write to the coordinator of a job: it runs nothing, ends nothing and is never taken for a value."""

import os
import pickle
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


def test_values_of_any_size_arrive_and_nothing_else_in_their_place(client, second, monkeypatch):
    in_round(0, monkeypatch)
    large = np.random.default_rng(0).bytes(2 * sealed.PIECE + 5)
    second.put("0/cost/1", pack(large))
    second.put("1/caf\\udce9/1", pack((np.float32(2), np.arange(3))))
    assert processes.exchange("cost", b"", bytes) == [b"", large]
    mine, other = processes.exchange("caf\udce9", (1.5, np.zeros(0)), tuple[float, np.ndarray])
    assert (mine[0], other[0], other[1].tolist()) == (1.5, 2.0, [0, 1, 2])
    monkeypatch.setattr(sealed, "MOST_PIECES", 2)
    with pytest.raises(ValueError, match=r"bytes, and processes tell each other at most 8000000 at a time"):
        second.put("2/cost/1", large)


def test_value_of_a_stranger_is_refused_and_no_code_of_it_runs(client, second, monkeypatch, tmp_path):
    in_round(0, monkeypatch)
    second.put("1/cost/1", pack(7))
    [(key, recorded)] = client.key_value_dir_get_bytes(f"{second._prefix}/")
    without_code = bytes(sealed.CODE_BYTES) + recorded[sealed.CODE_BYTES :]
    for number, content in enumerate((without_code, recorded, b"", pack(7), code(tmp_path / "harm"))):
        in_round(number + 2, monkeypatch)
        client.key_value_set_bytes(key.replace("1/cost", f"{number + 2}/cost"), content)
        with pytest.raises(ForeignValueError, match=r"cost/1 does not carry the code of this job.*another program"):
            processes.exchange("cost", 7)
    client.key_value_set_bytes(key.replace("1/cost/1", "9/cost/0"), recorded)
    in_round(9, monkeypatch)
    with pytest.raises(ForeignValueError, match=r"cost/0 is there already: another program"):
        processes.exchange("cost", 7)
    assert not (tmp_path / "harm").exists()


def test_failure_that_a_stranger_tells_ends_nothing_and_hides_no_true_one(client, second, tmp_path, caplog):
    place = f"{second._prefix}/failure/0"
    for name in ("dppa_jax/failure", place):
        client.key_value_set_bytes(name, code(tmp_path / "harm"))
    assert processes._failure() is None
    assert "ignored, as no process of this job has written it" in caplog.text
    assert not (tmp_path / "harm").exists()
    processes.fail("the disk is full: caf\udce9")
    told = processes._failure()
    assert type(told) is processes.ProcessFailedError
    assert str(told) == "process 0: the disk is full: caf\\udce9"
    processes.fail("interrupted", ended=True)
    assert str(processes._failure()) == str(told)  # the first counts


def test_process_with_another_secret_is_told_so(client):
    first, second, third = met(client, SECRET, SECRET, b"")
    for process, found in enumerate((first, second)):
        assert f"process 2 has another $DPPA_JAX_SECRET than process {process}, or another job" in str(found)
    assert "process 0 has another $DPPA_JAX_SECRET than process 2" in str(third)


def test_values_of_an_earlier_run_with_the_same_secret_do_not_pass(client):
    """Whoever recorded a run plays process 1 of it again."""
    _, second = met(client, SECRET, SECRET)
    recorded = client.key_value_try_get_bytes("dppa_jax/meeting/1/0")
    second.put("cost", b"7")
    client.key_value_delete("dppa_jax/meeting/")
    client.key_value_set_bytes("dppa_jax/meeting/1/0", recorded)
    again = meet(client, partial(client.blocking_key_value_get_bytes, timeout_in_ms=10_000), SECRET, 0, 2)
    assert again._prefix != second._prefix
    assert again._seal != second._seal


def test_secret_is_taken_from_the_environment_and_not_handed_to_children(client, monkeypatch):
    monkeypatch.setattr(processes, "_client", lambda: client)
    monkeypatch.setattr(processes, "_sealed", None)
    monkeypatch.setattr(processes, "index", lambda: 0)
    monkeypatch.setattr(processes, "count", lambda: 1)
    monkeypatch.setenv("DPPA_JAX_SECRET", "one\n")
    assert processes.exchange("cost", 7) == [7]
    assert "DPPA_JAX_SECRET" not in os.environ
    sealed_entry = client.key_value_try_get_bytes("dppa_jax/meeting/0/0")
    SealedStore(client, b"one", "dppa_jax/meeting").get("0", lambda _: sealed_entry)
