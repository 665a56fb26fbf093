"""What two checkpoints' tensors have in common: differences, ulps and masks, a few rows at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import ml_dtypes
import numpy as np

from dppa_jax.architecture.table import ARCHITECTURES
from dppa_jax.checkpoint import Checkpoint, CheckpointError

PIECE = 1 << 17  # elements compared at a time: what is made of them in float32 stays in a core's cache
SINGLE = np.dtype(np.float32)
EXPONENT = np.int32(0x7F800000)  # its bits in a float32

IDENTICAL, EQUAL, MASKS, DIFFERENT = "identical", "equal", "masks differ", "different"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # their rows beyond the shorter are ignored
LINEARS = dict.fromkeys(linear.kind.split(".")[-1] for row in ARCHITECTURES.values() for linear in row.linears)
KINDS = (*LINEARS, "embed_tokens", "lm_head", "norms", "biases", "other")

MEASURED = """\
- Everything is compared in the coarser dtype of the two, to which the finer is rounded.
- max and mean diff: of |ours - reference|. "of largest": the greatest difference as a share of the tensor's largest
  magnitude in the reference; with --base, of the largest magnitude of (reference - base) there.
- ulp: |ours - reference| in units in the last place of the larger of the two values, but never in units smaller than a
  float32 ulp of the tensor's root mean square and, with --base, of |base| + |model - base| there. Merges add base and
  deltas in float32, which is uncertain by an ulp of the numbers that are added. Where base and deltas cancel, the
  result is far smaller than these, and its own ulp says nothing: one rounding more or less, by another order of
  additions, is there thousands of the result's own ulps ("own_ulp" in validate.json).
- "equal within 1 ulp" says little where a delta is itself about an ulp of the weight, as many are in bfloat16. What is
  rounded from float32 to bfloat16 falls the other way in one element of 100,000; when many differ, by an ulp each,
  the deltas differ. Compare models merged with --output_dtype=float32, or the deltas, to be sure.
- kept: the tensor is not 0 there; with --base, the model differs from the base there. A merged model in bfloat16 or
  float16 whose delta was rounded away counts as not kept.
- "masks differ" is the verdict when values differ by more than --tolerance_ulp only where one keeps and the other
  does not.
