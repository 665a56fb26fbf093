"""Models on the hub: first the small files and the headers of the weights, then, if all is well, the weights.

Headers are read by requests for the first bytes of each file, so that a model of 140 GB can be refused after some
hundred KB. Every request names the same commit, whatever is pushed to the repository meanwhile.
"""

import glob
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from absl import logging

from dppa_jax.architecture.generic import Stated
from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.adapter import WEIGHTS
from dppa_jax.checkpoint.headers import AGAIN, StoredTensor, header_of
from dppa_jax.checkpoint.inside import COPIED
from dppa_jax.checkpoint.lora import AdaptedHeaders
from dppa_jax.checkpoint.output import check_space
from dppa_jax.checkpoint.safetensors import SafetensorsDirectory, SafetensorsHeaders
from dppa_jax.checkpoint.spliced import SplicedHeaders
from dppa_jax.runtime.memory import size_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
COMMIT = re.compile("[0-9a-f]{40}")
SMALL = ["config.json", "adapter_config.json", "*.index.json", "README.md", *COPIED]  # patterns; no pickle, no code
FIRST = 100_000  # bytes of a file that the first request asks for: most headers are smaller
REQUESTS = 8  # at a time
ON_THE_HUB = "the hub has it so: take another revision (owner/name@REVISION)"
ROOM = "the weights from the hub, and the output, need"
ELSEWHERE = "set HF_HUB_CACHE to a directory on another disk"


def fetch_small_files(where: str) -> Path:
    """Return the directory, in the hub's cache, of a model's small files; fetch those that are not there.

    The name of the directory is the commit.

    Args:
      where: owner/name, or owner/name@revision.

    Raises:
      HubError: the hub does not give them, and the cache has no such model.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from tqdm.auto import tqdm

    class NoBar(tqdm):  # there is a line of log in its place
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": True})

    repository, _, revision = where.partition("@")
    cached = COMMIT.fullmatch(revision) and try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(cached, str):
        logging.info("%s: looking on the hub for its commit, config.json and tokenizer", where)
    with _asking(where):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=SMALL, tqdm_class=NoBar))


def fetch_adapter(where: str) -> Path:
    """Return the directory, in the hub's cache, of an adapter with its weights; see `fetch_small_files`."""
    from huggingface_hub import snapshot_download

    directory = fetch_small_files(where)
    with _asking(where):
        snapshot_download(where.partition("@")[0], revision=directory.name, allow_patterns=[WEIGHTS])
    return directory


class HubError(CheckpointError):
    """The hub does not give what was asked for, and the cache does not have it."""


class HubModel(SafetensorsHeaders):
    """A model on the hub whose weights are not all in the cache: what its config.json and headers say.

    Args:
      where: owner/name, or owner/name@revision.
      directory: its small files, as `fetch_small_files` returned it.
      stated, dequantise: see `SafetensorsDirectory`.

    Attributes:
      where: owner/name@COMMIT, as messages call it.
      names: of the files that hold the weights.
      missing: bytes that are to be fetched, by name of the file.

    Raises:
      HubError: the hub does not answer.
      CheckpointError: a file is missing or damaged, or there are only pickles.
    """

    def __init__(self, where: str, directory: Path, stated: Stated | str | None = None, dequantise: bool = False):
        self.repository, self.commit = where.partition("@")[0], directory.name
        self.where = f"{self.repository}@{self.commit[:7]}"
        logging.info("%s: reading the headers of its weights on the hub", self.where)
        files = _HubFiles(self.repository, directory, dequantise)
        super().__init__(files, stated)
        self.names = sorted({str(f.relative_to(files.place)) for tensor in self.tensors.values() for f in tensor.files})
        found = {name: files.files[name] for name in self.names}
        self.missing = {name: file.size for name, file in found.items() if not _is_cached(directory, name, file)}

    @property
    def nbytes(self) -> int:
        """Bytes that are to be fetched."""
        return sum(self.missing.values())

    def fetch(self) -> SafetensorsDirectory:
        """Fetch the weights, and open the directory that then has them.

        Raises:
          OSError: the disk of the hub's cache has too little room.
          HubError: the hub does not give them.
          CheckpointError: they are others than the headers said.
        """
        from huggingface_hub import snapshot_download

        check_room([self])
        logging.info("%s: fetching %s of weights into %s", self.where, size_text(self.nbytes), self.directory)
        patterns = [glob.escape(name) for name in self.names]
        with _asking(self.where):
            snapshot_download(self.repository, revision=self.commit, allow_patterns=patterns)
        found = SafetensorsDirectory(self.directory, self._given, self.is_dequantised)
        if not _layout(found.tensors) <= _layout(self.tensors):
            raise CheckpointError(
                f"{self.where}: the weights that came have other headers than the hub showed before; remove "
                f"{self.directory}, and fetch them again."
            )
        return found

    def close(self) -> None:
        """Do nothing: no file is open."""


