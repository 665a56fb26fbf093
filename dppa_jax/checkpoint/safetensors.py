"""Read Hugging Face directories of safetensors: headers at once, weights by row and only when asked for.

Weights are read with `os.preadv` into buffers that are used again. The safetensors package maps the files into memory
instead: then every page that is touched costs a page fault and counts as memory of this process.
"""

import os
from functools import cached_property
from pathlib import Path

import numpy as np
from absl import logging

from dppa_jax.architecture.generic import Stated
from dppa_jax.architecture.layout import Layout
from dppa_jax.architecture.specs import (
    QUANTISATION,
    CheckpointError,
    TensorSpec,
    check_config,
    first_linear,
    matrix_shape,
    tied_heads,
)
from dppa_jax.checkpoint.fingerprints import content_digest, fingerprint
from dppa_jax.checkpoint.inside import AGAIN, inside
from dppa_jax.checkpoint.open_files import OpenFiles
from dppa_jax.checkpoint.promised import (
    Promised,
    drop_tied_heads,
    quantisation_left_over,
    without_quantisation,
)
from dppa_jax.checkpoint.quantised import Dequantised, dequantised, is_quantised
from dppa_jax.checkpoint.weights import ADAPTER, Files, LocalFiles, find_tensors, has_weights
from dppa_jax.runtime.reading import read_json

ALIGNMENT = 64  # bytes; a device takes an array that is aligned to this without a copy


class SafetensorsHeaders:
    """What config.json and the headers of the weights say of a model, without the weights themselves.

    Args:
      files: of the model.
      stated: what the tensors are, in place of what the table's row says; see `Promised`.

    Attributes:
      directory: where config.json and the other small files are.
      config: the content of config.json.
      tensors: where each tensor lies, by name.
      is_dequantised: do quantised tensors stand for the weights?

    Raises:
      CheckpointError: a file is missing, damaged, a pickle, or lies outside the directory.
    """

    def __init__(self, files: Files, stated: Stated | str | None = None):
        self.directory, self._given = files.directory, stated
        said = read_any_config(self.directory, needed=not stated)
        self.config = without_quantisation(said)
        path, self.is_dequantised = self.directory / "config.json", False
        with quantisation_left_over({} if files.quantised else said, path):
            stored = find_tensors(files, tied_heads(self.config))
            if files.quantised and is_quantised(stored):
                logging.info("%s: its quantised weights are read as bfloat16", self.directory)
                stored, self.is_dequantised = dequantised(stored, said.get(QUANTISATION), path), True
            self._promised = Promised(self.config, stored, stated)
            self.tensors = self._promised.tensors
            if said.get(QUANTISATION):
                _ = self.specs  # they are looked at when they are asked for

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that are merged, by name; every one is in a file and has the right shape.

        Raises:
          CheckpointError: a tensor is missing, too many or of another shape.
        """
        self._promised.check(self.directory)
        return self._promised.specs

    @property
    def layout(self) -> Layout:
        """The tensors of the files, and where those that are merged lie in them."""
        return self._promised.layout

    @property
    def renamed(self) -> dict[str, str]:
        """The names in the files of tensors that have another here, but for those that share one."""
        names = {name: place.stored for name, place in self.layout.places.items() if place.whole and name in self.specs}
        return {name: stored for name, stored in names.items() if stored not in (name, self.specs[name].stored)}

    @property
    def stated(self) -> Stated | None:
        """What the tensors are, if no row of the table of architectures promises them."""
        return self._promised.stated

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the linears; norms may have another."""
        return self.tensors[first_linear(self.specs).name].dtype


class SafetensorsDirectory(SafetensorsHeaders):
    """An open Hugging Face directory, a `Source`. Headers are read and checked at once, weights when asked for.

    Args:
      directory: of the model.
      stated: what the tensors are, in place of what the table's row says; see `Promised`.
      dequantise: read quantised weights as bfloat16; see `quantised`.

    Raises:
      CheckpointError: a file is missing, damaged, a pickle, or lies outside the directory.
    """

    def __init__(self, directory: Path | str, stated: Stated | str | None = None, dequantise: bool = False):
        self._files = OpenFiles()
        super().__init__(LocalFiles(Path(directory), dequantise), stated)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that are merged, by name; every one is in a file and has the right shape.

        Raises:
          CheckpointError: a tensor is missing, too many or of another shape; a head is wrongly called the embeddings.
        """
        self._promised.check(self.directory)
        drop_tied_heads(self, self._promised.tied, self._promised.specs)
        return self._promised.specs

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype.

        A vector counts as one row.

        Raises:
          CheckpointError: the file ends inside the tensor.
        """
        tensor = self.tensors[name]
        if isinstance(tensor, Dequantised):
            tensor.read_rows(self._files, name, start, stop, out)
        else:
            self._files.read_rows(name, tensor, start, stop, out)

    def evict_rows(self, name: str, start: int, stop: int) -> None:
        """Drop rows from the operating system's page cache, so that reading them takes as long as the disk takes."""
        tensor = self.tensors[name]
        for position, count in tensor.extents(start, stop) if hasattr(os, "posix_fadvise") else ():
            os.posix_fadvise(self._files.descriptor(tensor.file), position, count, os.POSIX_FADV_DONTNEED)

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor."""
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, matrix_shape(out.shape)[0], out)
        return out

    def fingerprint(self) -> str:
        """Hash the config, and names, sizes and 64 pages of every file: a second, where a full hash takes minutes."""
        return fingerprint(self.config, self.files())

    def content_digest(self) -> str:
        """Hash the config, the generation config and every byte of the weights: about a second for each GB."""
        return content_digest(self.directory, self.config, self.files())

    def files(self) -> dict[str, Path]:
        """Return the files of the weights by name."""
        return {file.name: file for file in sorted({f for tensor in self.tensors.values() for f in tensor.files})}

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()


def read_config(directory: Path) -> dict:
    """Read and check config.json of a model directory, where weights need not be.

    A quantization_config is left out if the weights are there and are not quantised.

    Raises:
      CheckpointError: it is missing, no JSON object, an adapter's, or not that of a model we can merge.
    """
    config = read_any_config(directory)
    if config.get(QUANTISATION) and has_weights(directory):
        return SafetensorsDirectory(directory).config
    check_config(config, directory / "config.json")
    return config


def read_any_config(directory: Path, needed: bool = True) -> dict:
    """Read and check config.json, which may say that the weights are quantised; see `read_config`.

    Args:
      needed: if not, a model may have none, and {} is returned.
    """
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} {ADAPTER}")
    path = inside(directory, "config.json")
    try:
        config = read_json(path, fix=AGAIN, error=CheckpointError)
    except FileNotFoundError:
        if not needed and not os.path.lexists(path):
            logging.warning("%s is missing: the model is known by the names and shapes of its tensors alone", path)
            return {}
        hint = " If it has none: --architecture=generic goes by names and shapes." * has_weights(directory)
        raise CheckpointError(f"{path} is missing; is {directory} a Hugging Face model directory?{hint}") from None
    check_config(without_quantisation(config), path)
    return config
