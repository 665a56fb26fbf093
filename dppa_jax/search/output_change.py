"""How much pruning changes an expert's outputs on text; q and factors for which it is least: no labels needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import Coefficient
from dppa_jax.config.q import QConfig
from dppa_jax.config.search import Factors, search_defaults
from dppa_jax.merging.activations import PADDING, calibration_tokens, probe, tokens_that_fit
from dppa_jax.merging.in_memory import merged_model
from dppa_jax.merging.merger import Merger
from dppa_jax.merging.opened import Opened
from dppa_jax.model import EncoderConfig, model_config
from dppa_jax.model.config import ModelConfig
from dppa_jax.model.decoder import hidden_states, unembed
from dppa_jax.model.encoder import compared_states, encode
from dppa_jax.runtime.progress import steps
from dppa_jax.search.q import QSearched, alone_of, search_q
from dppa_jax.search.rules import SearchResult, search

TOP = 5  # logits of the expert that are looked at, at each position
LOGITS = 2**25  # of one batch at most: 128 MiB in float32


def top_logits(logits: Float[Array, "B T V"]) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    """Return the largest logits of every position and the tokens that have them."""
    values, places = jax.lax.top_k(logits, TOP)
    return values, places


def top_logits_change(
    expert: tuple[Float[Array, "B T K"], Int[Array, "B T K"]],
    logits: Float[Array, "B T V"],
    counted: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Σ over positions that count of the mean, over the expert's largest logits, of (pruned − expert)².

    Source: Deng et al. 2024, the authors' repository for decoders.
    """
    values, places = expert
    changes = squared_change(values, jnp.take_along_axis(logits, places, axis=-1))
    return jnp.where(counted, changes, 0).sum()


def squared_change(expert: Float[Array, "B T K"], pruned: Float[Array, "B T K"]) -> Float[Array, "B T"]:
    """Return the mean of (pruned − expert)² over the largest logits of each position."""
    return jnp.square(pruned - expert).mean(axis=-1)


