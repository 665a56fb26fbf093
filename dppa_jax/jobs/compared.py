"""The models of a report: which they are, how each is made, and their scores with one seed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.method_options import parameters_of
from dppa_jax.config.numbers import Coefficient, default_partitions
from dppa_jax.config.q import LABELLED, UNLABELLED, QConfig
from dppa_jax.config.report import Choice, Sweep
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import ADAMERGING, Factors
from dppa_jax.delta.score import SCORES
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Task, every_task
from dppa_jax.jobs.evaluated import check_searched, find_coefficients
from dppa_jax.jobs.q import check_q, check_text, q_of_expert
from dppa_jax.merging.inspection import delta_sizes
from dppa_jax.report.darex import concerns
from dppa_jax.report.measurements import Measurements, Merged
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest, sources_digest, write_whole
from dppa_jax.runtime.reading import MAX_KEPT_BYTES, MAX_LINES_BYTES, read_json, read_text
from dppa_jax.search.adamerging_state import AdaMerged
from dppa_jax.search.advice import merge_by
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched, search_expert
from dppa_jax.search.mixture import check_combine
from dppa_jax.search.output_change import PrunedChange, factors_by_change

Domains = Mapping[str, Sequence[Task]]  # by expert: the tasks of its domain
FINDS = ("search/*.py", "delta/q_rules.py", "merging/activations.py", "merging/q_of_linears.py", "model/*.py")


class Found(msgspec.Struct):
    """The q or the factors of an expert as they were found, the content of q-NAME.json and factors-NAME.json.

    Attributes:
      inputs: a digest of all that decides them.
      number: q, or one for each linear; or factors, as a list.
      search: the search that found it, as JSON has it; None for a rule.
    """

    inputs: str
    number: float | dict[str, float] | tuple[float, ...]
    search: dict | None


class Compared(NamedTuple):
    """A model of the report.

    Attributes:
      choice: its method.
      rate: the share removed; 0 for a method that prunes nothing.
      expert: the name of a single expert; None for the merge of all.
    """

    choice: Choice
    rate: float
    expert: str | None

    @property
    def has_seed(self) -> bool:
        """Whether another seed gives another model."""
        return self.has_random_score or bool(self.choice.coefficients)

    @property
    def has_random_score(self) -> bool:
        """Whether a random number decides what is kept."""
        return self.choice.ranks is not None and SCORES[self.choice.ranks].random

    @property
    def key(self) -> tuple[str, float, str]:
        """What the scores of a single expert are kept by."""
        return self.choice.name, self.rate, self.expert

    @property
    def name(self) -> str:
        """A name for files and logs, such as "dppa-0.8-math"."""
        return "-".join(filter(None, (self.place, self.expert or "merge", self.choice.coefficients)))

    @property
    def place(self) -> str:
        """A name for a directory of what was found for experts, such as "dppa-0.8"."""
        return "-".join(filter(None, (*self.choice[:3], f"{self.rate:g}")))


@dataclass
class SeedRun:
    """Measures all models with one seed, and keeps the searches, numbers and coefficients that they needed."""

    job: JobConfig
    sweep: Sweep
    domains: Domains
    candidates: Candidates
    searched: dict[Compared, Searched] = field(default_factory=dict)
    adamerged: dict[Compared, AdaMerged] = field(default_factory=dict)
    found: dict[Compared, Found] = field(default_factory=dict)
    changes: dict[str, PrunedChange] = field(default_factory=dict)

    def measure(self, advance, first: Measurements | None = None) -> Measurements:
        """Return the scores of this seed's models.

        `first` holds the scores of the same dense models with another seed. The base, the experts and models that no
        seed changes are then not measured again.
        """
        every = every_task(self.job.evaluation.tasks)
        if first:
            measured = Measurements(first.base, first.experts, {}, {}, sizes=first.sizes)
        else:
            experts = {name: self.candidates.dense(name, tasks) for name, tasks in self.domains.items()}
            measured = Measurements(self.candidates.dense("base", every), experts, {}, {}, sizes=self.sizes())
        for model in compared(self.sweep, self.domains):
            if first and not model.has_seed:
                pass
            elif model.expert is None:
                merged = Merged(model.choice.name, model.rate, model.choice.coefficients)
                measured.merged[merged] = self.scores(model, tuple(self.job.experts), every)
            else:
                measured.single[model.key] = self.scores(model, (model.expert,), self.domains[model.expert])
                if model.choice.finds_q:
                    measured.q[model.key] = self.number(model, model.expert)
                if model.choice.finds_factors:
                    measured.factors[model.key] = self.number(model, model.expert)
            advance()
        return measured

    def sizes(self) -> dict[str, tuple[float, float]]:
        """Return the mean |δ| and ‖δ‖ / ‖base‖ of every expert, where tables show them."""
        if not concerns(self.sweep.single_choices):
            return {}
        opened = self.candidates.opened
        return delta_sizes(opened.base, {name: opened.experts[name] for name in self.domains})

    def scores(self, model: Compared, experts: tuple[str, ...], tasks: Sequence[Task]) -> Scores:
        """Return the scores of one model, with the factors and coefficients that it needs."""
        config = config_of(model, experts, self.job.merge, self.sweep)
        if config.takes_factors:
            config = replace(config, factors={name: self.factors(model, name) for name in experts})
        if model.choice.finds_q:
            config = replace(config, q={name: self.number(model, name) for name in experts})
        if model.choice.coefficients:
            config = replace(config, coefficients=self.coefficients(model, config))
        return self.candidates.merged(model.name, self.candidates.opened.merger(config), tasks)

    def coefficients(self, model: Compared, config: MergeConfig) -> Mapping[str, Coefficient]:
        """Find the coefficients of a merge by AdaMerging."""
        seed = self.job.merge.seed
        adamerging = replace(self.sweep.adamerging, granularity=ADAMERGING[model.choice.coefficients], seed=seed)
        place = Path(self.job.workdir) / f"{model.name}-seed{seed}"
        self.adamerged[model] = find_coefficients(self.candidates, self.domains, config, adamerging, place)
        return self.adamerged[model].coefficients

    def factors(self, model: Compared, expert: str) -> Factors:
        """Return the factors of an expert: those given, or those of a search, which is made once for each rate."""
        if model.choice.finds_factors:
            return self.number(model, expert)
        given = self.job.search.given.get(expert) if self.job.search else self.sweep.factors
        if given is not None:
            if model.has_random_score:
                return ()  # the default of MergeConfig: factors for magnitudes are of another size
            partitions = len(default_partitions(model.rate))
            return (*given, *[1.0] * partitions)[:partitions]
        alone = alone_of(model, expert)
        if alone not in self.searched:
            place = self._place(alone)
            config = config_of(alone, (expert,), self.job.merge, self.sweep)
            self.searched[alone] = search_expert(
                self.candidates, expert, self.domains[expert], self.job.search, config, place
            )
        return self.searched[alone].result.factors

    def number(self, model: Compared, expert: str) -> Coefficient | Factors:
        """Return the q or the factors of an expert, found once for each method, way and rate, and kept in a file."""
        alone = alone_of(model, expert)
        if alone not in self.found:
            config = config_of(alone, (expert,), self.job.merge, self.sweep)
            given, what = replace(self.sweep.q_search, way=alone.choice.way), "q" if alone.choice.finds_q else "factors"
            file, inputs = self._place(alone) / f"{what}-{expert}.json", self._inputs(config, given)
            resumes = self.job.evaluation.resume
            found = processes.of_first(what, lambda: _kept(file, inputs) if resumes else None, Found)
            if not found:
                found = Found(inputs, *self._find(config, given))
                if processes.index() == 0:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(file, json.dumps(msgspec.to_builtins(found), indent=1) + "\n")
            self.found[alone] = found
        return self.found[alone].number

    def change(self, expert: str) -> PrunedChange:
        """Return what measures how pruning an expert changes its outputs, which no method or rate changes."""
        if expert not in self.changes:
            opened = self.candidates.opened.reading(expert)
            self.changes[expert] = PrunedChange(opened, expert, self.sweep.q_search, self.job.merge)
        return self.changes[expert]

    def _find(self, config: MergeConfig, given: QConfig) -> tuple[Coefficient | Factors, dict | None]:
        """Find the q or the factors of a single expert; return them and their search."""
        (expert,) = config.experts
        if config.takes_factors:
            result = factors_by_change(self.change(expert), config)
            return result.factors, msgspec.to_builtins(asdict(result))
        opened, change = self.candidates.opened, partial(self.change, expert)
        q, searched = q_of_expert(opened, expert, given, config, self.candidates, self.domains[expert], change)
        return q, searched.as_dict() if searched else None

    def _place(self, model: Compared) -> Path:
        return Path(self.job.workdir) / f"{model.place}-seed{self.job.merge.seed}"

    def _inputs(self, config: MergeConfig, given: QConfig) -> str:
        """Return a digest of all that decides the q or the factors of a single expert."""
        (expert,) = config.experts
        text = read_text(self.job.text_of(expert), MAX_LINES_BYTES) if self.job.calibration else None
        asked = [task.name for task in self.domains[expert]], asdict(self.job.evaluation)
        asked = asked if given.way == LABELLED else None
        return digest([self.candidates.fingerprint(config), asdict(given), text, asked, sources_digest(*FINDS)])


def _kept(file: Path, inputs: str) -> Found | None:
    """Return what an earlier run with the same inputs found; None if there is nothing."""
    if not file.is_file():
        return None
    found = read_json(file, Found, MAX_KEPT_BYTES, "Remove the file, or give --noresume.")
    return found if found.inputs == inputs else None


def alone_of(model: Compared, expert: str) -> Compared:
    """Return the single expert whose factors and q a model takes: a merge takes those of its experts."""
    return Compared(model.choice._replace(coefficients=""), model.rate, expert)


def config_of(model: Compared, experts: tuple[str, ...], given: MergeConfig, sweep: Sweep) -> MergeConfig:
    """Return the config of one model: the numbers of `given` with the model's method, rate and own numbers.

    A single expert has coefficient 1. Factors are plain here, and q that is to be found is DARE's; `SeedRun` fills in
    others.
    """
    choice, merged = model.choice, model.expert is None
    own = parameters_of(choice.ranks, choice.preset.scale, choice.preset.combine)
    fields = {
        "experts": experts,
        "score": choice.score or None,
        "coefficients": given.coefficients if merged else {},
        "tensor_coefficients": given.tensor_coefficients if merged else (),
        "method_options": {name: value for name, value in sweep.method_options.items() if name in own},
    }
    if not choice.way:
        fields["q"] = {name: sweep.q[name] for name in experts if name in sweep.q and choice.takes_q}
    return merge_by(given, choice.method, model.rate, fields)


def check_sweep(job: JobConfig, sweep: Sweep, domains: Domains) -> None:
    """Refuse, before anything is measured, what cannot be measured."""
    if sweep.merge_methods and (others := [name for name in domains if "." in name]):
        raise ValueError(
            f"--merge_methods: a merge has one expert of each domain, and {others[0]!r} is another one of "
            f"{others[0].partition('.')[0]}; give --merge_methods in a report without it."
        )
    seen: set[str] = set()
    for model in compared(sweep, domains):
        config = config_of(model, tuple(job.experts) if model.expert is None else (model.expert,), job.merge, sweep)
        if job.search and config.takes_factors:
            job.search.config(config).ranges(len(config.partitions))
            if model.expert is None:
                check_searched(job, domains)
        flag = "--merge_methods" if model.expert is None else "--methods"
        if (config.is_calibrated or config.combination.solves) and (said := f"{flag}={model.choice.name}") not in seen:
            check_text(job, "", said, "")
            seen.add(said)
        if model.choice.finds_factors:
            check_text(job, UNLABELLED, f"--methods={model.choice.name}", f"--factors and {model.choice.method}")
        if model.choice.finds_q:
            check_q(replace(job, merge=config, q=replace(sweep.q_search, way=model.choice.way)), domains)
        if model.choice.coefficients:
            check_combine(config)


def compared(sweep: Sweep, domains: Domains) -> Iterator[Compared]:
    """Yield every model to measure."""
    for choice in sweep.single_choices:
        for rate in _rates(choice, sweep):
            for expert in domains:
                yield Compared(choice, rate, expert)
    for choice in sweep.merge_choices:
        for rate in _rates(choice, sweep):
            yield Compared(choice, rate, None)


def _rates(choice: Choice, sweep: Sweep) -> Sequence[float]:
    """Return the rates of a method; one that prunes nothing has the rate 0 only."""
    return sweep.rates if choice.ranks else (0.0,)