def check_room(models: Iterable[Any], outputs: Mapping[Path, int] | None = None) -> None:
    """Refuse weights that are to be fetched, and outputs, for which the disks have too little room.

    Args:
      models: those that are not on the hub, or in the cache already, need no room.
      outputs: bytes by directory.

    Raises:
      OSError: a disk has too little room; says how much is needed.
    """
    sizes = _to_fetch(models)
    if any(sizes.values()):
        check_space({**sizes, **(outputs or {})}, ROOM, ELSEWHERE)


def bytes_to_fetch(models: Iterable[Any]) -> int:
    """Return how many bytes of weights are to be fetched from the hub for models, of which several may be the same."""
    return sum(_to_fetch(models).values())


def _to_fetch(models: Iterable[Any]) -> dict[Path, int]:
    """Return the bytes that are to be fetched, by directory."""
    bases = [base for model in models for base in _bases(model)]
    return {model.directory: model.nbytes for model in bases if isinstance(model, HubModel)}


def _bases(model: Any) -> list[Any]:
    """Return the models that adapters were put onto, and those whose layers are taken; any other is its own."""
    if isinstance(model, SplicedHeaders):
        return [base for one in model.models for base in _bases(one)]
    return _bases(model.base) if isinstance(model, AdaptedHeaders) else [model]


class _HubFiles:
    """The files of a repository at a commit, as `weights.Files` describes them.

    Attributes:
      files: what the hub says of each file, by name.
    """

    def __init__(self, repository: str, directory: Path, quantised: bool = False):
        self.directory, self.place, self.quantised = directory, Path(repository), quantised
        self._commit, self._where = directory.name, f"{repository}@{directory.name[:7]}"

    @cached_property
    def _filesystem(self) -> Any:
        from huggingface_hub import HfFileSystem

        return HfFileSystem()

    @cached_property
    def files(self) -> dict[str, Any]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with _asking(self._where):
            found = list(HfApi().list_repo_tree(str(self.place), revision=self._commit, recursive=True))
        return {file.path: file for file in found if isinstance(file, RepoFile)}

    def has(self, name: str) -> bool:
        return name in self.files

    def matching(self, pattern: str) -> list[str]:
        slashes = pattern.count("/")  # fnmatch lets * match them, too
        return sorted(name for name in self.files if name.count("/") == slashes and fnmatch(name, pattern))

    def headers(self, names: Iterable[str], named_by: Path | None = None) -> dict[str, dict[str, StoredTensor]]:
        names = list(names)
        with ThreadPoolExecutor(REQUESTS, "headers") as requests:
            return dict(zip(names, requests.map(self._header, names), strict=True))

    def _header(self, name: str) -> dict[str, StoredTensor]:
        """Read a header by requests for ranges of bytes."""
        size = self.files[name].size
        with _asking(self._where):
            try:
                path = f"{self.place}@{self._commit}/{name}"
                with self._filesystem.open(path, "rb", block_size=FIRST, size=size) as stream:
                    return header_of(stream, size, self.place / name, self.quantised)
            except CheckpointError as error:  # nothing was downloaded that could be downloaded again
                raise type(error)(str(error).replace(AGAIN, ON_THE_HUB)) from None


def _is_cached(directory: Path, name: str, file: Any) -> bool:
    """Return whether the cache has a file, of this commit or of another with the same content."""
    blob = file.lfs.sha256 if file.lfs else file.blob_id
    return (directory / name).exists() or (directory.parent.parent / "blobs" / blob).exists()


def _layout(tensors: Mapping[str, Any]) -> set[tuple]:
    """Return what headers say of tensors, wherever their files are."""
    return {(name, tensor.file.name, tensor.dtype, tensor.shape, tensor.offset) for name, tensor in tensors.items()}


@contextmanager
def _asking(where: str) -> Iterator[None]:
    """Say what to do where a request to the hub fails."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the hub raises many kinds: no network, no such repository, gated, not logged in
        reason = (str(error).strip() or "no message").splitlines()[0].removesuffix(".")
        raise HubError(
            f"{where}: no such directory, and fetching it from the hub failed: {type(error).__name__}: {reason}. Check "
            f"the name, the network and, for a gated model, HF_TOKEN; or download it elsewhere and give its directory."
        ) from error
