"""Pass 1: what the allocations need to know of every expert's delta, exact and in float64 on the host."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from dppa_jax.architecture.specs import LINEARS, CheckpointError
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.allocate import ALLOCATIONS, Statistics
from dppa_jax.delta.score import LAST_BOUND, bound_above
from dppa_jax.delta.threshold import BOUNDS
from dppa_jax.merging.blocks import Block, Loaded, Stream
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.runtime.journal import Journal
from dppa_jax.runtime.mesh import put_rows
from dppa_jax.runtime.processes import joined
from dppa_jax.runtime.progress import Stage

SURVEYS = 2  # experts at a time: one's host work beside another's reading


def survey(
    stream: Stream, kernels: Kernels, config: MergeConfig, stage: Stage, journal: Journal | None = None
) -> list[Statistics]:
    """Statistics of each expert, in their order. `kernels` are those of the score "magnitude".

    The stream has the layers of this process; those of the others are told. `journal` keeps what is done.
    """
    allocation, journal = ALLOCATIONS[config.allocate], journal or Journal()
    shape = (stream.sources[0].config["num_hidden_layers"], len(LINEARS))
    experts = range(len(config.experts))
    numel = np.zeros(shape)
    linear = np.zeros((len(experts), *shape))
    layer = np.zeros((len(experts), shape[0]))
    blocks = []
    for block in (block for block in stream.blocks if block.layers):
        at = list(block.layers)
        if (known := journal.get(_key(block))) is None:
            blocks.append(block)
        else:
            numel[at], linear[:, at], layer[:, at] = (known[name] for name in ("numel", "linear", "layer"))

    def of_expert(e: int, linears: list[Loaded], at: list[int]) -> None:
        sums = _per_piece(linears, [kernels.row_sums("absolute", x.base, x.experts[e]) for x in linears])
        _check_finite(sums, linears, config.experts[e])
        of_linear, of_layer = _thresholds(sums, numel[at], config, allocation)
        outliers = _outliers(kernels, linears, e, of_linear, of_layer, allocation.outliers)
        for x, (own, layers) in zip(linears, outliers, strict=True):
            linear[e][at, x.part.linear] = own
            layer[e][at] += layers

    with ThreadPoolExecutor(SURVEYS, "survey") as pool:
        for block, loaded in stream(blocks):
            linears = [x for x in loaded if x.part.linear is not None]
            at = list(block.layers)
            for x in linears:
                numel[at, x.part.linear] = x.part.piece_rows * x.part.columns
            for done in [pool.submit(of_expert, e, linears, at) for e in experts]:
                done.result()
            found = {"numel": numel[at], "linear": linear[:, at], "layer": layer[:, at]}
            journal.add(_key(block), {name: array.tolist() for name, array in found.items()})
            stage.advance(stream.bytes_read)
    numel, linear, layer = (joined("survey", array, axis) for array, axis in ((numel, 0), (linear, 1), (layer, 1)))
    return [Statistics(numel, linear[e], layer[e]) for e in experts]


def _key(block: Block) -> str:
    return f"survey {block.layers[0]}"


def _per_piece(linears: Sequence[Loaded], folded: Sequence) -> np.ndarray:
    """(layers, linears) sums from the folded rows of every linear."""
    sums = [host_sums(f, x.part.rows) for x, f in zip(linears, folded, strict=True)]
    pieces = [s.reshape(len(x.part.pieces), -1).sum(axis=1) for x, s in zip(linears, sums, strict=True)]
    return np.stack(pieces, axis=1)


def _thresholds(sums, numel, config, allocation) -> tuple[np.ndarray, np.ndarray]:
    """Above what |δ| is an outlier: of each linear (layers, linears) and of each layer (layers,), float32.

    Means and products are rounded to the delta's dtype, as the authors' code does in working precision.
    """
    dtype = np.dtype(ml_dtypes.bfloat16 if config.delta_dtype == "bfloat16" else config.delta_dtype)
    multiple = config.significance_multiple
    own = (sums / numel).astype(dtype) * np.asarray(allocation.linear_multiple or multiple, dtype)
    mean = (sums.sum(axis=1) / numel.sum(axis=1)).astype(dtype)
    multiple = dtype.type(allocation.layer_multiple or multiple)
    layer = np.array([_largest_ratio(m, multiple) for m in mean]) if allocation.divides else mean * multiple
    return own.astype(np.float32), layer.astype(np.float32)


def _largest_ratio(mean: np.generic, multiple: np.generic) -> np.generic:
    """The largest w of the dtype with w/mean, rounded, at most `multiple`: so that w' > w means w'/mean > multiple."""
    if not mean:
        return mean
    w = mean * multiple
    while w / mean <= multiple:
        w = np.nextafter(w, np.array(np.inf, w.dtype))
    while w / mean > multiple:
        w = np.nextafter(w, np.array(0, w.dtype))
    return w


def _outliers(kernels: Kernels, linears, e: int, of_linear, of_layer, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per linear: outliers of each layer's linear above its own threshold, and above its layer's."""
    pending = []
    for x, own in zip(linears, of_linear.T, strict=True):
        thresholds = np.stack([own, of_layer], axis=1)
        if kind == "count":
            bounds = np.full((len(own), BOUNDS), LAST_BOUND)
            bounds[:, :2] = bound_above(thresholds)
            pending.append(kernels.counts(x.base, x.experts[e], None, put_rows(kernels.mesh, x.part.per_row(bounds))))
        else:
            per_row = put_rows(kernels.mesh, x.part.per_row(thresholds))
            pending.append(kernels.row_sums("above", x.base, x.experts[e], per_row))
    results = []
    for x, folded in zip(linears, pending, strict=True):
        if kind == "count":
            rows = np.asarray(folded)[: x.part.rows, :2].T
        else:
            sums = host_sums(folded, x.part.rows)
            rows = (sums.real, sums.imag)
        own, layer = (r.reshape(len(x.part.pieces), -1).sum(axis=1) for r in rows)
        results.append((own, layer))
    return results


def _check_finite(sums: np.ndarray, linears: Sequence[Loaded], expert: str) -> None:
    if np.isfinite(sums).all():
        return
    piece, linear = np.argwhere(~np.isfinite(sums))[0]
    raise NonfiniteError(linears[linear].part.pieces[piece].name, expert)


class NonfiniteError(CheckpointError):
    """NaN or Inf in a tensor."""

    def __init__(self, tensor: str, where: str):
        self.tensor = tensor
        super().__init__(
            f"{where!r} or the base: {tensor} holds NaN or Inf; the checkpoint is damaged or overflowed in training. "
            f"--allow_nonfinite merges it all the same."
        )
