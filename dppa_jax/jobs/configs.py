"""How each job's config is made from the values of all flags; every value is checked here, before a weight is read."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dppa_jax.config.advise import AUTO, DECIDED, UNDECIDED, AdviseConfig
from dppa_jax.config.benchmark import BenchmarkConfig
from dppa_jax.config.conventions import OURS
from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
from dppa_jax.config.finetune import AdamW, FinetuneConfig, Lora
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import Coefficient, read_coefficients
from dppa_jax.config.option import per_expert
from dppa_jax.config.q import LABELLED, UNLABELLED, QConfig, read_q, ways
from dppa_jax.config.report import Choice, ReportConfig, Sweep
from dppa_jax.config.run import PREFIX, ConvertConfig, EvaluateConfig, FromRecipe, JobConfig, ValidateConfig
from dppa_jax.config.search import ADAMERGING, AdaMergingConfig, FactorSearch
from dppa_jax.delta.presets import PARAMETERS
from dppa_jax.flags import BY_NAME, Values, command, make, read_experts, read_numbers, read_path
from dppa_jax.runtime.directories import existing_place

VALIDATION_SHARE = 0.2  # of a task's items, in jobs that search
UNSET = -1.0
WHOLE = "task_arithmetic"  # a method that prunes nothing


def job_config(values: Values) -> JobConfig:
    """Make the config of a job that merges, or looks at what would be merged.

    Of a file of several recipes it is that of the last one, which has those of the others as `earlier`.
    """
    if not values["recipe"]:
        return _job_config(values, values)
    from dppa_jax.recipes.file import of_recipes  # here, as it imports JAX, which --help does without

    return of_recipes(values, lambda said: _job_config(values, values | said.values, said.merge, said.recipe))


def _job_config(
    flags: Values, values: Values, merge_fields: Mapping[str, Any] | None = None, recipe: FromRecipe | None = None
) -> JobConfig:
    """Make a config of what flags and a recipe say together.

    Args:
      flags: as they were given.
      values: with those that the recipe says.
      merge_fields: fields of `MergeConfig` that the recipe says.
    """
    _check_directory(values)
    advised, alone = advises(values), values["job"] == "merge" and not values["evaluate"] and not _q_way(values)
    if advised or not alone:  # a merge alone writes nothing there
        _check_workdir(values)
    _check_undecided(values)
    experts = _experts(values)
    if not values["base"]:
        raise ValueError("--base is empty: give the model that the experts were fine-tuned from.")
    names = tuple(experts)
    granularity = _granularity(values)
    numbers = {
        "factors": {} if searches(values) else _factors(values, names),
        "coefficients": _coefficients(values, names),
        "q": _q(values, names),
        "expert_rates": per_expert("--expert_rate", values["expert_rate"], names, float),
        "method_options": _method_options(values),
    }
    chosen = {**values, "method": UNDECIDED} if advised else values
    merge = make(MergeConfig, chosen, experts=names, **(numbers | (merge_fields or {})))
    return make(
        JobConfig,
        values,
        merge=merge,
        experts=experts,
        tokenizer=values["tokenizer"] or "base",
        evaluation=evaluation(values),
        search=factor_search(values),
        adamerging=_adamerging(values, granularity) if granularity else None,
        q=q_config(values, merge),
        advise=_advise(values) if advised else None,
        from_recipe=recipe,
        flags=flags,
        command=command(flags),
    )


def inspect_config(values: Values) -> JobConfig:
    """Make the config of --job=inspect, which shows rates where --method says one, and else whole deltas."""
    return job_config({**values, "method": values["method"] or WHOLE})


def report_config(values: Values) -> ReportConfig:
    """Make the config of --job=report, whose methods are those of --methods; --method is for what goes to --output."""
    if len(values["factors"]) > 1 and not searches(values):
        raise ValueError("--job=report: give --factors once, for all experts, or --factors=search.")
    for name in ("score", "allocate", "scale", "combine", "partitions", "lora_factors"):
        if values[name]:
            raise ValueError(f"--{name}: --job=report compares --methods as they are; leave it out.")
    factors = [] if searches(values) else values["factors"]
    sweep = make(
        Sweep,
        values,
        q=per_expert("--q", values["q"], tuple(_experts(values)), float),
        q_search=make(QConfig, values, way=UNLABELLED),
        factors=read_numbers("--factors", factors[0].split(",")) if factors else (),
        adamerging=_adamerging(values),
        method_options=_method_options(values),
    )
    # nothing is merged by it without --output; dppa prunes linears alone
    other = "dppa" if values["prune"] in ("", OURS["prune"]) else "dare"
    method = values["method"] or ("" if values["output"] else other)
    plain = {name: one.default for name, one in PARAMETERS.items()}  # the sweep has the numbers of its methods
    run = job_config({**values, "method": method, "q": [], **plain})
    run = replace(run, flags=values, command=command(values))
    return ReportConfig(run, replace(sweep, rates=sweep.rates or (run.merge.rate,)))


def evaluate_config(values: Values) -> EvaluateConfig:
    """Make the config of --job=evaluate: the base, the experts and, where it is given, the merge."""
    base, merge = (read_path(f"--{flag}", values[flag]) for flag in ("base", "output"))
    _check_workdir(values)
    named = {"base": base, **_experts(values), "merge": merge}
    models = {name: where for name, where in named.items() if where}
    return make(EvaluateConfig, values, models=models, evaluation=evaluation(values), command=command(values))


def finetune_config(values: Values) -> FinetuneConfig:
    """Make the config of --job=finetune."""
    _check_directory(values)
    _check_workdir(values)
    return make(
        FinetuneConfig,
        values,
        optimizer=make(AdamW, values, beta2=0.999),
        lora=make(Lora, values),
        held_out=evaluation(values),
        flags=values,
        command=command(values),
    )


def convert_config(values: Values) -> ConvertConfig:
    """Make the config of --job=convert."""
    return make(ConvertConfig, values)


def validate_config(values: Values) -> ValidateConfig:
    """Make the config of --job=validate."""
    _check_workdir(values)
    return make(ValidateConfig, values)


def benchmark_config(values: Values) -> BenchmarkConfig:
    """Make the config of --job=benchmark; with --peer=restart it holds a job whose candidates are timed."""
    _check_workdir(values)
    config = make(BenchmarkConfig, values)
    return replace(config, restart=job_config(values)) if config.peer == "restart" else config


def evaluation(values: Values) -> EvaluationConfig:
    """Make what says how models are evaluated."""
    if values["evaluate"]:
        from dppa_jax.evaluate.tasks import by_domain  # the tasks' names; half a second of imports

        by_domain(values["evaluate"])
    share = values["validation_share"]
    if share == UNSET:
        ways_to_q = _q_way(values), *(one.way for one in _compared(values))
        by_labels = searches(values) or LABELLED in ways_to_q or (advises(values) and bool(values["evaluate"]))
        splits = [values["search_split"]] * by_labels + [values["adamerging_split"]] * adamerges(values)
        splits += ["validation"] * bool(values["job"] == "finetune" and values["decay_search"])
        share = VALIDATION_SHARE if "validation" in splits else 0.0
    return make(EvaluationConfig, values, options=make(TaskOptions, values, validation_share=share))


def searches(values: Values) -> bool:
    """Return whether factors are searched: of the --factors that are for all experts, the last one counts."""
    return values["job"] == "search" or [text for text in values["factors"] if "=" not in text][-1:] == ["search"]


def factor_search(values: Values) -> FactorSearch | None:
    """Make what says how factors are searched; None where they are given."""
    if not searches(values):
        return None
    bounds = read_numbers("--search_bounds", values["search_bounds"])
    if len(bounds) not in (0, 2):
        raise ValueError(f"--search_bounds={','.join(values['search_bounds'])}: give LOWEST,HIGHEST, for example 0,4.")
    given = _factors(values, tuple(_experts(values)))
    return make(FactorSearch, values, lower=bounds[:1], upper=bounds[1:], given=given)


def adamerges(values: Values) -> bool:
    """Return whether AdaMerging finds coefficients, of the merge or of one in a report."""
    return bool(_granularity(values)) or any(one.coefficients for one in _compared(values))


def _compared(values: Values) -> list[Choice]:
    """Return the methods of a report; none in other jobs."""
    names = [*values["methods"], *values["merge_methods"]] if values["job"] == "report" else []
    return [Choice.of(name) for name in names]


def _adamerging(values: Values, granularity: str = "task") -> AdaMergingConfig:
    return make(AdaMergingConfig, values, granularity=granularity)


def _granularity(values: Values) -> str:
    """Return what shares a coefficient where AdaMerging finds them, else ""; the last --coefficient counts."""
    return ADAMERGING.get(values["coefficient"][-1], "") if values["coefficient"] else ""


def _coefficients(values: Values, names: tuple[str, ...]) -> dict[str, Any]:
    if _granularity(values):
        return {}
    given = [text for text in values["coefficient"] if text not in ADAMERGING]
    if given and given[-1].endswith(".json"):
        return read_coefficients(read_path("--coefficient", given[-1]), names)
    of_base, given = ([text for text in given if text.startswith("base=") == own] for own in (True, False))
    found = per_expert("--coefficient", [text for text in given if not text.endswith(".json")], names, float)
    return found | per_expert("--coefficient", of_base, ("base",), float)


def _factors(values: Values, names: tuple[str, ...]) -> Mapping[str, tuple[float, ...]]:
    """Return the factors that are given: of all experts or, beside a search, of some."""
    last = max((i for i, text in enumerate(values["factors"]) if text == "search"), default=-1)
    given = [text for text in values["factors"][last + 1 :] if "=" in text or not searches(values)]
    return per_expert("--factors", given, names, lambda text: read_numbers("--factors", text.split(",")))


def _q_way(values: Values) -> str:
    """Return the way to find q, "" where it is given: of the --q that are for all experts, the last one counts."""
    last = [text for text in values["q"] if "=" not in text][-1:]
    return last[0] if last and last[0] in ways() else ""


def _q(values: Values, names: tuple[str, ...]) -> dict[str, Coefficient]:
    """Return the q that is given; of experts whose q is to be found, that of DARE: the density."""
    given = values["q"]
    if files := [text for text in given if text.endswith(".json")]:
        return read_q(read_path("--q", files[-1]), names)
    if not _q_way(values):
        return per_expert("--q", given, names, float)
    return dict.fromkeys(names, (1.0 - values["rate"]) or 1.0) | _q_beside_a_way(values, names)


def q_config(values: Values, merge: MergeConfig) -> QConfig | None:
    """Make what says how q is found; None where it is given."""
    if not (way := _q_way(values)):
        return None
    if merge.lora_factors:
        raise ValueError(f"--q={way}: with --lora_factors q is given as a number.")
    config = make(QConfig, values, way=way, given=tuple(_q_beside_a_way(values, merge.experts)))
    if config.is_rule and merge.drops_units:
        raise ValueError(
            f"--q={way}: it is a rule for single linears, and --score={merge.score} drops heads and neurons, which lie "
            f"in several; give a number, auto or search."
        )
    return config


def _q_beside_a_way(values: Values, names: tuple[str, ...]) -> dict[str, float]:
    """Return the q of experts that is given after the way in which the others are found."""
    last = max(i for i, text in enumerate(values["q"]) if text in ways())
    return per_expert("--q", values["q"][last + 1 :], names, float)


def advises(values: Values) -> bool:
    """Return whether the method is to be chosen."""
    return values["job"] == "advise" or (values["job"] == "merge" and values["method"] == AUTO)


def _check_undecided(values: Values) -> None:
    """Refuse --method=auto in a job that cannot choose, and flags that choose by hand beside a choice."""
    job, asked = values["job"], values["method"] == AUTO
    if asked and not advises(values):
        raise ValueError(
            f"--method={AUTO}: --job={job} chooses none. dppa_jax advise, with the same flags, chooses it and writes a "
            f"flagfile: dppa_jax {job} --flagfile={values['workdir']}/advise.cfg."
        )
    by_hand = [name for name in DECIDED if values[name] != BY_NAME[name].default]
    by_hand += ["method"] * bool(values["method"] and not asked)
    if by_hand and advises(values):
        chooser = f"--method={AUTO}" if asked else f"--job={job}"
        raise ValueError(f"--{by_hand[0]} goes with the method, which {chooser} chooses; leave it out.")


def _advise(values: Values) -> AdviseConfig:
    way = make(QConfig, values, way=UNLABELLED)
    found = make(AdviseConfig, values, q=way, can_retrain=bool(values["train_data"]))
    return replace(found, rates=found.rates if found.rates and values["job"] != "merge" else (values["rate"],))


def _method_options(values: Values) -> dict[str, float]:
    """Return the options of single methods that differ from their defaults."""
    return {name: values[name] for name, one in PARAMETERS.items() if values[name] != one.default}


def _experts(values: Values) -> dict[str, str]:
    return read_experts("--expert", values["expert"])


def _check_directory(values: Values) -> None:
    """Refuse an Orbax checkpoint as the output of a job that writes a Hugging Face directory."""
    output, job = values["output"], values["job"]
    if output.startswith(PREFIX):
        raise ValueError(
            f"--output={output}: --job={job} writes a Hugging Face directory; give --output=DIR, and then "
            f"--job=convert --base=DIR --output={output}."
        )


def _check_workdir(values: Values) -> None:
    """Refuse a --workdir into which the results of the work could not be written; nothing is made."""
    path = Path(read_path("--workdir", values["workdir"])).absolute()
    existing = existing_place(path)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        fault = "may not be written to" if existing.is_dir() else "is no directory"
        raise ValueError(f"--workdir={values['workdir']}: {existing} {fault}; give a directory for the results.")
