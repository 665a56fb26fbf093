"""Match the rows of embeddings and heads by the tokens that they belong to, where models have them at other places.

A merge has the base's rows, at the base's places. A row is named by the tokenizer that the merge gets, and a row that
this names not, by the base's. From each expert comes the row of the same token, wherever the expert has it.
- An expert that lacks the token gets the base's row: its delta is 0 there.
- Rows without a token, which pad the matrix, are matched by their places, unless the expert has a token there.
- An expert without tokenizer.json, whose tokens are not known, is matched by place.
- Tokens that only experts have are dropped (`--vocabulary=base`), or get rows of their own (`union`). These begin where
  the tokenizer ends, so they take the base's padding first, and no token of the base moves. Such a row is the mean of
  the rows of the experts that have the token. It has no delta: methods and coefficients do not change it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.architecture.table import grown
from dppa_jax.checkpoint.matched import LACKS, Matched, Means, vocabulary_tensors
from dppa_jax.merging.added_tokens import with_tokens
from dppa_jax.merging.tokenizers import AddedToken, Tokenizer
from dppa_jax.runtime.files import digest

IN_COMMON = 0.5  # of the smaller tokenizer's tokens; below that it is another kind of tokenizer
MULTIPLE = 128  # at most, to which the rows of a base with padding are filled up again
TOLD = 3  # tokens that a message names

Ids = Mapping[str, int]


@dataclass(frozen=True)
class Vocabulary:
    """Where the rows of a merge's vocabulary tensors come from.

    Attributes:
      size: rows of the merge.
      base_size: rows of the base.
      rows: by expert, (size,): the expert's row, LACKS where it has none. Experts that do not fit are not among them.
      new: which rows are the mean of the experts'.
      added: the ids of the tokens that the tokenizer gets.
      dropped: by expert, its tokens that the merge lacks.
      files: of the tokenizer, by name, where they are not those of the model that --tokenizer names.
    """

    size: int
    base_size: int
    rows: Mapping[str, np.ndarray]
    new: np.ndarray
    added: Ids
    dropped: Mapping[str, Sequence[str]]
    files: Mapping[str, str]

    def wrap(self, base: Any, experts: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return base and experts with the merge's rows; a model that has them already is returned as it is."""
        names = vocabulary_tensors(base.specs)
        is_new = np.zeros(self.size, bool)
        is_new[self.new] = True
        wide = base
        if self.size != self.base_size or len(self.new):
            own = np.minimum(np.arange(self.size), self.base_size - 1)  # more padding is like the last row of it
            means = Means(base, experts, self.rows)
            wide = Matched(base, names, np.where(is_new, LACKS, own), means, grown(base.config, self.size))
        wrapped = dict(experts)
        for name, rows in self.rows.items():
            rows = np.where(is_new, LACKS, rows)
            if not np.array_equal(rows, np.arange(self.size)):
                wrapped[name] = Matched(experts[name], names, rows, wide)
        return wide, wrapped

    @cached_property
    def digest(self) -> str:
        """A hash of all that this decides about the merge."""
        rows = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in self.rows.items()}
        return digest([self.size, rows, self.new.tolist(), self.files])

    def losses(self) -> Iterator[str]:
        """Yield, for each expert, which of its tokens the merge lacks."""
        for name, tokens in self.dropped.items():
            yield (
                f"expert {name!r}: {len(tokens)} of its tokens are neither the base's nor the tokenizer's, and the "
                f"merge has no rows for them: {_some(tokens)}"
            )

    def notes(self) -> list[str]:
        """Return what a user of the merge should know: tokens that it lacks, and those that it has from experts."""
        found = [f"{said}." for said in self.losses()]
        if self.added:
            found.append(
                f"Tokens that the base lacks: {_some(list(self.added))}. Their rows are the mean of the experts' rows."
            )
        return found

    def as_dict(self) -> dict:
        """Return the content for recipe.json."""
        return {"rows": self.size, "added": dict(self.added), "dropped": {n: list(t) for n, t in self.dropped.items()}}


