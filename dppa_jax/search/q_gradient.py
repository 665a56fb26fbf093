"""DAREx's q of every linear by gradient: descends the change of the expert's largest logits on text, without labels.

    q_l = (1−p)^(1−s_l),    s* = argmin mean over positions, k ≤ 5 of (pruned logit − expert's logit)²,    0 ≤ s_l ≤ 1

s_l is where ln q_l stands between ln(1−p), which is DARE, and ln 1. The mask is that of --seed. (1−p)/q_l is the
coefficient of the tensor, whose derivative `entropy.merged` has, so that no pruned model exists at any time. All that
is not pruned is the expert's.

Source: Deng et al. 2024, the authors' repository at commit 0873fc2, which calls it an initial version: the loss, AdamW
with learning rate 1e-2, betas 0.9 and 0.999 and weight decay 0.01, a cosine to 0 over 200 steps, batches of 8 rows of
128 tokens, 5 % of the text held out, whose loss is looked at every 10 steps, and an end after 5 misses.
Differs from the authors' code:
- their parameter is c in q = 1−p + |c|, which turns round at 1−p and knows no upper end; ours is clipped to its range
  after each step, and a step is the same share of that range at any rate;
- positions that are padding do not count (theirs do);
- all linears of the decoder layers have a q, whatever the score is that chose the mask;
- the text may come again, shuffled anew (theirs is read once);
- the q with the least loss on held-out text is the answer (misses are counted in a row).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import lax
from jaxtyping import Array, Float, Int

from dppa_jax.architecture.specs import linears_of
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import QConfig
from dppa_jax.merging.activations import PADDING, calibration_tokens
from dppa_jax.merging.kernels import ZERO
from dppa_jax.merging.opened import Opened
from dppa_jax.model.config import DecoderConfig
from dppa_jax.model.decoder import unembed
from dppa_jax.runtime.progress import steps as progress_of
from dppa_jax.search.adamerging_step import memory
from dppa_jax.search.entropy import LEAST, Batch, Weights, head_of, last_states, logits_by_chunk, merge_with
from dppa_jax.search.mixture import Arithmetic, Mixture, Tensor, decoded, some_rows
from dppa_jax.search.output_change import OBJECTIVES, TOP, squared_change, top_logits
from dppa_jax.search.prompts import Prompt, draw, prompts_of
from dppa_jax.search.q import alone_of

LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.01
ROWS, WINDOW = 8, 128  # of a batch, and tokens of a row
HELD_OUT = 0.05  # of the text, a batch at most
LOOK, MISSES = 10, 5  # steps between two looks at held-out text; so many in a row that are no better end the descent


@dataclass(frozen=True)
class QDescended:
    """The q of every linear of an expert, and how they were found.

    Attributes:
      expert, rate: whose they are, and the share that is removed.
      q: by the linears' names.
      losses: of the batch of each step, before it.
      held_out: the loss on held-out text after so many steps.
      peak_bytes, model_bytes: of a step, and of base and expert alone, per device.
    """

    expert: str
    rate: float
    q: dict[str, float]
    losses: tuple[float, ...]
    held_out: dict[int, float]
    peak_bytes: int
    model_bytes: int

    def in_words(self) -> str:
        """Return the answer as one line of text."""
        looked, steps = self.held_out, len(self.losses)
        measured = OBJECTIVES["top_logits"].measured
        return f"{measured} {min(looked.values()):.4g}, at q = 1 − rate {looked[0]:.4g}; {steps} steps"

    def as_dict(self) -> dict:
        """Return everything but q as JSON has it."""
        return {name: value for name, value in asdict(self).items() if name != "q"}


def q_by_gradient(opened: Opened, name: str, q: QConfig, merge: MergeConfig) -> QDescended:
    """Find the q of every linear of an expert on --calibration text.

    Raises:
      ValueError: the text is too short to hold some of it out, or the change is not finite.
    """
    alone = alone_of(merge, name)
    text, held_out = windows(calibration_tokens(opened.tokenizer.directory, Path(opened.job.calibration)))
    if not text:
        raise ValueError(f"--calibration={opened.job.calibration}: --q={q.way} needs text of two tokens or more.")
    mixture = Mixture(opened.base, opened.chosen(alone), alone, opened.mesh, opened.norms(alone))
    names, rates = linears_of(opened.base.specs).names, mixture.rates[0, -1]
    densities = dict(zip(names, (1.0 - rates).tolist(), strict=True))
    descent = Descent(mixture, densities, alone.q[name], q.steps)
    with progress_of(f"descend the q of {name}", q.steps, "steps") as advance:
        best, losses, looked = descend(descent, text, held_out, merge.seed, advance)
    cost = descent.peak_bytes, mixture.model_bytes
    logging.info("q of %s: a step takes %.3f GB per device, base and expert alone %.3f GB", name, *np.divide(cost, 1e9))
    return QDescended(name, merge.rate, descent.named(best), tuple(losses), looked, *cost)


def windows(tokens: Int[np.ndarray, "rows tokens"]) -> tuple[list[Prompt], Batch]:
    """Cut rows of text into some of 128 tokens or fewer; return those to learn from, and those held out, evenly spread.

    >>> text, held_out = windows(np.arange(7)[None])
    >>> text, held_out.tokens[:, :4].tolist()
    ([Prompt(tokens=(0, 1, 2, 3), first=0)], [[4, 5, 6, 0]])
    """
    pieces = [row[start : start + WINDOW] for row in tokens for start in range(0, len(row), WINDOW)]
    rows = [piece[piece != PADDING].tolist() for piece in pieces]
    if len(rows) == 1:
        half = (len(rows[0]) + 1) // 2
        rows = [rows[0][:half], rows[0][half:]]
    prompts = prompts_of(rows, "all")
    many = min(ROWS, max(1, int(HELD_OUT * len(prompts))))
    every = len(prompts) // many
    held_out = range(every - 1, every * many, every)
    text = [prompt for i, prompt in enumerate(prompts) if i not in held_out]
    return text, draw({"held out": [prompts[i] for i in held_out]}, 0, many, 0)


def descend(
    descent: "Descent", text: Sequence[Prompt], held_out: Batch, seed: int, advance: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, list[float], dict[int, float]]:
    """Take the steps, and return the s with the least loss on held-out text, the losses, and those on that text."""
    shares = best = np.zeros(len(descent.names), np.float32)
    state, losses = optimizer(descent.steps).init(shares), []
    looked, misses = {0: descent.loss(shares, held_out)}, 0
    while len(losses) < descent.steps and misses < MISSES:
        loss, shares, state = descent(shares, state, draw({"text": text}, len(losses), ROWS, seed))
        if not math.isfinite(loss):
            raise ValueError(
                f"--q: the change of the logits at step {len(losses)} is {loss}; a model that holds NaN or Inf?"
            )
        losses.append(loss)
        if len(losses) % LOOK == 0 or len(losses) == descent.steps:
            now = descent.loss(shares, held_out)
            best, misses = (shares, 0) if now < min(looked.values()) else (best, misses + 1)
            looked[len(losses)] = now
        advance()
    return best, losses, looked


class Descent:
    """Steps of AdamW on one number of each linear; compiled once for each shape of batches.

    Args:
      mixture: base and one expert.
      densities: 1−p of every linear.
      divisor: the q that the weights of the mixture have.
      steps: how many the learning rate falls over.
    """

    def __init__(self, mixture: Mixture, densities: Mapping[str, float], divisor: float, steps: int):
        self.mixture, self.steps, self.names, self.peak_bytes = mixture, steps, tuple(densities), 0
        self.densities = np.array([density or 1.0 for density in densities.values()])  # at rate 1 nothing is kept
        places = np.array([mixture.names.index(name) for name in self.names], np.int32)
        dense = np.ones((len(mixture.names), 1), np.float32)
        self._constants = dense, places, self.densities.astype(np.float32), np.float32(divisor)
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, shares: np.ndarray, state: Any, batch: Batch) -> tuple[float, np.ndarray, Any]:
        """Return the loss of a batch, and s and the optimiser's state after the step."""
        arguments = shares, state, self._constants, self.mixture.tree, batch, ZERO
        if batch.tokens.shape not in self._compiled:
            compiled = _step.lower(self.mixture.arithmetic, self.steps, *arguments).compile()
            self._compiled[batch.tokens.shape] = compiled
            self.peak_bytes = max(self.peak_bytes, sum(memory(compiled)))
        loss, shares, state = jax.device_get(self._compiled[batch.tokens.shape](*arguments))
        return float(loss), shares, state

    def gradient(self, shares: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        """Return the loss of a batch, and its derivative by every s."""
        arguments = shares, self._constants, self.mixture.tree, batch, ZERO
        loss, gradient = jax.device_get(_gradient(self.mixture.arithmetic, *arguments))
        return float(loss), gradient

    def loss(self, shares: np.ndarray, batch: Batch) -> float:
        """Return the loss of a batch."""
        arguments = shares, self._constants, self.mixture.tree, batch, ZERO
        return float(_loss(self.mixture.arithmetic, *arguments))

    def named(self, shares: np.ndarray) -> dict[str, float]:
        """Return q by the linears' names."""
        q = self.densities ** (1.0 - shares.astype(np.float64))
        return dict(zip(self.names, q.tolist(), strict=True))


def optimizer(steps: int) -> optax.GradientTransformation:
    """Return the authors' AdamW, whose learning rate falls to 0 over so many steps."""
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=WEIGHT_DECAY)


