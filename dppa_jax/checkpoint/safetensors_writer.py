"""Writing Hugging Face directories of safetensors: planned shards, under their final name only when complete."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dppa_jax.checkpoint.direct import DirectFile
from dppa_jax.checkpoint.names import CheckpointError
from dppa_jax.checkpoint.safetensors_dir import ALIGNMENT, DTYPES, companions

CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_SHARD_SIZE = 2_000_000_000

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by name


class SafetensorsWriter:
    """Writes a directory beside its final name and renames it when everything is in place.

    Shards are planned from shapes alone, so rows may come in any order from any thread. Until `commit`, the weights
    have names that no loader looks for, and there is neither a config.json nor an index. Leaving the `with` block
    before `commit` removes what was written.
    """

    def __init__(
        self, directory: Path | str, tensors: Tensors, max_shard_size: int = MAX_SHARD_SIZE, overwrite: bool = False
    ):
        self.directory = output_directory(directory, overwrite)
        self.aside = self.directory.with_name(self.directory.name + ".incomplete")
        self.shards = _plan_shards(tensors, max_shard_size)
        self.nbytes = sum(shard.nbytes for shard in self.shards)
        self._where = {name: (shard, offset) for shard in self.shards for name, offset in shard.offsets.items()}
        self._tensors, self._overwrite = tensors, overwrite
        self._files: dict[str, DirectFile] = {}
        self._lock: int | None = None
        check_space({self.directory: self.nbytes})
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _claim(self.aside)
        with self._errors("the headers"):
            for shard in self.shards:
                file = self._files[shard.name] = DirectFile(self.aside / f"{shard.name}.incomplete")
                file.write(memoryview(shard.header), 0)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.abort()

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        shard, offset = self._where[name]
        shape, dtype = self._tensors[name]
        assert rows.dtype == dtype, (name, rows.dtype, dtype)
        position = offset + start * shape[-1] * dtype.itemsize
        with self._errors(name):
            raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
            self._files[shard.name].write(memoryview(raw), position)

    def commit(self, config: Mapping, copy_from: Path | None = None, texts: Mapping[str, str] | None = None) -> None:
        """Complete the directory and give it its name. `texts` are further small files by name."""
        with self._errors("the last files"):
            for shard in self.shards:
                self._files.pop(shard.name).close()
                os.replace(self.aside / f"{shard.name}.incomplete", self.aside / shard.name)
            if len(self.shards) > 1:
                (self.aside / "model.safetensors.index.json").write_text(self._index())
            for path in companions(Path(copy_from)) if copy_from else ():
                shutil.copyfile(path, self.aside / path.name)
            for name, text in (texts or {}).items():
                (self.aside / name).write_text(text)
            (self.aside / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
            for path in self.aside.iterdir():
                _sync(path)  # after a power failure, too, the final name means complete
            output_directory(self.directory, self._overwrite)  # nothing came there in the meantime
            _swap(self.aside, self.directory)
        self._release()

    def abort(self) -> None:
        """Remove what was written; nothing after a commit."""
        while self._files:
            self._files.popitem()[1].close()
        if self._lock is not None:
            shutil.rmtree(self.aside, ignore_errors=True)
            self._release()

    def _index(self) -> str:
        weight_map = {name: shard.name for shard in self.shards for name in shard.offsets}
        size = sum(shard.nbytes - len(shard.header) for shard in self.shards)
        return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """An OSError while writing removes what was written and says what was going on."""
        try:
            yield
        except OSError as error:
            self.abort()
            raise OSError(
                f"writing {what} to {self.aside} failed: {error.strerror or error}. Nothing was left there; the whole "
                f"output needs {self.nbytes / 1e9:.2f} GB. Make room, or write to another disk."
            ) from error


def output_directory(given: Path | str, overwrite: bool = False) -> Path:
    """The absolute path of a directory to be written, refused where that would destroy something."""
    path = Path(given).expanduser().resolve()
    if path.is_mount():
        raise CheckpointError(f"{given} is a mount point, which cannot be replaced; give a directory inside it.")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{given} is a file; choose another name for the output directory.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{given} is not empty; choose another --output, or --overwrite to replace it.")
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{given} is not empty and holds no model (no config.json), so --overwrite does not replace it; choose "
                f"another --output."
            )
    return path


def check_space(sizes: Mapping[Path, int]) -> None:
    """Refuse directories that together do not fit on their disks."""
    needed: dict[int, int] = {}
    for directory, nbytes in sizes.items():
        existing = next(place for place in (directory, *directory.parents) if place.exists())
        disk = existing.stat().st_dev
        needed[disk] = needed.get(disk, 0) + nbytes
        free = shutil.disk_usage(existing).free
        if needed[disk] > free:
            raise OSError(
                f"{existing} has {free / 1e9:.2f} GB free, the output needs {needed[disk] / 1e9:.2f} GB. Make room, or "
                f"write to another disk."
            )


def total_bytes(tensors: Tensors) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def _plan_shards(tensors: Tensors, max_shard_size: int) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        nbytes = total_bytes({name: tensors[name]})
        if groups[-1] and size + nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    shards = []
    for i, names in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            shape, dtype = tensors[name]
            end = position + total_bytes({name: tensors[name]})
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        start = 8 + len(text)
        offsets = {name: start + header[name]["data_offsets"][0] for name in names}
        shards.append(_Shard(file, len(text).to_bytes(8, "little") + text, offsets, start + position))
    return shards


def _claim(aside: Path) -> int:
    """Make the directory, or empty what a killed run left of it; the lock ends with the process, however that ends."""
    aside.mkdir(exist_ok=True)
    lock = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(f"{aside} is being written by another run; wait, or choose another --output.") from None
    except OSError:
        pass  # a file system without locks
    for path in aside.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return lock


def _swap(new: Path, directory: Path) -> None:
    """Rename `new` to `directory`. One that is there moves aside and is deleted last, so that it survives failures."""
    old = directory.with_name(directory.name + ".replaced")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(directory, old)
    try:
        os.replace(new, directory)
    except BaseException:
        if old.exists():
            os.replace(old, directory)
        raise
    with suppress(OSError):  # not every file system can sync a directory
        _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
