"""Write Hugging Face directories of safetensors: shards are planned ahead, and get their final name when complete."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dppa_jax.architecture.layout import Place, stored_rows
from dppa_jax.architecture.specs import CheckpointError, matrix_shape
from dppa_jax.checkpoint.direct_file import DirectFile
from dppa_jax.checkpoint.headers import DTYPE_BY_CODE, NO_WEIGHT
from dppa_jax.checkpoint.inside import companions
from dppa_jax.checkpoint.output import TakenError, Unfinished, check_space, output_directory, publish, sync
from dppa_jax.checkpoint.safetensors import ALIGNMENT
from dppa_jax.checkpoint.small_files import copies, write_small_files
from dppa_jax.checkpoint.unfinished import aside_of
from dppa_jax.config.run import MAX_SHARD_SIZE
from dppa_jax.runtime import processes
from dppa_jax.runtime.journal import Journal

CODE_BY_DTYPE = {dtype: code for code, dtype in (DTYPE_BY_CODE | NO_WEIGHT).items()}
JOURNAL, ROWS = "journal-{}.jsonl", "rows-{}.jsonl"  # each process's, beside unfinished shards
KEEPING = (KeyboardInterrupt, SystemExit, processes.ProcessEndedError, OSError, TakenError)  # the files are worth it

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by name


class SafetensorsWriter:
    """A `Sink` that writes a directory beside its final name and renames it when everything is in place.

    Shards are planned from shapes alone, so rows may come in any order and from any thread. No loader takes an
    unfinished directory for a model: before `publish`, its shards have other names, or config.json and the index are
    missing.

    Leaving the `with` block before the directory has its name removes what was written. There is one exception: if a
    signal, another process, a full or broken disk ended the run, and there is an `identity`, it stays, and a later run
    of the same identity goes on from it. A checksum of all rows that were written stands in a journal beside them, so
    that rows which were lost or damaged meanwhile are written again.

    Of several processes, each writes shards of its own. Process 0 renames the directory when all have finished. All
    processes must call the same methods.

    Args:
      directory: the output.
      tensors: shape and dtype by name, in the order of the file.
      places: where tensors that callers name lie in these; by default callers name these.
      max_shard_size: bytes of weights in one shard, at most; a larger tensor gets a shard of its own.
      overwrite: replace a model that is there.
      identity: a hash of all that decides the content; without one, nothing is resumed.
      owners: of several processes, the one that writes each tensor, by the tensor's name.
      stem: how the names of files begin.

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
        places: Mapping[str, Place] | None = None,
        stem: str = "model",
    ):
        self._shared, self._overwrite = owners is not None, overwrite
        self.directory = output_directory(directory, overwrite) if self._first else Path(directory).resolve()
        self.path = aside_of(self.directory)
        self.shards = _plan_shards(tensors, max_shard_size, owners or dict.fromkeys(tensors, 0), stem)
        self._own = [shard for shard in self.shards if not owners or shard.owner == processes.index()]
        self.nbytes = sum(shard.nbytes for shard in self._own)
        self._where = {name: (shard, offset) for shard in self._own for name, offset in shard.offsets.items()}
        self._tensors, self._identity, self._places = tensors, identity, places or {}
        self._row_bytes = _row_bytes(tensors, self._places)
        self._files: dict[str, DirectFile] = {}
        self._rows = Journal()
        check_space({self.directory: sum(shard.nbytes for shard in self.shards)})
        self._unfinished = Unfinished(self.directory, identity) if self._first else None
        kept = self._agreed("claimed", lambda: self._unfinished.resumed)
        self.resumed = kept and all(self._there(shard) for shard in self._own)
        try:
            with self._errors("the headers"):
                for shard in self._own:
                    self._open(shard)
                if identity:
                    self._rows = Journal(self.path / ROWS.format(processes.index()), self.resumed)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if isinstance(error, KEEPING) and (self._identity or isinstance(error, TakenError)):
            self._close()
        else:
            self.abort()

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Write rows of a tensor, from row `start` on; they must have the tensor's dtype. A vector is one row."""
        pieces = self._pieces(name, start, start + (rows.shape[0] if rows.ndim > 1 else 1))
        raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        for stored, first, count in pieces:
            dtype = self._tensors[stored][1]
            assert rows.dtype == dtype, (name, rows.dtype, dtype)
            file, position, row_bytes = self._position(stored, first)
            with self._errors(name):
                checksum = file.write(memoryview(raw[: count * row_bytes]), position)
                self._rows.add(_rows_key(stored, first, first + count), checksum)
            raw = raw[count * row_bytes :]

    def has_rows(self, name: str, start: int, stop: int) -> bool:
        """Return whether an earlier run has written these rows, and they are still as they were written."""
        return all(self._has(*piece) for piece in self._pieces(name, start, stop))

    def _has(self, stored: str, first: int, count: int) -> bool:
        """Return whether rows of a tensor of a file are there, as they were written."""
        checksum = self._rows.get(_rows_key(stored, first, first + count))
        if checksum is None:
            return False
        file, position, row_bytes = self._position(stored, first)
        return file.checksum(position, count * row_bytes) == checksum

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield the tensor of a file, the first row there and the number of rows, a piece at a time."""
        place = self._places.get(name) or Place(name)
        for _, first, count in place.pieces(start, stop):
            yield place.stored, first, count

    def commit(
        self, config: Mapping | None, copy_from: Path | None = None, texts: Mapping[str, str | bytes] | None = None
    ) -> None:
        """Complete the directory and give it its final name; see `complete` for the arguments."""
        self.complete(config, copy_from, texts)
        publish_all([self])

    def complete(
        self, config: Mapping | None, copy_from: Path | None = None, texts: Mapping[str, str | bytes] | None = None
    ) -> None:
        """Finish the shards and write all else that belongs into the directory; `publish` then renames it.

        Args:
          config: the content of config.json; for None there is no such file.
          copy_from: a model's directory, whose tokenizer files and generation config are copied.
          texts: further small files, by name.
        """
        contents = copies(companions(copy_from), copy_from) if copy_from else {}
        with self._errors("the last files"):
            for shard in self._own:
                self._files.pop(shard.name).close()
                os.replace(self.path / f"{shard.name}.incomplete", self.path / shard.name)
                sync(self.path / shard.name)
        self._agreed("shards", lambda: True)
        if not self._first:
            return
        with self._errors("the last files"):
            self._check_shards()
            contents |= texts or {}
            if len(self.shards) > 1:
                contents["model.safetensors.index.json"] = self._index()
            if config is not None:
                contents["config.json"] = json.dumps(dict(config), indent=2) + "\n"
            write_small_files(self.path, contents)

    def abort(self) -> None:
        """Remove what was written. After the directory has its name, this does nothing."""
        opened, unfinished = bool(self._files), self._unfinished
        self._close(keep_lock=True)
        for shard in self._own if opened else ():
            (self.path / f"{shard.name}.incomplete").unlink(missing_ok=True)
        if unfinished:
            unfinished.remove()

    @property
    def journal(self) -> Path:
        """The file for this process's journal of what is written; it is removed when the directory gets its name."""
        return self.path / JOURNAL.format(processes.index())

    @property
    def _first(self) -> bool:
        return not self._shared or processes.index() == 0

    def _agreed(self, what: str, find: Callable[[], bool]) -> bool:
        """Call `find` in process 0 and return its result in all processes, which wait for each other here."""
        return processes.of_first(f"{self.directory.name}: {what}", find) if self._shared else find()

    def _there(self, shard: "_Shard") -> bool:
        """Return whether an earlier run left this shard. A finished shard gets the name of an unfinished one again."""
        finished, unfinished = self.path / shard.name, self.path / f"{shard.name}.incomplete"
        if finished.is_file() and not unfinished.exists():
            os.replace(finished, unfinished)
        return unfinished.is_file()

    def _open(self, shard: "_Shard") -> None:
        """Open a shard's file and write its header."""
        try:
            file = DirectFile(self.path / f"{shard.name}.incomplete", keep=self.resumed)
        except FileNotFoundError:
            raise CheckpointError(_not_shared(self.path)) from None
        self._files[shard.name] = file
        file.write(memoryview(shard.header), 0)

    def _check_shards(self) -> None:
        """Refuse to go on unless the shards of all processes are here, whole."""
        for shard in self.shards:
            file = self.path / shard.name
            size = file.stat().st_size if file.is_file() else None
            if size == shard.nbytes:
                continue
            if shard in self._own:
                raise CheckpointError(
                    f"{file} was written with {shard.nbytes} bytes and has {size} now: something else changed it, or "
                    f"the disk fails. Repeat the command."
                )
            raise CheckpointError(_not_shared(file))

    def _close(self, keep_lock: bool = False) -> None:
        """Close all files and, unless it is to be kept, end the lock."""
        self._rows.close()
        while self._files:
            self._files.popitem()[1].close()
        if self._unfinished and not keep_lock:
            self._unfinished.close()

    def _index(self) -> str:
        """Return the text of model.safetensors.index.json."""
        weight_map = {name: shard.name for shard in self.shards for name in shard.offsets}
        size = sum(shard.nbytes - len(shard.header) for shard in self.shards)
        return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"

    def _position(self, stored: str, row: int) -> tuple[DirectFile, int, int]:
        """Return where a row of a tensor of a file goes: the file, the position, and the bytes of a row."""
        shard, offset = self._where[stored]
        row_bytes = self._row_bytes[stored]
        return self._files[shard.name], offset + row * row_bytes, row_bytes

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn an OSError in the block into one that says what was being written, and how to go on."""
        try:
            yield
        except OSError as error:
            left = "What is written stays there" if self._identity else "Nothing is left there"
            on = ": the same command goes on from it" if self._identity else ""
            raise OSError(
                f"writing {what} to {self.path} failed: {error.strerror or error}. {left}{on}. The whole output needs "
                f"{sum(s.nbytes for s in self.shards) / 1e9:.2f} GB: make room, or write to another disk."
            ) from error


def publish_all(writers: Sequence[SafetensorsWriter]) -> None:
    """Give the completed directories of one run their names, the last one's last; see `output.publish`.

    Of several processes, all must call this.
    """
    last = writers[-1]
    if last._first:
        publish([writer._unfinished for writer in writers], last._overwrite)
    last._agreed("published", lambda: True)


def _rows_key(name: str, start: int, stop: int) -> str:
    """Return what rows are called in the journal."""
    return f"{name} {start} {stop}"


def _row_bytes(tensors: Tensors, places: Mapping[str, Place]) -> dict[str, int]:
    """Return the bytes of a row of every tensor, as the rows of what lies in it are counted."""
    cut = {place.stored for place in places.values() if not place.whole}
    columns = {name: (stored_rows if name in cut else matrix_shape)(shape)[1] for name, (shape, _) in tensors.items()}
    return {name: columns[name] * dtype.itemsize for name, (_, dtype) in tensors.items()}


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


def _plan_shards(tensors: Tensors, max_shard_size: int, owners: Mapping[str, int], stem: str) -> list[_Shard]:
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
        file = f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else f"{stem}.safetensors"
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
