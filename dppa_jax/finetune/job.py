"""--job=finetune: a checkpoint and files of examples in, an expert out."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np
from absl import logging

from dppa_jax.cache import digest, sources_digest
from dppa_jax.checkpoint import DTYPES, SafetensorsDirectory, load_tree, locate, save_tree
from dppa_jax.checkpoint.recipe import library_versions
from dppa_jax.checkpoint.safetensors_writer import MAX_SHARD_SIZE, output_directory
from dppa_jax.evaluate.evaluation import EvaluationConfig
from dppa_jax.finetune.data import Example, Rows, batches, encode, encode_packed, read_examples
from dppa_jax.finetune.train import STEPS_PER_REPORT, TRAIN_AXES, AdamW, State, TrainConfig, Trainer
from dppa_jax.jobs import check_apart
from dppa_jax.model import LlamaConfig
from dppa_jax.progress import steps
from dppa_jax.sharding import make_mesh

KEPT = 2  # checkpoints: the older one where the newer was being written


@dataclass(frozen=True)
class FinetuneConfig:
    """What --job=finetune does.

    Attributes:
      base, output: the checkpoint to start from, and the directory of the expert.
      data: files of examples, JSON lines; all of them are learned.
      eval_data: files of examples of which only the loss is told.
      epochs: passes over the examples, which give the number of steps where `steps` is 0.
      length: tokens of a row; longer examples are cut.
      pack: several examples to a row, each of which sees itself only.
      checkpoint_every, eval_every: steps; 0 for never.
      held_out: the tasks whose items must not be learned.
    """

    base: str
    output: str
    data: tuple[str, ...]
    eval_data: tuple[str, ...] = ()
    epochs: float = 1.0
    steps: int = 0
    learning_rate: float = 2e-5
    batch_size: int = 16
    accumulate: int = 1
    length: int = 512
    pack: bool = True
    warmup: float = 0.03
    optimizer: AdamW = field(default_factory=AdamW)
    dtype: str = "bfloat16"
    remat: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    eval_every: int = 0
    mesh: str = ""
    workdir: str = "runs"
    output_dtype: str = ""
    max_shard_size: int = MAX_SHARD_SIZE
    overwrite: bool = False
    held_out: EvaluationConfig = field(default_factory=EvaluationConfig)
    flags: Mapping = field(default_factory=dict)
    command: str = ""

    def __post_init__(self):
        if not self.base:
            raise ValueError("--base is empty: give the model to fine-tune.")
        if not self.output:
            raise ValueError("--output is empty: give the directory of the expert.")
        if not self.data:
            raise ValueError("--train_data is empty: give files of examples, JSON lines of prompt and completion.")
        if self.steps < 0 or (self.steps == 0 and not 0 < self.epochs < math.inf):
            raise ValueError(f"--epochs={self.epochs:g}, --train_steps={self.steps}: one of them must be above 0.")
        if self.length < 2:
            raise ValueError(f"--train_length={self.length}: a row has at least 2 tokens.")
        for flag, value in (("checkpoint_every", self.checkpoint_every), ("eval_every", self.eval_every)):
            if value < 0:
                raise ValueError(f"--{flag}={value}: a number of steps, or 0 for never.")

    def training(self, rows: int) -> TrainConfig:
        """How to train on so many rows."""
        return TrainConfig(
            steps=self.steps or max(1, round(self.epochs * rows / self.batch_size)),
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            warmup=self.warmup,
            optimizer=self.optimizer,
            accumulate=self.accumulate,
            dtype=self.dtype,
            remat=self.remat,
            seed=self.seed,
        )


def run_finetune(job: FinetuneConfig) -> list[dict]:
    """Train, and write a Hugging Face directory; returns what was logged: loss, tokens a second, loss on `eval_data`.

    The state is kept in `job.workdir` every `checkpoint_every` steps and when a signal ends the run. The same command
    goes on from there, to the same bits; a change of the inputs, of an option or of the code starts anew.
    """
    started = time.perf_counter()
    output_directory(job.output, job.overwrite)
    source = locate(job.base, job.seed)
    check_apart({"--output": job.output}, {"base": source})
    examples, checked = (_read(files) for files in (job.data, job.eval_data))
    check_held_out(job.held_out, examples)
    rows, eval_rows = _rows(job, source, examples), _rows(job, source, checked) if checked else None
    options = job.training(rows.count)
    hf_config, tree = load_tree(source)
    trainer = Trainer(LlamaConfig.from_hf(hf_config), options, make_mesh(job.mesh, TRAIN_AXES))
    logging.info(
        "%d examples in %d rows of %d tokens, %.0f %% of them filled; %d steps of %d rows",
        len(examples), rows.count, job.length, 100 * _filled(rows), options.steps, options.batch_size,
    )  # fmt: skip
    key = fingerprint(job, options, source, rows, trainer)
    with checkpoints(Path(job.workdir) / f"finetune-{key[:12]}", job.checkpoint_every) as kept:
        state, log = _trained(job, trainer, tree, rows, eval_rows, kept)
        dtype = DTYPES[job.output_dtype] if job.output_dtype else None
        tree = jax.tree.map(lambda new, old: np.asarray(new).astype(dtype or old.dtype), state.tree, tree)
        seconds = time.perf_counter() - started
        record = _record(job, options, source, log, seconds)
        save_tree(job.output, tree, hf_config, source, job.max_shard_size, job.overwrite, {"finetune.json": record})
        kept.finished()
    logging.info("wrote %s in %.1f s", job.output, seconds)
    return log


def _trained(
    job: FinetuneConfig, trainer: Trainer, tree: dict, rows: Rows, eval_rows: Rows | None, kept: "Checkpoints"
) -> tuple[State, list[dict]]:
    options, every = trainer.options, job.checkpoint_every
    state, log = kept.restore(trainer) or (trainer.start(tree), [])
    first = done = log[-1]["step"] if log else 0
    if first:
        logging.info("goes on after step %d", first)
    order = batches(rows.count, options.batch_size, options.steps, options.seed, first)
    pace = Pace(options.steps)
    try:
        with steps("train", options.steps - first, "steps") as advance:
            for number, batch in enumerate(order, first):
                part = rows.take(batch)
                state, loss = trainer.step(state, number, part)
                done = number + 1
                pace.add(part)
                evaluated = eval_rows is not None and (done == options.steps or _is_due(done, job.eval_every))
                if evaluated or done == options.steps or _is_due(done, every) or _is_due(done, STEPS_PER_REPORT):
                    entry = {"step": done, "loss": float(loss), **pace.entry()}
                    if evaluated:
                        entry["eval_loss"] = trainer.loss(state, eval_rows)
                    log.append(entry)
                    pace.tell(entry)
                if _is_due(done, every) and done < options.steps:
                    kept.save(done, state, log)
                advance()
    except (KeyboardInterrupt, SystemExit):
        if every and log and log[-1]["step"] == done:
            kept.save(done, state, log)
        raise
    return state, log


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Pace:
    """Tokens a second, and the time that is left."""

    def __init__(self, steps: int):
        self.steps = steps
        self._restart()

    def add(self, rows: Rows) -> None:
        self._taken, self._tokens = self._taken + 1, self._tokens + int(_present(rows).sum())

    def entry(self) -> dict:
        """Since the last one; the last step's loss is known, so that the device is idle."""
        seconds = time.perf_counter() - self._since
        return {"tokens_per_second": round(self._tokens / seconds, 1), "seconds_per_step": seconds / self._taken}

    def tell(self, entry: Mapping) -> None:
        evaluated = f", eval loss {entry['eval_loss']:.4f}" if "eval_loss" in entry else ""
        minutes = (self.steps - entry["step"]) * entry["seconds_per_step"] / 60
        values = entry["step"], self.steps, entry["loss"], evaluated, entry["tokens_per_second"], minutes
        logging.info("step %d of %d: loss %.4f%s, %.0f tokens/s, %.1f minutes left", *values)
        self._restart()

    def _restart(self) -> None:
        self._taken, self._tokens, self._since = 0, 0, time.perf_counter()


