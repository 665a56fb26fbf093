"""Pass 1: what the allocations need to know of every expert's delta, exact and in float64 on the host."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from dppa_jax.architecture.specs import CheckpointError, Linears
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.allocate import ALLOCATIONS, Statistics
from dppa_jax.delta.score import LAST_BOUND, bound_above
from dppa_jax.delta.threshold import BOUNDS
from dppa_jax.merging.blocks import Block, Step, layer_owners, survey_steps
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.merging.rows import DeviceMatrix
from dppa_jax.merging.stream import Stream
from dppa_jax.runtime import processes
from dppa_jax.runtime.journal import Journal
from dppa_jax.runtime.mesh import put_rows
from dppa_jax.runtime.progress import Stage, stage

SURVEYS = 2  # experts at a time: one's host work beside another's reading


def surveyed(
    stream: Stream,
    linears: Linears,
    dense: Kernels,
    config: MergeConfig,
    quiet: bool = False,
    journal: Journal | None = None,
) -> list[Statistics] | None:
    """Find the statistics of every expert in a pass over the weights; None where the allocation needs none."""
    if not config.is_surveyed:
        return None
    with stage("survey", stream.pass_bytes(), quiet=quiet) as progress:
        return survey(stream, linears, dense, config, progress, journal)


def survey(
    stream: Stream,
    linears: Linears,
    kernels: Kernels,
    config: MergeConfig,
    progress: Stage,
    journal: Journal | None = None,
) -> list[Statistics]:
    """Find the statistics of each expert, in their order, in a pass over the weights.

    Args:
      stream: has the layers of this process; the other processes tell what they find of theirs.
      linears: of the whole model.
      kernels: rank by magnitude.
      journal: keeps what is done.
    """
    journal, experts = journal or Journal(), range(len(config.experts))
    found, steps = _Found(linears, kernels, config), []
    for step in survey_steps(stream.blocks):
        if (known := journal.get(_key(step.block))) is None:
            steps.append(step)
        else:
            found.restore(step, known)
    last = {step.block.layers: step for step in steps}
    with ThreadPoolExecutor(SURVEYS, "survey") as pool:
        for step, (block, loaded) in zip(steps, stream([step.block for step in steps]), strict=True):
            matrices = [x for x in loaded if x.matrix.linears]
            for done in [pool.submit(found.survey, e, step, matrices) for e in experts if matrices]:
                done.result()
            if step is last[block.layers]:
                journal.add(_key(block), found.of(step))
            progress.advance(stream.bytes_read)
    return found.joined()


class _Found:
    """What is found of the linears and layers of this process.

    Attributes:
      sums: of |δ|, (experts, linears).
      linear, layer: outliers, (experts, linears) and (experts, layers).
    """

    def __init__(self, linears: Linears, kernels: Kernels, config: MergeConfig):
        self.linears, self.kernels, self.config = linears, kernels, config
        self.sums, self.linear = np.zeros((2, len(config.experts), len(linears)))
        self.layer = np.zeros((len(config.experts), linears.layers))

    def survey(self, e: int, step: Step, matrices: list[DeviceMatrix]) -> None:
        """Do a step for expert e."""
        places, whole, config, kernels = step.block.linears, list(step.whole), self.config, self.kernels
        if step.adds_up:
            folded = [kernels.row_sums("absolute", x.base, x.experts[e]) for x in matrices]
            rows = (host_sums(f, x.matrix.rows) for x, f in zip(matrices, folded, strict=True))
            self.sums[e, places] = np.concatenate([x.matrix.range_sums(r) for x, r in zip(matrices, rows, strict=True)])
            _check_finite(self.sums[e, places], places, self.linears, config.experts[e])
        if step.compares:
            thresholds = _thresholds(self.sums[e, whole], self.linears, whole, step.block.layers[0], config)
            chosen = [whole.index(place) for place in places] if len(places) < len(whole) else slice(None)
            of_linear, of_layer = (each[chosen] for each in thresholds)
            kind = ALLOCATIONS[config.allocate].outliers
            self.linear[e][places], beyond = _outliers(kernels, matrices, e, of_linear, of_layer, kind)
            np.add.at(self.layer[e], self.linears.layer[places], beyond)

    def of(self, step: Step) -> dict[str, list]:
        """What is found of the layers of a step, for a journal."""
        layers = list(step.block.layers)
        return {"linear": self.linear[:, step.whole].tolist(), "layer": self.layer[:, layers].tolist()}

    def restore(self, step: Step, known: dict[str, list]) -> None:
        """Take what is found of the layers of a step from a journal."""
        self.linear[:, step.whole], self.layer[:, list(step.block.layers)] = known["linear"], known["layer"]

    def joined(self) -> list[Statistics]:
        """The statistics of each expert, of the layers of all processes."""
        linears, owners = self.linears, np.array(layer_owners(self.linears.layers, processes.count()))
        layer = processes.joined("survey of layers", self.layer, 1, owners)
        linear = processes.joined("survey of linears", self.linear, 1, owners[linears.layer])
        of_experts = zip(linear, layer, strict=True)
        return [Statistics(linears.layer, linears.numel, *each) for each in of_experts]


def _key(block: Block) -> str:
    return f"survey {block.layers[0]}"


def _thresholds(
    sums: np.ndarray,
    linears: Linears,
    places: list[int],
    first_layer: int,
    config: MergeConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Above what |δ| is an outlier: for each linear at `places`, and for the layer of each, float32.

    Means and products are rounded to the delta's dtype, as the authors' code does in working precision.
    """
    allocation = ALLOCATIONS[config.allocate]
    dtype = np.dtype(ml_dtypes.bfloat16 if config.delta_dtype == "bfloat16" else config.delta_dtype)
    numel, layer = linears.numel[places], linears.layer[places] - first_layer
    own = (sums / numel).astype(dtype) * np.asarray(config.significance_multiple, dtype)
    mean = (np.bincount(layer, sums) / np.bincount(layer, numel)).astype(dtype)
    multiple = dtype.type(allocation.layer_multiple or config.significance_multiple)
    of_layer = np.array([_largest_ratio(m, multiple) for m in mean]) if allocation.divides else mean * multiple
    return own.astype(np.float32), of_layer.astype(np.float32)[layer]


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


