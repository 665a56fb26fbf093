"""Compare the tensors of two checkpoints, a few rows at a time: differences, ulps, masks, and a verdict."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import ml_dtypes
import numpy as np

from dppa_jax.architecture.table import ARCHITECTURES
from dppa_jax.checkpoint import Checkpoint, CheckpointError

PIECE = 1 << 17  # elements compared at a time: their float32 copies stay in a core's cache
SINGLE = np.dtype(np.float32)
EXPONENT = np.int32(0x7F800000)  # the bits of a float32 that hold its exponent

IDENTICAL, EQUAL, MASKS, DIFFERENT = "identical", "equal", "masks differ", "different"  # from best to worst
VERDICTS = (IDENTICAL, EQUAL, MASKS, DIFFERENT)
VOCABULARY = {  # rows that not all models have are ignored
    f"{name}.weight" for row in ARCHITECTURES.values() for name in (*row.embeddings, *row.heads)
}
LINEARS = dict.fromkeys(linear.kind.split(".")[-1] for row in ARCHITECTURES.values() for linear in row.linears)
KINDS = (*LINEARS, "embed_tokens", "lm_head", "norms", "biases", "other")

MEASURED = """\
- Values are compared in the coarser dtype of the two models; the finer model is rounded to it.
- max and mean diff: of |ours - reference|. "of largest": the greatest difference as a share of the tensor's largest
  magnitude in the reference; with --base, of the largest magnitude of (reference - base) there.
- ulp: |ours - reference| in units in the last place of the larger of the two values. The unit is never smaller than a
  float32 ulp of the tensor's root mean square and, with --base, of |base| + |model - base| there. The reason: merges
  add base and deltas in float32, and a sum is uncertain by an ulp of the numbers that are added. Where base and deltas
  cancel, the sum is far smaller than these numbers. One rounding more or less, from another order of additions, is
  then thousands of the sum's own ulps ("own_ulp" in validate.json), and means nothing.
- "equal within 1 ulp" says little where a delta is itself about an ulp of the weight, as many are in bfloat16. Rounding
  from float32 to bfloat16 falls the other way in about one element of 100,000. When many elements differ by an ulp
  each, the deltas differ. Compare models merged with --output_dtype=float32, or the deltas, to be sure.
- kept: the tensor is not 0 there; with --base, the model differs from the base there. A merged model in bfloat16 or
  float16 whose delta was rounded away counts as not kept.
- "masks differ" is the verdict when values differ by more than --tolerance_ulp only where one model keeps an element
  and the other does not.
