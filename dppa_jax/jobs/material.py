"""What a fine-tuning learns: the rows of its files, and the model that learns them, by what the base is."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from absl import logging

from dppa_jax.architecture.table import architecture_of
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.stacked import stored_tree
from dppa_jax.checkpoint.tokenizer import load_tokenizer
from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.finetune import FinetuneConfig
from dppa_jax.evaluate.reader import listed
from dppa_jax.evaluate.tasks import every_task
from dppa_jax.finetune.data import Example, Rows, encode, encode_packed, read_examples
from dppa_jax.finetune.heads import with_head
from dppa_jax.finetune.labelled import Labelled, LabelledRows, class_names, encode_labelled, read_labelled
from dppa_jax.finetune.losses import AnyRows
from dppa_jax.jobs.models import check_code
from dppa_jax.model import DecoderConfig, EncoderConfig
from dppa_jax.model.config import ModelConfig
from dppa_jax.model.generate import end_tokens


class Material(NamedTuple):
    """What is learned, and by what.

    Attributes:
      model: config.json, tensors and directory of the expert that comes of it: those of the base, or of the base with a
        head.
      config: of its forward pass.
      tree: the weights to start from.
      rows, eval_rows: what is learned, and what the loss is measured on.
      examples: how many are in the rows.
    """

    model: Any
    config: ModelConfig
    tree: dict
    rows: AnyRows
    eval_rows: AnyRows | None
    examples: int


def material_of(job: FinetuneConfig, base: Checkpoint) -> Material:
    """Read the files of a job for its base: prompts and completions for a decoder, texts with labels for an encoder.

    Raises:
      ValueError: a file is of another form, holds an item of a task in --evaluate, or does not fit the base.
    """
    return (_classified if architecture_of(base.config).own_heads else _continued)(job, base)


def _continued(job: FinetuneConfig, base: Checkpoint) -> Material:
    examples, checked = (_read(files, read_examples) for files in (job.data, job.eval_data))
    check_held_out(job.held_out, [f"{prompt}{completion}" for prompt, completion in examples])
    check_code(base)
    config, tokenizer = DecoderConfig.from_hf(base.config), _tokenizer(base)
    rows = _rows(job, tokenizer, config, examples)
    eval_rows = _rows(job, tokenizer, config, checked) if checked else None
    return Material(base, config, stored_tree(base, base.specs), rows, eval_rows, len(examples))


def _classified(job: FinetuneConfig, base: Checkpoint) -> Material:
    examples, checked = (_read(files, read_labelled) for files in (job.data, job.eval_data))
    check_held_out(job.held_out, ["\n".join(example.texts) for example in examples])
    check_code(base)
    known = EncoderConfig.from_hf(base.config).labels
    try:
        names = class_names([example.label for example in (*examples, *checked)], known)
    except ValueError as error:
        raise ValueError(f"--train_data: {error}") from None
    model = with_head(base, names, job.seed)
    config, tokenizer = EncoderConfig.from_hf(model.config), load_tokenizer(base.directory)
    length = min(job.length, config.positions)

    def rows(part: Sequence[Labelled]) -> LabelledRows:
        found = encode_labelled(part, names, tokenizer, length)
        _check_vocabulary(found, config)
        return found

    return Material(model, config, model.tree, rows(examples), rows(checked) if checked else None, len(examples))


def check_held_out(tasks: EvaluationConfig, examples: Iterable[str]) -> None:
    """Refuse examples in which a line begins with the question of an item, of any split, of a task in --evaluate.

    A text that has a class must be equal to be refused, as some are the beginnings of others.
    """
    learned = "".join(f"\n{example}\n" for example in examples)
    options = replace(tasks.options, limit=None)
    for task in every_task(tasks.tasks):
        end = "\n" if task.kind.classifies else ""
        for split, items in task.load(options).items():
            for item in items:
                if f"\n{item.prompt.strip()}{end}" in learned:
                    raise ValueError(
                        f"--train_data holds the {split} item {item.id!r} of {task.name}: {item.prompt[:80]!r}; what "
                        f"is evaluated must not be learned. Take it out."
                    )


def _read(files: Sequence[str], reader) -> list:
    return [example for file in files for example in reader(file)]


def _tokenizer(model: Checkpoint):
    tokenizer, ends = load_tokenizer(model.directory), end_tokens(model.config, model.directory)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{model.directory}: its tokenizer has no end-of-sequence token, by which completions end.")
    if tokenizer.eos_token_id not in ends:
        logging.warning(
            "%s: completions end with the token %d of its tokenizer, but its answers with %s: the expert will not stop "
            "where a completion ended; set eos_token_id in its generation_config.json",
            *(model.directory, tokenizer.eos_token_id, listed(ends)),
        )
    return tokenizer


def _rows(job: FinetuneConfig, tokenizer, config: DecoderConfig, examples: Sequence[Example]) -> Rows:
    if job.pack:
        rows = encode_packed(examples, tokenizer, job.length, job.seed)
    else:
        rows = encode(examples, tokenizer, job.length)
    if not rows.learned[:, 1:].any():
        raise ValueError(f"--train_length={job.length}: no completion begins within a row; make rows longer.")
    _check_vocabulary(rows, config)
    return rows


def _check_vocabulary(rows: AnyRows, config: ModelConfig) -> None:
    """Refuse tokens without a row in the embeddings, which no array access would notice."""
    highest = rows.tokens[rows.present].max()
    if highest >= config.vocab_size:
        raise ValueError(f"--base: its tokenizer gave the token {highest}, its vocab_size is {config.vocab_size}.")