def match_vocabularies(
    models: Mapping[str, Tokenizer], rows: Mapping[str, int], chosen: str, union: bool, any_base: bool = False
) -> Vocabulary | None:
    """Match the rows of base and experts; None where they are at the same places already.

    Args:
      models: the base, by the name "base", and the experts.
      rows: of the vocabulary tensors of each.
      chosen: the name of the model whose tokenizer the merge gets.
      union: keep the tokens that only experts have.
      any_base: also take an expert with another kind of tokenizer.

    Raises:
      CheckpointError: an expert has another kind of tokenizer, the chosen one contradicts the base's rows, or a token
        cannot be kept.
    """
    base, size = models["base"], rows["base"]
    if all(_fits(rows[name], size, union) and _alike(base, model) for name, model in models.items()):
        return None
    ids = {name: _ids(model, name == chosen) for name, model in models.items()}
    if union:
        _check_known(models, ids, rows, chosen)
    if not ids["base"]:
        return None
    if not any_base:
        _check_kind(ids)
    names = _names(ids, chosen, size)
    added: Ids = {}
    files: Mapping[str, str] = {}
    if union:
        tokens = _new_tokens(models, ids, rows, names)
        if tokens or max(names.values(), default=0) >= size:
            added, files = with_tokens(models[chosen], tokens)
            names |= added
        new = _new_rows(names, ids, rows)
        whole = _whole(names, ids["base"], size)
    else:
        names, new, whole = {token: id for token, id in names.items() if id < size}, [], size
    found = {
        name: _rows(ids[name], rows[name], names, (whole, size), new)
        for name in models
        if name != "base" and not _is_short(ids[name], rows[name], size)
    }
    dropped = {
        name: [token for token in _lacking(own, rows[name], names) if token not in ids["base"]]
        for name, own in ids.items()
    }
    dropped = {name: tokens for name, tokens in dropped.items() if tokens}
    return Vocabulary(whole, size, found, np.array(new, np.int64), added, dropped, files)


def _fits(rows: int, base: int, union: bool) -> bool:
    """Are the rows of a model that has the base's tokens at the same places enough as they are?"""
    return rows == base or (rows > base and not union)


def _alike(base: Tokenizer, model: Tokenizer) -> bool:
    """Do the files of two tokenizers, as far as they can be read, name the same tokens?"""
    try:
        return base.names_alike(model)
    except (ValueError, OSError):
        return False


def _ids(model: Tokenizer, is_chosen: bool) -> Ids:
    """Return the ids of a tokenizer; none of a damaged one, unless it is the one that the merge gets."""
    try:
        return model.ids
    except (ValueError, OSError):
        if is_chosen:
            raise
        return {}  # `check_tokenizers` says that it cannot be compared


def _check_known(models: Mapping[str, Tokenizer], ids: Mapping[str, Ids], rows: Mapping[str, int], chosen: str) -> None:
    """Refuse a union with tokens that are not known."""
    for name, model in models.items():
        if not ids[name] and (name in ("base", chosen) or rows[name] != rows["base"]):
            raise CheckpointError(
                f"--vocabulary=union: {model.directory} has no tokenizer.json that can be read, so the tokens of "
                f"{name!r} are not known. Put it there (transformers: AutoTokenizer.from_pretrained(DIR)"
                f".save_pretrained(DIR)), or give --vocabulary=base."
            )


def _check_kind(ids: Mapping[str, Ids]) -> None:
    """Refuse an expert with another kind of tokenizer."""
    base = ids["base"]
    for name, own in ids.items():
        common = len(base.keys() & own.keys())
        if own and common < IN_COMMON * min(len(base), len(own)):
            raise CheckpointError(
                f"expert {name!r}: its tokenizer has {common} of the {len(base)} tokens of the base's tokenizer, so "
                f"it is of another kind: a different base model? Experts must be fine-tuned from --base; "
                f"--allow_other_base merges the rows of the tokens that both have."
            )


def _names(ids: Mapping[str, Ids], chosen: str, size: int) -> dict[str, int]:
    """Return the row of each token of the merge: the chosen tokenizer's, and the base's where this names no row.

    Raises:
      CheckpointError: the chosen tokenizer has a token of the base at another place.
    """
    base, own = ids["base"], ids[chosen]
    moved = [token for token, id in own.items() if id != base.get(token, id) and 0 <= base[token] < size]
    if moved:
        raise CheckpointError(
            f"--tokenizer={chosen}: {len(moved)} tokens of the base have other ids in it, {_some(moved)}, and the "
            f"merge has the base's rows in their order, so that its texts would be read wrongly. Leave out "
            f"--tokenizer: the rows of each token are found in every expert, and --vocabulary=union keeps new tokens."
        )
    taken = set(own.values())
    rest = {token: id for token, id in base.items() if token not in own and id not in taken}
    return {token: id for token, id in {**rest, **own}.items() if id >= 0}