@partial(jax.jit, static_argnums=(0, 1))
def _step(arithmetic, steps, shares, state, constants, tree, batch, zero):
    loss, gradient = _gradient(arithmetic, shares, constants, tree, batch, zero)
    update, state = optimizer(steps).update(gradient, state, shares)
    return arithmetic.everywhere((loss, jnp.clip(optax.apply_updates(shares, update), 0, 1), state))


@partial(jax.jit, static_argnums=0)
def _gradient(arithmetic, shares, constants, tree, batch, zero):
    of_loss = jax.value_and_grad(lambda shares: _loss(arithmetic, shares, constants, tree, batch, zero))
    return arithmetic.everywhere(of_loss(shares))


@partial(jax.jit, static_argnums=0)
def _loss(arithmetic, shares, constants, tree, batch, zero):
    coefficients = coefficients_of(shares, *constants)
    return arithmetic.everywhere(row_changes(arithmetic, tree, coefficients, batch, zero).sum())


def coefficients_of(
    shares: Float[Array, " linears"], dense: Float[Array, "tensors 1"], places: Array, densities: Array, divisor: Array
) -> Float[Array, "tensors 1"]:
    """Return divisor/q in the places of the linears, and the coefficients of dense tensors, which are 1."""
    return dense.at[places, 0].set(divisor / densities ** (1.0 - shares))


