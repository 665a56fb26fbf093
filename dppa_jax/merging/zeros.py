"""Find zeros in place of weights: what a download leaves that allocated the whole file and did not fill it.

Rows that are exactly 0 in one model and not in the other are no fine-tune's, with these exceptions:
- rows of padding or added tokens, which are few, or at the end of the vocabulary;
- norms and biases of the base, which may start at 0 and be trained by the expert;
- rows so small that float16 holds them as 0.
"""

from collections.abc import Sequence

import numpy as np

from dppa_jax.architecture.specs import CheckpointError, Role, TensorSpec
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.merging.rows import Matrix

TINY = np.finfo(np.float16).smallest_subnormal  # what is smaller can be 0 in an expert that was saved as float16
AT_THE_END = 8  # one in so many rows of a vocabulary, the last ones, may be padding or added tokens
ELSEWHERE = 256  # and one in so many of the other rows


def check_zeros(sources: Sequence[Source], matrix: Matrix, arrays: Sequence[np.ndarray]) -> None:
    """Refuse rows that are exactly 0 in an expert and not in the base, or the other way round.

    Only the first element of each row is looked at, and whole rows where that is 0. Models without files, such as those
    in memory, are not looked at.

    Args:
      sources: base and experts.
      matrix: which rows were read.
      arrays: what each source has there, (rows or more, columns).

    Raises:
      CheckpointError: names file, tensor and fix.
    """
    zeros = [_zero_rows(array[: matrix.rows]) for array in arrays]
    if not any(zeros):
        return
    for expert in range(1, len(sources)):
        for one, other in ((expert, 0), (0, expert)):
            alone = [row for row in sorted(zeros[one] - zeros[other]) if _is_weight(arrays[other][row])]
            for rows, at in matrix.places():
                found = [row - at.start + rows.start for row in alone if at.start <= row < at.stop]
                if found and not _allowed(sources[one].specs[rows.name], found, one == 0):
                    _refuse(sources[one], sources[other], rows.name, found)


def _refuse(damaged: Source, sound: Source, name: str, zeros: Sequence[int]) -> None:
    """Refuse a model with these rows of zeros, unless its tensors are not in a file."""
    file, other = (getattr(source.tensors[name], "file", None) for source in (damaged, sound))
    if file:
        raise CheckpointError(
            f"{file}: {len(zeros)} rows of {name} are zeros, the first is row {zeros[0]}; in {other} they are not. Was "
            f"the download finished? Download it again; --allow_other_base merges it as it is."
        )


def _allowed(spec: TensorSpec, zeros: Sequence[int], is_base: bool) -> bool:
    """Can a sound model have zeros in these rows, and the other model none?"""
    if spec.role is Role.VOCABULARY:
        last = spec.rows - spec.rows // AT_THE_END
        return sum(row < last for row in zeros) <= max(1, spec.rows // ELSEWHERE)
    return spec.role is not Role.LINEAR and is_base


def _is_weight(row: np.ndarray) -> bool:
    """Has a row an element that no dtype holds as 0?"""
    return bool(np.abs(row.astype(np.float32)).max() >= TINY)


def _zero_rows(array: np.ndarray) -> set[int]:
    """Return which rows of a matrix are zero bytes."""
    bits = array.view(f"u{array.itemsize}")
    return {row for row in np.flatnonzero(bits[:, 0] == 0).tolist() if not bits[row].any()}
