"""Find and open a model by what a flag says of it.

That is a directory, a hub id, `orbax:DIR`, `demo:NAME`, BASE+ADAPTER, or `layers:MODEL[FIRST:END],MODEL[FIRST:END]`.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from absl import logging

from dppa_jax.architecture.generic import GENERIC, Stated
from dppa_jax.architecture.specs import CheckpointError, TensorSpec, layer_count, tensor_specs
from dppa_jax.checkpoint import Checkpoint, read_config
from dppa_jax.checkpoint.adapter import CONFIG, Adapter, is_adapter
from dppa_jax.checkpoint.hub import HUB_ID, HubError, HubModel, check_room, fetch_adapter, fetch_small_files
from dppa_jax.checkpoint.in_memory import Model, in_memory
from dppa_jax.checkpoint.lora import Adapted, AdaptedHeaders
from dppa_jax.checkpoint.orbax import OrbaxDirectory, is_orbax
from dppa_jax.checkpoint.safetensors import SafetensorsDirectory
from dppa_jax.checkpoint.spliced import Run, Spliced, SplicedHeaders, spliced_config
from dppa_jax.checkpoint.tokenizer import has_tokenizer
from dppa_jax.checkpoint.weights import has_all_weights
from dppa_jax.config.run import PREFIX, JobConfig
from dppa_jax.merging.configs import compare_configs
from dppa_jax.runtime import processes
from dppa_jax.runtime.reading import printable, read_json

Looked = Checkpoint | HubModel | AdaptedHeaders | SplicedHeaders  # a model that is open, or on the hub and looked at
LAYERS = "layers:"  # what a model of layers of others begins with
RUN = re.compile(r"(.+?)\[(\d{1,5}):(\d{1,5})\](?:,|$)")


@dataclass(frozen=True)
class ConfigAlone:
    """A model of which config.json is all that could be read."""

    directory: Path
    config: dict

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that config.json promises, by name."""
        return tensor_specs(self.config)


def open_checkpoint(
    where: str | Path, seed: int = 0, stated: Stated | str | None = None, dequantise: bool = False
) -> Checkpoint:
    """Open a model to be read by row; see `look` for the arguments and errors."""
    return _with_weights(look(where, seed, stated, dequantise))


def look(where: str | Path, seed: int = 0, stated: Stated | str | None = None, dequantise: bool = False) -> Looked:
    """Open a model; if it is on the hub and not in the cache, read its config.json and headers, and no weights.

    Other arguments and errors are those of `locate`.

    Args:
      stated: what its tensors are, as `stated_architecture` gives it; None for what the table of architectures says.
      dequantise: read quantised weights as bfloat16.

    Raises:
      CheckpointError: the model is damaged, or not one that can be merged.
    """
    if runs := runs_of(where):
        return _spliced({place: look(place, seed, stated, dequantise) for place in runs}, where)
    base, adapter = parts_of(where)
    if adapter:
        return _adapted(look(base, seed, stated, dequantise), adapter)
    return _look(where, locate(where, seed, weights=False), stated, dequantise)


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


def look_for_plan(
    where: str | Path, seed: int = 0, stated: Stated | str | None = None, dequantise: bool = False
) -> Looked | ConfigAlone:
    """Look at a model as `look` does; where neither weights nor headers can be read, its config.json is enough."""
    if runs := runs_of(where):
        models = {place: look_for_plan(place, seed, stated, dequantise) for place in runs}
        return _spliced(models, where)
    base, adapter = parts_of(where)
    if adapter:
        planned = look_for_plan(base, seed, stated, dequantise)
        return planned if isinstance(planned, ConfigAlone) else _adapted(planned, adapter)
    directory = locate(where, seed, weights=False)
    if is_orbax(directory) or has_all_weights(directory):
        return _look(where, directory, stated, dequantise)
    if _is_on_hub(where):
        try:
            return _look(where, directory, stated, dequantise)
        except HubError as error:
            logging.warning("%s: planned from config.json alone: %s", where, error)
    return ConfigAlone(directory, read_config(directory))


def open_all(
    places: Mapping[str, str],
    seed: int = 0,
    check: Callable[[dict[str, Looked]], None] | None = None,
    stated: Stated | str | None = None,
    dequantise: bool = False,
) -> dict[str, Checkpoint]:
    """Open models by name. All are looked at before the weights of one are fetched.

    Args:
      places: where each is; see `with_bases` and `locate`.
      seed: of the demo family.
      check: refuses what cannot work; it gets what `look` returned, by name.
      stated, dequantise: see `look`.
    """
    looked: dict[str, Looked] = {}
    for name, where in with_bases(places).items():
        base, adapter = parts_of(where)
        shared = looked.get("base") if adapter and base == places.get("base") else None
        looked[name] = _adapted(shared, adapter) if shared else look(where, seed, stated, dequantise)
    if check:
        check(looked)
    check_room(looked.values())
    return {name: _with_weights(model) for name, model in looked.items()}