def row_changes(
    arithmetic: Arithmetic,
    tree: dict,
    coefficients: Float[Array | np.ndarray, "tensors 1"],
    batch: Batch,
    zero: Int[Array | np.ndarray, ""],
) -> Float[Array, "B"]:
    """Compute Σ weight · mean squared change of the expert's largest logits, for each row of a batch.

    The arguments are those of `entropy.row_entropies`.
    """
    model, head = arithmetic.model, head_of(tree)
    merge, own = merge_with(arithmetic, coefficients, zero), lambda tensor: _of_expert(arithmetic, tensor)
    values, places = expert_logits(model, head, own, last_states(model, tree, batch, own))
    hidden = last_states(model, tree, batch, merge)
    rows = merge(some_rows(head, lambda table: table[places.reshape(-1)])).reshape(*places.shape, -1)
    logits = jax.vmap(jax.vmap(lambda rows, state: unembed(model, {"lm_head": rows}, state[None])[0]))(rows, hidden)
    return (squared_change(values, logits) * batch.weights).sum(axis=1)


def expert_logits(
    model: DecoderConfig, head: Tensor, weights_of: Weights, hidden: Float[Array, "B M D"]
) -> tuple[Float[Array, "B M K"], Int[Array, "B M K"]]:
    """Return the largest logits of every position and their tokens, a chunk of the vocabulary at a time."""
    chunks, logits_of = logits_by_chunk(model, head, weights_of, hidden)

    def step(largest, chunk):
        logits, tokens = logits_of(chunk)
        values = jnp.concatenate([largest[0], logits], axis=-1)
        known = jnp.concatenate([largest[1], jnp.broadcast_to(tokens, logits.shape)], axis=-1)
        values, at = top_logits(values)
        return (values, jnp.take_along_axis(known, at, axis=-1)), None

    nothing = jnp.full((*hidden.shape[:-1], TOP), LEAST, jnp.float32), jnp.zeros((*hidden.shape[:-1], TOP), jnp.int32)
    return lax.scan(step, nothing, np.arange(chunks, dtype=np.int32))[0]


def _of_expert(arithmetic: Arithmetic, tensor: Tensor) -> Float[Array, "*shape"]:
    """Return the expert's own weights, in the dtype of the activations."""
    weights = decoded(tensor).experts[0]
    return (weights[0] if tensor.vector else weights).astype(arithmetic.activations)
