"""Greedy generation: in batches, with a cache of keys and values, compiled once for each bucket of lengths."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Int

from dppa_jax.checkpoint.inside import inside
from dppa_jax.model.config import DecoderConfig, end_ids, ends_of, said_by
from dppa_jax.model.decoder import Cache, Decoder, hidden_states, unembed
from dppa_jax.model.tree import Tree
from dppa_jax.runtime.reading import read_json

GENERATION = "generation_config.json"
SMALLEST_BUCKET = 16  # tokens; for shorter lengths a compilation costs more than padding


def generate(
    model: Decoder | tuple[DecoderConfig, Tree],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    eos_token_id: int | Sequence[int] | None = None,
    *,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continue each prompt with its most likely token, again and again.

    An answer does not depend on the other prompts, on their order, or on `batch_size`, unless the logits of two tokens
    are equal up to rounding.

    Args:
      model: a `Decoder`, or its config and stacked tree; new weights of the same shapes need no new compilation.
      prompts: token ids, at least one for each prompt.
      max_new_tokens: where an answer is cut off, for all prompts or for each.
      eos_token_id: one or several ids that end an answer; None takes the config's, () never ends one early.
      batch_size: how many prompts are decoded together; this bounds the memory of the cache.

    Returns:
      The new tokens of each prompt, in the order of the prompts: without the prompt, and with the token that ended the
      answer, if one did.

    Raises:
      ValueError: a prompt is empty, or has tokens that the model does not know.
    """
    config, tree = (model.config, model.tree) if isinstance(model, Decoder) else model
    check_prompts(prompts, config.vocab_size)
    limits = [int(limit) for limit in np.broadcast_to(max_new_tokens, len(prompts))]
    needed = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
    if needed > config.max_position_embeddings:
        logging.warning(
            "answers may reach position %d, but the model was made for %d positions (max_position_embeddings)",
            *(needed, config.max_position_embeddings),
        )
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = np.atleast_1d(np.asarray(eos, np.int32))
    answers: list[list[int]] = [[] for _ in prompts]
    rows = min(batch_size, bucket(len(prompts), smallest=1))
    # A batch takes answers that may grow equally long, as they share a cache, and prompts of like length, to pad least.
    order = sorted(range(len(prompts)), key=lambda index: (bucket(limits[index]), len(prompts[index])))
    for start in range(0, len(prompts), rows):
        indices = order[start : start + rows]
        batch = [prompts[index] for index in indices], [limits[index] for index in indices]
        for index, answer in zip(indices, generate_batch(config, tree, *batch, eos, rows), strict=True):
            answers[index] = answer
    return answers


def end_tokens(config: Mapping[str, Any], directory: Path | None) -> tuple[int, ...]:
    """Return the ids that end an answer: those of generation_config.json or, where it names none, of config.json.

    Args:
      config: the content of config.json.
      directory: of generation_config.json; None for a model that has none.

    Raises:
      ValueError: generation_config.json is no JSON object, or names something else than ids.
    """
    ids = ends_of(said_by(config))
    if directory and (directory / GENERATION).exists():
        file = inside(directory, GENERATION)
        ids = end_ids(read_json(file).get("eos_token_id"), f"{file}: eos_token_id") or ids
    return tuple(sorted(set(ids)))


