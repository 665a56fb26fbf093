"""What --job=report compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from dppa_jax.config.merge import A_RATE
from dppa_jax.config.option import check, choose, option
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import ADAMERGING, AdaMergingConfig, Factors
from dppa_jax.delta.presets import METHODS


@dataclass(frozen=True)
class Sweep:
    """The methods, rates and seeds that a report compares.

    Attributes:
      methods: the columns of the tables of single experts.
      merge_methods: the rows of the table of merges of all experts; with "+adamerging", "+adamerging_layerwise" or
        "+adamerging_linearwise" AdaMerging finds their coefficients.
      rates: the rates of both; methods that prune nothing appear once.
      factors: DPA's factors of the partitions from 0.9 down; a rate takes as many as it has partitions, and 1 for those
        that are not given. Empty where they are searched, for every method, rate and expert.
      q: the divisor of darex_q, by expert.
      seeds: seeds of the demo family, of random scores and of the order of AdaMerging's prompts; cells are means over
        them.
      adamerging: how AdaMerging finds coefficients, apart from granularity and seed.
      method_options: values of methods' own options; each method takes those that it has.
    """

    HELP_GROUP: ClassVar[str] = "report, validate and benchmark"

    methods: tuple[str, ...] = option((), "report: methods of the table of single experts; benchmark: what to time")
    merge_methods: tuple[str, ...] = option(
        (), "report: methods of the table of merges; dppa+adamerging finds the coefficients"
    )
    rates: tuple[float, ...] = option(
        (),
        "report: rates of both tables, default --rate; 0.1:0.9:0.1 is a range",
        kind="ranges",
        **A_RATE,
        complement="densities",
    )
    factors: Factors = ()
    q: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = option((0,), "report: seeds, of the demo family and of random scores")
    adamerging: AdaMergingConfig = field(default_factory=AdaMergingConfig)
    method_options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        check(self)
        for name in self.methods:
            choose("--methods", name, METHODS)
        for name in self.merge_methods:
            method, _, coefficients = name.partition("+")
            choose("--merge_methods", method, METHODS)
            if coefficients:
                choose("--merge_methods: the coefficients", coefficients, ADAMERGING)
        if not self.seeds or not (self.methods or self.merge_methods):
            raise ValueError("--job=report needs --methods or --merge_methods, and at least one of --seeds.")


@dataclass(frozen=True)
class ReportConfig:
    """A report: `sweep` says what is compared, `run` the models, the numbers of every merge, and where it all goes.

    With an output, `run` is also a merge that is written there.
    """

    run: JobConfig
    sweep: Sweep
