"""Files of weights, opened when they are first read and read by position into buffers that are used again."""

import os
from pathlib import Path

import numpy as np

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.headers import StoredTensor
from dppa_jax.runtime.reading import open_regular


class OpenFiles:
    """The files of a model's weights. Closing them is no end: reading opens them again."""

    def __init__(self):
        self._descriptors: dict[Path, int] = {}

    def read_rows(self, name: str, tensor: StoredTensor, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype.

        A vector counts as one row.

        Raises:
          CheckpointError: the file ends inside the tensor.
        """
        view = memoryview(out.reshape(-1).view(np.uint8))
        for position, count in tensor.extents(start, stop):
            self.read_bytes(name, tensor.file, position, view[:count])
            view = view[count:]

    def read_bytes(self, name: str, file: Path, position: int, view: memoryview) -> None:
        """Read the bytes of a file from a position on, of the tensor that a message names."""
        while view.nbytes:
            try:
                count = os.preadv(self.descriptor(file), [view], position)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}, in {name}", str(file)) from error
            if count == 0:
                raise CheckpointError(
                    f"{file}: ends inside {name}; the file changed while it was read. Run again when it is complete."
                )
            view, position = view[count:], position + count

    def descriptor(self, file: Path) -> int:
        """Return the descriptor of a file, which the first use opens."""
        if file not in self._descriptors:
            opened = open_regular(file, CheckpointError)
            if self._descriptors.setdefault(file, opened) != opened:  # another thread was faster
                os.close(opened)
        return self._descriptors[file]

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
