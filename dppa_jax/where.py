"""Find and open a model by what a flag says of it: a directory, a hub id, `orbax:DIR` or `demo:NAME`."""

import os
import re
from contextlib import closing
from pathlib import Path

from dppa_jax.architecture.generic import GENERIC, Stated
from dppa_jax.architecture.specs import CheckpointError, tree_of
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.checkpoint.inside import COPIED
from dppa_jax.checkpoint.orbax import OrbaxDirectory, is_orbax
from dppa_jax.checkpoint.safetensors import SafetensorsDirectory
from dppa_jax.checkpoint.stacked import StoredArray
from dppa_jax.config.run import PREFIX, JobConfig
from dppa_jax.runtime import processes
from dppa_jax.runtime.reading import printable, read_json


def open_checkpoint(
    where: str | Path, seed: int = 0, weights: bool = True, stated: Stated | str | None = None
) -> Checkpoint:
    """Open a model to be read by row; see `locate` for the other arguments and errors.

    Args:
      stated: what its tensors are, as `stated_architecture` gives it; None for what the table of architectures says.

    Raises:
      CheckpointError: the directory is damaged, or not a model that can be merged.
    """
    directory = locate(where, seed, weights)
    return OrbaxDirectory(directory) if is_orbax(directory) else SafetensorsDirectory(directory, stated)


def stated_architecture(flag: str) -> Stated | str | None:
    """Read what --architecture gives: a file that states what the tensors are, `generic`, or nothing.

    Raises:
      CheckpointError: the file is missing, no JSON, or has other keys than `Stated`.
    """
    if not flag or flag == GENERIC:
        return flag or None
    fix = "It must have layers and linears, and may have vocabulary, copied and fused, as architecture.json of inspect."
    try:
        return read_json(Path(os.path.expanduser(flag)), Stated, fix=fix, error=CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"--architecture={flag}: no such file; --job=inspect writes one to start from.") from None


def locate(where: str | Path, seed: int = 0, weights: bool = True) -> Path:
    """Return the directory of a model; fetch it from the hub or train it first, where it is not there.

    Args:
      where: a directory, `orbax:DIR`, `demo:NAME`, or a hub id: `owner/name` or `owner/name@revision`.
      seed: of the demo family.
      weights: also fetch the weights of a hub id. Without them, config.json is enough for a plan.

    Raises:
      CheckpointError: there is no such directory, it is of another format, or the hub does not give it.
      ValueError: the demo family has no such member.
    """
    text = str(where)
    if text.startswith("demo:"):
        from dppa_jax import demo

        return demo.directory(text.removeprefix("demo:"), seed)
    path = Path(os.path.expanduser(text.removeprefix(PREFIX)))
    shown = printable(text)
    if path.is_dir() and text.startswith(PREFIX) and not is_orbax(path):
        raise CheckpointError(
            f"{shown}: {path} is not an Orbax checkpoint of a tree; --job=convert --base=WHERE --output={PREFIX}DIR "
            f"makes one. Give a Hugging Face directory without {PREFIX}. In the directory of an Orbax "
            f"CheckpointManager, give the item of a step: {PREFIX}DIR/STEP/default."
        )
    if path.is_dir():
        return path
    if path.is_symlink():
        raise CheckpointError(f"{shown} is a link to {path.readlink()}, where no directory is.")
    if text.startswith(PREFIX):
        raise CheckpointError(f"{shown}: no such directory. Check the path after {PREFIX}.")
    if path.exists():
        raise CheckpointError(f"{shown} is a file; give the directory that holds it and config.json.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not text.startswith((".", "/")):
        return _from_hub(text, weights)
    raise CheckpointError(f"{shown}: no such directory, and not of the form owner/name of a hub id.")


def _from_hub(text: str, weights: bool) -> Path:
    """Fetch a model from the hub, unless the hub's cache has it; never a pickle, never a file of code."""
    from huggingface_hub import snapshot_download

    repository, _, revision = text.partition("@")
    patterns = ["config.json", "*.index.json", "README.md", *COPIED]
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=patterns + ["*.safetensors"] * bool(weights)
            )
        )
    except Exception as error:  # the hub raises many kinds: no network, no such repository, gated, not logged in
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise CheckpointError(
            f"{text}: no such directory, and fetching it from the hub failed: {type(error).__name__}: {reason} Check "
            f"the name, the network and, for a gated model, HF_TOKEN; or download it elsewhere and give its directory."
        ) from error


def load_tree(where: str | Path, seed: int = 0) -> tuple[dict, dict]:
    """Read a model: return the content of config.json, and the tree of numpy arrays with decoder layers stacked.

    dppa_jax/model/README.md shows the tree. An array has the dtype of its tensors, and float32 where the layers have
    different dtypes. Arguments and errors are those of `open_checkpoint`.
    """
    with closing(open_checkpoint(where, seed)) as source:
        return source.config, tree_of(source.specs.values(), lambda group: StoredArray(source, group).read())


def load(where: str | Path, seed: int = 0) -> Model:
    """Read a model into memory.

    Args:
      where: a directory, a hub id (`owner/name`, `owner/name@revision`), `orbax:DIR`, or one of `demo:base`,
        `demo:math`, `demo:finance` and `demo:law`.
      seed: of the demo family.

    Raises:
      CheckpointError: there is no such model, or it is damaged or of an architecture that is not supported.
    """
    directory = locate(where, seed)
    return Model(*load_tree(directory), directory)


def open_models(job: JobConfig, weights: bool = True) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Open the base and the experts of a job.

    Args:
      job: says where the models are.
      weights: fetch the weights of hub ids. Without them, a model whose weights are not here is an error.
    """
    seed = job.merge.seed
    with processes.first_alone("models"):  # process 0 fetches or builds what the others then find
        options = seed, weights, stated_architecture(job.architecture)
        base = open_checkpoint(job.base, *options)
        return base, {name: open_checkpoint(where, *options) for name, where in job.experts.items()}
