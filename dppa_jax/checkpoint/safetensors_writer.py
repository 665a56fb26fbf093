"""Write Hugging Face directories of safetensors: shards are planned ahead, and get their final name when complete."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.direct_file import DirectFile
from dppa_jax.checkpoint.headers import DTYPE_BY_CODE
from dppa_jax.checkpoint.inside import companions
from dppa_jax.checkpoint.output import aside_of, check_space, claim, output_directory, swap, sync
from dppa_jax.checkpoint.safetensors import ALIGNMENT
from dppa_jax.config.run import MAX_SHARD_SIZE
from dppa_jax.runtime import processes

CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
IDENTITY, JOURNAL = "identity", "journal-{}.jsonl"  # files that lie beside unfinished shards

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by name


class SafetensorsWriter:
    """A `Sink` that writes a directory beside its final name and renames it when everything is in place.

    Shards are planned from shapes alone, so rows may come in any order and from any thread. No loader takes an
    unfinished directory for a model: before `publish`, its shards have other names, or config.json and the index are
    missing.

    Leaving the `with` block before `publish` removes what was written. There is one exception: if a signal or another
    process ended the run, and there is an `identity`, it stays, and a later run of the same identity goes on from it.

    Of several processes, each writes shards of its own. Process 0 renames the directory when all have finished. All
    processes must call the same methods.

    Args:
      directory: the output.
      tensors: shape and dtype by name, in the order of the file.
      max_shard_size: bytes of weights in one shard, at most; a larger tensor gets a shard of its own.
      overwrite: replace a model that is there.
      identity: a hash of all that decides the content; without one, nothing is resumed.
      owners: of several processes, the one that writes each tensor, by the tensor's name.

    Attributes:
      resumed: whether this process's shards are those of an earlier run with this identity.

    Raises:
      CheckpointError: the output is refused, see `output_directory`, or another run is writing it.
      OSError: there is no room on the disk, or writing fails.
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
        kept = self._agreed("claimed", self._prepare)
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
        """Write rows of a tensor, from row `start` on; they must have the tensor's dtype."""
        shard, offset = self._where[name]
        shape, dtype = self._tensors[name]
        assert rows.dtype == dtype, (name, rows.dtype, dtype)
        position = offset + start * shape[-1] * dtype.itemsize
        with self._errors(name):
            raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
            self._files[shard.name].write(memoryview(raw), position)

    def flush(self) -> None:
        """Flush all rows so far to the disk, where they survive a power failure."""
        for file in self._files.values():
            file.sync()

    def commit(self, config: Mapping, copy_from: Path | None = None, texts: Mapping[str, str] | None = None) -> None:
        """Complete the directory and give it its final name; see `complete` for the arguments."""
        self.complete(config, copy_from, texts)
        self.publish()

    def complete(self, config: Mapping, copy_from: Path | None = None, texts: Mapping[str, str] | None = None) -> None:
        """Finish the shards and write all else that belongs into the directory; `publish` then renames it.

        Args:
          config: the content of config.json.
          copy_from: a model's directory, whose tokenizer files and generation config are copied.
          texts: further small files, by name.
        """
        with self._errors("the last files"):
            for shard in self._own:
                self._files.pop(shard.name).close()
                os.replace(self.aside / f"{shard.name}.incomplete", self.aside / shard.name)
                sync(self.aside / shard.name)
        self._agreed("shards", lambda: True)
        if not self._first:
            return
        with self._errors("the last files"):
            self._check_shards()
            if len(self.shards) > 1:
                (self.aside / "model.safetensors.index.json").write_text(self._index())
            for path in companions(Path(copy_from)) if copy_from else ():
                place = self.aside / path.relative_to(copy_from)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
            for name, text in (texts or {}).items():
                (self.aside / name).write_text(text)
            (self.aside / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
            shards = {shard.name for shard in self.shards}
            for path in self.aside.iterdir():
                if path.name not in shards:
                    sync(path)  # the final name means complete, after a power failure, too

    def publish(self) -> None:
        """Give the directory its final name."""
        if self._first:
            with self._errors("the last files"):
                output_directory(self.directory, self._overwrite)  # another program may have written there
                for notes in (self.aside / IDENTITY, *self.aside.glob(JOURNAL.format("*"))):
                    notes.unlink(missing_ok=True)
                swap(self.aside, self.directory)
        self._agreed("published", lambda: True)
        self._close()

    def abort(self) -> None:
        """Remove what was written. After `publish`, this does nothing."""
        opened = bool(self._files) or self._lock is not None
        self._close()
        if self._first and opened:
            shutil.rmtree(self.aside, ignore_errors=True)
        for shard in self._own if opened else ():
            (self.aside / f"{shard.name}.incomplete").unlink(missing_ok=True)

    @property
    def journal(self) -> Path:
        """The file for this process's journal of what is written; it is removed when the directory gets its name."""
        return self.aside / JOURNAL.format(processes.index())

    @property
    def _first(self) -> bool:
        return not self._shared or processes.index() == 0

    def _agreed(self, what: str, find: Callable[[], bool]) -> bool:
        """Call `find` in process 0 and return its result in all processes, which wait for each other here."""
        return processes.of_first(f"{self.directory.name}: {what}", find) if self._shared else find()

    def _prepare(self) -> bool:
        """Empty the directory, unless an earlier run of the same identity left it. Return whether it was kept."""
        mark = self.aside / IDENTITY
        kept = bool(self._identity) and mark.is_file() and mark.read_text() == self._identity
        if not kept:
            for path in self.aside.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if self._identity:
                mark.write_text(self._identity)
        return kept

    def _there(self, shard: "_Shard") -> bool:
        """Return whether an earlier run left this shard. A finished shard gets the name of an unfinished one again."""
        finished, unfinished = self.aside / shard.name, self.aside / f"{shard.name}.incomplete"
        if finished.is_file() and not unfinished.exists():
            os.replace(finished, unfinished)
        return unfinished.is_file()

    def _open(self, shard: "_Shard") -> None:
        """Open a shard's file and write its header."""
        try:
            file = DirectFile(self.aside / f"{shard.name}.incomplete", keep=self.resumed)
        except FileNotFoundError:
            raise CheckpointError(_not_shared(self.aside)) from None
        self._files[shard.name] = file
        file.write(memoryview(shard.header), 0)

    def _check_shards(self) -> None:
        """Refuse to go on unless the shards of all processes are here, whole."""
        for shard in self.shards:
            file = self.aside / shard.name
            if not file.is_file() or file.stat().st_size != shard.nbytes:
                raise CheckpointError(_not_shared(file))

    def _close(self) -> None:
        """Close all files and end the lock."""
        while self._files:
            self._files.popitem()[1].close()
        self._release()

    def _index(self) -> str:
        """Return the text of model.safetensors.index.json."""
        weight_map = {name: shard.name for shard in self.shards for name in shard.offsets}
        size = sum(shard.nbytes - len(shard.header) for shard in self.shards)
        return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"

    def _release(self) -> None:
        """End the lock on the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn an OSError in the block into one that says what was being written, after removing what was written."""
        try:
            yield
        except OSError as error:
            self.abort()
            raise OSError(
                f"writing {what} to {self.aside} failed: {error.strerror or error}. Nothing was left there; the whole "
                f"output needs {sum(s.nbytes for s in self.shards) / 1e9:.2f} GB. Make room, or write to another disk."
            ) from error


def _not_shared(file: Path) -> str:
    """Say that a file of another process is missing."""
    return (
        f"{file}: this process does not see the file as another process wrote it. All processes must see the same "
        f"--output; give a directory on a file system that they share."
    )


def total_bytes(tensors: Tensors) -> int:
    """Return how many bytes the weights of these tensors take."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


@dataclass(frozen=True)
class _Shard:
    """One file of the output, as planned."""

    name: str
    header: bytes
    offsets: dict[str, int]  # of each tensor's first byte in the file
    nbytes: int  # of the whole file
    owner: int  # the process that writes it


def _plan_shards(tensors: Tensors, max_shard_size: int, owners: Mapping[str, int]) -> list[_Shard]:
    """Divide tensors, in their order, into shards of at most `max_shard_size` bytes with one owner each."""
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
            header[name] = {"dtype": CODE_BY_DTYPE[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        start = 8 + len(text)
        offsets = {name: start + header[name]["data_offsets"][0] for name in names}
        header_bytes = len(text).to_bytes(8, "little") + text
        shards.append(_Shard(file, header_bytes, offsets, start + position, owners[names[0]]))
    return shards
