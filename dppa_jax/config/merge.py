"""The frozen dataclasses that the rest of the code takes. Flags are parsed into them once, in launch.py."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dppa_jax.architecture.rules import nearest
from dppa_jax.config.option import WEIGHT_DTYPES, choose
from dppa_jax.delta.allocate import ALLOCATIONS
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES

RATE = 0.9

Coefficient = float | Mapping[str, float]  # of all tensors of an expert, or of each by its name in the checkpoint


@dataclass(frozen=True)
class MergeConfig:
    """What is computed, apart from where the models are and on which devices.

    Attributes:
      method: a preset of delta/methods.py; score, allocate, scale and combine override one axis of it.
      rate: the share of the delta that is removed, in [0, 1]; with scale "partition" the target.
      partitions: rates of DPA's partitions, highest first, the last one the target; every 0.1 from 0.9 by default.
      factors: per expert, one factor per partition, highest rate first; by default what leaves the method without
        amplification: 1, and 1/(1−rate) for random scores.
      coefficients: per expert, one number for all its tensors or one for every tensor of the base; 1 by default.
      q: the divisor of scale "q", global or per expert; in (0, 1].
      tensor_rates, tensor_coefficients: (regular expression, value) rules, the first match wins.
      method_options: the numbers that the score and the scale have to themselves, by the name of their flag.
    """

    experts: tuple[str, ...]
    method: str = "dppa"
    score: str | None = None
    allocate: str | None = None
    scale: str | None = None
    combine: str | None = None
    rate: float = RATE
    partitions: tuple[float, ...] = ()
    factors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    coefficients: Mapping[str, Coefficient] = field(default_factory=dict)
    q: Mapping[str, float] = field(default_factory=dict)
    max_fluctuation: float = 0.08
    significance_multiple: float = 5.0
    dpa_combine: str = "highest"
    seed: int = 0
    delta_dtype: str = "float32"
    output_dtype: str | None = None
    tensor_rates: tuple[tuple[str, float], ...] = ()
    tensor_coefficients: tuple[tuple[str, float], ...] = ()
    allow_nonfinite: bool = False
    method_options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        preset = METHODS[choose("--method", self.method, METHODS)]
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for axis, table in (("score", SCORES), ("allocate", ALLOCATIONS), ("scale", SCALES), ("combine", COMBINATIONS)):
            given = getattr(self, axis)
            set_(axis, choose(f"--{axis}", given, table) if given else getattr(preset, axis))
        if self.score is None and (self.allocate or self.scale != "none"):
            raise ValueError(f"--method={self.method} prunes nothing: give --score as well as --allocate or --scale.")
        if self.score and not self.allocate:
            set_("allocate", "uniform")
        self._check_experts()
        self._check_numbers()
        set_("method_options", self._resolve_method_options())
        scale = SCALES[self.scale]
        if scale.takes_factors:
            set_("partitions", self.partitions or default_partitions(self.rate))
        elif self.partitions:
            raise ValueError(f"--partitions: only --scale=partition (dppa, dare_dpa) has them, not {self.scale!r}.")
        set_("factors", self._resolve_factors())
        set_("coefficients", {name: _coefficient(name, self.coefficients.get(name, 1.0)) for name in self.experts})
        if scale.takes_q and set(self.q) != set(self.experts):
            raise ValueError("--scale=q (darex_q) needs --q, for all experts or as NAME=0.2 for each of them.")
        if not scale.takes_q and self.q:
            raise ValueError(f"--q: only --scale=q (darex_q) divides by it, not {self.scale!r}.")
        if self.score is None and self.tensor_rates:
            raise ValueError(f"--tensor_rate: --method={self.method} prunes nothing; give a method with a score.")
        choose("--dpa_combine", self.dpa_combine, ("highest", "max"))
        choose("--delta_dtype", self.delta_dtype, WEIGHT_DTYPES)
        if self.output_dtype:
            choose("--output_dtype", self.output_dtype, WEIGHT_DTYPES)

    @property
    def rates(self) -> tuple[float, ...]:
        """Nominal rates, highest first: of the partitions, or the one rate; empty when nothing is pruned."""
        if self.score is None:
            return ()
        return self.partitions or self.rates_of_tensor(self.rate)

    @property
    def has_random_score(self) -> bool:
        """Does a random number say what is kept? Then rates are the thresholds, and the seed counts."""
        return bool(self.score) and SCORES[self.score].random

    @property
    def ranks_by_magnitude(self) -> bool:
        """Is the score |δ| itself, so that thresholds are magnitudes?"""
        return bool(self.score) and SCORES[self.score].inputs is None

    @property
    def is_calibrated(self) -> bool:
        """Does the score need activation norms on `--calibration` text?"""
        return bool(self.score) and SCORES[self.score].calibrated

    def rates_of_tensor(self, rate: float) -> tuple[float, ...]:
        """The rates of the partitions of a linear to which `--tensor_rate` gives this rate: of DPA's all the same."""
        return (rate,) * len(self.partitions) or SCALES[self.scale].rates(rate, self.method_options)

    def as_dict(self) -> dict:
        return asdict(self)

    def _check_experts(self) -> None:
        if not self.experts:
            raise ValueError("no expert: give --expert=NAME=WHERE at least once.")
        repeated = [name for name in self.experts if self.experts.count(name) > 1]
        if repeated:
            raise ValueError(f"--expert: the name {repeated[0]!r} is given twice; names must differ.")
        for name in self.experts:
            if name == "base" or not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"--expert: {name!r} cannot name an expert, as 'base' names the base and --save_delta makes a "
                    f"directory of it; use letters, digits, _ . and -."
                )
        for flag in ("factors", "coefficients", "q"):
            for name in getattr(self, flag):
                choose(f"--{flag.removesuffix('s')} expert", name, self.experts)

    def _check_numbers(self) -> None:
        named = [("--rate", self.rate), *(("--partitions", p) for p in self.partitions)]
        named += [(f"--tensor_rate {pattern}", value) for pattern, value in self.tensor_rates]
        for flag, value in named:
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{flag}: rate {value} is outside [0, 1]; it is the share that is removed.")
        finite = [
            (f"--coefficient {name} {tensor}".rstrip(), value)
            for name, given in self.coefficients.items()
            for tensor, value in (given.items() if isinstance(given, Mapping) else [("", given)])
        ]
        finite += [(f"--factors of {name!r}", factor) for name, factors in self.factors.items() for factor in factors]
        finite += [(f"--tensor_coefficient {pattern}", value) for pattern, value in self.tensor_coefficients]
        for flag, value in finite:
            if not math.isfinite(value):
                raise ValueError(f"{flag}: {value} is not a finite number.")
        if not 0.0 <= self.max_fluctuation <= 1.0:
            raise ValueError(f"--max_fluctuation={self.max_fluctuation}: outside [0, 1]; rates change by it at most.")
        if not 0.0 <= self.significance_multiple < math.inf:
            raise ValueError(f"--significance_multiple={self.significance_multiple}: it must be 0 or more.")
        for name, value in self.q.items():
            if not 0.0 < value <= 1.0:
                raise ValueError(f"--q {name}={value}: outside (0, 1]; kept parameters are divided by it.")
        if list(self.partitions) != sorted(set(self.partitions), reverse=True):
            raise ValueError(f"--partitions={_join(self.partitions)}: rates must fall, highest first: 0.9,0.8.")
        if self.partitions and abs(self.partitions[-1] - self.rate) > 1e-12:
            raise ValueError(f"--partitions={_join(self.partitions)}: the last one must be --rate={self.rate:g}.")

    def _resolve_method_options(self) -> dict[str, float]:
        """The options of this score and scale, checked, with defaults for those that are not given."""
        own = dict(SCORES[self.score].parameters) if self.score else {}
        own |= SCALES[self.scale].parameters
        for name, value in self.method_options.items():
            if name not in own:
                raise ValueError(f"--{name}={value:g}: --method={self.method} has no such option.{nearest(name, own)}")
            if not own[name].lower <= value <= own[name].upper:
                raise ValueError(f"--{name}={value:g}: outside [{own[name].lower:g}, {own[name].upper:g}].")
        return {name: float(self.method_options.get(name, parameter.default)) for name, parameter in own.items()}

    def _resolve_factors(self) -> dict[str, tuple[float, ...]]:
        if not SCALES[self.scale].takes_factors:
            if self.factors:
                raise ValueError(f"--factors: only --scale=partition (dppa, dare_dpa) has them, not {self.scale!r}.")
            return {}
        plain = 1.0 / (1.0 - self.rate) if self.has_random_score and self.rate < 1 else 1.0
        resolved = {}
        for name in self.experts:
            factors = tuple(map(float, self.factors.get(name) or [plain] * len(self.partitions)))
            if len(factors) != len(self.partitions):
                raise ValueError(
                    f"--factors of {name!r}: {len(factors)} factors for the {len(self.partitions)} partitions "
                    f"{_join(self.partitions)}; give one each, highest rate first."
                )
            resolved[name] = factors
        return resolved


