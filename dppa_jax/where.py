"""TODO."""

import re
from contextlib import closing
from pathlib import Path

from dppa_jax.architecture.specs import (
    CheckpointError,
    tree_of,
)
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.checkpoint.orbax import OrbaxDirectory, is_orbax
from dppa_jax.checkpoint.safetensors import COPIED, SafetensorsDirectory
from dppa_jax.config.run import PREFIX, JobConfig
from dppa_jax.runtime import processes


def open_checkpoint(where: str | Path, seed: int = 0, weights: bool = True) -> Checkpoint:
    """A model given as `locate` takes it, open to be read lazily."""
    directory = locate(where, seed, weights)
    return OrbaxDirectory(directory) if is_orbax(directory) else SafetensorsDirectory(directory)


def locate(where: str | Path, seed: int = 0, weights: bool = True) -> Path:
    """The directory of a model given as a directory, `orbax:DIR`, `demo:NAME` or a hub id.

    It is fetched or built when needed. With weights=False only the small files of a hub id are: enough for a plan.
    """
    text = str(where)
    if text.startswith("demo:"):
        from dppa_jax import demo

        return demo.directory(text.removeprefix("demo:"), seed)
    path = Path(text.removeprefix(PREFIX)).expanduser()
    if path.is_dir() and text.startswith(PREFIX) and not is_orbax(path):
        raise CheckpointError(
            f"{text}: {path} is not an Orbax checkpoint of a tree; --job=convert --base=WHERE --output={PREFIX}DIR "
            f"makes one. A Hugging Face directory is given without {PREFIX}, and of a CheckpointManager's directory "
            f"the item of a step: {PREFIX}DIR/STEP/default."
        )
    if path.is_dir():
        return path
    if text.startswith(PREFIX):
        raise CheckpointError(f"{text}: no such directory: {path}.")
    if path.exists():
        raise CheckpointError(f"{text} is a file; give the directory that holds it and config.json.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not text.startswith((".", "/")):
        return _from_hub(text, weights)
    raise CheckpointError(f"{text}: no such directory, and not of the form owner/name of a hub id.")


def _from_hub(text: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = text.partition("@")
    wanted = ["config.json", "*.index.json", "README.md", *COPIED]
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=wanted + ["*.safetensors"] * bool(weights)
            )
        )
    except Exception as error:  # the hub raises many kinds: no network, no such repository, gated, not logged in
        said = (str(error).strip() or "no message").splitlines()[0]
        raise CheckpointError(
            f"{text}: no such directory, and fetching it from the hub failed: {type(error).__name__}: {said} Check the "
            f"name, the network and, for a gated model, HF_TOKEN; or download it elsewhere and give its directory."
        ) from error


def load_tree(where: str | Path, seed: int = 0) -> tuple[dict, dict]:
    """config.json and the tree of numpy arrays, decoder layers stacked; see the README for the tree.

    An array has its tensors' dtype, and float32 where the layers' differ.
    """
    from dppa_jax.checkpoint.stacked import StoredArray  # which needs this package

    with closing(open_checkpoint(where, seed)) as source:
        return source.config, tree_of(source.specs.values(), lambda group: StoredArray(source, group).read())


def load(where: str | Path, seed: int = 0) -> Model:
    """Read a model: a directory, a hub id, or demo:base, demo:math, demo:finance, demo:law (of a seed)."""
    directory = locate(where, seed)
    return Model(*load_tree(directory), directory)


def open_models(job: JobConfig, weights: bool = True) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Base and experts; without `weights` nothing large is fetched, and models that are not here are an error."""
    seed = job.merge.seed
    with processes.first_alone("models"):  # it fetches or builds what the others then find
        base = open_checkpoint(job.base, seed, weights)
        return base, {name: open_checkpoint(where, seed, weights) for name, where in job.experts.items()}
