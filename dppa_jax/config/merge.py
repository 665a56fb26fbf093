"""What a merge computes: the method, its numbers, and what each tensor gets."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from dppa_jax.architecture.row import PRUNED
from dppa_jax.config.combinations import A_RATE, axis, check_combination, check_lora_factors, check_rates, check_score
from dppa_jax.config.conventions import PROGRAMS, by_convention
from dppa_jax.config.method_options import GROUP, OF_SUMS, option_of, resolved_options, resolved_tensor_options
from dppa_jax.config.numbers import Coefficient, coefficient_of, default_partitions, each_number, listed
from dppa_jax.config.option import REQUIRED, WEIGHT_DTYPES, check, choose, option
from dppa_jax.delta.presets import COMPARISONS, METHODS

AT_A_TIME = 2  # experts of a plain sum that are held, twice, with the base; the sum of those before is as large as two

CHOOSE_METHOD = """--method is missing. Two good choices, of all that --help names:
  --method=task_arithmetic     keeps every parameter: the safest first merge
  --method=ties --density=0.2  keeps the largest fifth of each delta: ties where experts clash, dppa to amplify it"""


@dataclass(frozen=True)
class MergeConfig:
    """What is computed, apart from where the models are and on which devices.

    Attributes:
      experts: their names, in the order in which deltas are added.
      method: a preset of delta/presets.py; score, allocate, scale and combine override one axis of it.
      rate: the share of the delta that is removed, in [0, 1]; with scale "partition" the target.
      partitions: rates of DPA's partitions, highest first, the last one the target; every 0.1 from 0.9 by default.
      factors: per expert, one factor per partition, highest rate first; by default what leaves the method without
        amplification: 1, and 1/(1−rate) for random scores.
      coefficients: per expert, one number for all its tensors or one for every tensor of the base; 1 by default. Of
        "base" where the base is one of the models that are averaged.
      lambda_: what the combined delta is multiplied by.
      divide: what the sum of deltas is divided by, of `delta.stepwise.DIVISORS`; by default as the combination has it:
        by nothing, or by the number of experts that agree.
      compatible: a program of `delta.compatible.COMPATIBLE`, whose conventions are the defaults of the options.
      arithmetic: the dtype to which inputs and every step are rounded; "inputs" is that of the models.
      expert_rates: per expert, a rate in place of `rate`, or one for every tensor of the base.
      q: the divisor of scale "q": per expert, one number for all its linears or one for every linear; in (0, 1].
      compare: what an element's score is ranked in: its "linear", with one threshold, or its "row", of which
        int(columns · rate) elements are dropped, the first ones of equal score. With "row" a merge of whole tensors
        finds coefficients for every row.
      prune: what is pruned, a key of `architecture.row.PRUNED`: the linears of the layers; or all but heads; or all.
        What is not pruned carries its dense delta.
      ties: what becomes of elements whose score is the threshold, a key of `delta.tied.TIES`.
      lora_factors: prune the factors of experts that are adapters, and not their deltas; see `of_deltas`.
      depth_scaling: α and β of LiNeS, or nothing: see `delta.scale.over_depth`.
      tensor_rates, tensor_coefficients: (regular expression, value) rules, the first match wins.
      method_options: the numbers that score, scale and combination have to themselves, by the name of their flag;
        defaults are filled in.
      tensor_options: what only a recipe says, in place of `method_options` and `lambda_`, and whether a tensor's sum is
        divided and its Σ|δ| kept: {"lambda": {"": {TENSOR: 0.5}}, "della_window": {"math": 0.3}, "divide": {"": 1.0}};
        of all experts ("") or, of a score or scale, of one; for every tensor of the base, or one number.

    Raises:
      ValueError: a value or a combination is not allowed; the message names the flag.
    """

    HELP_GROUP: ClassVar[str] = GROUP

    experts: tuple[str, ...]
    method: str = option(REQUIRED, "a preset; auto: what advise chooses", choices=METHODS)
    rate: float = option(
        0.9,
        "share of each delta that is removed; density = 1 − rate is the share that is kept",
        **A_RATE,
        complement="density",
    )
    coefficients: Mapping[str, Coefficient] = option(
        {},
        "weight: 0.7, NAME=0.7, FILE.json, adamerging[_layerwise,_linearwise]; default 1",
        flag="coefficient",
        kind="named",
    )
    expert_rates: Mapping[str, Coefficient] = option(
        {}, "NAME=RATE, in place of --rate", flag="expert_rate", kind="named", rare=True,
        complement="expert_density",
    )  # fmt: skip
    lambda_: float = option(1.0, "what the combined delta is multiplied by", flag="lambda", rare=True)
    divide: str | None = option(
        None,
        "what a sum is divided by: none, count of experts that agree, their weights; default as --combine has it",
        choices=lambda: axis("divide"),
        rare=True,
    )
    compatible: str | None = option(
        None, "a program whose conventions are the defaults; of recipes mergekit", choices=PROGRAMS, rare=True
    )
    arithmetic: str | None = option(
        None,
        "dtype of every step, or inputs for that of the models; default float32",
        choices=(*WEIGHT_DTYPES, "inputs"),
        rare=True,
    )
    score: str | None = option(
        None, "what ranks delta parameters, in place of the preset's", choices=lambda: axis("score")
    )
    allocate: str | None = option(
        None, "how the rate is spread over layers and linears", choices=lambda: axis("allocate")
    )
    scale: str | None = option(None, "how kept parameters are rescaled", choices=lambda: axis("scale"))
    combine: str | None = option(None, "how deltas are added", choices=lambda: axis("combine"))
    partitions: tuple[float, ...] = option(
        (),
        "DPA: rates, highest first, ending at --rate; default every 0.1 from 0.9",
        **A_RATE,
        rare=True,
    )
    factors: Mapping[str, tuple[float, ...]] = option(
        {}, "DPA: a factor for each partition: 1.8,1.3 or NAME=1.8,1.3 (repeat), or search", kind="named"
    )
    q: Mapping[str, Coefficient] = option(
        {}, "DAREx-q: 0.2, NAME=0.2, FILE.json, bound, mse, reference, auto, gradient, search", kind="named"
    )
    max_fluctuation: float = option(
        0.08,
        "DP: greatest change of a rate by a layer, and by a linear",
        within=(0, 1),
        message="--{flag}={value}: outside [0, 1]; rates change by it at most.",
        rare=True,
    )
    significance_multiple: float = option(
        5.0, "DP, OWL: |delta| above this times the mean is an outlier", least=0, rare=True
    )
    dpa_combine: str = option(
        "highest", "DPA: factor of an element in several partitions", choices=("highest", "max"), rare=True
    )
    ties: str = option(
        "auto",
        "elements at the threshold: drop; keep; exact: as the rate says; auto: drop or exact",
        choices=lambda: axis("ties"),
    )
    compare: str = option(
        "linear", "rank scores, or merge whole tensors, by linear or, as WANDA does, by row", choices=COMPARISONS
    )
    prune: str | None = option(
        None,
        "linears of layers (default); backbone: embeddings, norms and biases, too, but no head; all",
        choices=PRUNED,
        rare=True,
    )
    tensor_rates: tuple[tuple[str, float], ...] = option(
        (), "REGEX=RATE, first match wins; 0 keeps a linear dense", flag="tensor_rate", kind="rules",
        complement="tensor_density",
    )  # fmt: skip
    tensor_coefficients: tuple[tuple[str, float], ...] = option(
        (), "REGEX=COEFFICIENT, first match wins", flag="tensor_coefficient", kind="rules"
    )
    depth_scaling: tuple[float, ...] = option(
        (), "LiNeS: ALPHA,BETA: coefficients are times ALPHA in the first layer, ALPHA+BETA in the last", rare=True
    )
    seed: int = option(0, "seed of random scores and of the demo family")
    delta_dtype: str = option(
        "float32", "the delta is formed in it; all after it is float32", choices=WEIGHT_DTYPES, rare=True
    )
    output_dtype: str | None = option(
        None, "dtype of the output; default: each base tensor's own", group="models", choices=WEIGHT_DTYPES
    )
    lora_factors: bool = option(False, "dare, darex_q of adapters: prune A and B in place of their product", rare=True)
    allow_nonfinite: bool = option(False, "let a NaN or Inf delta count as 0", rare=True)
    method_options: Mapping[str, float] = field(default_factory=dict)
    tensor_options: Mapping[str, Mapping[str, Coefficient]] = field(default_factory=dict)

    def __post_init__(self):
        self._check_experts()
        if not self.method:
            raise ValueError(CHOOSE_METHOD)
        check(self)
        preset = METHODS[self.method]
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        set_("combine", self.combine or preset.combine)
        for name, value in by_convention(self, self._own_divide).items():
            set_(name, value)
        for name in ("score", "allocate", "scale"):
            set_(name, getattr(self, name) or getattr(preset, name))
        if self.score is None and (self.allocate or self.scale != "none"):
            raise ValueError(f"--method={self.method} prunes nothing: give --score as well as --allocate or --scale.")
        if self.score and not self.allocate:
            set_("allocate", "uniform")
        check_score(self)
        check_combination(self)
        self._check_numbers()
        set_("method_options", resolved_options(self))
        set_("tensor_options", resolved_tensor_options(self))
        scale = axis("scale")[self.scale]
        if scale.takes_factors:
            set_("partitions", self.partitions or default_partitions(self.rate))
        elif self.partitions:
            raise ValueError(f"--partitions: only --scale=partition (dppa, dare_dpa) has them, not {self.scale!r}.")
        set_("factors", self._resolve_factors())
        named = {**dict.fromkeys(self.experts, self.combination.coefficient), **self.coefficients}
        set_("coefficients", {name: coefficient_of("--coefficient", name, one) for name, one in named.items()})
        set_("q", {name: coefficient_of("--q", name, one) for name, one in self.q.items()})
        if scale.takes_q and set(self.q) != set(self.experts):
            raise ValueError("--scale=q (darex_q) needs --q, for all experts or as NAME=0.2 for each of them.")
        if not scale.takes_q and self.q:
            raise ValueError(f"--q: only --scale=q (darex_q) divides by it, not {self.scale!r}.")
        if self.lora_factors:
            check_lora_factors(self)
        set_("expert_rates", {e: coefficient_of("--expert_rate", e, one) for e, one in self.expert_rates.items()})
        check_rates(self)

    @property
    def rates(self) -> tuple[float, ...]:
        """The nominal rates, highest first: of the partitions, or the one rate; empty when nothing is pruned."""
        if self.score is None:
            return ()
        return self.partitions or self.rates_of_tensor(self.rate)

    @property
    def _own_divide(self) -> str:
        steps = axis("steps").get(self.combine)
        return steps.divide if steps else "none"

    @property
    def is_stepwise(self) -> bool:
        """Whether the sum goes step by step (`delta.stepwise`): it is divided or multiplied, or its dtype matters."""
        plain = self.divide == self._own_divide and self.lambda_ == 1 and self.arithmetic == "float32"
        return bool(self.compatible) or not plain or bool(self.tensor_options.keys() & OF_SUMS)

    @property
    def combination(self) -> Any:
        """The facts of the combination."""
        return axis("combine")[self.combine]

    @property
    def experts_at_a_time(self) -> int:
        """How many experts a streamed merge holds: a few of many, where they are added up and nothing is pruned."""
        few = self.combination.accumulates and not (self.score or self.is_stepwise)
        return AT_A_TIME if few and len(self.experts) > AT_A_TIME + 1 else len(self.experts)

    @property
    def combines_rows(self) -> bool:
        """Whether a merge of whole tensors takes every row for a tensor."""
        return bool(self.combination.whole) and self.combination.whole.gram and COMPARISONS[self.compare]

    @property
    def has_random_score(self) -> bool:
        """Whether a random number says what is kept: then rates are the thresholds, and the seed counts."""
        return bool(self.score) and axis("score")[self.score].random

    @property
    def is_counted(self) -> bool:
        """Whether thresholds are found by counting, in reads of their own."""
        return bool(self.score) and not (self.has_random_score or self.compares_rows or self.ranks_units)

    @property
    def compares_rows(self) -> bool:
        """Whether an element is kept by its rank within its row."""
        return bool(self.score) and COMPARISONS[self.compare]

    @property
    def drops_units(self) -> bool:
        """Whether heads and neurons go as a whole, from all linears of their group."""
        return bool(self.score) and axis("score")[self.score].whole == "units"

    @property
    def ranks_units(self) -> bool:
        """Whether heads and neurons are ranked, for which a pass over the layers comes before the merge."""
        return bool(self.score) and bool(axis("score")[self.score].sums)

    @property
    def ranks_by_magnitude(self) -> bool:
        """Whether the score is |δ| itself, so that thresholds are magnitudes."""
        return self.is_counted and axis("score")[self.score].inputs is None

    @property
    def whole(self) -> Any:
        """What goes as a whole, a `delta.score.Whole`; None where single elements go, or --ties=exact cuts through."""
        return axis("score")[self.score].whole if self.score and self.ties_rule != "exact" else None

    @property
    def is_calibrated(self) -> bool:
        """Whether the score needs activation norms on `--calibration` text."""
        return bool(self.score) and axis("score")[self.score].calibrated

    @property
    def is_surveyed(self) -> bool:
        """Whether the allocation looks at outliers, for which a pass over the layers comes before the merge."""
        return bool(self.score) and bool(axis("allocate")[self.allocate].outliers)

    @property
    def ties_rule(self) -> str:
        """The rule for ties: that of the score or of the allocation, if one has its own and none is given."""
        own = [axis(name)[getattr(self, name)].ties for name in ("score", "allocate") if getattr(self, name)]
        return next(filter(None, own), self.ties) if self.ties == "auto" else self.ties

    @property
    def takes_factors(self) -> bool:
        """Whether the scale has partitions with a factor for each."""
        return axis("scale")[self.scale].takes_factors

    def rates_of_tensor(self, rate: float, tensor: str = "", expert: str = "") -> tuple[float, ...]:
        """Return the rates of a linear's partitions where `--tensor_rate` gives it this rate: for DPA all the same."""
        scale = axis("scale")[self.scale]
        own = {name: option_of(self, name, tensor, expert) for name in scale.parameters}
        return (rate,) * len(self.partitions) or scale.rates(rate, own)

    @property
    def has_plain_factors(self) -> bool:
        """Whether DPA's factors, of which there are some, amplify nothing."""
        return bool(self.factors) and {f for factors in self.factors.values() for f in factors} == {
            self._plain_factor()
        }

    @property
    def of_deltas(self) -> "MergeConfig":
        """What is done with deltas: with `lora_factors` nothing is pruned, as their factors were when they are read."""
        if not self.lora_factors:
            return self
        whole = {"method": "task_arithmetic", "score": None, "allocate": None, "scale": None, "q": {}}
        sums = {name: own for name, own in self.tensor_options.items() if name in OF_SUMS}
        return replace(self, **whole, method_options={}, tensor_options=sums, lora_factors=False)

    def as_dict(self) -> dict:
        """Return the fields for JSON; without options of the method where it has none."""
        empty = {name for name in ("method_options", "tensor_options") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in empty}

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
        for flag in ("factors", "coefficients", "q", "expert_rates"):
            for name in getattr(self, flag):
                if (flag, name) != ("coefficients", "base"):
                    choose(f"--{flag.removesuffix('s')} expert", name, self.experts)

    def _check_numbers(self) -> None:
        finite = [("--lambda", self.lambda_), *each_number("--coefficient", self.coefficients)]
        finite += [(f"--factors of {name!r}", factor) for name, factors in self.factors.items() for factor in factors]
        finite += [(f"--tensor_coefficient {pattern}", value) for pattern, value in self.tensor_coefficients]
        finite += [("--depth_scaling", value) for value in self.depth_scaling]
        for flag, value in finite:
            if not math.isfinite(value):
                raise ValueError(f"{flag}: {value} is not a finite number.")
        for flag, value in each_number("--q", self.q):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{flag}={value}: outside (0, 1]; kept parameters are divided by it.")
        if len(self.depth_scaling) not in (0, 2):
            raise ValueError(f"--depth_scaling={listed(self.depth_scaling)}: give two numbers, ALPHA,BETA: 0.3,0.7.")
        if list(self.partitions) != sorted(set(self.partitions), reverse=True):
            raise ValueError(f"--partitions={listed(self.partitions)}: rates must fall, highest first: 0.9,0.8.")
        if self.partitions and abs(self.partitions[-1] - self.rate) > 1e-12:
            raise ValueError(f"--partitions={listed(self.partitions)}: the last one must be --rate={self.rate:g}.")

    def _plain_factor(self) -> float:
        """Return the factor that leaves a partition as the method without DPA has it."""
        return 1.0 / (1.0 - self.rate) if self.has_random_score and self.rate < 1 else 1.0

    def _resolve_factors(self) -> dict[str, tuple[float, ...]]:
        if not self.takes_factors:
            if self.factors:
                raise ValueError(f"--factors: only --scale=partition (dppa, dare_dpa) has them, not {self.scale!r}.")
            return {}
        plain = self._plain_factor()
        resolved = {}
        for name in self.experts:
            factors = tuple(map(float, self.factors.get(name) or [plain] * len(self.partitions)))
            if len(factors) != len(self.partitions):
                raise ValueError(
                    f"--factors of {name!r}: {len(factors)} factors for the {len(self.partitions)} partitions "
                    f"{listed(self.partitions)}; give one each, highest rate first."
                )
            resolved[name] = factors
        return resolved
