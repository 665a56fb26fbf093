"""What --job=report compares."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from dppa_jax.config.advise import AdviseConfig
from dppa_jax.config.combinations import axis
from dppa_jax.config.option import check, choose, option, same
from dppa_jax.config.q import UNLABELLED, QConfig, ways
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import ADAMERGING, AdaMergingConfig, Factors
from dppa_jax.delta.presets import METHODS, Method


class Choice(NamedTuple):
    """A method as a report names it: METHOD[/SCORE][+WAY][+COEFFICIENTS].

    Attributes:
      method: a preset of `--method`.
      score: what ranks delta parameters in place of the preset's, as `--score` says it; empty for the preset's.
      way: how DAREx's q is found, one of `config.q.ways`, or DPA's factors, "auto" alone; empty where they are given,
        where factors are searched as `--factors=search` says, and where none are needed.
      coefficients: how those of a merge are found, a key of ADAMERGING; empty if they are given.
    """

    method: str
    score: str = ""
    way: str = ""
    coefficients: str = ""

    @classmethod
    def of(cls, text: str) -> "Choice":
        """Read what a report calls a method; nothing is checked.

        >>> Choice.of("darex_q/random_column+auto+adamerging")
        Choice(method='darex_q', score='random_column', way='auto', coefficients='adamerging')
        """
        head, *found = text.split("+")
        method, _, score = head.partition("/")
        coefficients = [one for one in found if one in ADAMERGING]
        return cls(method, score, "+".join(one for one in found if one not in ADAMERGING), "+".join(coefficients))

    @property
    def name(self) -> str:
        """What a report calls the method, without how coefficients are found."""
        return self.method + (f"/{self.score}" if self.score else "") + (f"+{self.way}" if self.way else "")

    @property
    def preset(self) -> Method:
        """The preset's axes."""
        return METHODS[self.method]

    @property
    def ranks(self) -> str | None:
        """The score that ranks delta parameters; None where nothing is pruned."""
        return self.score or self.preset.score

    @property
    def takes_q(self) -> bool:
        """Whether what is kept is divided by DAREx's q."""
        return axis("scale")[self.preset.scale].takes_q

    @property
    def takes_factors(self) -> bool:
        """Whether what is kept is multiplied by DPA's factors."""
        return axis("scale")[self.preset.scale].takes_factors

    @property
    def finds_q(self) -> bool:
        """Whether `way` is one to find q."""
        return bool(self.way) and self.takes_q

    @property
    def finds_factors(self) -> bool:
        """Whether `way` is one to find factors."""
        return bool(self.way) and self.takes_factors

    def check(self, flag: str) -> None:
        """Raise ValueError, with flag and nearest spelling, for a part that does not exist or means nothing."""
        choose(flag, self.method, METHODS)
        if self.score:
            choose(f"{flag}: {self.method}/SCORE", self.score, axis("score"))
        if self.way:
            choose(f"{flag}: {self.method}+", self.way, (*ways(), *ADAMERGING))
        if self.coefficients:
            choose(f"{flag}: the coefficients", self.coefficients, ADAMERGING)
        if self.score and not self.preset.score:
            raise ValueError(f"{flag}={self.name}: {self.method} prunes nothing, so that no score ranks anything.")
        if self.finds_factors and self.way != UNLABELLED:
            raise ValueError(
                f"{flag}={self.name}: {self.method} has factors, which are found by {self.method}+{UNLABELLED}, or as "
                f"--factors=search says for {self.method}."
            )
        if self.way and not (self.takes_q or self.takes_factors):
            able = [name for name in METHODS if Choice(name).takes_q or Choice(name).takes_factors]
            raise ValueError(f"{flag}={self.name}: {self.method} has no q and no factors; {', '.join(able)} have.")


@dataclass(frozen=True)
class Sweep:
    """The methods, rates and seeds that a report compares.

    Attributes:
      methods: the columns of the tables of single experts, each as `Choice` reads it.
      merge_methods: the rows of the table of merges of all experts, the same; with "+adamerging",
        "+adamerging_layerwise" or "+adamerging_linearwise" AdaMerging finds their coefficients.
      rates: the rates of both; methods that prune nothing appear once.
      factors: DPA's factors of the partitions from 0.9 down; a rate takes as many as it has partitions, and 1 for those
        that are not given. Empty where they are searched, for every method, rate and expert. Methods with a way to find
        them after their name take none of these.
      q: the divisor of methods that have one, by expert, where no way to find it stands after their name.
      q_search: how q is found, apart from the way; and what is to change least where "auto" finds factors.
      seeds: seeds of the demo family, of random scores and of the order of AdaMerging's prompts; cells are means over
        them.
      adamerging: how AdaMerging finds coefficients, apart from granularity and seed.
      method_options: values of methods' own options; each method takes those that it has.
    """

    HELP_GROUP: ClassVar[str] = "report, validate and benchmark"

    methods: tuple[str, ...] = option(
        (),
        "report: methods of the table of single experts, METHOD, METHOD/SCORE, or darex_q+auto, a way to find q; "
        "benchmark: what to time",
    )
    merge_methods: tuple[str, ...] = option(
        (), "report: methods of the table of merges, the same; dppa+adamerging finds the coefficients"
    )
    rates: tuple[float, ...] = same(AdviseConfig, "rates")
    factors: Factors = ()
    q: Mapping[str, float] = field(default_factory=dict)
    q_search: QConfig = field(default_factory=lambda: QConfig(UNLABELLED))
    seeds: tuple[int, ...] = option((0,), "report: seeds, of the demo family and of random scores")
    adamerging: AdaMergingConfig = field(default_factory=AdaMergingConfig)
    method_options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        check(self)
        for flag, choices in (("--methods", self.single_choices), ("--merge_methods", self.merge_choices)):
            for one in choices:
                one.check(flag)
        for one in self.single_choices:
            if one.coefficients:
                raise ValueError(f"--methods={one.name}+{one.coefficients}: a single expert has the coefficient 1.")
        if not self.seeds or not (self.methods or self.merge_methods):
            raise ValueError("--job=report needs --methods or --merge_methods, and at least one of --seeds.")

    @property
    def single_choices(self) -> list[Choice]:
        """The methods of single experts."""
        return [Choice.of(name) for name in self.methods]

    @property
    def merge_choices(self) -> list[Choice]:
        """The methods of merges."""
        return [Choice.of(name) for name in self.merge_methods]

    @property
    def ways(self) -> Iterator[str]:
        """The ways in which q and factors are found."""
        yield from (one.way for one in (*self.single_choices, *self.merge_choices) if one.way)


@dataclass(frozen=True)
class ReportConfig:
    """A report: `sweep` says what is compared, `run` the models, the numbers of every merge, and where it all goes.

    With an output, `run` is also a merge that is written there.
    """

    run: JobConfig
    sweep: Sweep
