"""--job=plan: memory, bytes, passes and time of a merge, before it is made."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from rich.table import Table

from dppa_jax.architecture.specs import tensor_specs
from dppa_jax.checkpoint import read_config
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.models import match
from dppa_jax.jobs.places import check_apart
from dppa_jax.merging.compatible import check_compatible
from dppa_jax.merging.plan import Plan, dtype_name, plan_of
from dppa_jax.merging.speed import measure_speeds
from dppa_jax.merging.tokenizers import Tokenizer, check_tokenizers
from dppa_jax.runtime.mesh import make_mesh, mesh_shape
from dppa_jax.runtime.progress import console, write_json
from dppa_jax.where import locate, open_models


def run_plan(job: JobConfig) -> Plan:
    """Print the plan, and write it as JSON to plan.json in --workdir.

    The config.json files are enough, and devices of the mesh are needed only for the time.
    """
    where = {"base": job.base, **job.experts}
    places = {name: locate(place, job.merge.seed, weights=False) for name, place in where.items()}
    check_apart({}, places, job.workdir)
    configs = {name: read_config(place) for name, place in places.items()}
    models = {name: SimpleNamespace(config=config, specs=tensor_specs(config)) for name, config in configs.items()}
    tokenizers = {name: Tokenizer(name, places[name], configs[name]) for name in places}
    base, experts = models.pop("base"), models
    if vocabulary := match(job, base, experts, tokenizers):
        base, experts = vocabulary.wrap(base, experts)
    check_compatible(base, experts)
    check_tokenizers(tokenizers, job.tokenizer, vocabulary.size if vocabulary else 0)
    dtypes = [dtype_name(model.config) for model in (base, *experts.values())]
    plan = plan_of(job, base.specs, dtypes, mesh_shape(job.mesh, 1))
    told, predicted = _predicted_time(job, plan)
    table = Table("plan", "", show_header=False)
    for row in (*plan.lines(), ("time", told)):
        table.add_row(*row)
    console().print(table)
    write_json(Path(job.workdir) / "plan.json", asdict(plan) | predicted)
    return plan


def _predicted_time(job: JobConfig, plan: Plan) -> tuple[str, dict]:
    """Predict the time from speeds measured here, in words and for plan.json; or return why there is no prediction."""
    if job.device_memory:
        return "not predicted: the devices of --device_memory are not here to be measured", {}
    if not job.output:
        return "not predicted: give --output, as it depends on that disk", {}
    try:
        base, experts = open_models(job, weights=False)
        speeds = measure_speeds((base, *experts.values()), Path(job.output), job.merge, make_mesh(job.mesh))
    except (ValueError, OSError) as error:
        return f"not predicted: {error}", {}
    return plan.time(speeds), {"seconds": plan.seconds(speeds), "speeds": asdict(speeds)}
