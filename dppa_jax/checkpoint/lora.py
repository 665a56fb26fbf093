"""A base with a PEFT adapter, read as one model: rows of base + scale · B · A, computed when they are asked for.

The product is computed in float32, a few rows at a time, added to the base's row in float32, and rounded once to the
base's dtype. peft's merge_and_unload gives the same but for the rounding of the product in an adapter that is not
float32.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.layout import Layout, Place, find_layout
from dppa_jax.architecture.specs import CheckpointError, Role, TensorSpec, matrix_shape, tied_heads
from dppa_jax.architecture.table import grown, known
from dppa_jax.checkpoint.adapter import CONFIG, MERGE_FIRST, Adapter, Factors, read_as_float32
from dppa_jax.checkpoint.fingerprints import content_digest, fingerprint
from dppa_jax.checkpoint.headers import StoredTensor, UnfitError, shown
from dppa_jax.checkpoint.laid_out import rest_of
from dppa_jax.checkpoint.matched import unwrapped, vocabulary_tensors
from dppa_jax.checkpoint.promised import same_bits
from dppa_jax.checkpoint.tokenizer import has_tokenizer
from dppa_jax.runtime.files import digest
from dppa_jax.runtime.reading import printable, read_json

TILE = 32  # rows of a product, always as many from the same rows on: then a row has the same bits whoever asks for it
GENERATION = "generation_config.json"

Keep = Callable[[str, int, int, int], np.ndarray]  # what rows of a factor are multiplied by: see `Thinned`


@dataclass(frozen=True)
class LowRank:
    """The change of a tensor of the base, or of that part of a module's weight that the tensor is.

    Attributes:
      name: of the tensor.
      factors: of the module.
      place: where the tensor's rows are among those of the module.
      rows: of the tensor.
      turned: is it the product turned round: Aᵀ · Bᵀ?
    """

    name: str
    factors: Factors
    place: Place
    rows: int
    turned: bool

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of A, which is the module's, and of those rows of B that are the tensor's, by name."""
        a, rank = self.factors.a.shape, self.factors.rank
        return {f"{self.factors.module}.lora_A": a, f"{self.name}.lora_B": (self._rows_of_b(), rank)}

    def products(
        self, adapter: Adapter, start: int, stop: int, keep: Keep | None = None
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield the change of rows start to stop (exclusive), some at a time: the first, one after the last, values."""
        scale, first = np.float32(self.factors.scale), start // TILE * TILE
        end = min(-(-stop // TILE) * TILE, self.rows)
        right, left = self._right(adapter, keep), self._left(adapter, first, end, keep)
        padded = np.zeros((-(-len(left) // TILE) * TILE, left.shape[1]), np.float32)
        padded[: len(left)] = left
        for row in range(first, stop, TILE):
            product = padded[row - first : row - first + TILE] @ right
            product *= scale
            low, high = max(row, start), min(row + TILE, stop)
            yield low, high, product[low - row : high - row]

    def _left(self, adapter: Adapter, start: int, stop: int, keep: Keep | None) -> np.ndarray:
        """Return rows of the left factor, (rows, rank)."""
        if self.turned:
            columns = adapter.read_columns(self.factors.a, start, stop)
            return columns * self._kept_of_a(keep)[:, start:stop].T if keep else columns
        part = self.factors.b.at(self.place, (self.rows, self.factors.rank))
        rows = read_as_float32(adapter, part, start, stop)
        return rows * keep(f"{self.name}.lora_B", start, stop, self.factors.rank) if keep else rows

    def _right(self, adapter: Adapter, keep: Keep | None) -> np.ndarray:
        """Return the right factor, (rank, columns)."""
        if not self.turned:
            whole = read_as_float32(adapter, self.factors.a)
            return whole * self._kept_of_a(keep) if keep else whole
        whole = read_as_float32(adapter, self.factors.b)
        whole = whole * keep(f"{self.name}.lora_B", 0, *whole.shape) if keep else whole
        return np.ascontiguousarray(whole.T)

    def _kept_of_a(self, keep: Keep) -> np.ndarray:
        return keep(f"{self.factors.module}.lora_A", 0, *self.factors.a.shape)

    def _rows_of_b(self) -> int:
        return self.factors.b.shape[0] if self.turned else self.rows


class AdaptedHeaders:
    """A base with an adapter, by their headers alone, as the base's weights may not be here yet.

    What is not about the adapter, such as dtype and layout, is the base's.

    Args:
      base: an open checkpoint, or a model on the hub.
      adapter: of the base.

    Attributes:
      config: the base's config.json; where the adapter has more tokens, with their number.
      specs, tensors: those of the base; a vocabulary may have the rows that the adapter has.

    Raises:
      CheckpointError: the adapter is of another base, or has a tensor for which the base has no place.
    """

    def __init__(self, base: Any, adapter: Adapter):
        self.base, self.adapter = base, adapter
        self._whole = self._in_place()
        self.specs, self.config = self._grown()
        self._low_rank = self._changes()
        changed = self._whole.keys() | self._low_rank.keys()
        self.tensors = {
            name: replace(tensor, file=adapter.file, shape=self._shape(name)) if name in changed else tensor
            for name, tensor in base.tensors.items()
        }
        self._tell()

    def __getattr__(self, name: str) -> Any:
        """Return what is not about the adapter: dtype, layout and more of the base."""
        return getattr(self.base, name)

    @property
    def directories(self) -> tuple[Path, ...]:
        """The directories that the model is read from."""
        return self.adapter.directory, self.base.directory

    @property
    def directory(self) -> Path:
        """The directory of the tokenizer: the adapter's, if it has one, or the base's."""
        return self.adapter.directory if has_tokenizer(self.adapter.directory) else self.base.directory

    def fetch(self) -> "Adapted":
        """Fetch the base's weights from the hub; return the model that can be read."""
        return Adapted(self.base.fetch(), self.adapter)

    @property
    def whole_linears(self) -> list[str]:
        """The linears that the adapter has whole, and not as factors."""
        return [name for name in self._whole if name in self.specs and self.specs[name].role is Role.LINEAR]

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the factors of linears, by name; see `LowRank.factor_shapes`."""
        of_linears = (one for name, one in self._low_rank.items() if self.specs[name].role is Role.LINEAR)
        return {name: shape for one in of_linears for name, shape in one.factor_shapes().items()}

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self.base.close()
        self.adapter.close()

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape if name in self.specs else tuple(self.base.tensors[name].shape)

    def _in_place(self) -> dict[str, StoredTensor]:
        """Return the tensors of the adapter that stand in place of the base's, by the names of these."""
        stored = {name: self.adapter.tensors[own] for name, own in self.adapter.whole.items()}
        places = self._matched({name: tensor.shape for name, tensor in stored.items()})
        for head, embeddings in tied_heads(self.base.config).items():
            if head in places:
                pair = [self.adapter.whole.get(places[name].stored) for name in (head, embeddings) if name in places]
                if len(pair) < 2 or not same_bits(*((self.adapter, name) for name in pair)):
                    raise self._tied(head)
                del places[head]
        found = {}
        for name, place in places.items():
            tensor, spec = stored[place.stored], self.base.specs.get(name)
            shape = spec.shape if spec else tuple(self.base.tensors[name].shape)
            more = spec and spec.role is Role.VOCABULARY and tensor.shape[1:] == shape[1:]
            if place.whole and tensor.shape != shape and not more:
                raise self._unfit(self.adapter.whole[place.stored], tensor.shape, name, shape)
            found[name] = tensor.at(place, shape)
        return found

    def _grown(self) -> tuple[Mapping[str, TensorSpec], dict]:
        """Return the specs and config.json, with as many tokens as the adapter has."""
        specs, config = dict(self.base.specs), self.base.config
        names = vocabulary_tensors(specs)
        rows = {name: self._whole[name].shape[0] if name in self._whole else specs[name].rows for name in names}
        if rows == {name: specs[name].rows for name in names}:
            return specs, config if self.directory == self.base.directory else self._with_ends(config)
        if len(set(rows.values())) > 1:
            raise CheckpointError(
                f"{self.adapter.file}: the rows of tokens are {rows}: the adapter changes their number in some tensors "
                f"only. Name all of them in modules_to_save, or {MERGE_FIRST}"
            )
        specs |= {name: replace(specs[name], shape=(rows[name], *specs[name].shape[1:])) for name in names}
        return specs, grown(self._with_ends(config), rows[names[0]])

    def _with_ends(self, config: dict) -> dict:
        """Return config.json with the tokens that end a text by the base's generation config, which adapters lack."""
        path = self.base.directory / GENERATION
        if self.directory == self.base.directory or not path.is_file() or (self.directory / GENERATION).is_file():
            return config
        ends = read_json(path, error=CheckpointError).get("eos_token_id")
        return config if ends is None else {**config, "eos_token_id": ends}

    def _changes(self) -> dict[str, LowRank]:
        """Return the changes by the names of the base's tensors."""
        factors = self.adapter.factors
        row = None if getattr(self.base, "stated", None) else known(self.base.config)
        flip = self.adapter.config.fan_in_fan_out and not row  # families of the table have no such modules
        turned = {name: one.embedding or flip for name, one in factors.items()}
        shapes = {name: (one.b.shape[0], one.a.shape[1]) for name, one in factors.items()}
        shapes = {name: shape[:: -1 if turned[name] else 1] for name, shape in shapes.items()}
        found = {}
        for name, place in self._matched(shapes).items():
            if name in tied_heads(self.base.config):
                raise self._tied(name)
            shape = self._shape(name)
            if shape != shapes[place.stored] if place.whole else turned[place.stored]:
                raise self._unfit(factors[place.stored].module, shapes[place.stored], name, shape)
            found[name] = LowRank(name, factors[place.stored], place, matrix_shape(shape)[0], turned[place.stored])
        return found

    def _matched(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
        """Find the base's tensors among weights that an adapter names, of these shapes.

        Returns:
          Where the rows of each lie in the weight that the adapter names, by the name of the base's tensor.

        Raises:
          CheckpointError: a weight is none of the base.
        """
        base, rest = self.base, rest_of(self.base)
        row = None if getattr(base, "stated", None) else known(base.config)
        if row:
            layout = find_layout(row, row.said(base.config), base.specs, shapes, tied_heads(base.config))
        else:
            places = {name: place for name, place in base.layout.places.items() if place.stored in shapes}
            layout = Layout(places=places)
            cut = {place.stored for place in places.values() if not place.whole}
            layout.unfit = {n: base.layout.shapes[n] for n in cut if base.layout.shapes[n] != shapes[n]}
        for name, wanted in layout.unfit.items():
            raise self._unfit(name, shapes[name], name, wanted)
        taken = {place.stored for place in layout.places.values()}
        copied = {name: Place(name) for name in shapes if name in rest and name not in taken}
        if lost := [name for name in shapes if name not in taken and name not in copied]:
            raise UnfitError(
                f"{self.adapter.file} changes {len(lost)} tensors that the base in {base.directory} does not have, "
                f"first {shown(lost[0])!r}; {self._made_from()}"
            )
        return layout.places | copied

    def _unfit(self, what: str, shape: tuple[int, ...], name: str, wanted: tuple[int, ...]) -> CheckpointError:
        return UnfitError(
            f"{self.adapter.file}: {shown(what)} has the shape {tuple(shape)}, and {name} of the base in "
            f"{self.base.directory} the shape {tuple(wanted)}; {self._made_from()}"
        )

    def _tied(self, head: str) -> CheckpointError:
        return CheckpointError(
            f"{self.adapter.file} changes {head}, which is the embeddings of the base (tie_word_embeddings in "
            f"config.json of {self.base.directory}), and not them alike: give a base whose head is its own."
        )

    def _made_from(self) -> str:
        name = self.adapter.config.base_model_name_or_path
        said = f"{CONFIG} says that it was made from {printable(name)[:200]!r}. " if name else ""
        return f"{said}Give the base that it was made from: BASE+{self.adapter.directory}."

    def _tell(self) -> None:
        """Warn where the adapter names another base, or where a merge says more than the adapter did."""
        name = self.adapter.config.base_model_name_or_path
        last = (name or "").rstrip("/").rpartition("/")[2]
        parts = self.base.directory.resolve().parts
        if last and not any(part == last or part.endswith(f"--{last}") for part in parts):
            logging.warning(
                "%s was made from %r by its %s, and is put onto %s: is that the same model?",
                *(self.adapter.directory, printable(name)[:200], CONFIG, self.base.directory),
            )
        for embeddings in tied_heads(self.base.config).values():
            if embeddings in self._low_rank:
                logging.warning(
                    "%s changes %s, which is the head, too: in training only the embeddings were changed",
                    *(self.adapter.directory, embeddings),
                )


class Adapted(AdaptedHeaders):
    """An open base with an adapter, a `Source` that offers what the base offers.

    Rows are computed when they are asked for. Arguments and errors are those of `AdaptedHeaders`.
    """

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray, keep: Keep | None = None) -> None:
        """Compute rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype.

        Args:
          keep: what the factors are multiplied by, as `Thinned` says; None to leave them as they are.
        """
        stored = out = out.reshape(stop - start, -1) if out.ndim < 2 else out
        if (whole := self._whole.get(name)) is not None:
            stored = np.empty(out.shape, whole.dtype)
            self.adapter.read_part(whole, start, stop, stored)
        else:
            self.base.read_rows(name, start, stop, out)
        change = self._low_rank.get(name)
        for first, last, product in change.products(self.adapter, start, stop, keep) if change else ():
            at = slice(first - start, last - start)
            product += stored[at].astype(np.float32, copy=False)
            out[at] = product
        if stored is not out and not change:
            out[...] = stored

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor."""
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, matrix_shape(out.shape)[0], out)
        return out

    def files(self) -> dict[str, Path]:
        """Return the files of the base's weights and of the adapter, by name."""
        config = {"config.json": self.base.directory / "config.json"} if self.base.config else {}
        return {**config, **self.base.files(), **self.adapter.files()}

    def fingerprint(self) -> str:
        """Hash samples of the base's files and of the adapter's."""
        return digest([self.base.fingerprint(), fingerprint(self.adapter.said, self.adapter.files())])

    def content_digest(self) -> str:
        """Hash every byte of the base's weights and of the adapter."""
        adapter = self.adapter
        return digest([self.base.content_digest(), content_digest(adapter.directory, adapter.said, adapter.files())])


class Thinned:
    """A base with an adapter of which only a part of A and B is there, for linears. A `Source`.

    All else, such as factors of embeddings, is the model's own.

    Args:
      model: an `Adapted`, or what reads some of its tensors or its rows in another order.
      keep: from the name of a factor ("model.layers.0.self_attn.q_proj.lora_A", or the linear's name and ".lora_B"),
        the first of its rows and the one after the last, and its columns, to what these are multiplied by, float32.
    """

    def __init__(self, model: Any, keep: Keep):
        self.model, self._keep, self._adapted = model, keep, unwrapped(model)

    def __getattr__(self, name: str) -> Any:
        """Return what is not about rows: specs, tensors, directory, dtype and more of the model."""
        return getattr(self.model, name)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Compute rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype."""
        if self.specs[name].role is Role.LINEAR:
            self._adapted.read_rows(name, start, stop, out, self._keep)
        else:
            self.model.read_rows(name, start, stop, out)
