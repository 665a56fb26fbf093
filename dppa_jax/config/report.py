"""TODO."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dppa_jax.config.option import choose
from dppa_jax.config.search import ADAMERGING, AdaMergingConfig, Factors
from dppa_jax.delta.presets import METHODS


@dataclass(frozen=True)
class Sweep:
    """What the report compares.

    Attributes:
      methods: of the tables of single experts.
      merge_methods: of the table of merges of all experts; with "+adamerging", "+adamerging_layerwise" or
        "+adamerging_linearwise" AdaMerging finds their coefficients.
      rates: of both; methods that prune nothing appear once.
      factors: DPA's, of the partitions from 0.9 down; a rate takes as many as it has partitions, and 1 for those that
        are not given. Empty where they are searched, for every method, rate and expert.
      q: by expert, for darex_q.
      seeds: of the demo family, of random scores and of the order of AdaMerging's prompts; cells are means over them.
      adamerging: how AdaMerging finds coefficients, apart from granularity and seed.
    """

    methods: tuple[str, ...]
    merge_methods: tuple[str, ...]
    rates: tuple[float, ...]
    factors: Factors = ()
    q: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    adamerging: AdaMergingConfig = field(default_factory=AdaMergingConfig)

    def __post_init__(self):
        for name in self.methods:
            choose("--methods", name, METHODS)
        for name in self.merge_methods:
            method, _, coefficients = name.partition("+")
            choose("--merge_methods", method, METHODS)
            if coefficients:
                choose("--merge_methods: the coefficients", coefficients, ADAMERGING)
        for rate in self.rates:
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"--rates: {rate} is outside [0, 1]; it is the share that is removed.")
        if not self.seeds or not (self.methods or self.merge_methods):
            raise ValueError("--job=report needs --methods or --merge_methods, and at least one of --seeds.")