def hidden_change(
    expert: Float[Array, "B T D"], hidden: Float[Array, "B T D"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Σ over positions that count of the mean |pruned − expert| of the last hidden states.

    Source: Deng et al. 2024, the authors' repository for encoders. On decoders it shrinks too far (measured here).
    """
    return jnp.where(counted, jnp.abs(hidden - expert).mean(axis=-1), 0).sum()


def states(config: ModelConfig, tree: dict, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return the states that are compared: the last hidden ones, of RoBERTa after the head's dense."""
    return compared_states(config, tree, hidden) if isinstance(config, EncoderConfig) else hidden


@dataclass(frozen=True)
class Objective:
    """How outputs are compared.

    Attributes:
      of_expert: from (config, tree, hidden states) to what is kept of the expert.
      change: from (that, the same of another model before it is reduced, which positions count) to a sum.
      outputs: from (config, tree, hidden states) to what `change` gets of the other model.
      measured: a mean change, in words.
    """

    outputs: Callable[..., Any]
    of_expert: Callable[..., Any]
    change: Callable[..., Array]
    measured: str


OBJECTIVES = {
    "top_logits": Objective(unembed, top_logits, top_logits_change, "mean squared change of the 5 largest logits"),
    "hidden": Objective(states, lambda hidden: hidden, hidden_change, "mean change of hidden states"),
}


def objective_of(config: ModelConfig, objective: str) -> str:
    """Return the key of `OBJECTIVES` of a model: what is asked for, or hidden states, as encoders predict no tokens."""
    return "hidden" if isinstance(config, EncoderConfig) else objective


def last_positions(tokens: Int[np.ndarray, "rows tokens"]) -> Bool[np.ndarray, "rows tokens"]:
    """Say which positions are the last of their rows, behind which there is nothing but PADDING.

    >>> last_positions(np.array([[5, 6, 7], [8, PADDING, PADDING]])).tolist()
    [[False, False, True], [True, False, False]]
    """
    known = tokens != PADDING
    return known & (np.cumsum(known[:, ::-1], axis=1)[:, ::-1] == 1)


class OutputChange:
    """The mean change of outputs against an expert, on the same text for every model.

    Args:
      expert: the unpruned expert.
      tokens: rows of equal length; PADDING does not count.
      objective: a key of `OBJECTIVES`.
      counted: which positions count; None for all of them.
    """

    def __init__(
        self,
        expert: Model,
        tokens: Int[np.ndarray, "rows tokens"],
        objective: str,
        counted: Bool[np.ndarray, "rows tokens"] | None = None,
    ):
        self.config = model_config(expert.config)
        tokens = tokens_that_fit(self.config, tokens)
        kept, self._change = _compiled(self.config, objective)
        self._tokens, known = np.maximum(tokens, 0), tokens != PADDING
        self._text = known
        self._counted = known if counted is None else known & counted
        tree = _on_device(expert)
        self._expert = [jax.tree.map(np.asarray, kept(tree, *batch)) for _, *batch in self._batches()]

    def __call__(self, model: Model) -> float:
        """Return the mean change of a model of the same shape."""
        tree, total = _on_device(model), 0.0
        for of_expert, (rows, *batch) in zip(self._expert, self._batches(), strict=True):
            total += float(self._change(tree, *batch, of_expert, self._counted[rows]))
        return total / int(self._counted.sum())

    def _batches(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        rows, width = self._tokens.shape
        many = max(1, min(rows, LOGITS // (width * self.config.vocab_size)))
        for start in range(0, rows, many):
            part = slice(start, start + many)
            yield part, self._tokens[part], self._text[part]


@cache
def _compiled(config: ModelConfig, objective: str) -> tuple[Callable, Callable]:
    """Return what reduces an expert's outputs, and what compares a model's with them; compiled once for all experts."""
    said = OBJECTIVES[objective]

    def outputs(tree: dict, tokens: Array, text: Array) -> Array:
        if isinstance(config, EncoderConfig):
            hidden = encode(config, tree, tokens, text)
        else:
            hidden, _ = hidden_states(config, tree, tokens)
        return said.outputs(config, tree, hidden)

    kept = jax.jit(lambda tree, tokens, text: said.of_expert(outputs(tree, tokens, text)))
    change = jax.jit(
        lambda tree, tokens, text, of_expert, counted: said.change(of_expert, outputs(tree, tokens, text), counted)
    )
    return kept, change


class PrunedChange:
    """The change of an expert's outputs by pruning it, in any way, on --calibration text.

    Attributes:
      name: the expert's.
      measured: the change, in words.
      base: the change if nothing is kept at all, not even outside the linears.
    """

    def __init__(self, opened: Opened, name: str, q: QConfig, merge: MergeConfig):
        alone = alone_of(merge, name)
        self.name, self._opened, self._directory = name, opened, opened.tokenizer.directory
        tokens = probe(calibration_tokens(self._directory, Path(opened.job.calibration)))
        layout = opened.layout(opened.plan(alone))
        dense = Merger(opened.base, opened.chosen(alone), _dense(alone), opened.mesh, layout, quiet=True)
        expert = merged_model(dense, self._directory, opened.rest)
        objective = objective_of(model_config(expert.config), q.objective)
        counted = last_positions(tokens) if q.positions == "last" else None
        self._change = OutputChange(expert, tokens, objective, counted)
        self.measured = OBJECTIVES[objective].measured + " at last positions" * (counted is not None)
        del expert  # two whole models are in memory at a time, one as it is stored and one on the devices
        self.base = self._change(merged_model(dense, self._directory, opened.rest, coefficients={name: 0.0}))

    def by(self, merge: MergeConfig) -> Callable[..., float]:
        """Prepare the expert as a merge prunes it; all candidates have the same mask.

        Returns:
          A function of `q` and `factors` of the expert, in place of those of the merge, to the mean change.
        """
        alone = alone_of(merge, self.name)
        merger = self._opened.merger(alone)

        def change(**numbers: Coefficient | Factors) -> float:
            own = {name: {self.name: number} for name, number in numbers.items()}
            return self._change(merged_model(merger, self._directory, self._opened.rest, **own))

        return change


def searched_by_change(change: PrunedChange, q: QConfig, merge: MergeConfig) -> QSearched:
    """Search the q of an expert for which pruning changes its outputs least, on --calibration text.

    Deng et al. 2024 call it q_e. Beside the answer are the change at q = 1−p, and that of the base: where it is the
    smallest, nothing kept is better than what is kept.
    """
    with steps(f"search the q of {change.name}", None, "candidates") as advance:
        by_q = change.by(merge)

        def score(value: float) -> float:
            found = -max(by_q(q=value), np.finfo(float).tiny)
            advance()
            return found

        density = 1.0 - merge.rate
        result = search_q(score, density, q)
        beside = {
            "of the base": change.base,
            "at q = 1 − rate": -dict(result.visits)[density],
        }  # every rule looks there
    return QSearched(change.name, merge.rate, change.measured, result, beside)


def factors_by_change(change: PrunedChange, merge: MergeConfig) -> SearchResult:
    """Search DPA's factors of an expert for which pruning changes its outputs least, by the rule of `search.rules`.

    The score is 1/change. All partitions are there from the start (Method 2). Ours: the paper's search has labels.
    """
    by_factors = change.by(merge)
    walk = search_defaults(merge.partitions, merge.has_random_score, methods=(2,))
    with steps("search factors by the change of outputs", None, "candidates") as advance:

        def score(factors: Factors) -> float:
            found = 1.0 / max(by_factors(factors=factors), np.finfo(float).tiny)
            advance()
            return found

        return search(score, len(merge.partitions), walk)


def least_change(change: PrunedChange, q: QConfig, merge: MergeConfig, of_eta: Sequence[Mapping]) -> int:
    """Return which of several q of the linears, one for each η, changes the outputs of an expert least."""
    with steps(f"search the eta of {change.name}", len(of_eta), "candidates") as advance:
        by_q, changes = change.by(merge), []
        for eta, own in zip(q.eta, of_eta, strict=True):
            changes.append(by_q(q=own))
            logging.info("%s: eta %g: %s %.4g", change.name, eta, change.measured, changes[-1])
            advance()
    return int(np.argmin(changes))


def _dense(alone: MergeConfig) -> MergeConfig:
    """Return the merge that gives the expert itself, rounded as its pruned versions are."""
    kept = {name: getattr(alone, name) for name in ("seed", "delta_dtype", "output_dtype", "allow_nonfinite")}
    return MergeConfig(alone.experts, "task_arithmetic", **kept)


def _on_device(model: Model) -> dict:
    """Return the weights on the devices; in float32 on a CPU, which computes 16 bits slower.

    One leaf after the other: all at once, each would be there in its own dtype, too.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else None
    return jax.tree.map(lambda leaf: jax.block_until_ready(jnp.asarray(leaf, dtype)), model.tree)