"""


@dataclass(frozen=True)
class Comparison:
    """One tensor of ours and of the reference, or several of them together.

    Attributes:
      name: of the tensor; of several, of the worst one.
      elements: compared.
      differing: elements whose bits are not the same.
      nonfinite: of these, where either is NaN or infinite; the differences leave them out.
      relative: the greatest difference as a share of the largest magnitude; see MEASURED.
      ulp, own_ulp: the greatest difference in ulps, and in those of the results alone; see MEASURED.
      ulp_of_shared: `ulp` of the elements that both or neither keep.
      kept_by_both, kept_by_ours, kept_by_theirs: elements kept by both, by ours alone and by theirs alone.
      worst: index, ours and theirs of the greatest difference.
      problem: why nothing could be compared.
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
        return self.kept_by_ours + self.kept_by_theirs

    def verdict(self, tolerance_ulp: float) -> str:
        """One of IDENTICAL, EQUAL, MASKS, DIFFERENT.

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
        """The verdict with its number.

        >>> Comparison("x", 100, 2, ulp=9e9, kept_by_ours=2).in_words(1.0)
        'masks differ at 2 positions (2 %)'
        """
        verdict = self.verdict(tolerance_ulp)
        masks = f"masks differ at {_many(self.kept_by_one, 'position')} ({percent(self.kept_by_one, self.elements)})"
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
        found = asdict(self) | {"kind": kind(self.name), "verdict": self.verdict(tolerance_ulp)}
        if self.elements:
            found["mask_agreement"] = 1 - self.kept_by_one / self.elements
            found["sparsity"] = 1 - (self.kept_by_both + self.kept_by_ours) / self.elements
            found["sparsity_of_reference"] = 1 - (self.kept_by_both + self.kept_by_theirs) / self.elements
        return found


def together(group: Sequence[Comparison], tolerance_ulp: float) -> Comparison:
    """Several as one: sums of the counts, the mean, the greatest differences, with the name of the worst."""
    order = (IDENTICAL, EQUAL, MASKS, DIFFERENT)
    worst = max(group, key=lambda one: (order.index(one.verdict(tolerance_ulp)), one.ulp, one.max_difference))
    counts = ("elements", "differing", "nonfinite", "kept_by_both", "kept_by_ours", "kept_by_theirs")
    greatest = ("max_difference", "relative", "ulp", "own_ulp", "ulp_of_shared")
    elements = sum(one.elements for one in group)
    return replace(
        worst,
        **{name: sum(getattr(one, name) for one in group) for name in counts},
        **{name: max(getattr(one, name) for one in group) for name in greatest},
        mean_difference=sum(one.mean_difference * one.elements for one in group) / max(elements, 1),
    )


def kind(name: str) -> str:
    """Of KINDS.

    >>> kind("model.layers.3.mlp.up_proj.weight"), kind("model.norm.weight"), kind("lm_head.weight")
    ('up_proj', 'norms', 'lm_head')
    """
    *_, module, leaf = ("", *name.split("."))
    if leaf == "bias":
        return "biases"
    if module.endswith("norm"):
        return "norms"
    return module if module in KINDS else "other"


def compare_tensor(name: str, sources: Sequence[Checkpoint]) -> Comparison:
    """One tensor that the first two sources, ours and the reference, both have; a third is the base."""
    stored = [source.tensors.get(name) for source in sources]
    ours, theirs, *bases = stored
    shapes = [tensor.shape if tensor else () for tensor in stored]
    if name in VOCABULARY:
        shapes = [shape[1:] for shape in shapes]
    if shapes[0] != shapes[1]:
        return Comparison(name, problem=f"the output's shape is {ours.shape}, the reference's {theirs.shape}")
    if bases and shapes[2] != shapes[0]:
        raise CheckpointError(
            f"{sources[2].directory}: {name} is not there, or not of the shape {ours.shape} that the output has; is "
            f"--base what both were made from? Without it, what is 0 is compared in place of what equals the base."
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
    return _Pair(name, sources, rows, columns, common).compared(shape, tuple(notes))


class _Pair:
    """A tensor of ours and of the reference, and of the base where there is one; read again for every pass."""

    def __init__(self, name: str, sources: Sequence[Checkpoint], rows: int, columns: int, common: np.dtype):
        self.name, self.sources, self.rows, self.columns, self.common = name, sources, rows, columns, common
        self.bits = np.dtype(f"u{common.itemsize}")
        self.step = max(1, PIECE // columns)
        many = min(self.step, rows)
        self.buffers = [np.empty((many, columns), source.tensors[name].dtype) for source in sources]

    def pieces(self) -> Iterator[list[np.ndarray]]:
        """Vectors of some rows of every source, in the common dtype."""
        for start in range(0, self.rows, self.step):
            stop = min(start + self.step, self.rows)
            for source, buffer in zip(self.sources, self.buffers, strict=True):
                source.read_rows(self.name, start, stop, buffer)
            with np.errstate(over="ignore"):  # of float32 in float16
                yield [b[: stop - start].reshape(-1).astype(self.common, copy=False) for b in self.buffers]

    def compared(self, shape: tuple[int, ...], notes: tuple[str, ...]) -> Comparison:
        """The masks, and what an ulp depends on, in a first pass; differences, where there are any, in a second."""
        elements = self.rows * self.columns
        differing = by_both = by_ours = by_theirs = 0
        squares = largest = 0.0
        for piece in self.pieces():
            many = int(np.count_nonzero(self._differ(*piece)))
            ours, theirs, base = _singles(piece)
            differing += many
            squares += _sum_of_squares(theirs)
            largest = max(largest, _largest(theirs - base if base.ndim else theirs))
            kept = theirs != base
            both = kept if not many else kept & (ours != base)
            by_both += int(np.count_nonzero(both))
            by_theirs += int(np.count_nonzero(kept)) - int(np.count_nonzero(both))
            by_ours += int(np.count_nonzero((ours != base) & ~kept)) if many else 0
        found = Comparison(
            self.name,
            elements,
            differing,
            kept_by_both=by_both,
            kept_by_ours=by_ours,
            kept_by_theirs=by_theirs,
            notes=notes,
        )
        if not differing:
            return found
        with np.errstate(invalid="ignore", over="ignore"):  # of NaN and Inf, which are counted
            return self._with_differences(found, shape, math.sqrt(squares / elements), largest)

    def _with_differences(
        self, found: Comparison, shape: tuple[int, ...], typical: float, largest: float
    ) -> Comparison:
        """The greatest and mean differences; `typical` is the root mean square."""
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
            if base.ndim:  # a lower bound of the numbers that were added, which only who merged knows
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
            found,
            nonfinite=nonfinite,
            max_difference=greatest,
            mean_difference=summed / found.elements,
            relative=greatest / largest if largest else float(greatest > 0),
            ulp=ulp,
            own_ulp=own_ulp,
            ulp_of_shared=shared_ulp,
            worst=worst if greatest else {},
        )

    def _leave_out_nonfinite(self, difference: np.ndarray, piece: list[np.ndarray]) -> int:
        """Set differences from or to NaN and Inf to 0; how many of them are between other bits."""
        infinite = ~np.isfinite(difference)
        difference[infinite] = 0
        return int(np.count_nonzero(infinite & self._differ(*piece)))

    def _differ(self, ours: np.ndarray, theirs: np.ndarray, *_: np.ndarray) -> np.ndarray:
        return ours.view(self.bits) != theirs.view(self.bits)


def _singles(piece: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ours, theirs and the base as float32; in place of no base a zero without dimensions."""
    ours, theirs, *base = (array.astype(np.float32, copy=False) for array in piece)
    return ours, theirs, base[0] if base else np.zeros((), np.float32)


def _ulp(magnitude: np.ndarray | np.float32, dtype: np.dtype) -> np.ndarray | np.float32:
    """The distance from a finite float32 that is not negative to the next larger value of a dtype.

    >>> float(_ulp(np.float32(1.5), np.dtype(np.float32))) == float(np.spacing(np.float32(1.5)))
    True
    """
    facts = ml_dtypes.finfo(dtype)
    power = (np.asarray(magnitude).view(np.int32) & EXPONENT).view(np.float32)  # 0 of a subnormal
    return np.maximum(power, np.float32(facts.smallest_normal)) * np.float32(facts.eps)


def _coarser(*dtypes: np.dtype) -> np.dtype:
    return min(dtypes, key=lambda dtype: ml_dtypes.finfo(dtype).nmant)


def _sum_of_squares(values: np.ndarray) -> float:
    found = float(np.dot(values, values))
    if math.isfinite(found):
        return found
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(np.dot(finite, finite))


def _largest(values: np.ndarray) -> float:
    found = float(max(values.max(), -values.min()))
    return found if math.isfinite(found) else float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _many(count: int, of: str) -> str:
    return f"{count} {of}" + "s" * (count != 1)


def percent(count: int, of: int) -> str:
    """
    >>> percent(1, 8), percent(0, 8), percent(1, 10**7)
    ('12.5 %', '0 %', '< 0.001 %')
    """
    share = 100 * count / max(of, 1)
    return "< 0.001 %" if 0 < share < 0.001 else f"{share:.3g} %"
