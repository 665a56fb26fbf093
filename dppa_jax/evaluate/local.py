"""Evaluation with the in-process JAX model."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppa_jax.demo.text import Split
from dppa_jax.evaluate.tasks import Task
from dppa_jax.model import LlamaConfig, generate


class Result(NamedTuple):
    accuracy: float
    responses: list[str]  # in the order of the task's items


def evaluate(
    config: LlamaConfig,
    tree: dict,
    tokenizer,
    tasks: Sequence[Task],
    *,
    split: Split = "test",
    limit: int | None = None,
    batch_size: int = 256,
) -> dict[str, Result]:
    """Answers the tasks' items by greedy decoding and judges the answers.

    Other weights of the same shapes need no new compilation: the weights are arguments of what is compiled.

    Args:
      config: of the model.
      tree: its weights.
      tokenizer: the model's, as transformers loads it.
      tasks: what to answer.
      split: "test" for what is reported, "validation" for what is chosen by.
      limit: items per task; None for all.
      batch_size: prompts decoded together.

    Returns:
      Accuracy and responses by the name of the task.
    """
    tree = jax.tree.map(jnp.asarray, tree)  # onto the device once, not for every batch
    results = {}
    budget = lambda task: task.max_new_tokens  # noqa: E731
    for max_new_tokens, group in groupby(sorted(tasks, key=budget), key=budget):
        items = {task: task.items(split, limit) for task in group}
        prompts = tokenizer([item.prompt for part in items.values() for item in part])["input_ids"]
        tokens = generate((config, tree), prompts, max_new_tokens, batch_size=batch_size)
        texts = iter(tokenizer.batch_decode(tokens, skip_special_tokens=True))
        for task, part in items.items():
            responses = [next(texts) for _ in part]
            results[task.name] = Result(task.accuracy(responses, part), responses)
    return {task.name: results[task.name] for task in tasks}