"""


@dataclass(frozen=True)
class Comparison:
    """How a tensor of our model differs from that of the reference; or the same of several tensors together.

    Attributes:
      name: of the tensor; of several tensors, the name of the worst one.
      elements: how many were compared.
      differing: how many elements do not have the same bits.
      nonfinite: in how many of these a value is NaN or infinite; the differences leave them out.
      max_difference, mean_difference: of |ours - reference|.
      relative: the greatest difference as a share of the largest magnitude; see MEASURED.
      ulp, own_ulp: the greatest difference in ulps, and in ulps of the results alone; see MEASURED.
      ulp_of_shared: the greatest `ulp` of the elements that both or neither keep.
      kept_by_both, kept_by_ours, kept_by_theirs: how many elements both keep, only ours and only the reference.
      worst: the index of the greatest difference, and the values of ours and theirs there.
      problem: why the tensors could not be compared.
      notes: what else differs: dtypes, rows of the vocabulary.
    """

    name: str
    elements: int = 0
    differing: int = 0
    nonfinite: int = 0
    max_difference: float = 0.0
    mean_difference: float = 0.0
    relative: float = 0.0
    ulp: float = 0.0
    own_ulp: float = 0.0
    ulp_of_shared: float = 0.0
    kept_by_both: int = 0
    kept_by_ours: int = 0
    kept_by_theirs: int = 0
    worst: Mapping = field(default_factory=dict)
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def kept_by_one(self) -> int:
        """The number of elements that one of the two keeps and the other does not."""
        return self.kept_by_ours + self.kept_by_theirs

    def verdict(self, tolerance_ulp: float) -> str:
        """Return one of VERDICTS. Differences of up to `tolerance_ulp` are EQUAL.

        >>> Comparison("x", 9, 1, ulp=0.5).verdict(1.0), Comparison("x", 9, 1, ulp=2.0, ulp_of_shared=2.0).verdict(1.0)
        ('equal', 'different')
        """
        if self.problem or self.nonfinite:
            return DIFFERENT
        if not self.differing:
            return IDENTICAL
        if self.ulp <= tolerance_ulp:
            return EQUAL
        return MASKS if self.ulp_of_shared <= tolerance_ulp else DIFFERENT

    def in_words(self, tolerance_ulp: float) -> str:
        """Say the verdict with the number that it rests on.

        >>> Comparison("x", 100, 2, ulp=9e9, kept_by_ours=2).in_words(1.0)
        'masks differ at 2 positions (2 %)'
        """
        verdict = self.verdict(tolerance_ulp)
        masks = f"masks differ at {_counted(self.kept_by_one, 'position')} ({percent(self.kept_by_one, self.elements)})"
        if verdict == EQUAL:
            equal = f"equal within {math.ceil(self.ulp)} ulp, {percent(self.differing, self.elements)} differ"
            return equal + f", {masks}" * (self.kept_by_one > 0)
        if verdict == MASKS:
            return masks
        if verdict == DIFFERENT:
            reason = self.problem or f"{self.nonfinite} NaN or Inf" * (self.nonfinite > 0) or f"{self.ulp:.3g} ulp"
            return f"different: {reason}"
        return verdict

    def as_dict(self, tolerance_ulp: float) -> dict:
        """Return every number, with the tensor's kind, the verdict and the sparsities, for validate.json."""
        content = asdict(self) | {"kind": tensor_kind(self.name), "verdict": self.verdict(tolerance_ulp)}
        if self.elements:
            content["mask_agreement"] = 1 - self.kept_by_one / self.elements
            content["sparsity"] = 1 - (self.kept_by_both + self.kept_by_ours) / self.elements
            content["sparsity_of_reference"] = 1 - (self.kept_by_both + self.kept_by_theirs) / self.elements
        return content


def summarise(tensors: Sequence[Comparison], tolerance_ulp: float) -> Comparison:
    """Summarise several comparisons as one: counts added, the mean, the greatest differences, the worst one's name."""
    worst = max(tensors, key=lambda x: (VERDICTS.index(x.verdict(tolerance_ulp)), x.ulp, x.max_difference))
    counts = ("elements", "differing", "nonfinite", "kept_by_both", "kept_by_ours", "kept_by_theirs")
    greatest = ("max_difference", "relative", "ulp", "own_ulp", "ulp_of_shared")
    elements = sum(tensor.elements for tensor in tensors)
    return replace(
        worst,
        **{name: sum(getattr(tensor, name) for tensor in tensors) for name in counts},
        **{name: max(getattr(tensor, name) for tensor in tensors) for name in greatest},
        mean_difference=sum(tensor.mean_difference * tensor.elements for tensor in tensors) / max(elements, 1),
    )


def tensor_kind(name: str) -> str:
    """Return the one of KINDS that a tensor belongs to, by its name.

    >>> [tensor_kind(f"{name}.weight") for name in ("model.layers.3.mlp.up_proj", "model.norm", "lm_head")]
    ['up_proj', 'norms', 'lm_head']
    """
    *_, module, leaf = ("", *name.split("."))
    if leaf == "bias":
        return "biases"
    if module.endswith("norm"):
        return "norms"
    return module if module in KINDS else "other"


