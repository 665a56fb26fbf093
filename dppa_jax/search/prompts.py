"""The unlabelled prompts that AdaMerging reads: which positions count, and which prompts a step sees."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dppa_jax.search.entropy import Batch

SMALLEST = 16  # tokens of a row


class Prompt(NamedTuple):
    """Token ids, and the first position whose next-token distribution counts; those after it do, too."""

    tokens: tuple[int, ...]
    first: int


def prompts_of(asked: Sequence[Sequence[int]], positions: str, answers: Sequence[Sequence[int]] = ()) -> list[Prompt]:
    """Prompts with the positions that `positions` names.

    "all" are those of the prompt, "last" is its last one, whose distribution is that of the answer's first token, and
    "generated" are those whose distributions the tokens of `answers` were taken from: the prompt's last one, and of
    each new token but the last.

    >>> prompts_of([[1, 5, 7]], "generated", [[8, 9]])
    [Prompt(tokens=(1, 5, 7, 8), first=2)]
    """
    if positions == "generated":
        pairs = zip(asked, answers, strict=True)
        return [Prompt((*prompt, *answer[:-1]), len(prompt) - 1) for prompt, answer in pairs if prompt and answer]
    return [Prompt(tuple(prompt), 0 if positions == "all" else len(prompt) - 1) for prompt in asked if prompt]


def draw(domains: Mapping[str, Sequence[Prompt]], step: int, batch_size: int, seed: int) -> Batch:
    """The prompts of a step, `batch_size` of each domain (or all it has), domain after domain.

    Within a domain none comes again before all have come; then they are shuffled anew. A step's prompts depend on
    nothing but the arguments. The weights of a domain's positions add up to 1.
    """
    rows: list[Prompt] = []
    weights: list[float] = []
    for d, prompts in enumerate(domains.values()):
        many = min(batch_size, len(prompts))
        chosen = [prompts[_nth(len(prompts), step * many + i, (seed, d))] for i in range(many)]
        counted = sum(len(prompt.tokens) - prompt.first for prompt in chosen)
        rows += chosen
        weights += [1.0 / counted] * many
    width = size(max(len(prompt.tokens) for prompt in rows))
    most = max(len(prompt.tokens) - prompt.first for prompt in rows)
    batch = Batch(
        np.zeros((len(rows), width), np.int32),
        np.zeros((len(rows), 1 if most == 1 else min(size(most), width)), np.int32),
        np.zeros((len(rows), 1 if most == 1 else min(size(most), width)), np.float32),
    )
    for row, (prompt, weight) in enumerate(zip(rows, weights, strict=True)):
        length = len(prompt.tokens)
        batch.tokens[row, :length] = prompt.tokens
        batch.chosen[row, : length - prompt.first] = np.arange(prompt.first, length)
        batch.weights[row, : length - prompt.first] = weight
    return batch


def size(least: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, …: few, so that little is compiled, and at most a third of it padding.

    >>> [size(n) for n in (3, 17, 25, 33, 49, 100)]
    [16, 24, 32, 48, 64, 128]
    """
    power = max(SMALLEST, 1 << (least - 1).bit_length())
    between = 3 * power // 4
    return between if SMALLEST < least <= between else power


def _nth(many: int, index: int, seed: Sequence[int]) -> int:
    """Of an endless row of shuffles of range(many)."""
    shuffle, at = divmod(index, many)
    return int(np.random.default_rng([*seed, shuffle]).permutation(many)[at])
