"""--job=merge: base and experts in, one model with its recipe and model card out."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from absl import logging

from dppa_jax.architecture.specs import CheckpointError, with_dtype
from dppa_jax.checkpoint import DTYPE_BY_NAME, Checkpoint, SafetensorsWriter
from dppa_jax.checkpoint.card import library_versions, licence, model_card, recipe
from dppa_jax.checkpoint.output import check_space, output_directory
from dppa_jax.checkpoint.safetensors_writer import total_bytes
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.models import _outputs, check_models, check_outputs
from dppa_jax.merging.activations import norms_of_experts
from dppa_jax.merging.blocks import owners
from dppa_jax.merging.identity import common_identity, input_identity, journal_of
from dppa_jax.merging.merger import ARITHMETIC, Layout, Outcome, merge_checkpoints, output_tensors
from dppa_jax.merging.plan import plan_of
from dppa_jax.merging.survey import NonfiniteError
from dppa_jax.runtime import processes, signals
from dppa_jax.runtime.memory import peak_resident
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.where import open_models


def run_merge(job: JobConfig) -> Outcome:
    """Merge into job.output; search factors, find coefficients and evaluate where the job asks for it."""
    if job.search or job.adamerging or job.evaluation.tasks:
        from dppa_jax.jobs.evaluated_merge import run_evaluated_merge  # a second of imports

        return run_evaluated_merge(job)
    return write_merge(job)


def write_merge(job: JobConfig) -> Outcome:
    """Merge with given numbers into job.output: a Hugging Face directory with recipe.json and a model card."""
    started = time.perf_counter()
    if job.merge.has_plain_factors and not job.search:
        logging.warning(
            "--factors: all are the plain ones, so that --method=%s amplifies nothing; --factors=search "
            "--evaluate=TASKS finds factors on tasks of the experts' domains",
            job.merge.method,
        )
    check_outputs(job)
    base, experts = open_models(job)
    check_models(job, base, experts)
    mesh = make_mesh(job.mesh)
    plan = plan_of(job, [{**m.config, "dtype": m.dtype.name} for m in (base, *experts.values())], mesh.devices.shape)
    for what, value in plan.lines():
        (logging.info if plan.fits else logging.warning)("plan: %s: %s", what, value)
    norms = norms_of_experts(job, experts) if job.merge.is_calibrated else None
    layout = Layout(plan.block_layers, plan.resident, processes.count(), processes.index())

    with ExitStack() as opened:
        for model in (base, *experts.values()):
            opened.callback(model.close)
        identity = identity_of(job, {"base": base, **experts}, layout) if job.resume else ""
        writers = {name: opened.enter_context(writer) for name, writer in _writers(job, base, identity)}
        writer = writers.pop("--output")
        journal = opened.enter_context(journal_of((writer, *writers.values()), identity))
        try:
            outcome = merge_checkpoints(base, experts, job.merge, writer, mesh, layout, writers, norms, journal=journal)
        except NonfiniteError as error:
            raise _damaged(error, {"base": base, **experts}) from error
        texts = _texts(job, base, experts, outcome, _cost(outcome, (writer, *writers.values()), started))
        signals.check()
        for delta in writers.values():
            delta.complete(with_dtype(base.config, job.merge.delta_dtype), base.directory)
        tokenizer = base if job.tokenizer == "base" else experts[job.tokenizer]
        writer.complete(with_dtype(base.config, job.merge.output_dtype or base.dtype.name), tokenizer.directory, texts)
        for whole in (*writers.values(), writer):
            whole.publish()
    logging.info("wrote %s in %.1f s", job.output, time.perf_counter() - started)
    return outcome


def identity_of(job: JobConfig, models: Mapping[str, Checkpoint], layout: Layout) -> str:
    """Hash all that decides what a merge writes."""
    inputs = {name: input_identity(model) for name, model in models.items()}
    calibration = Path(job.calibration).read_text() if job.calibration else ""
    outputs = {flag: str(Path(where).resolve()) for flag, where in _outputs(job).items()}
    computed = [ARITHMETIC, library_versions(), jax.default_backend(), job.merge.as_dict(), calibration]
    return common_identity([computed, inputs, outputs, replace(layout, process=0), job.max_shard_size])


def _cost(outcome: Outcome, writers: Sequence[SafetensorsWriter], started: float) -> dict:
    """Return the time, the bytes that each process read and wrote, and the largest peak of resident memory."""
    mine = outcome.bytes_read, sum(w.nbytes for w in writers), peak_resident()
    read, written, peak = zip(*processes.exchange("cost", mine), strict=True)
    cost = {"seconds": round(time.perf_counter() - started, 3), "bytes_read": sum(read), "bytes_written": sum(written)}
    cost |= {"peak_memory": max(peak)}
    return cost | ({"processes": {"bytes_read": read, "bytes_written": written}} if len(read) > 1 else {})


def _writers(job: JobConfig, base: Checkpoint, identity: str) -> Iterator[tuple[str, SafetensorsWriter]]:
    dtype = DTYPE_BY_NAME[job.merge.delta_dtype]
    tensors = {name: {n: (spec.shape, dtype) for n, spec in base.specs.items()} for name in _outputs(job)}
    tensors["--output"] = output_tensors(base, job.merge)
    outputs = {name: output_directory(where, job.overwrite) for name, where in _outputs(job).items()}
    check_space({where: total_bytes(tensors[name]) for name, where in outputs.items()})
    owner = owners(base.specs, processes.count())
    for name, where in outputs.items():
        yield name, SafetensorsWriter(where, tensors[name], job.max_shard_size, job.overwrite, identity, owner)


def _damaged(error: NonfiniteError, models: Mapping[str, Checkpoint]) -> CheckpointError:
    """Return the error with the file and the place of the first NaN or Inf."""
    for name, model in models.items():
        bad = np.argwhere(~np.isfinite(model.read(error.tensor).astype(np.float32)))
        if len(bad):
            return CheckpointError(
                f"{model.tensors[error.tensor].file}: {error.tensor} of {name!r} holds {len(bad)} NaN or Inf, the "
                f"first at {tuple(bad[0].tolist())}: damaged, or overflowed in training. Fetch it again; or "
                f"--allow_nonfinite lets such a delta count as 0."
            )
    return error


def _texts(job: JobConfig, base, experts: Mapping[str, Checkpoint], outcome: Outcome, cost: Mapping) -> dict:
    """Return the contents of recipe.json and README.md, by name."""
    config = job.merge.as_dict()
    opened = {"base": base, **experts}
    where = {"base": job.base, **job.experts}
    inputs = {
        name: {"where": where[name], "directory": str(m.directory), "fingerprint": m.fingerprint()}
        for name, m in opened.items()
    }
    tables = {name: getattr(outcome, name) for name in ("rates", "thresholds", "densities", "weights")}
    cards = [m.directory / "README.md" for m in opened.values()]
    licences = [licence(card.read_text(errors="replace")) if card.is_file() else "unknown" for card in cards]
    card = model_card(Path(job.output).name, job.base, job.experts, config, licences, job.command)
    return {
        "recipe.json": recipe(job.flags, config, inputs, tables, outcome.linears, job.merge.rates, cost),
        "README.md": card,
    }