def with_bases(places: Mapping[str, str]) -> dict[str, str]:
    """Return where models are, by name; the base of an adapter that is given alone is the model called "base"."""
    base = places.get("base", "")
    alone = {name for name, where in places.items() if base and name != "base" and _is_adapter(where)}
    return {name: f"{base}+{where}" if name in alone else where for name, where in places.items()}


def parts_of(where: str | Path) -> tuple[str, str]:
    """Return the places of a model and of its adapter, BASE+ADAPTER; without an adapter the second is empty.

    A + may also be part of the name of a directory.
    """
    text = str(where)
    if "+" not in text or text.startswith(LAYERS) or os.path.lexists(os.path.expanduser(text.removeprefix(PREFIX))):
        return text, ""
    pairs = [(text[:at], text[at + 1 :]) for at, character in enumerate(text) if character == "+"]
    found = next((pair for pair in pairs if os.path.lexists(os.path.expanduser(pair[1]))), pairs[-1])
    if not all(found):
        raise CheckpointError(f"{printable(text)}: give BASE+ADAPTER, a model and an adapter of it.")
    return found


def runs_of(where: str | Path) -> dict[str, list[tuple[int, int, int]]]:
    """Return the runs of layers that `layers:` names, by where their models are; {} of any other place.

    Each run has its place among all, its first layer and the one after its last.

    >>> runs_of("layers:models/a[0:24],owner/b[8:32],models/a[30:32]")
    {'models/a': [(0, 0, 24), (2, 30, 32)], 'owner/b': [(1, 8, 32)]}
    """
    text = str(where)
    if not text.startswith(LAYERS):
        return {}
    text = text.removeprefix(LAYERS)
    found = list(RUN.finditer(text))
    if "".join(one[0] for one in found) != text or not found or text.endswith(","):
        raise CheckpointError(
            f"{printable(str(where))}: give {LAYERS}MODEL[FIRST:END],MODEL[FIRST:END], layers that are counted from 0, "
            f"END not among them."
        )
    runs: dict[str, list[tuple[int, int, int]]] = {}
    for place, (model, first, last) in enumerate(one.groups() for one in found):
        runs.setdefault(model, []).append((place, int(first), int(last)))
    return runs


def locate(where: str | Path, seed: int = 0, weights: bool = True) -> Path:
    """Return the directory of a model; fetch it from the hub or train it first, where it is not there.

    A model with an adapter has the directory of its tokenizer: the adapter's, if it has one, or the base's.

    Args:
      where: a directory, `orbax:DIR`, `demo:NAME`, a hub id (`owner/name` or `owner/name@revision`), BASE+ADAPTER, or
        `layers:`, for the directory of the first model's tokenizer.
      seed: of the demo family.
      weights: also fetch the weights of a hub id. Without them, the directory has the small files.

    Raises:
      CheckpointError: there is no such directory, it is of another format, or the hub does not give it.
      ValueError: the demo family has no such member.
    """
    text = str(where)
    if runs := runs_of(where):
        return locate(next(iter(runs)), seed, weights)
    base, adapter = parts_of(where)
    if adapter:
        directory = _adapter_directory(adapter)
        return directory if has_tokenizer(directory) else locate(base, seed, weights)
    if _is_on_hub(where):
        return open_checkpoint(where).directory if weights else fetch_small_files(text)
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
    raise CheckpointError(f"{shown}: no such directory, and not of the form owner/name of a hub id.")


def hub_ids(places: Iterable[str]) -> list[str]:
    """Return the hub ids in what says where models are, each once, without revisions.

    >>> hub_ids(["layers:owner/a[0:2],owner/b@main[1:4]", "owner/a+owner/adapter", "/models/mine"])
    ['owner/a', 'owner/b', 'owner/adapter']
    """
    found: dict[str, None] = {}
    for where in places:
        parts = [*runs_of(where)] or [part for part in parts_of(where) if part]
        own = [where.partition("@")[0]] if _is_on_hub(where) else []
        found |= dict.fromkeys(own if parts == [where] else hub_ids(parts))
    return list(found)


def _is_on_hub(where: str | Path) -> bool:
    """Return whether this is a hub id, and nothing of that name is here."""
    text = str(where)
    return bool(HUB_ID.fullmatch(text)) and not text.startswith(".") and not os.path.lexists(text)


def _look(where: str | Path, directory: Path, stated: Stated | str | None, dequantise: bool) -> Looked:
    """Open what `locate` found, or look at it on the hub."""
    if is_orbax(directory):
        return OrbaxDirectory(directory)
    if _is_on_hub(where) and not has_all_weights(directory):
        return HubModel(str(where), directory, stated, dequantise)
    return SafetensorsDirectory(directory, stated, dequantise)