def default_partitions(rate: float) -> tuple[float, ...]:
    """Every 0.1 from 0.9 down to the target; the target alone when it is higher.

    >>> default_partitions(0.75)
    (0.9, 0.8, 0.75)
    """
    tenths = [p / 10 for p in range(9, 0, -1) if p / 10 > rate + 1e-12]
    return (*tenths, rate)


def read_coefficients(file: str | Path, experts: Sequence[str]) -> dict[str, Coefficient]:
    """The coefficients that AdaMerging wrote into a file, or any {"coefficients": {expert: number or by tensor}}.

    Raises:
      ValueError: not such a file, or an expert is missing or unknown.
    """
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--coefficient={file}: not a readable JSON file: {error}") from None
    found = content.get("coefficients") if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f'--coefficient={file}: no object "coefficients" in it, as AdaMerging writes one.')
    if content.get("finished") is False:
        raise ValueError(f"--coefficient={file}: of AdaMerging that has not finished; run it to its end.")
    for name in found:
        choose(f"--coefficient={file}: the expert", name, experts)
    if missing := [name for name in experts if name not in found]:
        raise ValueError(f"--coefficient={file}: no coefficient of the expert {missing[0]!r}.")
    return {name: _coefficient(name, found[name]) for name in experts}


def _coefficient(expert: str, given: object) -> Coefficient:
    try:
        return {tensor: float(v) for tensor, v in given.items()} if isinstance(given, Mapping) else float(given)
    except (TypeError, ValueError):
        raise ValueError(f"--coefficient of {expert!r}: {given!r} is not a number, or one for each tensor.") from None


def _join(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
