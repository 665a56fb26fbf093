"""Where the tensors of a model lie in the tensors of its files, whose names and cuts differ from program to program.

A file may hold several linears in one tensor (query, key and value; the experts of a layer), may put a wrapper's name
before every name (`_orig_mod.`, `language_model.`), or spell names as an older program did.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dppa_jax.architecture.row import Architecture, Fused
from dppa_jax.architecture.specs import TensorSpec, matrix_shape

WRAPPER = re.compile(r"^(module\.)+|\b(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
TEXT_MODEL = ("model.language_model.", "language_model.model.", "language_model.")  # of images and text: in its files
RESPELT = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))  # by the first BERTs


class Place(NamedTuple):
    """Where the rows of a tensor lie in a tensor of a file.

    Attributes:
      stored: the name of the tensor in the file.
      first: its row there that is this one's first; all axes but the last count as rows.
      run: rows that lie together, if not all do.
      step: rows from the begin of one run to that of the next.
      whole: is it the whole tensor of the file, in its shape?
    """

    stored: str
    first: int = 0
    run: int = 0
    step: int = 0
    whole: bool = True

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut rows start to stop (exclusive) into what lies together.

        Yields:
          The first row of a piece, its first row in the tensor of the file, and how many rows it has.

        >>> list(Place("qkv", first=2, run=2, step=6).pieces(1, 5))
        [(1, 3, 1), (2, 8, 2), (4, 14, 1)]
        """
        run = self.run or max(stop, 1)
        while start < stop:
            count = min(stop, (start // run + 1) * run) - start
            yield start, self.first + start // run * self.step + start % run, count
            start += count


@dataclass
class Layout:
    """The tensors of a model's files, and where those of the model lie in them.

    Attributes:
      shapes: of the tensors of the files that hold tensors of the model, by name.
      places: by the name of a tensor of the model.
      rest: names of all other tensors of the files.
      unfit: tensors of the rest that should hold several linears and have another shape, with that shape as a matrix.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    unfit: dict[str, tuple[int, int]] = field(default_factory=dict)


def find_layout(
    architecture: Architecture,
    said: Mapping,
    specs: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    heads: Iterable[str] = (),
) -> Layout:
    """Find the tensors of a model in its files, as far as they are there.

    Args:
      architecture, said: the row, and what config.json says with its defaults.
      specs: the tensors of the model.
      shapes: of the tensors of the files, by name.
      heads: tensors that may be there beside these: copies of the embeddings.
    """
    together = fused_tensors(architecture, said, specs)
    alone = {name: spec.name for spec in specs.values() for name in (spec.name, spec.stored) if name}
    alone |= {name: name for name in heads}
    found: dict[str, str] = {}
    for name in shapes:
        for plain in _plain_names(name, architecture):
            if plain not in found and (plain in together or plain in alone):
                found[plain] = name
                break
    layout = Layout()
    for plain, name in found.items():
        if plain in together:
            wanted = _together_shape(together[plain][1], specs)
            if stored_rows(shapes[name]) == wanted:
                layout.places |= _parts(name, together[plain], said, specs)
            else:
                layout.unfit[name] = wanted
        elif alone[plain] not in layout.places:
            layout.places[alone[plain]] = Place(name)
    layout.shapes = {place.stored: shapes[place.stored] for place in layout.places.values()}
    layout.rest = tuple(name for name in shapes if name not in layout.shapes)
    return layout


def usual_layout(architecture: Architecture, said: Mapping, specs: Mapping[str, TensorSpec]) -> Layout:
    """Return the layout of the files that most programs write."""
    layout = Layout()
    for name, (fused, kinds) in fused_tensors(architecture, said, specs).items():
        if fused.always:
            layout.places |= _parts(name, (fused, kinds), said, specs)
            layout.shapes[name] = _together_shape(kinds, specs)
    for spec in specs.values():
        if spec.name not in layout.places:
            name = spec.stored or spec.name
            layout.places[spec.name], layout.shapes[name] = Place(name), spec.shape
    return layout


def fused_tensors(
    architecture: Architecture, said: Mapping, specs: Mapping[str, TensorSpec]
) -> dict[str, tuple[Fused, Sequence[str]]]:
    """The tensors of files that may hold several linears, by name: the row's entry, and the linears in their order."""
    of_kind: dict[tuple[int, str], list[str]] = {}
    for spec in specs.values():
        if spec.linear is not None:
            of_kind.setdefault((spec.layer, spec.kind), []).append(spec.name)
    tensors = {}
    for layer in range(said["num_hidden_layers"] if architecture.fused else 0):
        for fused in architecture.fused:
            kinds = [of_kind.get((layer, kind.replace(".{}", "")), []) for kind in fused.kinds]
            names = [name for expert in zip(*kinds, strict=True) for name in expert]
            if names:
                tensors[architecture.layer.format(layer) + fused.name] = fused, names
    return tensors


def stored_rows(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of a file as `Place` counts them: all axes but the last are rows."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else matrix_shape(shape)


def _together_shape(names: Sequence[str], specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """The shape of a tensor that holds these linears."""
    return sum(specs[name].rows for name in names), specs[names[0]].columns


def _parts(
    stored: str, together: tuple[Fused, Sequence[str]], said: Mapping, specs: Mapping[str, TensorSpec]
) -> dict[str, Place]:
    """The places of linears in the tensor that holds them."""
    fused, names = together
    runs = said[fused.alternate] if fused.alternate else 1
    return cut(stored, {name: specs[name].rows // runs for name in names}, runs)


def cut(stored: str, rows: Mapping[str, int], runs: int = 1) -> dict[str, Place]:
    """Cut a tensor of a file into tensors of the model.

    Args:
      stored: its name.
      rows: that each has in a row before those of the next begin, by name.
      runs: how often all of this is repeated.
    """
    places, first, step = {}, 0, sum(rows.values())
    for name, run in rows.items():
        places[name] = Place(stored, first, run if runs > 1 else 0, step if runs > 1 else 0, whole=False)
        first += run
    return places


def _plain_names(name: str, architecture: Architecture) -> Iterable[str]:
    """The names that a tensor of a file can mean, the likeliest first: without wrappers and other spellings."""
    plain = WRAPPER.sub("", name)
    for old, new in RESPELT:
        plain = plain.replace(old, new)
    yield plain
    for prefix in TEXT_MODEL:
        if plain.startswith(prefix):
            yield architecture.root + plain.removeprefix(prefix)
            yield plain.removeprefix(prefix)
    yield architecture.root + plain
