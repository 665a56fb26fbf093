"""--job=finetune: make an expert from a checkpoint and files of examples."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial, reduce
from importlib.metadata import version
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from dppa_jax.architecture.specs import first_linear, with_dtype
from dppa_jax.checkpoint import DTYPE_BY_NAME, Checkpoint, SafetensorsWriter
from dppa_jax.checkpoint.adapter import CONFIG
from dppa_jax.checkpoint.card import library_versions
from dppa_jax.checkpoint.laid_out import laid_out_writer
from dppa_jax.checkpoint.output import check_space, output_directory
from dppa_jax.checkpoint.safetensors_writer import total_bytes
from dppa_jax.config.finetune import FinetuneConfig, Lora, TrainConfig
from dppa_jax.finetune.data import batches
from dppa_jax.finetune.lora import adapter_config, adapter_tensors, with_targets
from dppa_jax.finetune.losses import AnyRows
from dppa_jax.finetune.optimizer import PullError
from dppa_jax.finetune.states import KEPT, Checkpoints, checkpoints
from dppa_jax.finetune.train import STEPS_PER_REPORT, TRAIN_AXES, State, Trainer
from dppa_jax.jobs.material import material_of
from dppa_jax.jobs.places import check_apart, directories
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest, sources_digest
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.runtime.progress import steps
from dppa_jax.runtime.signals import defer_signals
from dppa_jax.where import open_checkpoint

LEARNED_BY = (
    "data",
    "heads",
    "labelled",
    "lora",
    "losses",
    "optimizer",
    "train",
)  # modules that decide what is learned
STATE_BYTES = 12  # for each parameter: the weight and two moments in float32


def run_finetune(job: FinetuneConfig) -> list[dict]:
    """Train, write the expert to a Hugging Face directory, and return the log: loss, tokens a second, evaluation loss.

    The state is saved in `job.workdir` every `checkpoint_every` steps. In a run of one process it is also saved when a
    signal ends the run. The same command resumes from it, to the same bits; on another mesh, to the same weights but
    for rounding. If the inputs, an option or the code have changed, training starts anew.

    Several processes share one mesh. Each reads the same batches and holds the slices of its own devices.
    """
    if job.decay_search:
        from dppa_jax.jobs.decay_search import run_decay_search

        return run_decay_search(job)
    started = time.perf_counter()
    with processes.first_alone("output"):
        output_directory(job.output, job.overwrite)
    mesh = make_mesh(job.mesh, TRAIN_AXES, jax.devices())
    with processes.first_alone("base"):
        model = open_checkpoint(job.base, job.seed)
    check_apart({"--output": job.output}, directories({"base": model}), job.workdir)
    material = material_of(job, model)
    tree, rows, eval_rows = material.tree, material.rows, material.eval_rows
    options = job.training(rows.count)
    options = replace(options, lora=with_targets(options.lora, model.config))
    trainer = Trainer(material.config, options, mesh, tree)
    trained = trainer.abstract().tree if options.lora.rank else tree
    dtypes = jax.tree.map(lambda weight: DTYPE_BY_NAME[job.output_dtype] if job.output_dtype else weight.dtype, trained)
    _check_space(job, trained, dtypes)
    _tell(options, material.examples, rows)
    weights = processes.of_first("base digest", model.content_digest)
    key = processes.of_first("fingerprint", lambda: fingerprint(job, options, weights, rows, eval_rows))
    directory = Path(job.workdir) / f"finetune-{key[:12]}"
    with checkpoints(directory, job.checkpoint_every, job.resume, weights) as kept:
        state, log = kept.restore(trainer) or (trainer.start(tree), [])
        model.close()
        state, log = _trained(job, trainer, state, log, rows, eval_rows, kept)
        seconds = time.perf_counter() - started
        texts = {"finetune.json": _record(job, options, model.directory, log, seconds)}
        if options.lora.rank:
            write_adapter(job, state.tree, options.lora, model, texts)
        else:
            write_expert(job, state.tree, dtypes, material.model, texts)
        kept.finished()
    logging.info("wrote %s in %.1f s", job.output, seconds)
    return log


def _trained(
    job: FinetuneConfig,
    trainer: Trainer,
    state: State,
    log: list[dict],
    rows: AnyRows,
    eval_rows: AnyRows | None,
    kept: Checkpoints,
) -> tuple[State, list[dict]]:
    """Train from a state to the last step; return the last state and the log.

    If a signal ends a run of one process, the state is saved, provided that it is whole. Several processes save nothing
    then: saving takes all of them, and a signal finds them at different steps.
    """
    options, first = trainer.options, state.steps
    if first:
        logging.info("goes on after step %d", first)
    order = batches(rows.count, options.batch_size, options.steps, options.seed, first)
    pace = Pace(options.steps)
    try:
        with steps("train", options.steps - first, "steps") as advance:
            for done, batch in enumerate(order, first + 1):
                part = rows.take(batch)
                with defer_signals():  # else a signal finds the old state used up and the new one nameless
                    state, loss = trainer.step(state, done - 1, part)
                pace.add(part)
                last, due = done == options.steps, _is_due(done, job.checkpoint_every)
                evaluated = eval_rows is not None and (last or _is_due(done, job.eval_every))
                if evaluated or last or due or _is_due(done, STEPS_PER_REPORT):
                    entry = {"step": done, "loss": _finite(float(loss), done), **trainer.pull(state), **pace.entry()}
                    if evaluated:
                        entry["eval_loss"] = trainer.loss(state, eval_rows)
                    log.append(entry)
                    pace.tell(entry)
                if due and not last:
                    kept.save(state, log)
                advance()
    except PullError:
        kept.finished()  # whatever goes on from these states ends here again
        raise
    except (KeyboardInterrupt, SystemExit):
        alone = processes.count() == 1
        if alone and job.checkpoint_every and not _given_away(state) and 0 < state.steps < options.steps:
            kept.save(state, log)
            logging.info("kept the state after step %d; the same command goes on from there", state.steps)
        raise
    return state, log


def write_expert(job: FinetuneConfig, tree: dict, dtypes: dict, base: Any, texts: Mapping[str, str]) -> None:
    """Write the Hugging Face directory, in the first process. One tensor at a time is whole on every device."""
    specs, at = base.specs, lambda tree, spec: reduce(getitem, spec.path, tree)
    tensors = {name: (spec.shape, at(dtypes, spec)) for name, spec in specs.items()}
    whole = NamedSharding(jax.tree.leaves(tree)[0].sharding.mesh, PartitionSpec())
    gather_layer = jax.jit(partial(jax.lax.dynamic_index_in_dim, keepdims=False), out_shardings=whole)
    gather = jax.jit(lambda array: array, out_shardings=whole)
    with ExitStack() as opened:
        writer = None
        if processes.index() == 0:
            options = job.output, tensors, job.max_shard_size, job.overwrite
            writer = opened.enter_context(laid_out_writer(base, *options))
        for name, spec in specs.items():
            tensor = at(tree, spec)
            for number in spec.index:
                tensor = gather_layer(tensor, number)
            tensor = tensor if spec.index else gather(tensor)
            if writer:
                writer.write_rows(name, 0, np.asarray(tensor).astype(tensors[name][1], copy=False))
        if writer:
            dtype = at(dtypes, first_linear(specs))
            writer.commit(with_dtype(base.config, dtype.name), base.directory, texts)
    processes.barrier("expert")


def write_adapter(job: FinetuneConfig, factors: dict, lora: Lora, base: Checkpoint, texts: Mapping[str, str]) -> None:
    """Write the directory of an adapter, as peft does, in the first process. The factors are whole everywhere."""
    whole = NamedSharding(jax.tree.leaves(factors)[0].sharding.mesh, PartitionSpec())
    factors = jax.jit(lambda tree: tree, out_shardings=whole)(factors)
    if processes.index() == 0:
        dtype = DTYPE_BY_NAME[job.output_dtype or "float32"]
        tensors = {name: tensor.astype(dtype) for name, tensor in adapter_tensors(factors, base.specs)}
        planned = {name: (tensor.shape, dtype) for name, tensor in tensors.items()}
        one_file = total_bytes(planned)  # peft reads no shards
        with SafetensorsWriter(job.output, planned, one_file, job.overwrite, stem="adapter_model") as writer:
            for name, tensor in tensors.items():
                writer.write_rows(name, 0, tensor)
            content = json.dumps(adapter_config(job.base, lora), indent=2) + "\n"
            writer.commit(None, base.directory, {CONFIG: content, **texts})
    processes.barrier("expert")


def _given_away(state: State) -> bool:
    """Tell whether a step has already taken over the state's memory."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _finite(loss: float, step: int) -> float:
    """Return the loss; refuse one that is not finite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {step}: --learning_rate is too high for this model and data, or a weight of "
            f"--base is not finite."
        )
    return loss


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Pace:
    """Measures tokens a second and the time that is left."""

    def __init__(self, steps: int):
        self.steps = steps
        self._restart()

    def add(self, rows: AnyRows) -> None:
        """Count the tokens of a step."""
        self._taken, self._tokens = self._taken + 1, self._tokens + int(rows.present.sum())

    def entry(self) -> dict:
        """Return the speed since the last entry. Call it when the last loss is known, so that the device is idle."""
        seconds = time.perf_counter() - self._since
        return {"tokens_per_second": round(self._tokens / seconds, 1), "seconds_per_step": seconds / self._taken}

    def tell(self, entry: Mapping) -> None:
        """Log an entry, and start measuring anew."""
        evaluated = f", eval loss {entry['eval_loss']:.4f}" if "eval_loss" in entry else ""
        if "vbar" in entry:
            evaluated += f", vbar {entry['vbar']:.3g}, largest pull {entry['largest_pull']:.3g}"
        minutes = (self.steps - entry["step"]) * entry["seconds_per_step"] / 60
        values = entry["step"], self.steps, entry["loss"], evaluated, entry["tokens_per_second"], minutes
        if processes.index() == 0:
            logging.info("step %d of %d: loss %.4f%s, %.0f tokens/s, %.1f minutes left", *values)
        self._restart()

    def _restart(self) -> None:
        self._taken, self._tokens, self._since = 0, 0, time.perf_counter()


def fingerprint(
    job: FinetuneConfig, options: TrainConfig, weights: str, rows: AnyRows, eval_rows: AnyRows | None
) -> str:
    """Return the fingerprint of everything that decides what is learned and logged, apart from the devices.

    `weights` is that of the base.
    """
    arrays = [array for part in (rows, eval_rows or ()) for array in part if array is not None]
    tokens = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
    code = (*(f"finetune/{name}.py" for name in LEARNED_BY), "model/*.py")
    versions = [version(library) for library in ("jax", "optax", "grain")]
    sources = sources_digest(*code)
    return digest([versions, sources, weights, tokens, asdict(options), job.length])


def _check_space(job: FinetuneConfig, tree: dict, dtypes: dict) -> None:
    """Refuse, before hours of training, an expert and states that do not fit on the disks."""
    sizes = [weight.size for weight in jax.tree.leaves(tree)]
    written = sum(size * dtype.itemsize for size, dtype in zip(sizes, jax.tree.leaves(dtypes), strict=True))
    kept = (KEPT + 1) * STATE_BYTES * sum(sizes) if job.checkpoint_every else 0
    check_space({Path(job.output).resolve(): written, Path(job.workdir).resolve(): kept})


def _tell(options: TrainConfig, examples: int, rows: AnyRows) -> None:
    """Log what is learned in how many steps, and warn of a decay that does nothing."""
    logging.info(
        "%d examples in %d rows of %d tokens, %.0f %% of them filled; %d steps of %d rows",
        examples, rows.count, rows.tokens.shape[1], 100 * rows.present.mean(), options.steps, options.batch_size,
    )  # fmt: skip
    if options.optimizer.decays_toward_base and not options.optimizer.weight_decay:
        logging.warning("--decay_toward=base: --weight_decay is 0, so nothing pulls; give it, or --decay_search")


def _record(job: FinetuneConfig, options: TrainConfig, source: Path, log: Sequence[Mapping], seconds: float) -> str:
    content = {
        "command": job.command,
        "flags": dict(job.flags),
        "training": asdict(options),
        "base": {"where": job.base, "directory": str(source)},
        "seconds": round(seconds, 1),
        "versions": library_versions(),
        "log": list(log),
    }
    return json.dumps(content, indent=1, default=str) + "\n"
