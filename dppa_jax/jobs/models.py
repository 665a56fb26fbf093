"""Checks of a job's models and outputs, before the work begins."""

from collections.abc import Mapping
from pathlib import Path

from absl import logging

from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.output import output_directory
from dppa_jax.checkpoint.safetensors import companions
from dppa_jax.config.run import JobConfig
from dppa_jax.merging.compatible import check_apart, check_compatible, check_same_base


def check_outputs(job: JobConfig) -> None:
    """Refuse an output that is not given, or that cannot be written to."""
    for directory in _outputs(job).values():
        if not directory:
            raise ValueError("--output is empty: give the directory of the merged model.")
        output_directory(directory, job.overwrite)


def check_models(job: JobConfig, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
    """Refuse models that do not belong together, lack files, or lie where the output goes."""
    models = {"base": base, **experts}
    outputs = {flag: where for flag, where in _outputs(job).items() if where}
    check_apart(outputs, {name: model.directory for name, model in models.items()})
    check_compatible(base, experts)
    companions(base.directory)
    companions(models[job.tokenizer].directory)
    tokens, rows = (models[name].config["vocab_size"] for name in (job.tokenizer, "base"))
    if tokens > rows:
        logging.warning("--tokenizer=%s has %d tokens, the merged model only %d", job.tokenizer, tokens, rows)
    if not job.allow_other_base:
        for name, expert in experts.items():
            check_same_base(base, expert, name)


def _outputs(job: JobConfig) -> dict[str, str]:
    """Return the directories to write, by "--output" or the name of the expert whose delta goes there."""
    deltas = {name: str(Path(job.save_delta) / name) for name in job.experts} if job.save_delta else {}
    return {"--output": job.output, **deltas}
