"""The weights of a model in Hugging Face's layout: which of its files hold them, or what is there in their place."""

import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec
from absl import logging

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.architecture.table import IGNORED
from dppa_jax.checkpoint.headers import StoredTensor, read_header, shown
from dppa_jax.checkpoint.inside import inside, readable
from dppa_jax.runtime.reading import printable, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX = 8_000_000  # bytes; a model of 128 experts in 94 layers has half of that
ADAPTER = (
    "is an adapter, not a model: give it behind the model that it was made for, as BASE+ADAPTER, or merge it into that "
    "before, with peft's merge_and_unload()."
)
IN_PLACE = (  # what may be in a directory in place of weights, and what to do then; the first that is there counts
    ("model-*-of-*.safetensors", f"is a shard, and {INDEX} says what is in which: fetch it from where the shards came"),
    ("zero_to_fp32.py", "puts the weights of a DeepSpeed checkpoint together: run it with --safe_serialization"),
    ("consolidated*.safetensors", "has Mistral's own names of tensors: take the files for transformers"),
    ("*.safetensors", f"has another name than {SINGLE}: rename it, if it holds all weights of the model"),
    ("*.gguf", "is for llama.cpp: take the safetensors that it was made from"),
    ("checkpoint-*/config.json", "belongs to a checkpoint of a training run: give the directory of that checkpoint"),
)
NO_MODEL = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*)\.(bin|pt|pth)")


class Index(msgspec.Struct):
    """What is read of an index: the file of each tensor."""

    weight_map: dict[str, str]


@runtime_checkable
class Files(Protocol):
    """The files of a model, among which its weights are looked for: in a directory, or on the hub.

    Attributes:
      directory: where the small files are.
      place: the directory or the repository, as messages call it.
      quantised: are headers with the dtypes of quantised weights read?
    """

    directory: Path
    place: Path
    quantised: bool

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""

    def matching(self, pattern: str) -> list[str]:
        """Return the names that match a pattern, sorted; each "/" of a name must be in the pattern."""

    def headers(self, names: Iterable[str], named_by: Path | None = None) -> dict[str, dict[str, StoredTensor]]:
        """Read the headers of files; return the tensors by name, by file. `named_by` is as for `inside`."""


class LocalFiles:
    """The files of a directory."""

    def __init__(self, directory: Path, quantised: bool = False):
        self.directory, self.place, self.quantised = directory, directory, quantised

    def has(self, name: str) -> bool:
        """Return whether there is such a file, or a link."""
        return os.path.lexists(self.directory / name)

    def matching(self, pattern: str) -> list[str]:
        """Return the names that match a pattern, sorted."""
        return sorted(str(path.relative_to(self.directory)) for path in self.directory.glob(pattern))

    def headers(self, names: Iterable[str], named_by: Path | None = None) -> dict[str, dict[str, StoredTensor]]:
        """Read the headers of files; see `Files`."""
        return {name: read_header(readable(self.directory, name, named_by), self.quantised) for name in names}


def has_weights(directory: Path) -> bool:
    """Return whether weights seem to be there."""
    return any(os.path.lexists(directory / name) for name in (SINGLE, INDEX))


def has_all_weights(directory: Path) -> bool:
    """Return whether the weights are there, and all shards that the index names.

    Raises:
      CheckpointError: there are two sets of weights, or the index is damaged.
    """
    files = LocalFiles(directory)
    names = set(_weight_map(files).values()) if files.has(INDEX) else {SINGLE}
    return all(os.path.exists(directory / name) for name in names)


def find_tensors(files: Files, heads: Container[str] = ()) -> dict[str, StoredTensor]:
    """Return every tensor of a model by name, from one file or from shards.

    Args:
      heads: those that are the embeddings; an index may list them although no shard has them.

    Raises:
      CheckpointError: there are no weights, or two sets of them; a file is missing, damaged or outside the directory.
    """
    if files.has(INDEX):
        weight_map = _weight_map(files)
        tensors, names = _listed(files, weight_map, heads), set(weight_map.values())
    elif files.has(SINGLE):
        tensors, names = files.headers([SINGLE])[SINGLE], {SINGLE}
    else:
        raise CheckpointError(_no_weights(files))
    _tell_unread(files, names)
    return {name: tensor for name, tensor in tensors.items() if not IGNORED.match(name)}


def _weight_map(files: Files) -> Mapping[str, str]:
    """Return the file of each tensor as the index says, unless there is another set of weights beside these."""
    fix = "It must have a weight_map from tensors to files; download it again."
    weight_map = read_json(inside(files.directory, INDEX), Index, MAX_INDEX, fix, CheckpointError).weight_map
    if files.has(SINGLE) and SINGLE not in weight_map.values():
        raise CheckpointError(
            f"{files.place} holds two sets of weights: {SINGLE}, and the shards that {INDEX} names. Some programs read "
            f"the one, some the other. Remove the set that is not meant: {SINGLE}, or {INDEX} with its shards."
        )
    return weight_map


def _listed(files: Files, weight_map: Mapping[str, str], heads: Container[str]) -> dict[str, StoredTensor]:
    """Return the tensors that the index lists."""
    index = files.directory / INDEX
    first_tensors: dict[str, str] = {}
    for name, shard in weight_map.items():
        first_tensors.setdefault(shard, name)
    for shard, name in first_tensors.items():
        inside(files.directory, shard, index)
        if not files.has(shard):
            raise CheckpointError(
                f"{shown(str(files.place / shard))} is missing ({INDEX} says it holds {shown(name)!r}); download it "
                f"again."
            )
    headers = files.headers(first_tensors, index)
    tensors = {}
    for name, shard in weight_map.items():
        if name in headers[shard]:
            tensors[name] = headers[shard][name]
        elif name not in heads and not IGNORED.match(name):
            raise CheckpointError(
                f"{files.place / shard}: has no tensor {shown(name)!r}, which {INDEX} says it holds; download both "
                f"again."
            )
    return tensors


def _tell_unread(files: Files, names: Iterable[str]) -> None:
    """Name safetensors files that hold none of the weights, such as consolidated.safetensors or shards of before."""
    read = {os.path.normpath(name) for name in names}
    if unread := [name for name in files.matching("*.safetensors") if name not in read]:
        some = ", ".join(map(printable, unread[:3])) + ", …" * (len(unread) > 3)
        logging.warning("%s: not read, as the weights are in other files: %s", files.place, some)


def _no_weights(files: Files) -> str:
    """Say what is there in place of weights, and what to do."""
    if files.matching("adapter_*"):
        return f"{files.place} {ADAPTER}"
    pickles = sorted(name for pattern in ("*.bin", "*.pt", "*.pth") for name in files.matching(pattern))
    place = files.place
    if pickles := [name for name in pickles if not NO_MODEL.fullmatch(name)]:
        return (
            f"{place}: {printable(pickles[0])} is a pickle, which can run code when it is read. Convert it once, "
            f'if you trust it: python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('
            f"'{place}', dtype='auto').save_pretrained('{place}-safetensors')\" and copy the tokenizer files."
        )
    absent = f"{place}: neither {SINGLE} nor {INDEX} is there"
    for pattern, fix in IN_PLACE:
        if found := files.matching(pattern):
            return f"{absent}; {printable(found[0])} {fix}."
    return f"{absent}; give the directory that holds the weights, or download them."
