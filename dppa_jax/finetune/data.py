"""What is learned from: prompts and completions, as rows of tokens, in a reproducible order.

An example is one JSON object a line: {"prompt": "...", "completion": "..."}. Only the completion is learned;
pre-training is the case of empty prompts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Int

PACKED_ROWS = 64  # that are filled side by side: with as many, less than a hundredth of a row stays empty


class Example(NamedTuple):
    prompt: str
    completion: str


class Rows(NamedTuple):
    """Examples as tokens.

    `learned` marks the tokens of completions and those that end them. `positions` restart at 0 where an example begins,
    which is all that the model needs to keep the examples of a row apart; where there are none, a row is an example.
    """

    tokens: Int[np.ndarray, "*N T"]
    learned: Bool[np.ndarray, "*N T"]
    positions: Int[np.ndarray, "*N T"] | None = None

    def take(self, at: slice | Int[np.ndarray, "n"]) -> "Rows":
        """The rows at these places."""
        return Rows(*(None if array is None else array[at] for array in (self.tokens, self.learned, self.positions)))

    @property
    def count(self) -> int:
        return len(self.tokens)


def read_examples(path: Path | str) -> list[Example]:
    """The examples of a file of JSON lines; other keys than "prompt" and "completion" are ignored."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}.") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            example = Example(fields["prompt"], fields["completion"])
            if not all(isinstance(text, str) for text in example):
                raise TypeError
            examples.append(example)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: not of the form {{"prompt": "...", "completion": "..."}}: {line[:80]!r}'
            ) from error
    if not examples:
        raise ValueError(f"{path}: no examples.")
    return examples


def encode(examples: Iterable[Example], tokenizer, max_length: int) -> Rows:
    """A row for each example: prompt and completion as one text, and the end-of-sequence token, padded at its end.

    Where a token spans the end of the prompt it counts as completion: at generation the prompt ends before it.

    Args:
      tokenizer: a transformers tokenizer with an end-of-sequence token.
      max_length: tokens per row; longer examples are cut there, and a warning says how many.
    """
    return _padded(_encoded(examples, tokenizer, max_length), tokenizer, max_length)


def encode_packed(examples: Iterable[Example], tokenizer, max_length: int, seed: int = 0) -> Rows:
    """As `encode`, but with several examples to a row, first fit, in a random order."""
    import grain

    encoded = _encoded(examples, tokenizer, max_length)
    source = [{"tokens": tokens, "learned": learned} for tokens, learned in encoded]
    order = grain.MapDataset.source(source).shuffle(seed=seed)
    lengths = {"tokens": max_length, "learned": max_length}
    packed = grain.experimental.FirstFitPackIterDataset(
        order.to_iter_dataset(), length_struct=lengths, num_packing_bins=PACKED_ROWS
    )
    rows = list(packed)
    tokens, learned, positions = (
        np.stack([row[name] for row in rows]) for name in ("tokens", "learned", "tokens_positions")
    )
    learned &= positions > 0  # what begins a text follows from nothing, certainly not from the text before it
    return Rows(tokens.astype(np.int32), learned, positions.astype(np.int32))


def batches(count: int, size: int, steps: int, seed: int, start: int = 0) -> Iterator[Int[np.ndarray, "batch"]]:
    """The indices of each step's rows, from step `start` on: a new random order for every pass, one after another.

    What a step gets is a function of its number, so that a resumed run goes on with what the first would have got.
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
    """The number of equal tokens at the start of both."""
    unequal = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(unequal, min(len(first), len(second)))


def _encoded(examples: Iterable[Example], tokenizer, max_length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each example, and which of them are learned."""
    examples = list(examples)
    prompts = sorted({example.prompt for example in examples})
    prompt_tokens = dict(zip(prompts, tokenizer(prompts)["input_ids"], strict=True))
    texts = tokenizer([example.prompt + example.completion for example in examples])["input_ids"]
    found, cut = [], 0
    for example, text in zip(examples, texts, strict=True):
        start = common_prefix(prompt_tokens[example.prompt], text)
        tokens = np.array([*text, tokenizer.eos_token_id], np.int32)
        cut += len(tokens) > max_length
        found.append((tokens[:max_length], (np.arange(len(tokens)) >= start)[:max_length]))
    if cut:
        logging.warning("%d of %d examples are longer than %d tokens and were cut", cut, len(examples), max_length)
    return found


def _padded(encoded: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer, max_length: int) -> Rows:
    tokens = np.full((len(encoded), max_length), tokenizer.pad_token_id or 0, np.int32)
    learned = np.zeros((len(encoded), max_length), bool)
    for row, (of_row, which) in enumerate(encoded):
        tokens[row, : len(of_row)] = of_row
        learned[row, : len(which)] = which
    return Rows(tokens, learned)
