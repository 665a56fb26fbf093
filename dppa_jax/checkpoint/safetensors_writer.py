"""Writing Hugging Face directories of safetensors: planned shards, under their final name only when complete."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.direct_file import DirectFile
from dppa_jax.checkpoint.safetensors import ALIGNMENT, DTYPES, companions
from dppa_jax.config.run import MAX_SHARD_SIZE
from dppa_jax.runtime import processes

CODES = {dtype: code for code, dtype in DTYPES.items()}
IDENTITY, JOURNAL = "identity", "journal-{}.jsonl"  # beside unfinished shards

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by name


class SafetensorsWriter:
    """Writes a directory beside its final name and renames it when everything is in place.

    Shards are planned from shapes alone, so rows may come in any order from any thread. Until `publish`, the weights
    have names that no loader looks for, or there is neither a config.json nor an index. Leaving the `with` block before
    it removes what was written; where a signal or another process ended the run, and there is an `identity` to know it
    by, it stays for a further run to go on with.

    Args:
      tensors: shape and dtype by name.
      identity: of all that decides the content; a writer of the same identity goes on from what is there.
      owners: the process that writes each tensor, where there are several: each writes shards of its own, the first one
        gives the directory its name when all have finished. All must call the same methods.

    Attributes:
      resumed: are this process's shards those of an earlier run of this identity?
    """

    def __init__(
        self,
        directory: Path | str,
        tensors: Tensors,
        max_shard_size: int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        identity: str = "",
        owners: Mapping[str, int] | None = None,
    ):
        self.directory = output_directory(directory, overwrite)
        self.aside = aside_of(self.directory)
        self.shards = _plan_shards(tensors, max_shard_size, owners or dict.fromkeys(tensors, 0))
        self._own = [shard for shard in self.shards if not owners or shard.owner == processes.index()]
        self.nbytes = sum(shard.nbytes for shard in self._own)
        self._where = {name: (shard, offset) for shard in self._own for name, offset in shard.offsets.items()}
        self._tensors, self._overwrite, self._shared = tensors, overwrite, owners is not None
        self._identity = identity and f"{identity}\n"
        self._files: dict[str, DirectFile] = {}
        self._lock: int | None = None
        check_space({self.directory: sum(shard.nbytes for shard in self.shards)})
        if self._first:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._lock = claim(self.aside)
        kept = self._told("claimed", self._prepare)
        self.resumed = kept and all(self._there(shard) for shard in self._own)
        with self._errors("the headers"):
            for shard in self._own:
                self._open(shard)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if self._identity and isinstance(error, (KeyboardInterrupt, SystemExit, processes.ProcessEndedError)):
            self._close()
        else:
            self.abort()

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        shard, offset = self._where[name]
        shape, dtype = self._tensors[name]
        assert rows.dtype == dtype, (name, rows.dtype, dtype)
        position = offset + start * shape[-1] * dtype.itemsize
        with self._errors(name):
            raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
            self._files[shard.name].write(memoryview(raw), position)

    def flush(self) -> None:
        """Return when all rows so far would survive a power failure."""
        for file in self._files.values():
            file.sync()

    def commit(self, config: Mapping, copy_from: Path | None = None, texts: Mapping[str, str] | None = None) -> None:
        """Complete the directory and give it its name. `texts` are further small files by name."""
        self.complete(config, copy_from, texts)
        self.publish()

    def complete(self, config: Mapping, copy_from: Path | None = None, texts: Mapping[str, str] | None = None) -> None:
        """Everything but the name."""
        with self._errors("the last files"):
            for shard in self._own:
                self._files.pop(shard.name).close()
                os.replace(self.aside / f"{shard.name}.incomplete", self.aside / shard.name)
                sync(self.aside / shard.name)
        self._told("shards", lambda: True)
        if not self._first:
            return
        with self._errors("the last files"):
            self._check_shards()
            if len(self.shards) > 1:
                (self.aside / "model.safetensors.index.json").write_text(self._index())
            for path in companions(Path(copy_from)) if copy_from else ():
                shutil.copyfile(path, self.aside / path.name)
            for name, text in (texts or {}).items():
                (self.aside / name).write_text(text)
            (self.aside / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
            shards = {shard.name for shard in self.shards}
            for path in self.aside.iterdir():
                if path.name not in shards:
                    sync(path)  # after a power failure, too, the final name means complete

    def publish(self) -> None:
        """Give the directory its name."""
        if self._first:
            with self._errors("the last files"):
                output_directory(self.directory, self._overwrite)  # nothing came there in the meantime
                for notes in (self.aside / IDENTITY, *self.aside.glob(JOURNAL.format("*"))):
                    notes.unlink(missing_ok=True)
                swap(self.aside, self.directory)
        self._told("published", lambda: True)
        self._close()

    def abort(self) -> None:
        """Remove what was written; nothing after a commit."""
        opened = bool(self._files) or self._lock is not None
        self._close()
        if self._first and opened:
            shutil.rmtree(self.aside, ignore_errors=True)
        for shard in self._own if opened else ():
            (self.aside / f"{shard.name}.incomplete").unlink(missing_ok=True)

    @property
    def journal(self) -> Path:
        """Where this process can keep notes on what is written; they go when the directory gets its name."""
        return self.aside / JOURNAL.format(processes.index())

    @property
    def _first(self) -> bool:
        return not self._shared or processes.index() == 0

    def _told(self, what: str, find: Callable[[], bool]) -> bool:
        """What the first process finds; the others wait for it, and it for them."""
        return processes.of_first(f"{self.directory.name}: {what}", find) if self._shared else find()

    def _prepare(self) -> bool:
        """Empty the directory, unless what is there is of the same identity."""
        mark = self.aside / IDENTITY
        kept = bool(self._identity) and mark.is_file() and mark.read_text() == self._identity
        if not kept:
            for path in self.aside.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if self._identity:
                mark.write_text(self._identity)
        return kept

    def _there(self, shard: "_Shard") -> bool:
        """Has an earlier run left it? One that it had finished gets the name of an unfinished one again."""
        finished, unfinished = self.aside / shard.name, self.aside / f"{shard.name}.incomplete"
        if finished.is_file() and not unfinished.exists():
            os.replace(finished, unfinished)
        return unfinished.is_file()

    def _open(self, shard: "_Shard") -> None:
        try:
            file = DirectFile(self.aside / f"{shard.name}.incomplete", keep=self.resumed)
        except FileNotFoundError:
            raise CheckpointError(_not_shared(self.aside)) from None
        self._files[shard.name] = file
        file.write(memoryview(shard.header), 0)

    def _check_shards(self) -> None:
        for shard in self.shards:
            file = self.aside / shard.name
            if not file.is_file() or file.stat().st_size != shard.nbytes:
                raise CheckpointError(_not_shared(file))

    def _close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
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
                f"output needs {sum(s.nbytes for s in self.shards) / 1e9:.2f} GB. Make room, or write to another disk."
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
        needed[disk] = needed.get(disk, 0) + max(0, nbytes - _taken(aside_of(directory)))
        free = shutil.disk_usage(existing).free
        if needed[disk] > free:
            raise OSError(
                f"{existing} has {free / 1e9:.2f} GB free, the output needs {needed[disk] / 1e9:.2f} GB. Make room, or "
                f"write to another disk."
            )


def aside_of(directory: Path) -> Path:
    """Where a directory is written before it gets its name."""
    return directory.with_name(directory.name + ".incomplete")


def _taken(aside: Path) -> int:
    """Bytes on the disk of what an earlier run left, which is written on or removed."""
    return sum(path.stat().st_blocks * 512 for path in aside.iterdir()) if aside.is_dir() else 0


def _not_shared(file: Path) -> str:
    return (
        f"{file} is not there as another process wrote it: all processes must see the same --output; give a directory "
        f"on a file system that they share."
    )


def total_bytes(tensors: Tensors) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int
    owner: int  # the process that writes it


def _plan_shards(tensors: Tensors, max_shard_size: int, owners: Mapping[str, int]) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        nbytes = total_bytes({name: tensors[name]})
        if groups[-1] and (size + nbytes > max_shard_size or owners[name] != owners[groups[-1][-1]]):
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
        header_bytes = len(text).to_bytes(8, "little") + text
        shards.append(_Shard(file, header_bytes, offsets, start + position, owners[names[0]]))
    return shards


def claim(aside: Path) -> int:
    """Make the directory, or take over what a killed run left; the lock ends with the process, however that ends."""
    aside.mkdir(exist_ok=True)
    lock = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(f"{aside} is being written by another run; wait, or choose another --output.") from None
    except OSError:
        pass  # a file system without locks
    return lock


def swap(new: Path, directory: Path) -> None:
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
        sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Return when a file, or a directory's list of files, would survive a power failure."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