def generate_batch(
    config: DecoderConfig,
    tree: Tree,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    eos: Int[np.ndarray, "E"],
    rows: int,
) -> list[list[int]]:
    """Return the answers to at most `rows` prompts, each with at most its limit of new tokens, cut off after an end."""
    tokens, lengths = pad(prompts, rows)
    limit = np.zeros(rows, np.int32)
    limit[: len(prompts)] = limits
    new = np.asarray(decode(config, tree, tokens, lengths, limit, eos, answer_slots=bucket(int(limit.max()))))
    answers = []
    for row, most in zip(new, limits, strict=False):
        row = row[: max(0, most)]
        ends = np.flatnonzero(np.isin(row, eos))
        answers.append(row[: ends[0] + 1 if len(ends) else None].tolist())
    return answers


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse prompts that are empty or have tokens outside the vocabulary.

    Raises:
      ValueError: names the prompt.
    """
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty; start it with the beginning-of-sequence token.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {index} has tokens {min(prompt)} to {max(prompt)}, the model knows 0 to {vocab_size - 1}: "
                "encode it with this model's tokenizer."
            )


def pad(prompts: Sequence[Sequence[int]], rows: int) -> tuple[Int[np.ndarray, "rows T"], Int[np.ndarray, "rows"]]:
    """Pad prompts on the left to the length of a bucket; return the tokens and the prompts' lengths.

    With padding on the left, the next token of every row goes to the same slot of the cache. Rows without a prompt have
    length 0.
    """
    tokens = np.zeros((rows, bucket(max(map(len, prompts)))), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """Return the next power of two, at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


@partial(jax.jit, static_argnames=("config", "answer_slots"))
def decode(
    config: DecoderConfig,
    tree: Tree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    limit: Int[Array, "B"],
    eos: Int[Array, "E"],
    *,
    answer_slots: int,
) -> Int[Array, "B answer_slots"]:
    """Generate the first `limit` new tokens of each row; `answer_slots` is at least the largest limit.

    What follows these tokens, or a row's end-of-sequence token, is meaningless. The weights are an argument and not a
    constant of the compiled program, so another model of the same shapes reuses the program.
    """
    batch, time = tokens.shape
    switches = [rope.original_max_position_embeddings for rope in config.ropes if rope and rope.switches]

    def unfinished(state):
        step, _, done, *_ = state
        return (step < answer_slots) & ~jnp.all(done)

    def advance(state):
        step, token, done, new, cache = state
        new = new.at[:, step].set(token)
        done |= jnp.isin(token, eos) | (step + 1 >= limit)
        following = lambda: predict(config, tree, token[:, None], (lengths + step)[:, None], cache)  # noqa: E731
        if switches:
            anew = partial(predict_anew, config, tree, tokens, lengths, new, step)
            token, cache = jax.lax.cond(jnp.any(lengths + step == switches[0]), anew, following)
        else:
            token, cache = following()
        return step + 1, token, done, new, cache

    positions = jnp.arange(time) - (time - lengths)[:, None]
    cache = Cache.empty(config, batch, time + answer_slots, tree["embed_tokens"].dtype)
    token, cache = predict(config, tree, tokens, positions, cache)
    state = (0, token, (lengths == 0) | (limit <= 0), jnp.zeros((batch, answer_slots), jnp.int32), cache)
    return jax.lax.while_loop(unfinished, advance, state)[3]


def predict(
    config: DecoderConfig,
    tree: Tree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    last: Int[Array, ""] | int = -1,
) -> tuple[Int[Array, "B"], Cache]:
    """Return the most likely token after the one in column `last`, and the cache with these tokens added."""
    hidden, cache = hidden_states(config, tree, tokens, positions, cache)
    return jnp.argmax(unembed(config, tree, hidden[:, last]), axis=-1).astype(jnp.int32), cache


def predict_anew(
    config: DecoderConfig,
    tree: Tree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    new: Int[Array, "B N"],
    step: Int[Array, ""],
) -> tuple[Int[Array, "B"], Cache]:
    """Predict from all tokens up to new token `step`, because the cache has the frequencies of a shorter text."""
    batch, time = tokens.shape
    slots = time + new.shape[1]
    positions = jnp.minimum(jnp.arange(slots) - time, step) + lengths[:, None]  # what follows makes no text longer
    empty = Cache.empty(config, batch, slots, tree["embed_tokens"].dtype)
    token, cache = predict(config, tree, jnp.concatenate([tokens, new], axis=1), positions, empty, time + step)
    return token, cache._replace(length=time + step + 1)