def compare_tensor(name: str, sources: Sequence[Checkpoint]) -> Comparison:
    """Compare one tensor of two checkpoints.

    Args:
      name: of a tensor that both have.
      sources: our model, the reference and, if there is one, their base.

    Raises:
      CheckpointError: the base lacks the tensor, or has it in another shape.
    """
    stored = [source.tensors.get(name) for source in sources]
    ours, theirs, *bases = stored
    shapes = [tensor.shape if tensor else () for tensor in stored]
    if name in VOCABULARY:
        shapes = [shape[1:] for shape in shapes]
    if shapes[0] != shapes[1]:
        return Comparison(name, problem=f"the output's shape is {ours.shape}, the reference's {theirs.shape}")
    if bases and shapes[2] != shapes[0]:
        raise CheckpointError(
            f"{sources[2].directory}: {name} is missing, or does not have the shape {ours.shape} that the output has; "
            f"is --base the model that both were made from? Without --base, kept is what is not 0."
        )
    if len(ours.shape) not in (1, 2) or 0 in ours.shape:
        return Comparison(name, problem=f"a tensor of shape {ours.shape} is not compared")
    notes = []
    rows, columns = (ours.shape[0] if len(ours.shape) == 2 else 1), ours.shape[-1]
    if name in VOCABULARY:
        rows = min(tensor.shape[0] for tensor in stored)
        for what, tensor in zip(("output", "reference", "base"), stored, strict=False):
            if tensor.shape[0] > rows:
                extra = f"row {rows} is" if tensor.shape[0] == rows + 1 else f"rows {rows} to {tensor.shape[0] - 1} are"
                notes.append(f"{extra} in the {what} only, ignored")
    common = _coarser(ours.dtype, theirs.dtype)
    if ours.dtype != theirs.dtype:
        notes.append(f"{ours.dtype} in the output, {theirs.dtype} in the reference; compared in {common}")
    shape = (rows, columns) if len(ours.shape) == 2 else (columns,)
    return _Pair(name, sources, rows, columns, common).compare(shape, tuple(notes))


