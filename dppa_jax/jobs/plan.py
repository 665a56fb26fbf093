"""--job=plan: memory, bytes, passes and time of a merge, before it is made."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from rich.table import Table

from dppa_jax.checkpoint.hub import bytes_to_fetch
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.models import prepare
from dppa_jax.jobs.places import check_apart, directories
from dppa_jax.merging.compatible import check_compatible
from dppa_jax.merging.plan import Plan, dtype_name, plan_of
from dppa_jax.merging.speed import measure_speeds
from dppa_jax.recipes.output import recipe_text
from dppa_jax.runtime.memory import size_text
from dppa_jax.runtime.mesh import make_mesh, mesh_shape
from dppa_jax.runtime.progress import console, write_json
from dppa_jax.where import ConfigAlone, Looked, look_for_plan, stated_architecture, with_bases


def run_plan(job: JobConfig) -> Plan:
    """Print the plan, and write it as JSON to plan.json in --workdir.

    Headers of the weights are read, also on the hub; where there are no weights, config.json is enough. Devices of the
    mesh are needed only for the time. Of a recipe the value of every parameter is printed as well. Merges that come
    first are not planned, and what they would write is taken for the base that they read.
    """
    for one in (*job.earlier, job):
        if one.from_recipe:
            _print_resolved(one)
    job = _without_earlier(job)
    where = with_bases({"base": job.base, **job.experts})
    options = job.merge.seed, stated_architecture(job.architecture), job.dequantise
    models = {name: look_for_plan(place, *options) for name, place in where.items()}
    check_apart({}, directories(models), job.workdir)
    prepared = prepare(job, models)
    check_compatible(prepared.base, prepared.experts)
    dtypes = [_dtype(model) for model in models.values()]
    plan = plan_of(job, prepared.base.specs, dtypes, mesh_shape(job.mesh, 1))
    told, predicted = _predicted_time(job, plan, models)
    fetched = bytes_to_fetch(models.values())
    table = Table("plan", "", show_header=False)
    rows = [("fetched from the hub", size_text(fetched))] if fetched else []
    if read := [name for name, model in models.items() if getattr(model, "is_dequantised", False)]:
        rows.append(("dequantised while read", f"{', '.join(read)}: as bfloat16"))
    for row in (*rows, *plan.lines(), ("time", told)):
        table.add_row(*row)
    console().print(table)
    if job.print_recipe:
        print(recipe_text(job, prepared.base.specs, dtypes[0], needed=True), end="")
    write_json(Path(job.workdir) / "plan.json", asdict(plan) | {"bytes_fetched": fetched} | predicted)
    return plan


def _print_resolved(job: JobConfig) -> None:
    """Print the value of every parameter of a recipe."""
    rows = job.from_recipe.rows
    titles = list(dict.fromkeys(title for row in rows for title in row))
    table = Table(*titles, title=f"{job.merge.method} into {job.output or 'no output'}")
    for row in rows:
        table.add_row(*(row.get(title, "") for title in titles))
    console().print(table)


def _without_earlier(job: JobConfig) -> JobConfig:
    """Put what an earlier merge reads as its base in the place of its output, which has the same tensors."""
    like: dict[str, str] = {}
    for one in job.earlier:
        like[one.output] = like.get(one.base, one.base)
    experts = {name: like.get(where, where) for name, where in job.experts.items()}
    return replace(job, base=like.get(job.base, job.base), experts=experts)


def _dtype(model: Looked | ConfigAlone) -> str:
    """Return the dtype that the weights have or, where they could not be seen, that config.json says."""
    return dtype_name(model.config) if isinstance(model, ConfigAlone) else model.dtype.name


def _predicted_time(job: JobConfig, plan: Plan, models: Mapping[str, Looked | ConfigAlone]) -> tuple[str, dict]:
    """Predict the time from speeds measured here, in words and for plan.json; or return why there is no prediction."""
    if job.device_memory:
        return "not predicted: the devices of --device_memory are not here to be measured", {}
    if not job.output:
        return "not predicted: give --output, as it depends on that disk", {}
    for name, model in models.items():
        if not hasattr(model, "read_rows"):
            return f"not predicted: the weights of {name} are not here, in {model.directory}", {}
    try:
        speeds = measure_speeds(list(models.values()), Path(job.output), job.merge, make_mesh(job.mesh))
    except (ValueError, OSError) as error:
        return f"not predicted: {error}", {}
    return plan.time(speeds), {"seconds": plan.seconds(speeds), "speeds": asdict(speeds)}
