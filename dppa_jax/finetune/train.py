"""Fine-tuning and pre-training of decoders, of all weights or of an adapter, and of encoders, on a mesh of devices.

The mesh has the axes `data` and `fsdp`. Both divide the rows of a batch. `fsdp` also divides every matrix, its gradient
and its optimiser moments; a layer's weights are gathered when the layer is computed.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dppa_jax.config.finetune import AdamW, Lora, TrainConfig
from dppa_jax.finetune.data import batches
from dppa_jax.finetune.lora import first_factors, trained_tree, whole_tree
from dppa_jax.finetune.losses import AnyRows, loss_sums
from dppa_jax.finetune.optimizer import pull_of, transformation
from dppa_jax.model import abstract_tree
from dppa_jax.model.config import ModelConfig
from dppa_jax.runtime.mesh import WIDE_VECTORS, put

STEPS_PER_REPORT = 10  # reading a loss waits for the device's queue to empty, so it is not done at every step
TRAIN_AXES = ("data", "fsdp")


def learning_rates(options: TrainConfig) -> Float[np.ndarray, "steps"]:
    """Return the learning rate of every step: a linear rise, then half a cosine down to `final` times the peak."""
    warmup = max(1, round(options.warmup * options.steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, warmup, max(options.steps, warmup + 1), options.final * options.learning_rate
    )
    return np.asarray(jax.vmap(schedule)(jnp.arange(options.steps)), np.float32)


class State(NamedTuple):
    """Everything that a step changes: the weights and the optimiser's moments."""

    tree: dict
    moments: Any

    @property
    def steps(self) -> int:
        """The number of steps taken so far."""
        return int(optax.tree.get(self.moments, "count"))