class Checkpoints:
    """States of one training, kept by Orbax: each restores to the same bits, onto any mesh."""

    def __init__(self, directory: Path, manager):
        self.directory, self._manager = directory, manager

    def restore(self, trainer: Trainer) -> tuple[State, list[dict]] | None:
        """The newest state with what was logged until then; None where there is none."""
        import orbax.checkpoint as ocp

        step = self._manager.latest_step()
        if step is None:
            return None
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(trainer.abstract()._asdict()), log=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=wanted)
        return State(**found["state"]), found["log"]["entries"]

    def save(self, step: int, state: State, log: Sequence[Mapping]) -> None:
        import orbax.checkpoint as ocp

        content = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), log=ocp.args.JsonSave({"entries": list(log)})
        )
        self._manager.save(step, args=content, force=True)
        self._manager.wait_until_finished()  # the next step uses the state's memory again

    def finished(self) -> None:
        """The output is written: nothing is left to go on with."""
        self._manager.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def checkpoints(directory: Path, every: int) -> Iterator[Checkpoints]:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=bool(every), enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory.resolve(), options=options) as manager:
        yield Checkpoints(directory, manager)


def fingerprint(job: FinetuneConfig, options: TrainConfig, source: Path, rows: Rows, trainer: Trainer) -> str:
    """Of all that decides the bits of the result."""
    model = SafetensorsDirectory(source)
    weights = model.content_digest()
    model.close()
    learned = [hashlib.sha256(array.tobytes()).hexdigest() for array in rows if array is not None]
    package = Path(__file__).parent.parent
    code = [jax.__version__, sources_digest(package, "finetune/*.py", "model/llama.py")]
    return digest([code, weights, learned, asdict(options), dict(trainer.mesh.shape), job.length])


def check_held_out(tasks: EvaluationConfig, examples: Sequence[Example]) -> None:
    """Refuse examples that ask what a task of --evaluate asks, in any of its splits."""
    asked = {example.prompt.strip() for example in examples}
    for task in tasks.every_task:
        for split in task.load(tasks.options):
            for item in task.items(tasks.options, split):
                if item.prompt.strip() in asked:
                    raise ValueError(
                        f"--train_data holds the {split} item {item.id!r} of {task.name}: {item.prompt[:80]!r}; what "
                        f"is evaluated must not be learned. Take it out."
                    )


def _read(files: Sequence[str]) -> list[Example]:
    return [example for file in files for example in read_examples(file)]


def _rows(job: FinetuneConfig, source: Path, examples: Sequence[Example]) -> Rows:
    from transformers import AutoTokenizer  # takes a second

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: its tokenizer has no end-of-sequence token, by which completions end.")
    if job.pack:
        return encode_packed(examples, tokenizer, job.length, job.seed)
    return encode(examples, tokenizer, job.length)


def _present(rows: Rows) -> np.ndarray:
    """Tokens that belong to an example."""
    if rows.positions is None:  # padding follows the last learned token
        return np.flip(np.maximum.accumulate(np.flip(rows.learned, -1), -1), -1)
    following = np.concatenate([rows.positions[:, 1:] > 0, np.zeros((len(rows.positions), 1), bool)], -1)
    return (rows.positions > 0) | following


def _filled(rows: Rows) -> float:
    return float(_present(rows).mean())


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
