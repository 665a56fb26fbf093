"""Open a job's models once, and refuse what cannot work before the work begins."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from absl import logging

from dppa_jax.checkpoint import DTYPE_BY_NAME
from dppa_jax.checkpoint.card import licence
from dppa_jax.checkpoint.hub import check_room
from dppa_jax.checkpoint.inside import companions
from dppa_jax.checkpoint.output import output_directory
from dppa_jax.checkpoint.safetensors_writer import Tensors, total_bytes
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.places import check_apart
from dppa_jax.merging.compatible import check_compatible, check_same_base
from dppa_jax.merging.merger import check_named, output_tensors
from dppa_jax.merging.opened import Opened
from dppa_jax.merging.tokenizers import Tokenizer, check_tokenizers
from dppa_jax.runtime import processes
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.where import Looked, open_models


def open_job(job: JobConfig, writes: bool = False) -> Opened:
    """Open the models of a job; what can be refused without work is.

    Args:
      writes: does the job write the merge, and the deltas, where it says?

    Raises:
      CheckpointError: models that do not belong together or lack files, an output that is or contains an input.
    """
    outputs = check_outputs(job) if writes else {}
    mesh = make_mesh(job.mesh)
    base, experts = open_models(job, lambda models: check_models(job, models, outputs))
    if not job.allow_other_base:
        for name, expert in experts.items():
            check_same_base(base, expert, name)
    return Opened(job, base, experts, outputs, mesh)


def check_outputs(job: JobConfig) -> dict[str, Path]:
    """Return the directories to write, by "--output" or the expert whose delta goes there.

    Raises:
      ValueError: --output is not given.
      CheckpointError: a directory cannot be written to without destroying something.
    """
    if not job.output:
        raise ValueError("--output is empty: give the directory of the merged model.")
    with processes.first_alone("outputs"):  # process 0 puts right what a killed run left; the others find it done
        return {name: output_directory(where, job.overwrite) for name, where in _outputs(job).items()}


def check_models(job: JobConfig, models: Mapping[str, Looked], outputs: Mapping[str, Path]) -> None:
    """Refuse models that do not belong together, lack files, or lie where the output goes, by their headers alone.

    Args:
      models: base and experts by name; the base is called "base".
      outputs: the directories to write, as `check_outputs` returned them.
    """
    works = job.evaluation.tasks or not outputs  # a merge alone writes nothing to --workdir
    check_apart(
        _outputs(job) if outputs else {},
        {name: model.directory for name, model in models.items()},
        job.workdir if works else "",
    )
    base = models["base"]
    check_compatible(base, {name: model for name, model in models.items() if name != "base"})
    check_named(job.merge, base.specs)
    for model in models.values():
        licence(model.directory)  # the model card names it in the end
    companions(base.directory)
    companions(models[job.tokenizer].directory)
    check_tokenizers({n: Tokenizer(n, model.directory, model.config) for n, model in models.items()}, job.tokenizer)
    if outputs:
        check_code(base)
    tensors = written_tensors(job, base, outputs)
    check_room(models.values(), {where: total_bytes(tensors[name]) for name, where in outputs.items()})


def written_tensors(job: JobConfig, base: Looked, outputs: Iterable[str]) -> dict[str, Tensors]:
    """Return shape and dtype of every tensor of each output, by "--output" or the expert whose delta goes there."""
    dtype = DTYPE_BY_NAME[job.merge.delta_dtype]
    tensors = {name: {n: (spec.shape, dtype) for n, spec in base.specs.items()} for name in outputs}
    return tensors | ({"--output": output_tensors(base, job.merge)} if "--output" in tensors else {})


def check_code(model: Looked) -> None:
    """Warn where config.json names code: it is never copied, and config.json of the output does not name it."""
    if "auto_map" in model.config:
        logging.warning(
            "%s: config.json names code (auto_map %s), which is never copied; the output's config.json has no "
            "auto_map, so that the class of its architecture in transformers is used",
            model.directory,
            model.config["auto_map"],
        )


def _outputs(job: JobConfig) -> dict[str, str]:
    """The directories to write, as they were given."""
    deltas = {name: str(Path(job.save_delta) / name) for name in job.experts} if job.save_delta else {}
    return {"--output": job.output, **deltas}
