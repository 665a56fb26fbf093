"""Read training examples, turn them into rows of tokens, and draw batches of rows in a reproducible order.

A file of examples holds one JSON object a line: {"prompt": "...", "completion": "..."}. The loss counts only the tokens
of the completion. For pre-training, leave the prompts empty.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from absl import logging
from jaxtyping import Bool, Int

from dppa_jax.checkpoint.tokenizer import encode as encode_texts
from dppa_jax.runtime.reading import read_json_lines

OPEN_ROWS = 64  # rows that are filled side by side; with 64 of them, less than 1 % of a row stays empty


class Example(NamedTuple):
    """One text to learn from: the model sees `prompt` and learns to continue it with `completion`."""

    prompt: str
    completion: str


class Line(TypedDict):
    """A line of a file of examples."""

    prompt: str
    completion: str


class Rows(NamedTuple):
    """Examples as rows of tokens, padded to one length.

    Attributes:
      tokens: token ids.
      learned: True for the tokens that the loss counts: a completion and the end-of-sequence token after it.
      positions: the place of each token in its own example, from 0. They keep the examples of a row apart: attention
        does not cross a place where they start again. None: each row is one example.
    """

    tokens: Int[np.ndarray, "*N T"]
    learned: Bool[np.ndarray, "*N T"]
    positions: Int[np.ndarray, "*N T"] | None = None

    def take(self, at: slice | Int[np.ndarray, "n"]) -> "Rows":
        """Return the rows with these indices."""
        return Rows(*(None if array is None else array[at] for array in (self.tokens, self.learned, self.positions)))

    def only(self, which: Bool[np.ndarray, " N"]) -> "Rows":
        """Return the rows, of which the others do not count."""
        return self._replace(learned=self.learned & which[:, None])

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.tokens)

    @property
    def terms(self):
        """How many tokens the loss counts: the learned ones but for the first of a row, which nothing predicts."""
        return self.learned[..., 1:].sum()

    @property
    def present(self) -> Bool[np.ndarray, "N T"]:
        """Which tokens belong to an example and are not padding."""
        if self.positions is None:  # padding follows the last learned token
            return np.flip(np.maximum.accumulate(np.flip(self.learned, -1), -1), -1)
        following = np.concatenate([self.positions[:, 1:] > 0, np.zeros((len(self.positions), 1), bool)], -1)
        return (self.positions > 0) | following


def read_examples(path: Path | str) -> list[Example]:
    """Read a file of JSON lines; keys other than "prompt" and "completion" are ignored.

    Raises:
      ValueError: the file is not UTF-8, has no examples, or a line is not an object with these two texts.
    """
    fix = 'A line has the form {"prompt": "...", "completion": "..."}.'
    examples = [Example(**line) for _, line in read_json_lines(path, Line, fix=fix)]
    if not examples:
        raise ValueError(f"{path}: no examples.")
    return examples


def encode(examples: Iterable[Example], tokenizer, max_length: int) -> Rows:
    """Make one row for each example: prompt and completion as one text, an end-of-sequence token, padding.

    A token that spans the end of the prompt counts as completion, because at generation the prompt ends before it.

    Args:
      tokenizer: a transformers tokenizer with an end-of-sequence token.
      max_length: tokens per row. Longer examples are cut there, and a warning says how many were cut.
    """
    return _padded(_encoded(examples, tokenizer, max_length), tokenizer, max_length)


def encode_packed(examples: Iterable[Example], tokenizer, max_length: int, seed: int = 0) -> Rows:
    """Make rows that hold several examples each: shuffle the examples, then put each into the first row with room.

    The arguments are those of `encode`; `seed` decides the order.
    """
    import grain

    encoded = _encoded(examples, tokenizer, max_length)
    source = [{"tokens": tokens, "learned": learned} for tokens, learned in encoded]
    order = grain.MapDataset.source(source).shuffle(seed=seed)
    lengths = {"tokens": max_length, "learned": max_length}
    packed = grain.experimental.FirstFitPackIterDataset(
        order.to_iter_dataset(), length_struct=lengths, num_packing_bins=OPEN_ROWS
    )
    rows = list(packed)
    tokens, learned, positions = (
        np.stack([row[name] for row in rows]) for name in ("tokens", "learned", "tokens_positions")
    )
    learned &= positions > 0  # nothing predicts the first token of a text, least of all the text before it in the row
    return Rows(tokens.astype(np.int32), learned, positions.astype(np.int32))


def batches(count: int, size: int, steps: int, seed: int, start: int = 0) -> Iterator[Int[np.ndarray, "batch"]]:
    """Yield the row indices of each step, from step `start` on. Every pass over the rows has a new random order.

    A step's rows depend on its number and the seed only, so a resumed run gets the rows that the first run would have.
    """
    draw = np.random.default_rng(seed)
    queue = np.empty(0, np.int64)
    for step in range(steps):
        while len(queue) < size:
            queue = np.concatenate([queue, draw.permutation(count)])
        if step >= start:
            yield queue[:size]
        queue = queue[size:]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens at the start of both sequences are equal."""
    unequal = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(unequal, min(len(first), len(second)))


def _encoded(examples: Iterable[Example], tokenizer, max_length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the tokens of each example, cut at `max_length`, and which of them are learned."""
    examples = list(examples)
    prompts = sorted({example.prompt for example in examples})
    prompt_tokens = dict(zip(prompts, encode_texts(tokenizer, prompts), strict=True))
    texts = encode_texts(tokenizer, [example.prompt + example.completion for example in examples])
    encoded, cut = [], 0
    for example, text in zip(examples, texts, strict=True):
        start = common_prefix(prompt_tokens[example.prompt], text)
        while text[start:] and text[-1] == tokenizer.eos_token_id:  # a completion that writes the end itself
            text = text[:-1]
        tokens = np.array([*text, tokenizer.eos_token_id], np.int32)
        cut += len(tokens) > max_length
        encoded.append((tokens[:max_length], (np.arange(len(tokens)) >= start)[:max_length]))
    if cut:
        logging.warning("%d of %d examples are longer than %d tokens and were cut", cut, len(examples), max_length)
    return encoded


def _padded(encoded: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer, max_length: int) -> Rows:
    padded = np.full((len(encoded), max_length), tokenizer.pad_token_id or 0, np.int32)
    padded_learned = np.zeros((len(encoded), max_length), bool)
    for row, (tokens, learned) in enumerate(encoded):
        padded[row, : len(tokens)] = tokens
        padded_learned[row, : len(learned)] = learned
    return Rows(padded, padded_learned)