def _outliers(
    kernels: Kernels, matrices: Sequence[DeviceMatrix], e: int, of_linear: np.ndarray, of_layer: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Outliers of each linear above its own threshold, and above its layer's."""
    pending, first = [], 0
    for x in matrices:
        places = slice(first, first + len(x.matrix.linears))
        first = places.stop
        thresholds = np.stack([of_linear[places], of_layer[places]], axis=1)
        if kind == "count":
            bounds = np.full((len(thresholds), BOUNDS), LAST_BOUND)
            bounds[:, :2] = bound_above(thresholds)
            per_row = put_rows(kernels.mesh, x.matrix.per_row(bounds))
            pending.append(kernels.counts(x.base, x.experts[e], None, per_row))
        else:
            per_row = put_rows(kernels.mesh, x.matrix.per_row(thresholds))
            pending.append(kernels.row_sums("above", x.base, x.experts[e], per_row))
    own, beyond = [], []
    for x, folded in zip(matrices, pending, strict=True):
        if kind == "count":
            rows = np.asarray(folded)[: x.matrix.rows, :2].T
        else:
            sums = host_sums(folded, x.matrix.rows)
            rows = (sums.real, sums.imag)
        own.append(x.matrix.range_sums(rows[0]))
        beyond.append(x.matrix.range_sums(rows[1]))
    return np.concatenate(own), np.concatenate(beyond)


def _check_finite(sums: np.ndarray, places: list[int], linears: Linears, expert: str) -> None:
    if not np.isfinite(sums).all():
        raise NonfiniteError(linears.names[places[np.argmin(np.isfinite(sums))]], expert)


class NonfiniteError(CheckpointError):
    """A tensor holds NaN or Inf."""

    def __init__(self, tensor: str, model: str):
        self.tensor = tensor
        super().__init__(
            f"{model!r} or the base: {tensor} holds NaN or Inf; the checkpoint is damaged or overflowed in training. "
            f"--allow_nonfinite merges it all the same."
        )
