"""Write a merge with given numbers: a Hugging Face directory with its recipe and model card, whole or not at all."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from absl import logging

from dppa_jax.architecture.specs import CheckpointError, with_dtype
from dppa_jax.checkpoint import Checkpoint, SafetensorsWriter
from dppa_jax.checkpoint.card import library_versions, licence, model_card, recipe
from dppa_jax.checkpoint.laid_out import laid_out_writer
from dppa_jax.checkpoint.matched import opened_model
from dppa_jax.checkpoint.output import check_space
from dppa_jax.checkpoint.safetensors_writer import publish_all, total_bytes
from dppa_jax.jobs.models import written_tensors
from dppa_jax.jobs.places import directories
from dppa_jax.merging.blocks import owners
from dppa_jax.merging.gone import Gone, gone_of, sentence
from dppa_jax.merging.identity import common_identity, input_identity, journal_of, unchanged
from dppa_jax.merging.lora_factors import factors_gone
from dppa_jax.merging.merger import ARITHMETIC, Layout, Outcome, merge_checkpoints
from dppa_jax.merging.opened import Opened
from dppa_jax.merging.rest import copy_rest
from dppa_jax.merging.survey import NonfiniteError
from dppa_jax.recipes.output import RECIPE_FILE, chat_template, recipe_text
from dppa_jax.runtime import processes, signals
from dppa_jax.runtime.memory import peak_resident
from dppa_jax.runtime.reading import MAX_LINES_BYTES, read_text
from dppa_jax.where import hub_ids


def write_merge(opened: Opened, advice: Mapping = MappingProxyType({})) -> Outcome:
    """Merge with given numbers into the job's output: a Hugging Face directory with recipe.json and a model card.

    Args:
      advice: why the method was chosen, if it was, for recipe.json.
    """
    started = time.perf_counter()
    job, base, merge = opened.job, opened.base, opened.job.merge
    if merge.has_plain_factors and not job.search:
        logging.warning(
            "--factors: all are the plain ones, so that --method=%s amplifies nothing; --factors=search "
            "--evaluate=TASKS finds factors on tasks of the experts' domains",
            merge.method,
        )
    plan = opened.plan(merge)
    for what, value in plan.lines():
        (logging.info if plan.fits else logging.warning)("plan: %s: %s", what, value)
    layout, seen = opened.layout(plan), opened.seen(merge)
    identity = identity_of(opened, layout) if job.resume else ""
    with ExitStack() as stack:
        check_unchanged = stack.enter_context(unchanged(opened.models))
        writers = {name: stack.enter_context(writer) for name, writer in _writers(opened, identity)}
        writer = writers.pop("--output")
        journal = stack.enter_context(journal_of((writer, *writers.values()), identity))
        try:
            outcome = merge_checkpoints(
                base, opened.chosen(merge), merge, writer, opened.mesh, layout, writers, journal=journal, **seen
            )
            copy_rest(opened.rest, opened.experts, writer)
        except NonfiniteError as error:
            raise _damaged(error, opened.models) from error
        files, base_files = opened.tokenizer_files, (opened.tokenizer if opened.tokenizer_files else base).directory
        texts = _texts(opened, outcome, _cost(outcome, (writer, *writers.values()), started), advice)
        signals.check()
        for delta in writers.values():
            delta.complete(with_dtype(base.config, merge.delta_dtype), base_files, files)
        config = with_dtype(opened.rest.config, merge.output_dtype or base.dtype.name)
        writer.complete(config, opened.tokenizer.directory, {**files, **texts})
        check_unchanged()
        publish_all([*writers.values(), writer])
    logging.info("wrote %s in %.1f s", job.output, time.perf_counter() - started)
    return outcome


def identity_of(opened: Opened, layout: Layout) -> str:
    """Hash all that decides what a merge writes."""
    job = opened.job
    inputs = {name: input_identity(model) for name, model in opened.models.items()}
    texts = [text for name in job.merge.experts if (text := job.text_of(name))]
    calibration = [read_text(text, MAX_LINES_BYTES) for text in texts]
    outputs = {flag: str(where) for flag, where in opened.outputs.items()}
    linears = [spec.name for spec in opened.base.specs.values() if spec.linear is not None]
    matched = opened.vocabulary.digest if opened.vocabulary else ""
    computed = [ARITHMETIC, library_versions(), jax.default_backend(), job.merge.as_dict(), calibration, linears]
    return common_identity([computed, inputs, matched, outputs, replace(layout, process=0), job.max_shard_size])


def _cost(outcome: Outcome, writers: Sequence[SafetensorsWriter], started: float) -> dict:
    """Return the time, the bytes that each process read and wrote, and the largest peak of resident memory."""
    mine = outcome.bytes_read, sum(w.nbytes for w in writers), peak_resident()
    read, written, peak = zip(*processes.exchange("cost", mine), strict=True)
    cost = {"seconds": round(time.perf_counter() - started, 3), "bytes_read": sum(read), "bytes_written": sum(written)}
    cost |= {"peak_memory": max(peak)}
    return cost | ({"processes": {"bytes_read": read, "bytes_written": written}} if len(read) > 1 else {})


def _writers(opened: Opened, identity: str) -> Iterator[tuple[str, SafetensorsWriter]]:
    job, base = opened.job, opened.base
    tensors, copied = written_tensors(job, base, opened.outputs), {"--output": opened.rest.tensors}
    check_space({w: total_bytes(tensors[name] | copied.get(name, {})) for name, w in opened.outputs.items()})
    owner = owners(base.specs, processes.count())
    for name, where in opened.outputs.items():
        options = where, tensors[name], job.max_shard_size, job.overwrite, identity
        yield name, laid_out_writer(base, *options, owners=owner, copied=copied.get(name))


def _damaged(error: NonfiniteError, models: Mapping[str, Checkpoint]) -> CheckpointError:
    """Return the error with the file and the place of the first NaN or Inf."""
    for name, model in models.items():
        bad = np.argwhere(~np.isfinite(opened_model(model).read(error.tensor).astype(np.float32)))
        if len(bad):
            return CheckpointError(
                f"{model.tensors[error.tensor].file}: {error.tensor} of {name!r} holds {len(bad)} NaN or Inf, the "
                f"first at {tuple(bad[0].tolist())}: damaged, or overflowed in training. Fetch it again; or "
                f"--allow_nonfinite lets such a delta count as 0."
            )
    return error


def _texts(opened: Opened, outcome: Outcome, cost: Mapping, advice: Mapping) -> dict[str, str]:
    """Return the contents of recipe.json, README.md and what a recipe asks for, by name."""
    job, base, models = opened.job, opened.base, opened.models
    config, where = job.merge.as_dict(), {"base": job.base, **job.experts}
    inputs = {
        name: {"where": where[name], "directory": str(model.directory), "fingerprint": model.fingerprint()}
        for name, model in models.items()
    }
    tables = {name: getattr(outcome, name) for name in ("rates", "thresholds", "densities", "weights")}
    licences = [licence(directory) for directory in directories(models).values()]
    vocabulary, linears = opened.vocabulary, outcome.linears
    notes, (what, gone) = vocabulary.notes() if vocabulary else [], _gone(opened, outcome)
    for told in (sentence(name, of_expert, what) for name, of_expert in gone.items()):
        logging.info("%s", told)
        notes = [*notes, told]
    text = recipe_text(job, base.specs, base.dtype.name)
    more = {"notes": notes, "parents": hub_ids(where.values()), "configuration": text}
    card = model_card(Path(job.output).name, job.base, job.experts, config, licences, job.command, **more)
    return {
        "recipe.json": recipe(
            *(job.flags, config, inputs, tables, linears, job.merge.of_deltas.rates, cost, gone),
            vocabulary=vocabulary.as_dict() if vocabulary else {},
            advice=advice,
        ),
        "README.md": card,
        **({RECIPE_FILE: text} if text else {}),
        **chat_template(job, opened.models),
    }


def _gone(opened: Opened, outcome: Outcome) -> tuple[str, dict[str, dict[str, Gone]]]:
    """Return what has been pruned, and how much of it is gone of each expert."""
    merge = opened.job.merge
    if merge.lora_factors:
        return "factors", factors_gone(opened.experts, merge)
    return "delta", gone_of(merge, outcome)
