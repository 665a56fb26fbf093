"""Hugging Face directories of safetensors: lazy rows in, planned shards out.

Reading goes through `os.preadv` into buffers that are used again: mapping the files, as the safetensors package does,
counts every page that was touched as this process's memory and faults on each of them. The format itself is eight
bytes of header length, a JSON header and the tensors' bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from dppa_jax.checkpoint.names import IGNORED, CheckpointError, TensorSpec, check_architecture, tensor_specs

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
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


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class SafetensorsDirectory:
    """An open checkpoint. Headers are read and checked at once, tensors by row when asked for."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.config = _read_json(_inside(self.directory, "config.json"))
        check_architecture(self.config, self.directory)
        self.tensors = _read_headers(self.directory)
        self._files: dict[Path, int] = {}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that config.json promises, each found in a file with the shape it should have."""
        specs = tensor_specs(self.config)
        if self.config.get("tie_word_embeddings") and "lm_head.weight" in self.tensors:
            self.tensors.pop("lm_head.weight")  # a copy of the embeddings that some exports carry
        missing, extra = [n for n in specs if n not in self.tensors], [n for n in self.tensors if n not in specs]
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} tensors are missing, first {missing[0]!r}; is the download complete, "
                f"and does config.json (num_hidden_layers {self.config['num_hidden_layers']}) belong to these files?"
            )
        if extra:
            raise CheckpointError(
                f"{self.directory}: {self.tensors[extra[0]].file.name} has {len(extra)} tensors that a LLaMA of this "
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
        return self.tensors["model.layers.0.self_attn.q_proj.weight"].dtype

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Rows start..stop of a tensor (the whole of a vector) into `out`, a contiguous array of the tensor's dtype."""
        tensor = self.tensors[name]
        row_bytes = tensor.shape[-1] * tensor.dtype.itemsize
        view = memoryview(out.reshape(-1).view(np.uint8))[: (stop - start) * row_bytes]
        position = tensor.offset + start * row_bytes
        while view.nbytes:
            count = os.preadv(self._descriptor(tensor.file), [view], position)
            if count == 0:
                raise CheckpointError(f"{tensor.file}: ends inside {name}; the file changed while it was read.")
            view, position = view[count:], position + count

    def read(self, name: str) -> np.ndarray:
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, out.shape[0] if out.ndim == 2 else 1, out)
        return out

    def fingerprint(self) -> str:
        """Of config, headers, sizes and 64 pages spread over every file: a second, not the minutes of a full hash."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            for position in np.linspace(0, max(size - 4096, 0), 64).astype(int):
                digest.update(os.pread(self._descriptor(file), 4096, int(position)))
        return digest.hexdigest()

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class SafetensorsWriter:
    """Writes a directory beside its final name and renames it when everything is in place.

    Shards are planned from shapes alone, so rows may come in any order from any thread. Until `commit`, the weights
    have names that no loader looks for, and there is neither a config.json nor an index.
    """

    def __init__(self, directory: Path | str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], max_shard_size: int):
        self.directory = Path(directory)
        self.aside = self.directory.with_name(self.directory.name + ".incomplete")
        self.shards = _plan_shards(tensors, max_shard_size)
        self.nbytes = sum(shard.nbytes for shard in self.shards)
        self._where = {name: (shard, offset) for shard in self.shards for name, offset in shard.offsets.items()}
        self._tensors = tensors
        shutil.rmtree(self.aside, ignore_errors=True)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory.parent).free
        if self.nbytes > free:
            raise OSError(
                f"{self.directory.parent} has {free / 1e9:.1f} GB free, the output needs {self.nbytes / 1e9:.1f} GB."
            )
        self.aside.mkdir()
        self._files = {}
        with self._errors("the first bytes"):
            for shard in self.shards:
                file = os.open(self.aside / f"{shard.name}.incomplete", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                self._files[shard.name] = file
                _write_all(file, memoryview(shard.header), 0)

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        shard, offset = self._where[name]
        shape, dtype = self._tensors[name]
        assert rows.dtype == dtype, (name, rows.dtype, dtype)
        position = offset + start * shape[-1] * dtype.itemsize
        with self._errors(name):
            _write_all(self._files[shard.name], memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8)), position)

    def commit(self, config: Mapping, copy_from: Path | None = None, texts: Mapping[str, str] | None = None) -> None:
        """Complete the directory and give it its name. `texts` are further small files by name."""
        with self._errors("the index"):
            for shard in self.shards:
                file = self._files.pop(shard.name)
                os.fsync(file)
                os.close(file)
                os.replace(self.aside / f"{shard.name}.incomplete", self.aside / shard.name)
            if len(self.shards) > 1:
                weight_map = {name: shard.name for shard in self.shards for name in shard.offsets}
                size = sum(shard.nbytes - len(shard.header) for shard in self.shards)
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                (self.aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
            for name in COPIED if copy_from else ():
                if (Path(copy_from) / name).is_file():
                    shutil.copyfile(_inside(Path(copy_from), name), self.aside / name)
            for name, text in (texts or {}).items():
                (self.aside / name).write_text(text)
            (self.aside / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
            if self.directory.exists():
                shutil.rmtree(self.directory)
            os.replace(self.aside, self.directory)

    def abort(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
        shutil.rmtree(self.aside, ignore_errors=True)

    def _errors(self, what: str) -> "_WriteErrors":
        return _WriteErrors(self, what)


class _WriteErrors:
    """An OSError while writing removes what was written and says what was going on."""

    def __init__(self, writer: SafetensorsWriter, what: str):
        self.writer, self.what = writer, what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            self.writer.abort()
            raise OSError(
                f"writing {self.what} to {self.writer.aside} failed: {error.strerror}. Nothing was left there; the whole "
                f"output needs {self.writer.nbytes / 1e9:.2f} GB."
            ) from error


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def _plan_shards(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], max_shard_size: int) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in tensors.items():
        nbytes = int(np.prod(shape)) * dtype.itemsize
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
            end = position + int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        start = 8 + len(text)
        offsets = {name: start + header[name]["data_offsets"][0] for name in names}
        shards.append(_Shard(file, len(text).to_bytes(8, "little") + text, offsets, start + position))
    return shards


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(_inside(directory, index.name))["weight_map"]
        files = {name: _inside(directory, name, f"{index} names a file") for name in sorted(set(weight_map.values()))}
        for name, file in files.items():
            if not file.exists():
                first = next(tensor for tensor, shard in weight_map.items() if shard == name)
                raise CheckpointError(f"{file} is missing ({index.name} says it holds {first!r}); download it again.")
    else:
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(_no_weights(directory))
        weight_map, files = None, {single.name: _inside(directory, single.name)}
    tensors = {}
    for name, file in files.items():
        found = _read_header(file)
        wanted = found if weight_map is None else [t for t, shard in weight_map.items() if shard == name]
        for tensor in wanted:
            if tensor not in found:
                raise CheckpointError(f"{file}: has no tensor {tensor!r}, which {index.name} says it holds.")
            if not IGNORED.match(tensor):
                tensors[tensor] = found[tensor]
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes); download it again.")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise CheckpointError(f"{file}: its header is not JSON; download it again.") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            if IGNORED.match(name):
                continue
            raise CheckpointError(
                f"{file}: {name} is {entry['dtype']}; weights must be {', '.join(DTYPES)}. Dequantise the model first."
            )
        begin, end = entry["data_offsets"]
        tensor = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
        if end - begin != tensor.nbytes or begin < 0:
            raise CheckpointError(f"{file}: {name} says {end - begin} bytes for shape {tensor.shape}; download it again.")
        if 8 + length + end > size:
            raise CheckpointError(f"{file}: truncated: {name} ends at byte {8 + length + end} of {size}; download it again.")
        tensors[name] = tensor
    return tensors


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if not pickles:
        return f"{directory}: neither model.safetensors nor model.safetensors.index.json is there."
    return (
        f"{directory}: {pickles[0]} is a pickle, which can run code when it is read. Convert it once, where you trust it: "
        f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{directory}', "
        f"torch_dtype='auto').save_pretrained('{directory}-safetensors')\" and copy the tokenizer files."
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
            f"{what or f'{path} leads'} outside the directory: {name!r} is {path.resolve()}. Copy the file into {directory}."
        )
    return path


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a Hugging Face model directory?") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}.") from None


def _write_all(file: int, view: memoryview, position: int, write: Callable = os.pwrite) -> None:
    while view.nbytes:
        count = write(file, view, position)
        view, position = view[count:], position + count
