"""The evaluator that generates, or classifies, with the JAX model in this process (--evaluator=jax)."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.model import DecoderConfig, EncoderConfig, classify, generate, model_config
from dppa_jax.model.config import ModelConfig
from dppa_jax.model.generate import bucket, end_tokens
from dppa_jax.runtime.memory import device_memory
from dppa_jax.where import load_tree

BATCH_SIZE = 256


class JaxEvaluator:
    """An `Evaluator` that generates greedily with a decoder of dppa_jax.model, and classifies with an encoder.

    New weights of the same shapes need no new compilation: the weights are arguments of the compiled program.

    Args:
      dtype: of weights and activations. "auto" keeps the dtype of the weights, but takes float32 on CPUs, where it
        decodes faster than bfloat16 and rounds no weight.
      batch_size: how many prompts are decoded together; fewer where their keys and values would not fit into memory.
      max_length: tokens of prompt and answer together, at most; never more than the model's positions.
    """

    name = "jax"

    def __init__(self, *, dtype: str = "auto", batch_size: int = BATCH_SIZE, max_length: int = 2048):
        self.batch_size, self.max_length = batch_size, max_length
        self._dtype = "float32" if dtype == "auto" and jax.default_backend() == "cpu" else dtype
        self._config: ModelConfig | None = None
        self._tree: dict = {}

    @property
    def decoding(self) -> dict[str, str | int | float]:
        """What decides the responses, beside the weights and the prompts."""
        return {
            "evaluator": self.name,
            "version": f"jax {jax.__version__} {jax.default_backend()}",
            "dtype": self._dtype,
            "max_length": self.max_length,
        }

    def use(self, weights: Path | Model) -> None:
        """Answer with these weights from now on."""
        self.close()  # the old weights must not take memory beside the new ones
        if isinstance(weights, Model):
            config, tree, origin = weights.config, weights.tree, weights.directory
        else:
            config, tree = load_tree(weights)
            origin = weights
        parsed = model_config(config)
        if isinstance(parsed, EncoderConfig) and not parsed.labels:
            raise ValueError(f"{origin}: it has no classification head, as experts that are tuned from it have.")
        self._end = end_tokens(config, origin)
        dtype = None if self._dtype == "auto" else self._dtype
        self._tree = jax.tree.map(lambda array: jnp.array(array, dtype), tree)
        self._config = parsed

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int] | int) -> list[list[int]]:
        """Return the answers to prompts of token ids; see `Evaluator`."""
        if self._config is None:
            raise ValueError("the evaluator has no weights yet: call use() first.")
        budgets = room_for(prompts, max_new_tokens, min(self.max_length, self._config.max_position_embeddings))
        asked = [index for index, budget in enumerate(budgets) if budget > 0]
        asked_prompts = [prompts[index] for index in asked]
        limits = [budgets[index] for index in asked]
        memory, _ = device_memory()
        itemsize = self._tree["norm"].dtype.itemsize
        rows = min(self.batch_size, rows_that_fit(self._config, asked_prompts, limits, itemsize, memory))
        generated = generate((self._config, self._tree), asked_prompts, limits, self._end, batch_size=rows)
        answers: list[list[int]] = [[] for _ in prompts]
        for index, answer in zip(asked, generated, strict=True):
            answers[index] = answer
        return answers

    def classify(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> list[str]:
        """Return the number and the name of the class of each text, "1 positive", or the number that is predicted.

        Args:
          texts: token ids with all that an encoder reads.
          types: of the tokens.
        """
        if not isinstance(self._config, EncoderConfig):
            raise ValueError("the evaluator has no encoder yet: call use() with one first.")
        most, names = max(map(len, texts), default=0), self._config.labels
        if most > self._config.positions:
            raise ValueError(
                f"a text has {most} tokens, and the model reads {self._config.positions}: give "
                f"--max_length={self._config.positions}."
            )
        answers = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            logits = self._logits(texts[part], types[part])
            if len(names) == 1:
                answers += [f"{value:.9g}" for value in logits[:, 0].tolist()]
            else:
                answers += [f"{best} {names[best]}" for best in logits.argmax(axis=1).tolist()]
        return answers

    def _logits(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> np.ndarray:
        """Compute the logits of a batch, padded to a length and a number of rows of which there are few."""
        shape = bucket(len(texts)), min(bucket(max(map(len, texts))), self._config.positions)
        tokens, kinds, text = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        text[len(texts) :, 0] = True  # an empty row would divide by nothing
        for row, (ids, own) in enumerate(zip(texts, types, strict=True)):
            tokens[row, : len(ids)], kinds[row, : len(ids)], text[row, : len(ids)] = ids, own, True
        return np.asarray(classify(self._config, self._tree, tokens, text, kinds))[: len(texts)]

    def close(self) -> None:
        """Free the weights."""
        self._config, self._tree = None, {}


def rows_that_fit(
    config: DecoderConfig, prompts: Sequence[Sequence[int]], limits: Sequence[int], itemsize: int, memory: int
) -> int:
    """Return how many prompts can be decoded together: a power of two, at least 1.

    A prompt takes its keys and values, twice while they are updated, and the attention scores of the longest prompt.

    Args:
      config: of the model.
      prompts: to be decoded.
      limits: of new tokens, for each prompt.
      itemsize: bytes of a key or value.
      memory: of the device, in bytes.
    """
    longest, most = bucket(max(map(len, prompts), default=1)), bucket(max(limits, default=1))
    slots = longest + most
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * slots * itemsize
    scores = config.num_attention_heads * longest * slots * 4
    return 1 << max(0, (memory // (2 * cache + 2 * scores)).bit_length() - 1)


def room_for(prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int] | int, max_length: int) -> list[int]:
    """Return how many new tokens each prompt gets: as many as are asked for, but no more than fit behind it.

    Args:
      prompts: of token ids.
      max_new_tokens: asked for, for all prompts or for each.
      max_length: of prompt and answer together.

    >>> room_for([[1, 2, 3], [1] * 8, [1] * 12], 5, 10)
    [5, 2, 0]
    """
    limits = np.broadcast_to(max_new_tokens, len(prompts))
    budgets = [min(int(limit), max_length - len(prompt)) for limit, prompt in zip(limits, prompts, strict=True)]
    if too_long := sum(budget < min(1, int(limit)) for budget, limit in zip(budgets, limits, strict=True)):
        logging.warning("%d prompts have %d tokens or more and get no answer", too_long, max_length)
    return [max(0, budget) for budget in budgets]
