"""Reading Hugging Face directories of safetensors, lazily and by row.

Reading goes through `os.preadv` into buffers that are used again: mapping the files, as the safetensors package does,
counts every page that was touched as this process's memory and faults on each of them. The format itself is eight
bytes of header length, a JSON header and the tensors' bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dppa_jax.architecture.specs import (
    DEQUANTISE,
    CheckpointError,
    TensorSpec,
    check_config,
    first_linear,
    tensor_specs,
)
from dppa_jax.architecture.table import IGNORED, architecture_of

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 64  # what a device takes without a copy
MAX_HEADER = 100_000_000  # the limit of the safetensors package

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """That of all; where they differ float32, which holds the values of every other."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsDirectory:
    """An open checkpoint. Headers are read and checked at once, tensors by row when asked for."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.tensors = _read_headers(self.directory)
        self._files: dict[Path, int] = {}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that config.json promises, each found in a file with the shape it should have."""
        specs = tensor_specs(self.config)
        if self.config.get("tie_word_embeddings", architecture_of(self.config).tied):
            for head in architecture_of(self.config).heads:
                self.tensors.pop(f"{head}.weight", None)  # a copy of the embeddings that some exports carry
        missing, extra = [n for n in specs if n not in self.tensors], [n for n in self.tensors if n not in specs]
        if missing:
            layers = self.config["num_hidden_layers"]
            raise CheckpointError(
                f"{self.directory}: {len(missing)} tensors are missing, first {missing[0]!r}; is the download "
                f"complete, and is config.json (num_hidden_layers {layers}) that of these files?"
            )
        if extra:
            raise CheckpointError(
                f"{self.directory}: {self.tensors[extra[0]].file.name} has {len(extra)} tensors that a model of this "
                f"config.json does not have, first {extra[0]!r}; merge adapters into the model before, and check "
                f"attention_bias, mlp_bias and tie_word_embeddings."
            )
        for name, spec in specs.items():
            if self.tensors[name].shape != spec.shape:
                raise CheckpointError(
                    f"{self.tensors[name].file}: {name} has shape {self.tensors[name].shape}, config.json says "
                    f"{spec.shape}; config.json does not belong to these weights."
                )
        return specs

    @property
    def dtype(self) -> np.dtype:
        """That of the linears; norms may differ."""
        return self.tensors[first_linear(self.specs).name].dtype

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Rows start..stop of a tensor (the whole of a vector) into `out`, a contiguous array of the tensor's dtype."""
        file, position, count = self._extent(name, start, stop)
        view = memoryview(out.reshape(-1).view(np.uint8))[:count]
        while view.nbytes:
            count = os.preadv(self._descriptor(file), [view], position)
            if count == 0:
                raise CheckpointError(f"{file}: ends inside {name}; the file changed while it was read.")
            view, position = view[count:], position + count

    def evict_rows(self, name: str, start: int, stop: int) -> None:
        """Let the operating system forget rows that it has in memory: reading them then takes as long as the disk."""
        file, position, count = self._extent(name, start, stop)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(file), position, count, os.POSIX_FADV_DONTNEED)

    def read(self, name: str) -> np.ndarray:
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, out.shape[0] if out.ndim == 2 else 1, out)
        return out

    def fingerprint(self) -> str:
        """Of config, headers, sizes and 64 pages spread over every file: a second, not the minutes of a full hash."""
        return fingerprint(self.config, self._by_name())

    def content_digest(self) -> str:
        """Of config, generation config and every byte of the weights: about a second for each GB."""
        return content_digest(self.directory, self.config, self._by_name())

    def _extent(self, name: str, start: int, stop: int) -> tuple[Path, int, int]:
        """File, position and number of bytes of rows."""
        tensor = self.tensors[name]
        row_bytes = tensor.shape[-1] * tensor.dtype.itemsize
        return tensor.file, tensor.offset + start * row_bytes, (stop - start) * row_bytes

    def _by_name(self) -> dict[str, Path]:
        return {file.name: file for file in sorted({tensor.file for tensor in self.tensors.values()})}

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def fingerprint(config: Mapping, files: Mapping[str, Path]) -> str:
    """Of config, and of the sizes and 64 pages of every file by its name."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, file in files.items():
        with file.open("rb", buffering=0) as content:
            size = os.fstat(content.fileno()).st_size
            digest.update(f"{name} {size}".encode())
            for position in np.linspace(0, max(size - 4096, 0), 64).astype(int):
                digest.update(os.pread(content.fileno(), 4096, int(position)))
    return digest.hexdigest()


def content_digest(directory: Path, config: Mapping, files: Mapping[str, Path]) -> str:
    """Of config, the directory's generation config and every byte of the files."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    generation = directory / "generation_config.json"
    digest.update(generation.read_bytes() if generation.is_file() else b"")
    for file in files.values():
        stat = file.stat()
        digest.update(_file_digest(file, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@cache  # a report opens its models for every seed
def _file_digest(file: Path, size: int, modified: int) -> bytes:
    """Of a file as it is since it was last changed."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def read_config(directory: Path) -> dict:
    """config.json of a model directory, checked."""
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory} is an adapter (adapter_config.json), not a model: merge it into its base first, with peft's "
            f"merge_and_unload().save_pretrained(DIR)."
        )
    config = read_json(_inside(directory, "config.json"))
    check_config(config, directory / "config.json")
    return config


def companions(directory: Path) -> list[Path]:
    """Tokenizer files, chat templates and generation config of a model: what is copied verbatim beside the weights."""
    return [_inside(directory, name) for name in COPIED if (directory / name).is_file()]


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(_no_weights(directory))
        found = _read_header(_inside(directory, single.name))
        return {name: tensor for name, tensor in found.items() if not IGNORED.match(name)}
    tensors, headers = {}, {}
    for name, shard in _read_index(directory, index).items():
        if shard not in headers:
            file = _inside(directory, shard, f"{index} names a file")
            if not file.is_file():
                raise CheckpointError(f"{file} is missing ({index.name} says it holds {name!r}); download it again.")
            headers[shard] = _read_header(file)
        if IGNORED.match(name):
            continue
        if name not in headers[shard]:
            raise CheckpointError(f"{directory / shard}: has no tensor {name!r}, which {index.name} says it holds.")
        tensors[name] = headers[shard][name]
    return tensors


def _read_index(directory: Path, index: Path) -> dict[str, str]:
    weight_map = read_json(_inside(directory, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; download it again.")
    return weight_map


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, which must fill it without holes or overlaps, as the format says."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{file}: a Git LFS pointer in place of the weights; run `git lfs pull` there.")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes); download it again.")
        header = _parse(stream.read(length), f"the header of {file}")
    header.pop("__metadata__", None)
    entries = sorted((_entry(file, name, entry) for name, entry in header.items()), key=lambda e: e[2:])
    tensors, position, data = {}, 0, 8 + length
    for name, tensor, begin, end in entries:
        if data + end > size:
            raise CheckpointError(f"{file}: truncated: {name} ends at byte {data + end} of {size}; download it again.")
        if begin != position:
            raise CheckpointError(
                f"{file}: {name} begins at byte {begin} of the data, where {position} was to be expected: tensors "
                f"overlap or leave holes; download it again."
            )
        position = end
        if tensor:
            tensors[name] = StoredTensor(file, *tensor, data + begin)
    if data + position != size:
        raise CheckpointError(f"{file}: {size - data - position} bytes after the last tensor; download it again.")
    return tensors


def _entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[np.dtype, tuple[int, ...]] | None, int, int]:
    """Name, (dtype, shape), begin and end of a header's entry; nothing in place of the dtype of a buffer we ignore."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: its header's entry of {name} is damaged: {str(entry)[:99]}; download it again.")
    if code not in DTYPES:
        if IGNORED.match(name):
            return name, None, begin, end
        raise CheckpointError(f"{file}: {name} is stored as {code}; weights must be {', '.join(DTYPES)}. {DEQUANTISE}")
    nbytes = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name} has {end - begin} bytes in the header, its shape {shape} in {code} needs {nbytes}; "
            f"download it again."
        )
    return name, (DTYPES[code], shape), begin, end


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if not pickles:
        return (
            f"{directory}: neither model.safetensors nor model.safetensors.index.json is there; a hub repository that "
            f"holds only pickles (.bin) must be converted first."
        )
    return (
        f"{directory}: {pickles[0]} is a pickle, which can run code when it is read. Convert it once, if you trust it: "
        f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{directory}', "
        f"dtype='auto').save_pretrained('{directory}-safetensors')\" and copy the tokenizer files."
    )


def _inside(directory: Path, name: str, what: str = "") -> Path:
    """directory/name, which must be inside it; links of the hub's cache lead to its blobs folder."""
    path = directory / name
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{what or f'{path} leads'} outside the directory: {name!r} is {path.resolve()}. Copy the file into "
            f"{directory}."
        )
    return path


def read_json(path: Path) -> dict:
    """The JSON object in a file of a model directory."""
    try:
        return _parse(path.read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a Hugging Face model directory?") from None


def _parse(text: bytes, where: Path | str) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds a {type(content).__name__} in place of a JSON object; download it again.")
    return content
