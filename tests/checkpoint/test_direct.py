"""Files written past the page cache hold the same bytes as others."""

import errno
import fcntl
import os

import numpy as np
import pytest

from dppa_jax.checkpoint.direct_file import DirectFile


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(0, 256, 20_000_001, dtype=np.uint8)


def write_in_pieces(path, data):
    generator = np.random.default_rng(1)
    cuts = np.sort(np.concatenate([[0, 1, 4096, 8192, data.size], generator.integers(0, data.size, 40)]))
    file = DirectFile(path)
    for i in generator.permutation(len(cuts) - 1):
        file.write(memoryview(data[cuts[i] : cuts[i + 1]]), int(cuts[i]))
    file.close()


def test_pieces_of_any_size_in_any_order_make_the_file(tmp_path, data):
    write_in_pieces(tmp_path / "file", data)
    assert (np.fromfile(tmp_path / "file", np.uint8) == data).all()


def test_a_file_system_that_refuses_direct_writes_is_written_through_the_cache(tmp_path, data, monkeypatch):
    pwrite = os.pwrite

    def refuse(file, buffer, position):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(file, buffer, position)

    monkeypatch.setattr(os, "pwrite", refuse)
    write_in_pieces(tmp_path / "file", data)
    assert (np.fromfile(tmp_path / "file", np.uint8) == data).all()