class _Pair:
    """A tensor of our model and of the reference, and of the base if there is one; every pass reads it again."""

    def __init__(self, name: str, sources: Sequence[Checkpoint], rows: int, columns: int, common: np.dtype):
        self.name, self.sources, self.rows, self.columns, self.common = name, sources, rows, columns, common
        self.bits = np.dtype(f"u{common.itemsize}")
        self.step = max(1, PIECE // columns)
        count = min(self.step, rows)
        self.buffers = [np.empty((count, columns), source.tensors[name].dtype) for source in sources]

    def pieces(self) -> Iterator[list[np.ndarray]]:
        """Yield some rows of every source at a time, as vectors of the common dtype."""
        for start in range(0, self.rows, self.step):
            stop = min(start + self.step, self.rows)
            for source, buffer in zip(self.sources, self.buffers, strict=True):
                source.read_rows(self.name, start, stop, buffer)
            with np.errstate(over="ignore"):  # a float32 may be too large for float16
                yield [b[: stop - start].reshape(-1).astype(self.common, copy=False) for b in self.buffers]

    def compare(self, shape: tuple[int, ...], notes: tuple[str, ...]) -> Comparison:
        """Count masks and measure what an ulp depends on in a first pass, and differences, if any, in a second."""
        elements = self.rows * self.columns
        differing = by_both = by_ours = by_theirs = 0
        squares = largest = 0.0
        for piece in self.pieces():
            count = int(np.count_nonzero(self._differ(*piece)))
            ours, theirs, base = _singles(piece)
            differing += count
            squares += _sum_of_squares(theirs)
            largest = max(largest, _largest(theirs - base if base.ndim else theirs))
            kept = theirs != base
            both = kept if not count else kept & (ours != base)
            by_both += int(np.count_nonzero(both))
            by_theirs += int(np.count_nonzero(kept)) - int(np.count_nonzero(both))
            by_ours += int(np.count_nonzero((ours != base) & ~kept)) if count else 0
        comparison = Comparison(
            self.name,
            elements,
            differing,
            kept_by_both=by_both,
            kept_by_ours=by_ours,
            kept_by_theirs=by_theirs,
            notes=notes,
        )
        if not differing:
            return comparison
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are counted
            return self._with_differences(comparison, shape, math.sqrt(squares / elements), largest)

    def _with_differences(
        self, comparison: Comparison, shape: tuple[int, ...], typical: float, largest: float
    ) -> Comparison:
        """Add the greatest and the mean differences to a comparison.

        Args:
          comparison: the counts of the first pass.
          shape: of the tensor, for the index of the greatest difference.
          typical: the root mean square of the reference.
          largest: the largest magnitude; see MEASURED.
        """
        floor = float(_ulp(np.float32(typical), SINGLE))
        greatest = summed = shared_ulp = ulp = own_ulp = 0.0
        nonfinite = done = 0
        worst: dict = {}
        for piece in self.pieces():
            ours, theirs, base = _singles(piece)
            difference = np.abs(ours - theirs)
            total = float(difference.sum(dtype=np.float64))
            if not math.isfinite(total):
                nonfinite += self._leave_out_nonfinite(difference, piece)
                total = float(difference.sum(dtype=np.float64))
            summed += total
            own = _ulp(np.maximum(np.abs(ours), np.abs(theirs)), self.common)
            unit = np.maximum(own, floor)
            if base.ndim:  # a lower bound of the numbers that were added; only the merge itself knew them
                added = np.abs(base) + np.maximum(np.abs(ours - base), np.abs(theirs - base))
                unit = np.maximum(unit, _ulp(added, SINGLE))
            in_ulps = difference / unit
            ulp = max(ulp, float(in_ulps.max()))
            own_ulp = max(own_ulp, float((difference / own).max()))
            shared = (ours != base) == (theirs != base)
            shared_ulp = max(shared_ulp, float((in_ulps * shared).max()))
            if difference.max() > greatest or not worst:
                i = int(np.argmax(difference))
                index = [int(place) for place in np.unravel_index(done + i, shape)]
                worst = {"index": index, "ours": float(ours[i]), "theirs": float(theirs[i])}
                greatest = float(difference[i])
            done += difference.size
        return replace(
            comparison,
            nonfinite=nonfinite,
            max_difference=greatest,
            mean_difference=summed / comparison.elements,
            relative=greatest / largest if largest else float(greatest > 0),
            ulp=ulp,
            own_ulp=own_ulp,
            ulp_of_shared=shared_ulp,
            worst=worst if greatest else {},
        )

    def _leave_out_nonfinite(self, difference: np.ndarray, piece: list[np.ndarray]) -> int:
        """Set differences from or to NaN and Inf to 0; return how many of them are between values of unlike bits."""
        infinite = ~np.isfinite(difference)
        difference[infinite] = 0
        return int(np.count_nonzero(infinite & self._differ(*piece)))

    def _differ(self, ours: np.ndarray, theirs: np.ndarray, *_: np.ndarray) -> np.ndarray:
        """Return where the bits of two vectors differ."""
        return ours.view(self.bits) != theirs.view(self.bits)


def _singles(piece: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ours, theirs and the base as float32; without a base, a zero without dimensions stands for it."""
    ours, theirs, *base = (array.astype(np.float32, copy=False) for array in piece)
    return ours, theirs, base[0] if base else np.zeros((), np.float32)


def _ulp(magnitude: np.ndarray | np.float32, dtype: np.dtype) -> np.ndarray | np.float32:
    """Return the distance from a finite, non-negative float32 to the next larger value of a dtype.

    >>> float(_ulp(np.float32(1.5), np.dtype(np.float32))) == float(np.spacing(np.float32(1.5)))
    True
    """
    facts = ml_dtypes.finfo(dtype)
    power = (np.asarray(magnitude).view(np.int32) & EXPONENT).view(np.float32)  # 0 of a subnormal
    return np.maximum(power, np.float32(facts.smallest_normal)) * np.float32(facts.eps)


def _coarser(*dtypes: np.dtype) -> np.dtype:
    """Return the dtype with the fewest bits of mantissa."""
    return min(dtypes, key=lambda dtype: ml_dtypes.finfo(dtype).nmant)


def _sum_of_squares(values: np.ndarray) -> float:
    """Add up the squares of the values that are finite."""
    total = float(np.dot(values, values))
    if math.isfinite(total):
        return total
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(np.dot(finite, finite))


def _largest(values: np.ndarray) -> float:
    """Return the largest magnitude of the values that are finite."""
    largest = float(max(values.max(), -values.min()))
    return largest if math.isfinite(largest) else float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural where it must be."""
    return f"{count} {noun}" + "s" * (count != 1)


def percent(count: int, of: int) -> str:
    """Say a count as a percentage of a total.

    >>> percent(1, 8), percent(0, 8), percent(1, 10**7)
    ('12.5 %', '0 %', '< 0.001 %')
    """
    share = 100 * count / max(of, 1)
    return "< 0.001 %" if 0 < share < 0.001 else f"{share:.3g} %"
