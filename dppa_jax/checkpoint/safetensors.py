"""Read Hugging Face directories of safetensors: headers at once, weights by row and only when asked for.

A safetensors file is eight bytes with the length of the header, a JSON header, and the bytes of the tensors. We read it
with `os.preadv` into buffers that are used again. The safetensors package maps the files into memory instead: then
every page that is touched costs a page fault and counts as memory of this process.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
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
    tied_heads,
)
from dppa_jax.architecture.table import IGNORED
from dppa_jax.checkpoint.fingerprints import content_digest, fingerprint

DTYPE_BY_CODE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 64  # bytes; a device takes an array that is aligned to this without a copy
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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of the tensor's first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsDirectory:
    """An open Hugging Face directory, a `Source`. Headers are read and checked at once, weights when asked for.

    Raises:
      CheckpointError: a file is missing, damaged, a pickle, or lies outside the directory.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.tensors = _read_headers(self.directory)
        self._files: dict[Path, int] = {}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that config.json promises, by name; every one is in a file and has the right shape.

        Raises:
          CheckpointError: a tensor is missing, too many or of another shape.
        """
        specs = tensor_specs(self.config)
        for copy in tied_heads(self.config):
            self.tensors.pop(copy, None)
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
        """The dtype of the linears; norms may have another."""
        return self.tensors[first_linear(self.specs).name].dtype

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype.

        A vector counts as one row.

        Raises:
          CheckpointError: the file ends inside the tensor.
        """
        file, position, count = self._extent(name, start, stop)
        view = memoryview(out.reshape(-1).view(np.uint8))[:count]
        while view.nbytes:
            count = os.preadv(self._descriptor(file), [view], position)
            if count == 0:
                raise CheckpointError(
                    f"{file}: ends inside {name}; the file changed while it was read. Run again when it is complete."
                )
            view, position = view[count:], position + count

    def evict_rows(self, name: str, start: int, stop: int) -> None:
        """Drop rows from the operating system's page cache, so that reading them takes as long as the disk takes."""
        file, position, count = self._extent(name, start, stop)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(file), position, count, os.POSIX_FADV_DONTNEED)

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor."""
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, out.shape[0] if out.ndim == 2 else 1, out)
        return out

    def fingerprint(self) -> str:
        """Hash the config, and names, sizes and 64 pages of every file: a second, where a full hash takes minutes."""
        return fingerprint(self.config, self.files())

    def content_digest(self) -> str:
        """Hash the config, the generation config and every byte of the weights: about a second for each GB."""
        return content_digest(self.directory, self.config, self.files())

    def _extent(self, name: str, start: int, stop: int) -> tuple[Path, int, int]:
        """Return where rows lie: the file, the position of the first byte, and the number of bytes."""
        tensor = self.tensors[name]
        row_bytes = tensor.shape[-1] * tensor.dtype.itemsize
        return tensor.file, tensor.offset + start * row_bytes, (stop - start) * row_bytes

    def files(self) -> dict[str, Path]:
        """Return the files of the weights by name."""
        return {file.name: file for file in sorted({tensor.file for tensor in self.tensors.values()})}

    def _descriptor(self, file: Path) -> int:
        """Return the descriptor of a file, which the first use opens."""
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])


def read_config(directory: Path) -> dict:
    """Read and check config.json of a model directory.

    Raises:
      CheckpointError: it is missing, no JSON object, an adapter's, or not that of a model we can merge.
    """
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory} is an adapter (adapter_config.json), not a model: merge it into its base first, with peft's "
            f"merge_and_unload().save_pretrained(DIR)."
        )
    config = read_json(_inside(directory, "config.json"))
    check_config(config, directory / "config.json")
    return config


def companions(directory: Path) -> list[Path]:
    """Return the files that are copied verbatim beside the weights: tokenizer, chat template, generation config."""
    return [_inside(directory, name) for name in COPIED if (directory / name).is_file()]


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a directory by name, from model.safetensors or from the shards that the index names."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(_no_weights(directory))
        header = _read_header(_inside(directory, single.name))
        return {name: tensor for name, tensor in header.items() if not IGNORED.match(name)}
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
    """Return the shard of each tensor, as the index says."""
    weight_map = read_json(_inside(directory, index.name)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; download it again.")
    return weight_map


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file. They must fill the file without holes and overlaps, as the format says."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer in place of the weights; run `git lfs pull` there.")
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
                f"{file}: {name} begins at byte {begin} of the data, but should begin at byte {position}: tensors "
                f"overlap or leave holes; download it again."
            )
        position = end
        if tensor:
            tensors[name] = StoredTensor(file, *tensor, data + begin)
    if data + position != size:
        raise CheckpointError(f"{file}: {size - data - position} bytes after the last tensor; download it again.")
    return tensors


def _entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[np.dtype, tuple[int, ...]] | None, int, int]:
    """Parse a header's entry into name, (dtype, shape), begin and end; None in place of the pair if we ignore it."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: the header's entry of {name} is damaged: {str(entry)[:99]}; download it again.")
    if code not in DTYPE_BY_CODE:
        if IGNORED.match(name):
            return name, None, begin, end
        raise CheckpointError(
            f"{file}: {name} is stored as {code}; weights must be {', '.join(DTYPE_BY_CODE)}. {DEQUANTISE}"
        )
    nbytes = math.prod(shape) * DTYPE_BY_CODE[code].itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name} has {end - begin} bytes in the header, its shape {shape} in {code} needs {nbytes}; "
            f"download it again."
        )
    return name, (DTYPE_BY_CODE[code], shape), begin, end


def _no_weights(directory: Path) -> str:
    """Say why a directory without safetensors is refused, and what to do."""
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
    """Return directory/name, and refuse a path or a link that leads outside.

    In the hub's cache, a model's files are links into the `blobs` folder of the same model; these are allowed.

    Args:
      what: what names the file, for the message; by default the file itself.
    """
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
    """Read the JSON object in a file of a model directory."""
    try:
        return _parse(path.read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a Hugging Face model directory?") from None


def _parse(text: bytes, where: Path | str) -> dict:
    """Parse a JSON object; `where` names it in errors."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds a {type(content).__name__} in place of a JSON object; download it again.")
    return content
