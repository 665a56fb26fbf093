"""Full fine-tuning, and pre-training, of the Flax LLaMA with AdamW.

An example is a prompt and its completion, one JSON object a line: {"prompt": "...", "completion": "..."}. Only the
completion is learned; pre-training is the case of empty prompts. Every example is a row of its own, padded at its end.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from dppa_jax.model import LlamaConfig, forward

STEPS_PER_REPORT = 10  # waiting for a loss empties the device's queue, so not every step


class Example(NamedTuple):
    prompt: str
    completion: str


class Rows(NamedTuple):
    """Examples as tokens; `learned` marks those of the completions and the tokens that end them."""

    tokens: Int[np.ndarray, "N T"]
    learned: Bool[np.ndarray, "N T"]


@dataclass(frozen=True)
class AdamW:
    """AdamW apart from its learning rate, which changes from step to step."""

    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0

    def transform(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm),
            optax.scale_by_adam(self.beta1, self.beta2),
            optax.add_decayed_weights(self.weight_decay),
        )


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    The learning rate rises linearly from 0 during the first `warmup` share of the steps, then falls along a cosine to
    `final` times its peak. `remat` takes less memory and a third more work. `seed` is that of the examples' order.
    """

    steps: int
    learning_rate: float
    batch_size: int = 64
    warmup: float = 0.1
    final: float = 0.05
    optimizer: AdamW = AdamW()
    remat: bool = False
    seed: int = 0

    def learning_rates(self) -> Float[np.ndarray, "steps"]:
        warmup = max(1, round(self.warmup * self.steps))
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(self.steps, warmup + 1), self.final * self.learning_rate
        )
        return np.asarray(jax.vmap(schedule)(jnp.arange(self.steps)), np.float32)


def train(
    config: LlamaConfig,
    tree: dict,
    rows: Rows,
    options: TrainConfig,
    report: Callable[[int, float], None] = lambda steps, loss: None,
) -> tuple[dict, Float[np.ndarray, "steps"]]:
    """Minimises the mean cross-entropy of the learned tokens; the same bits for the same arguments on one machine.

    Args:
      config: of the model.
      tree: the weights to start from; they are not changed. The optimiser works in their dtype: float32 is advised.
      rows: the examples, see `encode`; each is used once before any is used again.
      options: how to train.
      report: called now and then with the number of steps done and the loss of the last one.

    Returns:
      The trained weights, and the loss at each step.
    """
    tree = jax.tree.map(
        lambda array: jnp.array(array, copy=True), tree
    )  # `update` reuses the memory of what it is given
    moments = options.optimizer.transform().init(tree)
    losses: list[Array] = []
    for rate, batch in zip(options.learning_rates(), batches(len(rows.tokens), options), strict=True):
        tree, moments, loss = update(
            config, options.optimizer, tree, moments, rate, rows.tokens[batch], rows.learned[batch], remat=options.remat
        )
        losses.append(loss)
        if len(losses) % STEPS_PER_REPORT == 0 or len(losses) == options.steps:
            report(len(losses), float(loss))
    return tree, np.array(losses, np.float32)


# The learning rate is an argument, so that another schedule needs no other compilation.
@partial(jax.jit, static_argnames=("config", "optimizer", "remat"), donate_argnames=("tree", "moments"))
def update(config: LlamaConfig, optimizer: AdamW, tree, moments, learning_rate, tokens, learned, *, remat: bool):
    """One step of AdamW: the new weights, the new moments, the loss before the step."""
    loss, gradient = jax.value_and_grad(partial(mean_loss, config, remat=remat))(tree, tokens, learned)
    direction, moments = optimizer.transform().update(gradient, moments, tree)
    tree = jax.tree.map(lambda weight, d: (weight - learning_rate * d).astype(weight.dtype), tree, direction)
    return tree, moments, loss


def mean_loss(
    config: LlamaConfig,
    tree: dict,
    tokens: Int[Array | np.ndarray, "B T"],
    learned: Bool[Array | np.ndarray, "B T"],
    *,
    remat: bool = False,
) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of the learned tokens given those before them."""
    logits = forward(config, tree, tokens[:, :-1], remat=remat)
    surprise = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(surprise, where=learned[:, 1:]) / jnp.maximum(jnp.sum(learned[:, 1:]), 1)


def batches(count: int, options: TrainConfig) -> Iterator[Int[np.ndarray, "batch"]]:
    """The indices of each step's examples: a new random order for every pass, passes running into each other."""
    draw = np.random.default_rng(options.seed)
    queue = np.empty(0, np.int64)
    for _ in range(options.steps):
        while len(queue) < options.batch_size:
            queue = np.concatenate([queue, draw.permutation(count)])
        yield queue[: options.batch_size]
        queue = queue[options.batch_size :]


def read_examples(path: Path | str) -> list[Example]:
    """The examples of a file of JSON lines; other keys than "prompt" and "completion" are ignored."""
    examples = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            examples.append(Example(fields["prompt"], fields["completion"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: not of the form {{"prompt": "...", "completion": "..."}}: {line[:80]!r}'
            ) from error
    return examples


def encode(examples: Iterable[Example], tokenizer, max_length: int) -> Rows:
    """Tokenises prompt and completion as one text, adds the end-of-sequence token, pads to `max_length`.

    Where a token spans the end of the prompt it counts as completion: at generation the prompt ends before it.

    Args:
      tokenizer: a transformers tokenizer with an end-of-sequence token.
      max_length: tokens per row; longer examples are cut there, and a warning says how many.
    """
    examples = list(examples)
    prompts = sorted({example.prompt for example in examples})
    prompt_tokens = dict(zip(prompts, tokenizer(prompts)["input_ids"], strict=True))
    texts = tokenizer([example.prompt + example.completion for example in examples])["input_ids"]
    tokens = np.full((len(examples), max_length), tokenizer.pad_token_id or 0, np.int32)
    learned = np.zeros((len(examples), max_length), bool)
    cut = 0
    for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
        start = common_prefix(prompt_tokens[example.prompt], text)
        text = [*text, tokenizer.eos_token_id]
        cut += len(text) > max_length
        text = text[:max_length]
        tokens[row, : len(text)] = text
        learned[row, start : len(text)] = True
    if cut:
        logging.warning("%d of %d examples are longer than %d tokens and were cut", cut, len(examples), max_length)
    return Rows(tokens, learned)


def common_prefix(first: list[int], second: list[int]) -> int:
    """The number of equal tokens at the start of both."""
    unequal = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(unequal, min(len(first), len(second)))
