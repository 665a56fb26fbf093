"""--job=advise: which method suits each expert at each rate, by what was measured; --method=auto merges with it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from absl import logging
from rich.table import Table

from dppa_jax.config.advise import AUTO, DECIDED
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.delta.advice import SMALL_NOISE, rate_of_noise
from dppa_jax.flags import written
from dppa_jax.jobs.evaluated import Domains, check_forward, domains_of, evaluated_candidates
from dppa_jax.jobs.inspect import delta_table, inspected
from dppa_jax.jobs.models import open_job
from dppa_jax.merging.alignment import total
from dppa_jax.merging.opened import Opened
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.progress import console, write_json
from dppa_jax.search.advice import Adviser, Decision, Tried, merge_by, shared
from dppa_jax.search.candidates import Candidates
from dppa_jax.where import look

NOT_CARRIED = {"job", "method", "rate", "rates", "train_data", "overwrite", "validation_share", *DECIDED}


@dataclass(frozen=True)
class Advised:
    """The choice for a merge of all experts at a rate.

    Attributes:
      preset, why: the one method that all experts share.
      numbers: of each expert, with that method.
      decisions: what each expert would have by itself.
      merge: the merge that is advised.
    """

    rate: float
    preset: str
    why: str
    numbers: Mapping[str, Tried]
    decisions: Sequence[Decision]
    merge: MergeConfig

    def as_dict(self) -> dict:
        """Return everything as JSON has it."""
        return {
            "rate": self.rate,
            "method": self.preset,
            "why": self.why,
            "numbers": {name: one.numbers for name, one in self.numbers.items()},
            "experts": {one.expert: one.as_dict() for one in self.decisions},
        }


def run_advise(job: JobConfig) -> list[Advised]:
    """Choose a method for each expert and rate, print every number and reason, and write flagfiles and advise.json."""
    check_advise(job)
    if not job.evaluation.tasks:
        with open_job(job) as opened:
            return find_methods(opened)
    domains = domains_of(job)
    with evaluated_candidates(job) as candidates:
        return find_methods(candidates.opened, candidates, domains)


def check_advise(job: JobConfig) -> None:
    """Refuse, before any work, text for a model that is not computed here, and several processes."""
    if processes.count() > 1:
        raise ValueError(
            f"--method={AUTO}: one process measures. Run dppa_jax advise in one, and merge with the flagfile it writes."
        )
    if job.calibration:
        check_forward(look(job.base, job.merge.seed, dequantise=job.dequantise), "advice by --calibration")


def find_methods(opened: Opened, candidates: Candidates | None = None, domains: Domains | None = None) -> list[Advised]:
    """Choose for every rate of a job; print it, and write it to advise.json and a flagfile for each rate in --workdir.

    Args:
      candidates, domains: what is needed to measure right answers to tasks.
    """
    job, started = opened.job, time.perf_counter()
    seen = inspected(opened)
    console().print(delta_table(seen))
    advisers = {
        name: Adviser(opened, name, job.merge, job.advise, one, candidates, (domains or {}).get(name, ()))
        for name, one in seen.items()
    }
    advice = []
    for rate in job.advise.rates:
        decisions = [adviser.decide(rate) for adviser in advisers.values()]
        preset, why = shared(decisions, advisers)
        one_for_all = len({one.chosen.preset for one in decisions}) == 1
        numbers = {
            one.expert: one.chosen if one_for_all else advisers[one.expert].tried(preset, rate) for one in decisions
        }
        advice.append(Advised(rate, preset, why, numbers, decisions, _merge(job.merge, preset, rate, numbers)))
        _tell(advice[-1], advisers)
    _tell_what_would_change(job, advisers)
    logging.info("advice took %.1f s", time.perf_counter() - started)
    _write(job, advice, advisers)
    return advice


def with_method(
    opened: Opened, candidates: Candidates | None = None, domains: Domains | None = None
) -> tuple[JobConfig, dict]:
    """Return the job with the method that was chosen, and the choice as recipe.json keeps it."""
    [advised] = find_methods(opened, candidates, domains)
    return replace(opened.job, merge=advised.merge), advised.as_dict()


def _merge(given: MergeConfig, preset: str, rate: float, numbers: Mapping[str, Tried]) -> MergeConfig:
    fields = {flag for one in numbers.values() for flag in one.numbers}
    by_flag = {flag: {name: one.numbers[flag] for name, one in numbers.items()} for flag in fields}
    return merge_by(given, preset.partition("+")[0], rate, by_flag)


def _tell(advised: Advised, advisers: Mapping[str, Adviser]) -> None:
    """Print every number that was measured at a rate, and the choices with their reasons."""
    out, rate = console(), advised.rate
    columns = ("method", "change of outputs", "of the base's", "right answers", "candidates", "seconds")
    table = Table("expert", *columns, title=f"rate {rate:g}, density {1 - rate:g}: what was measured")
    for decision in advised.decisions:
        for one in decision.tried:
            mark = " ←" if one is decision.chosen else ""
            share = f"{one.change / decision.base:.3g}" if decision.base else ""
            seconds = str(one.visits), f"{one.seconds:.1f}"
            table.add_row(decision.expert, one.in_words() + mark, f"{one.change:.4g}", share, _answers(one), *seconds)
        if decision.base is not None:
            table.add_row(decision.expert, "the base itself", f"{decision.base:.4g}", "1", "", "", "")
    if table.row_count:
        out.print(table)
    for decision in advised.decisions:
        norm = advisers[decision.expert].inspection.relative_norm
        noise = f"noise {decision.noise:.3g}"
        if advisers[decision.expert].has_text:
            noise += f", {decision.advice.noise:.3g} on the text"
        out.print(
            f"{decision.expert} at {rate:g}: {decision.chosen.in_words()}: {decision.why} (ρ {norm:.3g}, {noise})"
        )
        if decision.advice.retrain_with:
            out.print(f"{decision.expert}: or fine-tune again with --decay_toward=base, and take dare")
    out.print(f"merge at {rate:g}: {advised.preset}: {advised.why}")


def _answers(one: Tried) -> str:
    if one.score is None:
        return ""
    low, high = one.score.interval
    return f"{100 * one.score.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _tell_what_would_change(job: JobConfig, advisers: Mapping[str, Adviser]) -> None:
    """Print what else, if it were given, could change the choices."""
    out = console()
    for name, adviser in advisers.items():
        norm = adviser.inspection.relative_norm
        if adviser.has_text:
            norm = total(adviser.alignment).noise(0.5)  # noise at rate ½ is the norm that stands for it
        out.print(f"{name}: dare is enough up to rate {rate_of_noise(SMALL_NOISE, norm):.3g}" if norm else name)
    if not job.calibration:
        out.print("--calibration=FILE, a text: then the change of outputs is measured, and decides")
    if not all(adviser.tasks for adviser in advisers.values()):
        out.print("--evaluate=TASKS of the experts' domains: then right answers decide between the two best")
    if not job.advise.can_retrain:
        out.print("--train_data=FILE, if the experts can be fine-tuned again: then small deltas may be the better way")


def _write(job: JobConfig, advice: Sequence[Advised], advisers: Mapping[str, Adviser]) -> None:
    """Write a flagfile for each rate, and all numbers."""
    workdir = Path(job.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for advised in advice:
        name = "advise.cfg" if len(advice) == 1 else f"advise-{advised.rate:g}.cfg"
        text = "\n".join(_flagfile(job, advised)) + "\n"
        write_whole(workdir / name, text)
        console().print(f"{workdir / name}:\n{text}")
    write_json(workdir / "advise.json", _as_dict(advice, advisers))


def _as_dict(advice: Sequence[Advised], advisers: Mapping[str, Adviser]) -> dict:
    """Return all numbers as JSON has them; `choices` names methods as results.json of a report does."""
    return {
        "choices": [
            {"expert": one.expert, "rate": one.rate, "method": one.chosen.preset}
            for advised in advice
            for one in advised.decisions
        ],
        "merges": [advised.as_dict() for advised in advice],
        "experts": {name: _of_expert(adviser) for name, adviser in advisers.items()},
    }


def _of_expert(adviser: Adviser) -> dict:
    one = adviser.inspection
    found = {"mean_size": one.mean_size, "min": one.minimum, "deciles": one.deciles, "max": one.maximum}
    found |= {"relative_norm": one.relative_norm, "relative_norms": one.linears.named(one.relative_norms)}
    if adviser.has_text:
        named = lambda sums: {**sums._asdict(), "ratio": sums.ratio}  # noqa: E731
        found |= {"alignment": named(total(adviser.alignment))}
        found |= {"alignments": {name: named(sums) for name, sums in adviser.alignment.items()}}
    return found


def _flagfile(job: JobConfig, advised: Advised) -> Iterator[str]:
    """Yield the flags of the merge that is advised, which `dppa_jax plan` and `dppa_jax merge` take."""
    yield f"# {advised.preset} at rate {advised.rate:g}: {advised.why}"
    yield from written({name: value for name, value in job.flags.items() if name not in NOT_CARRIED})
    yield f"--method={advised.merge.method}"
    yield f"--rate={advised.rate!r}"
    for name, one in advised.numbers.items():
        for flag, number in one.numbers.items():
            yield f"--{flag}={name}={','.join(map(repr, number)) if isinstance(number, tuple) else repr(number)}"
    if job.evaluation.tasks:  # the items that the choice was made by are left out of what a merge reports
        yield f"--validation_share={job.evaluation.options.validation_share!r}"