def _new_tokens(
    models: Mapping[str, Tokenizer], ids: Mapping[str, Ids], rows: Mapping[str, int], names: Ids
) -> list[AddedToken]:
    """Return the tokens that only experts have and that have a row, in the order of the experts and of their ids.

    Raises:
      CheckpointError: a token is an ordinary entry of an expert's vocabulary. As an added token it would be found in
        the middle of words that the base reads otherwise.
    """
    found: dict[str, AddedToken] = {}
    for name, model in models.items():
        new = [token for token in _lacking(ids[name], rows[name], names) if token not in ids["base"]]
        if ordinary := [token for token in new if token not in model.added]:
            raise CheckpointError(
                f"--vocabulary=union: {len(ordinary)} tokens of expert {name!r}, {_some(ordinary)}, are ordinary "
                f"entries of its vocabulary and not added tokens; no tokenizer but its own splits texts into them. "
                f"--tokenizer={name} takes that, or --vocabulary=base drops them."
            )
        for token in new:
            found.setdefault(token, model.added[token])
    return list(found.values())


def _new_rows(names: Ids, ids: Mapping[str, Ids], rows: Mapping[str, int]) -> list[int]:
    """Return which rows of a union are the mean of experts' rows: of tokens that have no row in the base.

    Raises:
      CheckpointError: a token has a row in no model.
    """
    found = set()
    for token, id in names.items():
        if 0 <= ids["base"].get(token, LACKS) < rows["base"]:
            continue
        if any(0 <= own.get(token, LACKS) < rows[name] for name, own in ids.items() if name != "base"):
            found.add(id)
        elif id >= rows["base"]:
            raise CheckpointError(
                f"--vocabulary=union: the tokenizer has {token!r} with the id {id}, and no model has a row for it. "
                f"Take it out of the tokenizer's files, or resize the base (transformers: "
                f"base.resize_token_embeddings({id + 1}))."
            )
    return sorted(found)


def _whole(names: Ids, base: Ids, size: int) -> int:
    """Return how many rows a union has; they are filled up where the base's were."""
    needed = max(size, 1 + max(names.values()))
    padded = size > 1 + max((id for id in base.values() if id < size), default=-1)
    multiple = min(MULTIPLE, size & -size) if padded else 1  # the largest power of 2 that divides the rows
    return -(-needed // multiple) * multiple if needed > size else size


def _rows(own: Ids, count: int, names: Ids, sizes: tuple[int, int], new: Sequence[int]) -> np.ndarray:
    """Return which row of an expert is that of each row of the merge.

    Args:
      own: the expert's ids; empty where they are not known.
      count: rows of the expert.
      sizes: rows of the merge, and of the base.
    """
    whole, size = sizes
    found = np.full(whole, LACKS, np.int64)
    placed = np.arange(min(count, size))
    if own:
        unnamed = np.setdiff1d(placed, _within(names.values(), whole))
        placed = np.setdiff1d(unnamed, _within(own.values(), count))
    found[placed] = placed
    if not own:
        found[list(new)] = LACKS
    for token, row in names.items():
        if 0 <= (id := own.get(token, LACKS)) < count:
            found[row] = id
    return found


def _within(ids: Any, size: int) -> list[int]:
    """Return the ids that are rows of a matrix of this size."""
    return [id for id in ids if 0 <= id < size]


def _is_short(own: Ids, count: int, size: int) -> bool:
    """Has an expert fewer rows than the base, without saying by its tokenizer which they are?"""
    return count < size and (not own or max(own.values()) >= count)


def _lacking(own: Ids, count: int, names: Ids) -> list[str]:
    """Return the tokens of an expert that have a row there and are not in the merge, in the order of their ids."""
    return sorted((token for token, id in own.items() if token not in names and 0 <= id < count), key=own.__getitem__)


def _some(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens[:TOLD])) + ", …" * (len(tokens) > TOLD)