class Trainer:
    """Take optimiser steps and compute losses.

    Trainers that differ only in schedule and seed share one compilation.

    Args:
      config: the model's shape.
      options: how to train.
      mesh: a mesh with the axes `TRAIN_AXES`, which may span several processes; one device by default.
      base: the weights toward which AdamR decays, in their own dtype, or to which an adapter is added, in that of the
        forward pass, divided over the mesh; others need none.

    Raises:
      ValueError: the rows that go through the model together cannot be divided over the devices, or AdamR or an
        adapter has no base.
    """

    def __init__(self, config: ModelConfig, options: TrainConfig, mesh: Mesh | None = None, base: dict | None = None):
        self.config, self.options = config, options
        self.mesh = mesh or Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), TRAIN_AXES)
        if options.rows_together % self.mesh.size:
            raise ValueError(
                f"--train_batch_size={options.batch_size}, --accumulate={options.accumulate}: the rows that go through "
                f"the model together, {options.rows_together}, must be a multiple of the {self.mesh.size} devices."
            )
        self.rates = learning_rates(options)
        decides = config, options.optimizer, options.accumulate, options.dtype, options.remat, self.mesh, options.lora
        self._update, self._loss = compiled(*decides)
        self._updates = compiled_steps(*decides)
        self._anchor = None
        if options.optimizer.decays_toward_base:
            if base is None:
                raise ValueError("--decay_toward=base: the trainer is given no base; give the weights to decay toward.")
            self._anchor = jax.tree.map(lambda w, sharding: _on_mesh(w, sharding, w.dtype), base, self.shardings.tree)
        if options.lora.rank:
            if base is None:
                raise ValueError(
                    "--lora_rank: the trainer is given no base; give the weights to which an adapter adds."
                )
            own = tree_shardings(abstract_tree(config), self.mesh)
            self._anchor = jax.tree.map(partial(_on_mesh, dtype=jnp.dtype(options.dtype)), base, own)

    @property
    def shardings(self) -> State:
        """The sharding of every array of a state."""
        return state_shardings(self.config, self.options.optimizer, self.mesh, self.options.lora)

    def start(self, tree: dict) -> State:
        """Return the first state: float32 copies of the weights, or an adapter's factors, and moments of 0.

        Each process reads only the slices that its own devices hold.
        """
        if self.options.lora.rank:
            tree = first_factors(self.config, self.options.lora, self.options.seed)
        tree = jax.tree.map(partial(_on_mesh, dtype=np.float32), tree, self.shardings.tree)
        init = jax.jit(transformation(self.options.optimizer).init, out_shardings=self.shardings.moments)
        return State(tree, init(tree))

    def abstract(self) -> State:
        """Return a state's shapes, dtypes and shardings, without any arrays."""
        tree = trained_tree(self.config, self.options.lora)
        state = State(tree, jax.eval_shape(transformation(self.options.optimizer).init, tree))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.shardings)

    def step(self, state: State, number: int, rows: AnyRows) -> tuple[State, Float[Array, ""]]:
        """Return the state after one step, and the loss before it. The memory of the given state is reused.

        Args:
          number: the step, counted from 0; it decides the learning rate.
          rows: the batch, `batch_size` rows.
        """
        return self._update(state, self.rates[number], self._placed(rows, self.options.accumulate), self._anchor)

    def steps(self, state: State, first: int, batches: Sequence[AnyRows]) -> tuple[State, Float[np.ndarray, "steps"]]:
        """Take a step for each batch, `STEPS_PER_REPORT` at most, in one program; return the losses before them.

        The results are those of as many calls of `step`, up to rounding. A small model gains by it: between two steps
        nothing waits for Python.
        """
        count, missing = len(batches), STEPS_PER_REPORT - len(batches)
        rates = np.pad(self.rates[first : first + count], (0, missing))
        placed = [self._split(rows, self.options.accumulate) for rows in [*batches, *missing * batches[:1]]]
        sharding = NamedSharding(self.mesh, PartitionSpec(None, None, TRAIN_AXES))
        stacked = jax.tree.map(lambda *arrays: put(np.stack(arrays), sharding), *placed)
        state, losses = self._updates(state, rates, stacked, count, self._anchor)
        return state, np.asarray(losses)[:count]

    def pull(self, state: State) -> dict[str, float]:
        """Return AdamR's `vbar` and largest pull so far, for a log; refuse a pull of 1 or more, see `pull_of`."""
        return pull_of(state.moments)

    def loss(self, state: State, rows: AnyRows) -> float:
        """Return the mean loss of all rows; see `losses.py`."""
        total = count = 0.0
        for start in range(0, rows.count, self.options.rows_together):
            at = np.arange(start, start + self.options.rows_together)
            part = rows.take(at % rows.count)  # the last batch is filled with rows that do not count
            surprise, terms = self._loss(state.tree, self._placed(part.only(at < rows.count), 1), self._anchor)
            total, count = total + float(surprise), count + float(terms)
        return total / max(count, 1.0)

    def _placed(self, rows: AnyRows, parts: int) -> AnyRows:
        """Put rows on the mesh, shaped (parts, rows of a part, tokens)."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, TRAIN_AXES))
        return jax.tree.map(lambda array: put(array, sharding), self._split(rows, parts))

    def _split(self, rows: AnyRows, parts: int) -> AnyRows:
        """Return views of the rows, shaped (parts, rows of a part, tokens)."""
        return jax.tree.map(lambda array: array.reshape(parts, -1, array.shape[-1]), rows)


def _on_mesh(weight, sharding: NamedSharding, dtype) -> Array:
    """Put a copy of a weight on the mesh; each process reads only the slices that its own devices hold."""
    copied = lambda index: np.array(weight[index], dtype)  # noqa: E731
    return jax.make_array_from_callback(weight.shape, sharding, copied)


def train(
    config: ModelConfig,
    tree: dict,
    rows: AnyRows,
    options: TrainConfig,
    report: Callable[[int, float], None] = lambda steps, loss: None,
) -> tuple[dict, Float[np.ndarray, "steps"]]:
    """Minimise the mean loss of the rows, on one device.

    On one machine, the same arguments give the same bits.

    Args:
      config: the model's shape.
      tree: the weights to start from, and AdamR's base; they are not changed.
      rows: the examples, see `data.encode`; each row is used once before any is used again.
      options: how to train.
      report: called every `STEPS_PER_REPORT` steps with the number of steps done and the last loss.

    Returns:
      The trained weights, and the loss at each step.
    """
    trainer = Trainer(config, options, base=tree)
    state = trainer.start(tree)
    losses: list[float] = []
    order = batches(rows.count, options.batch_size, options.steps, options.seed)
    while taken := [rows.take(batch) for batch in islice(order, STEPS_PER_REPORT)]:
        state, found = trainer.steps(state, len(losses), taken)
        losses += found.tolist()
        trainer.pull(state)
        report(len(losses), losses[-1])
    return state.tree, np.array(losses, np.float32)


@cache  # the learning rate is an argument of the step, so another schedule needs no new compilation
def compiled(config: ModelConfig, optimizer: AdamW, accumulate: int, dtype: str, remat: bool, mesh: Mesh, lora: Lora):
    """Return two jitted functions: the optimiser step, and `loss_sums` of one batch."""
    whole = NamedSharding(mesh, PartitionSpec())
    sums = partial(loss_sums, config, dtype=dtype, remat=remat)

    def batch_loss(tree, rows: AnyRows, base):
        return sums(whole_tree(base, tree, lora), jax.tree.map(lambda array: array[0], rows))

    return (
        _jitted_update(
            _update_of(config, optimizer, accumulate, dtype, remat, mesh, lora), config, optimizer, mesh, lora
        ),
        jax.jit(batch_loss, out_shardings=whole, compiler_options=_compiler_options(mesh)),
    )


@cache
def compiled_steps(
    config: ModelConfig, optimizer: AdamW, accumulate: int, dtype: str, remat: bool, mesh: Mesh, lora: Lora
):
    """Return a jitted function that takes the first `count` of `STEPS_PER_REPORT` steps.

    Its rows and learning rates have a leading axis of that size.
    """
    update = _update_of(config, optimizer, accumulate, dtype, remat, mesh, lora)

    def updates(state: State, learning_rates, rows: AnyRows, count, anchor):
        def take(number, carry):
            state, losses = carry
            taken = jax.tree.map(lambda array: array[number], rows)
            state, loss = update(state, learning_rates[number], taken, anchor)
            return state, losses.at[number].set(loss)

        return jax.lax.fori_loop(0, count, take, (state, jnp.zeros(STEPS_PER_REPORT)))

    return _jitted_update(updates, config, optimizer, mesh, lora)


def _jitted_update(update: Callable, config: ModelConfig, optimizer: AdamW, mesh: Mesh, lora: Lora):
    """Jit a function of a state, whose memory it reuses, and more; it returns a state and what all devices hold."""
    shardings, whole = state_shardings(config, optimizer, mesh, lora), NamedSharding(mesh, PartitionSpec())
    options = _compiler_options(mesh)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, whole), compiler_options=options)


def _compiler_options(mesh: Mesh) -> dict | None:
    return WIDE_VECTORS if mesh.devices.flat[0].platform == "cpu" else None


def _update_of(
    config: ModelConfig, optimizer: AdamW, accumulate: int, dtype: str, remat: bool, mesh: Mesh, lora: Lora
) -> Callable:
    """Return the optimiser step: a function of state, learning rate, rows (parts, rows of a part, tokens), anchor."""
    shardings = state_shardings(config, optimizer, mesh, lora)
    sums = partial(loss_sums, config, dtype=dtype, remat=remat)

    def update(state: State, learning_rate, rows: AnyRows, anchor):
        terms = jnp.maximum(rows.terms, 1)

        def part_loss(tree, part: AnyRows):  # this part's share of the mean over the whole batch
            return sums(whole_tree(anchor, tree, lora), part)[0] / terms

        def loss_and_gradient(part: AnyRows):
            loss, gradient = jax.value_and_grad(part_loss)(state.tree, part)
            return loss, jax.lax.with_sharding_constraint(gradient, shardings.tree)

        def add(carry, part: AnyRows):
            return jax.tree.map(jnp.add, carry, loss_and_gradient(part)), None

        total = loss_and_gradient(jax.tree.map(lambda array: array[0], rows))
        if accumulate > 1:
            total, _ = jax.lax.scan(add, total, jax.tree.map(lambda array: array[1:], rows))
        loss, gradient = total
        more = {"anchor": anchor, "learning_rate": learning_rate}
        direction, moments = transformation(optimizer).update(gradient, state.moments, state.tree, **more)
        return State(jax.tree.map(lambda w, d: w - learning_rate * d, state.tree, direction), moments), loss

    return update


@cache
def state_shardings(config: ModelConfig, optimizer: AdamW, mesh: Mesh, lora: Lora) -> State:
    """Return the sharding of every array of a state; moments are divided like their weights."""
    tree = trained_tree(config, lora)
    weights = tree_shardings(tree, mesh)
    transform, whole = transformation(optimizer), NamedSharding(mesh, PartitionSpec())
    moments = jax.eval_shape(transform.init, tree)
    moment_shardings = optax.tree.map_params(
        transform, lambda _, s: s, moments, weights, transform_non_params=lambda _: whole
    )
    return State(weights, moment_shardings)


def tree_shardings(tree: dict, mesh: Mesh) -> dict:
    """Return the sharding of every weight of a tree; see `fsdp_spec`."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, path[0].key == "layers", mesh.shape["fsdp"])), tree
    )


def fsdp_spec(shape: tuple[int, ...], stacked: bool, size: int) -> PartitionSpec:
    """Divide a matrix along the longest of its axes that `size` divides; keep a vector whole on every device.

    Args:
      shape: the array's shape.
      stacked: whether the first axis counts decoder layers; it is never divided.
      size: devices on the mesh axis `fsdp`.

    >>> shapes = {(30, 1536, 576): True, (49152, 576): False, (30, 576): True}
    >>> [tuple(fsdp_spec(shape, stacked, 4)) for shape, stacked in shapes.items()]
    [(None, 'fsdp', None), ('fsdp', None), ()]
    """
    axes = range(stacked, len(shape))
    divisible = [axis for axis in axes if shape[axis] % size == 0]
    if len(axes) < 2 or not divisible:
        return PartitionSpec()
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))