def _with_weights(model: Looked) -> Checkpoint:
    """Fetch the weights of a model on the hub; any other has them."""
    return model if hasattr(model, "read_rows") else model.fetch()


def _adapted(base: Looked, adapter: str) -> AdaptedHeaders:
    """Put the adapter that lies at a place onto a base, whose weights may not be here yet."""
    opened = Adapter(_adapter_directory(adapter))
    return (Adapted if hasattr(base, "read_rows") else AdaptedHeaders)(base, opened)


def _spliced(models: Mapping[str, Looked | ConfigAlone], where: str | Path) -> Looked | ConfigAlone:
    """Make one model of the layers that `layers:` names; one run of all layers of a model is that model.

    Args:
      models: by where they are; weights may not be here yet.
    """
    opened, runs = list(models.values()), {}
    for model, own in enumerate(runs_of(where).values()):
        runs |= {place: Run(model, first, last) for place, first, last in own}
    taken = [runs[place] for place in sorted(runs)]
    if len(taken) == 1 and (taken[0].first, taken[0].last) == (0, layer_count(opened[0].specs)):
        return opened[0]
    shown = printable(str(where))
    if any(isinstance(model, ConfigAlone) for model in opened):
        config = spliced_config([model.config for model in opened], taken, shown)
        return ConfigAlone(opened[taken[0].model].directory, config)
    for place, model in models.items():
        compare_configs(opened[taken[0].model].config, model.config, place)
    readable = all(hasattr(model, "read_rows") for model in opened)
    return (Spliced if readable else SplicedHeaders)(opened, taken, shown)


def _adapter_directory(where: str) -> Path:
    """Return the directory of an adapter; fetch it from the hub, if it is there.

    Raises:
      CheckpointError: there is no such directory, or no adapter in it.
    """
    directory = fetch_adapter(where) if _is_on_hub(where) else Path(os.path.expanduser(where))
    if not os.path.lexists(directory / CONFIG):
        raise CheckpointError(
            f"{printable(where)}: no {CONFIG} is there, which an adapter has; a place with a + is BASE+ADAPTER."
        )
    return directory


def _is_adapter(where: str) -> bool:
    """Return whether an adapter, and no model, is at a place."""
    if where.startswith(LAYERS):
        return False
    return is_adapter(fetch_small_files(where) if _is_on_hub(where) else Path(os.path.expanduser(where)))


def load_tree(where: str | Path, seed: int = 0) -> tuple[dict, dict]:
    """Read a model: return the content of config.json, and the tree of numpy arrays with decoder layers stacked.

    dppa_jax/model/README.md shows the tree. An array has the dtype of its tensors, and float32 where the layers have
    different dtypes. Arguments and errors are those of `open_checkpoint`.
    """
    model = load(where, seed)
    return model.config, model.tree


def load(where: str | Path, seed: int = 0) -> Model:
    """Read a model into memory.

    Args:
      where: a directory, a hub id (`owner/name`, `owner/name@revision`), `orbax:DIR`, one of `demo:base`, `demo:math`,
        `demo:finance` and `demo:law`, BASE+ADAPTER, or layers of models: `layers:MODEL[0:24],MODEL[8:32]`.
      seed: of the demo family.

    Raises:
      CheckpointError: there is no such model, or it is damaged or of an architecture that is not supported.
    """
    with closing(open_checkpoint(where, seed)) as source:
        return in_memory(source)


def open_models(
    job: JobConfig, check: Callable[[dict[str, Looked]], None] | None = None
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Open the base and the experts of a job, of which a hub id is the same commit in every process.

    Args:
      job: says where the models are.
      check: see `open_all`; the base is called "base".
    """
    places = {"base": job.base, **job.experts}
    pinned = processes.of_first("commits", lambda: {n: _pinned(where) for n, where in places.items()}, dict[str, str])
    with processes.first_alone("models"):  # process 0 fetches or builds what the others then find
        models = open_all(pinned, job.merge.seed, check, stated_architecture(job.architecture), job.dequantise)
    return models.pop("base"), models


def _pinned(where: str) -> str:
    """Return a hub id with the commit that its revision is now; any other place as it is."""
    if runs_of(where):
        return LAYERS + RUN.sub(lambda run: run[0].replace(run[1], _pinned(run[1]), 1), where.removeprefix(LAYERS))
    base, adapter = parts_of(where)
    if adapter:
        return f"{_pinned(base)}+{_pinned(adapter)}"
    if not _is_on_hub(where):
        return where
    return f"{where.partition('@')[0]}@{fetch_small_files(where).name}"
