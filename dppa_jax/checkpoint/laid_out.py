"""Write a model as the files of another are laid out: names, fused tensors, and what is copied from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dppa_jax.architecture.layout import Layout, usual_layout
from dppa_jax.architecture.specs import matrix_shape, row_pieces
from dppa_jax.architecture.table import architecture_of
from dppa_jax.checkpoint.safetensors_writer import SafetensorsWriter, Tensors
from dppa_jax.runtime import signals

PIECE = 1 << 26  # bytes that are copied at a time


def layout_of(source: Any) -> Layout:
    """Return how the files of a source are laid out or, where it has none, how those of its family usually are."""
    if layout := getattr(source, "layout", None):
        return layout
    row = architecture_of(source.config)
    return usual_layout(row, row.said(source.config), source.specs)


def rest_of(source: Any) -> tuple[str, ...]:
    """Return the names of what the files of a source have beside the tensors of the model."""
    layout = getattr(source, "layout", None)
    return layout.rest if layout else ()


def stored_tensors(layout: Layout, tensors: Tensors) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the tensors of files, of what a model's tensors are to be; those that share one have one dtype."""
    stored = {}
    for name, (shape, dtype) in tensors.items():
        place = layout.places[name]
        stored.setdefault(place.stored, (shape if place.whole else layout.shapes[place.stored], dtype))
    return stored


def laid_out_writer(
    source: Any,
    directory: Path | str,
    tensors: Tensors,
    *options: Any,
    owners: Mapping[str, int] | None = None,
    copied: Tensors | None = None,
    **more: Any,
) -> SafetensorsWriter:
    """Return a writer of a directory whose files are laid out as those of a source.

    Args:
      tensors: shape and dtype of the model's tensors by name.
      owners: of several processes, the one that writes each tensor.
      copied: shape and dtype of further tensors, by their names in files; process 0 writes them.
      options, more: further arguments of `SafetensorsWriter`.
    """
    layout = layout_of(source)
    stored = stored_tensors(layout, tensors) | dict(copied or {})
    of_stored = None
    if owners is not None:
        of_stored = dict.fromkeys(copied or (), 0) | {layout.places[n].stored: o for n, o in owners.items()}
    return SafetensorsWriter(directory, stored, *options, owners=of_stored, places=layout.places, **more)


def copy_tensors(source: Any, names: Mapping[str, Any] | list[str] | tuple[str, ...], sink: SafetensorsWriter) -> None:
    """Copy whole tensors of a source, bit by bit, but for those that an earlier run has copied."""
    for name in names:
        tensor = source.tensors[name]
        rows, columns = matrix_shape(tensor.shape)
        for start, stop in row_pieces(rows, columns, PIECE // tensor.dtype.itemsize):
            signals.check()
            if not sink.has_rows(name, start, stop):
                piece = np.empty((stop - start, columns), tensor.dtype)
                source.read_rows(name, start, stop, piece)
                sink.write_rows(name, start, piece)
