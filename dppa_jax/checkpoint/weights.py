"""The weights of a Hugging Face directory: which of its files hold them, or what is there in their place."""

import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

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
ADAPTER = "is an adapter, not a model: merge it into its base, with peft's merge_and_unload().save_pretrained(DIR)."
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


def has_weights(directory: Path) -> bool:
    """Return whether weights seem to be there."""
    return any(os.path.lexists(directory / name) for name in (SINGLE, INDEX))


def find_tensors(directory: Path, heads: Container[str] = ()) -> dict[str, StoredTensor]:
    """Return every tensor of a directory by name, from one file or from shards.

    Args:
      heads: those that are the embeddings; an index may list them although no shard has them.

    Raises:
      CheckpointError: there are no weights, or two sets of them; a file is missing, damaged or outside the directory.
    """
    if os.path.lexists(directory / INDEX):
        weight_map = _weight_map(directory)
        tensors, files = _listed(directory, weight_map, heads), set(weight_map.values())
    elif os.path.lexists(directory / SINGLE):
        tensors, files = read_header(readable(directory, SINGLE)), {SINGLE}
    else:
        raise CheckpointError(_no_weights(directory))
    _tell_unread(directory, files)
    return {name: tensor for name, tensor in tensors.items() if not IGNORED.match(name)}


def _weight_map(directory: Path) -> Mapping[str, str]:
    """Return the file of each tensor as the index says, unless there is another set of weights beside these."""
    fix = "It must have a weight_map from tensors to files; download it again."
    weight_map = read_json(inside(directory, INDEX), Index, MAX_INDEX, fix, CheckpointError).weight_map
    if os.path.lexists(directory / SINGLE) and SINGLE not in weight_map.values():
        raise CheckpointError(
            f"{directory} holds two sets of weights: {SINGLE}, and the shards that {INDEX} names. Some programs read "
            f"the one, some the other. Remove the set that is not meant: {SINGLE}, or {INDEX} with its shards."
        )
    return weight_map


def _listed(directory: Path, weight_map: Mapping[str, str], heads: Container[str]) -> dict[str, StoredTensor]:
    """Return the tensors that the index lists."""
    index = directory / INDEX
    tensors, headers = {}, {}
    for name, shard in weight_map.items():
        if shard not in headers:
            file = inside(directory, shard, index)
            if not os.path.lexists(file):
                raise CheckpointError(
                    f"{shown(str(file))} is missing ({INDEX} says it holds {shown(name)!r}); download it again."
                )
            headers[shard] = read_header(readable(directory, shard, index))
        if name in headers[shard]:
            tensors[name] = headers[shard][name]
        elif name not in heads and not IGNORED.match(name):
            raise CheckpointError(
                f"{directory / shard}: has no tensor {shown(name)!r}, which {INDEX} says it holds; download both again."
            )
    return tensors


def _tell_unread(directory: Path, files: Iterable[str]) -> None:
    """Name safetensors files that hold none of the weights, such as consolidated.safetensors or shards of before."""
    read = {os.path.normpath(file) for file in files}
    if unread := sorted(path.name for path in directory.glob("*.safetensors") if path.name not in read):
        names = ", ".join(map(printable, unread[:3])) + ", …" * (len(unread) > 3)
        logging.warning("%s: not read, as the weights are in other files: %s", directory, names)


def _no_weights(directory: Path) -> str:
    """Say what is in a directory in place of weights, and what to do."""
    if any(directory.glob("adapter_*")):
        return f"{directory} {ADAPTER}"
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles := [name for name in pickles if not NO_MODEL.fullmatch(name)]:
        return (
            f"{directory}: {printable(pickles[0])} is a pickle, which can run code when it is read. Convert it once, "
            f'if you trust it: python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('
            f"'{directory}', dtype='auto').save_pretrained('{directory}-safetensors')\" and copy the tokenizer files."
        )
    absent = f"{directory}: neither {SINGLE} nor {INDEX} is there"
    for pattern, fix in IN_PLACE:
        if found := sorted(directory.glob(pattern)):
            return f"{absent}; {printable(str(found[0].relative_to(directory)))} {fix}."
    return f"{absent}; give the directory that holds the weights, or download them."
