"""What a structural merge leaves out of each expert's delta: parameters, bytes, and what is gone as a whole."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dppa_jax.architecture.specs import Linears
from dppa_jax.checkpoint import DTYPE_BY_NAME
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.score import Whole
from dppa_jax.merging.merger import Outcome
from dppa_jax.runtime.memory import size_text


class Gone(NamedTuple):
    """How many are gone, of how many."""

    gone: int
    of: int


def gone_of(config: MergeConfig, outcome: Outcome) -> dict[str, dict[str, Gone]]:
    """Count what is gone of the linears' delta of each expert: of "parameters", "bytes", and of what goes as a whole.

    Bytes are those of a delta in `delta_dtype`. The merged model has its shape and its bytes all the same. Nothing is
    said of a merge in which single elements go.
    """
    if not (whole := config.whole):
        return {}
    own = np.diff(outcome.densities, axis=1, prepend=0.0)  # of each partition
    dropped = 1.0 - (own * (outcome.weights != 0)).sum(axis=1)
    return {name: _of_expert(config, whole, outcome.linears, dropped[e]) for e, name in enumerate(config.experts)}


def sentence(expert: str, gone: Mapping[str, Gone], pruned: str = "delta") -> str:
    """Say what is gone of an expert's delta, or of whatever else has been pruned.

    >>> sentence("law", {"parameters": Gone(90, 100), "bytes": Gone(360, 400), "rows": Gone(9, 10)})
    "Of the delta of 'law' 90 of 100 parameters (360 bytes of 400 bytes) and 9 of 10 rows are gone."
    """
    counts = {what: f"{each.gone:,} of {each.of:,} {what}" for what, each in gone.items() if what != "bytes"}
    counts["parameters"] += f" ({size_text(gone['bytes'].gone)} of {size_text(gone['bytes'].of)})"
    return f"Of the {pruned} of {expert!r} {' and '.join(counts.values())} are gone."


def _of_expert(config: MergeConfig, whole: Whole, linears: Linears, dropped: np.ndarray) -> dict[str, Gone]:
    parameters = Gone(int(np.rint(linears.numel * dropped).sum()), int(linears.numel.sum()))
    size = DTYPE_BY_NAME[config.delta_dtype].itemsize
    found = {"parameters": parameters, "bytes": Gone(parameters.gone * size, parameters.of * size)}
    for what, count, place in _wholes(whole, linears):
        gone, of = found.get(what, Gone(0, 0))
        found[what] = Gone(gone + round(count * dropped[place]), of + count)
    return found


def _wholes(whole: Whole, linears: Linears) -> Iterator[tuple[str, int, int]]:
    """Yield what goes as a whole, how many of it there are, and the linear whose density says how many stay."""
    seen = set()
    for place, spec in enumerate(linears.specs):
        if whole is not Whole.UNITS:
            yield whole.value, spec.rows if whole is Whole.ROWS else spec.columns, place
        elif spec.group.name not in seen:  # the other linears of a group have the same density
            seen.add(spec.group.name)
            yield spec.group.kind, spec.group.units, place
