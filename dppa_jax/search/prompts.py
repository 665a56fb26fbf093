"""Choose the unlabelled prompts that a step of AdaMerging sees, and the positions whose entropy counts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dppa_jax.search.entropy import Batch

SMALLEST = 16  # tokens of the shortest row


class Prompt(NamedTuple):
    """A prompt and the positions that count.

    Attributes:
      tokens: token ids.
      first: the first position whose next-token distribution counts; all later ones count, too.
    """

    tokens: tuple[int, ...]
    first: int


def prompts_of(asked: Sequence[Sequence[int]], positions: str, answers: Sequence[Sequence[int]] = ()) -> list[Prompt]:
    """Return prompts with the positions that `positions` names.

    - "all": every position of the prompt.
    - "last": the last position, whose distribution is that of the answer's first token.
    - "generated": the positions whose distributions gave the tokens of `answers`: the prompt's last one, and that of
      each answer token but the last.

    >>> prompts_of([[1, 5, 7]], "generated", [[8, 9]])
    [Prompt(tokens=(1, 5, 7, 8), first=2)]
    """
    if positions == "generated":
        pairs = zip(asked, answers, strict=True)
        return [Prompt((*prompt, *answer[:-1]), len(prompt) - 1) for prompt, answer in pairs if prompt and answer]
    return [Prompt(tuple(prompt), 0 if positions == "all" else len(prompt) - 1) for prompt in asked if prompt]


def draw(domains: Mapping[str, Sequence[Prompt]], step: int, batch_size: int, seed: int) -> Batch:
    """Return the batch of one step: `batch_size` prompts of each domain, or all if it has fewer, domain after domain.

    Within a domain no prompt comes again before all have come; then they are shuffled anew. A step's prompts depend
    only on the arguments. The weights of a domain's positions add up to 1.
    """
    rows: list[Prompt] = []
    weights: list[float] = []
    for d, prompts in enumerate(domains.values()):
        count = min(batch_size, len(prompts))
        chosen = [prompts[_nth_shuffled(len(prompts), step * count + i, (seed, d))] for i in range(count)]
        counted = sum(len(prompt.tokens) - prompt.first for prompt in chosen)
        rows += chosen
        weights += [1.0 / counted] * count
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
    """Return the next of 16, 24, 32, 48, 64, 96, …, which is `least` or more.

    There are few such sizes, so little is compiled, and beyond 16 at most a third of a row is padding.

    >>> [size(n) for n in (3, 17, 25, 33, 49, 100)]
    [16, 24, 32, 48, 64, 128]
    """
    power = max(SMALLEST, 1 << (least - 1).bit_length())
    between = 3 * power // 4
    return between if SMALLEST < least <= between else power


def _nth_shuffled(count: int, index: int, seed: Sequence[int]) -> int:
    """Return element `index` of an endless sequence: range(count) shuffled, then shuffled anew, and so on."""
    shuffle, at = divmod(index, count)
    return int(np.random.default_rng([*seed, shuffle]).permutation(count)[at])
