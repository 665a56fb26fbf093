"""What every linear's inputs are on calibration text, for calibrated scores and q; one layer at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from dppa_jax.architecture.specs import Role, TensorSpec, by_path, tree_of
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.tokenizer import encode, load_tokenizer
from dppa_jax.config.run import JobConfig
from dppa_jax.model.config import DecoderConfig, EncoderConfig, ModelConfig, model_config
from dppa_jax.model.context import LayerKind, context_of, layer_kinds
from dppa_jax.model.decoder import decoder_layer, embed, mlp_inner, project
from dppa_jax.model.encoder import embedded, encoder_layer
from dppa_jax.runtime.reading import MAX_LINES_BYTES, read_text

TOKENS = 512  # of a row; the text is one stream, cut into rows
ROWS = 128  # at most: 65,536 tokens
SHORT = 64  # tokens of a line at most, where each line is a row
PADDING = -1  # in place of a token, behind the end of a short row
WINDOW, WINDOWS = 256, 32  # of q: tokens of a row, and rows at most; DAREx's authors take 50 × 128 or 100 × 256

Measure = Callable[[Array, Array | None, Array | None], Any]  # from inputs, which of them count, and the delta


class InputMoments(NamedTuple):
    """What is known of a linear's inputs over the tokens that it sees; of several linears on a first axis.

    Attributes:
      norms: ‖x_j‖₂ of every input.
      means: the signed mean of every input.
      change: Σ_t |δ·x_t|²; 0 where no delta is given.
    """

    norms: Float[Array | np.ndarray, "*E columns"]
    means: Float[Array | np.ndarray, "*E columns"]
    change: Float[Array | np.ndarray, "*E"]


class LayerSeen(NamedTuple):
    """One layer: its stored linears, and what was measured of the inputs of each, by the tensors' names."""

    linears: Mapping[str, np.ndarray]
    measured: Mapping[str, Any]


def calibration_tokens(tokenizer: Path, text: Path) -> Int[np.ndarray, "rows tokens"]:
    """Read a text as rows of tokens.

    Where all lines are short, such as questions, each is a row, and PADDING follows those that are shorter than the
    longest: a model of such lines may not know what to do with several in a row. Any other text is one stream, cut into
    rows of equally many tokens, the remainder dropped.
    """
    known, content = load_tokenizer(tokenizer), read_text(text, MAX_LINES_BYTES)
    lines = encode(known, [line for line in content.splitlines() if line.strip()])
    if len(lines) > 1 and max(map(len, lines)) <= SHORT:
        return padded(lines)
    (ids,) = encode(known, [content])
    tokens = np.array(ids, np.int32)
    width = min(TOKENS, len(tokens))
    if not width:
        raise ValueError(f"--calibration={text}: no tokens in it.")
    rows = min(ROWS, len(tokens) // width)
    return tokens[: rows * width].reshape(rows, width)


def padded(lines: Sequence[Sequence[int]]) -> Int[np.ndarray, "rows tokens"]:
    """Return the first lines as rows of the longest one's width, at most as many tokens as of other text.

    >>> padded([[5, 6, 7], [8]]).tolist()
    [[5, 6, 7], [8, -1, -1]]
    """
    width = max(map(len, lines))
    return np.array([[*line, *[PADDING] * (width - len(line))] for line in lines[: TOKENS * ROWS // width]], np.int32)


def probe(tokens: Int[np.ndarray, "rows tokens"]) -> Int[np.ndarray, "windows window"]:
    """Cut rows into windows, of which the first ones are taken: q needs less text than norms of single inputs."""
    width = min(WINDOW, tokens.shape[1])
    per_row = tokens.shape[1] // width
    return tokens[:, : per_row * width].reshape(-1, width)[: WINDOW * WINDOWS // width]


def activation_norms(
    model: Checkpoint, tokens: Int[np.ndarray, "rows tokens"]
) -> dict[str, Float[np.ndarray, " columns"]]:
    """Compute ‖x_j‖₂ over all tokens for every input j of every linear, by the tensors' names.

    Source: Sun et al. 2023.
    """
    return {name: own for seen in layers_seen(model, tokens, norms) for name, own in seen.measured.items()}


def layers_seen(
    model: Checkpoint,
    tokens: Int[np.ndarray, "rows tokens"],
    measure: Measure,
    delta: Callable[[str, np.ndarray], Array] | None = None,
) -> Iterator[LayerSeen]:
    """Compute the model on tokens, layer after layer; each of its tensors is read once.

    Args:
      model: the model whose linears are looked at.
      tokens: rows of equal length; PADDING is not looked at.
      measure: from the inputs of a linear to what is to be known of them.
      delta: from a linear's name and weights to the delta that `measure` gets; None for no delta.
    """
    config = model_config(model.config)
    tokens = tokens_that_fit(config, tokens)
    counted = None if (tokens != PADDING).all() else jnp.asarray(tokens != PADDING, jnp.float32)
    hidden = _first_states(config, model, np.maximum(tokens, 0))
    step, kinds = jax.jit(partial(_layer, config, measure)), kinds_of(config)
    for layer in range(config.num_hidden_layers):
        kind = jax.tree.map(lambda numbers, layer=layer: jnp.asarray(numbers[layer]), kinds)
        run = partial(step, kind=kind, hidden=hidden, counted=counted)
        hidden, *seen = _layer_seen(model, layer, run, delta)
        yield seen.pop()  # it is the taker's alone, and can be let go of


def _layer_seen(
    model: Checkpoint, layer: int, run: Callable, delta: Callable[[str, np.ndarray], Array] | None
) -> tuple[Array, LayerSeen]:
    """Compute a layer: its output, and what was measured. Its weights are let go before the next is asked for."""
    specs = [spec for spec in model.specs.values() if spec.layer == layer]
    linears = [spec for spec in specs if spec.role is Role.LINEAR]
    stored = {spec.name: model.read(spec.name) for spec in specs}
    weights = tree_of(specs, partial(_array, stored))["layers"]
    deltas = {}
    if delta:
        own = {spec.name: delta(spec.name, stored[spec.name]) for spec in linears}
        deltas = {".".join(path[1:]): _array(own, group) for path, group in by_path(linears).items()}
    hidden, of_path = run(weights, deltas=deltas)
    measured = {}
    for path, group in by_path(linears).items():
        of_group = jax.tree.map(np.asarray, of_path[".".join(path[1:])])
        for i, spec in enumerate(group):  # of a mixture there is one of each expert, on the first axis
            one = len(group) == 1
            measured[spec.name] = of_group if one else jax.tree.map(lambda array, i=i: array[i], of_group)
    return hidden, LayerSeen({spec.name: stored[spec.name] for spec in linears}, measured)


def tokens_that_fit(config: ModelConfig, tokens: Int[np.ndarray, "rows tokens"]) -> Int[np.ndarray, "rows tokens"]:
    """Cut rows of tokens to what an encoder has positions for; a decoder's are left as they are."""
    return tokens[:, : config.positions] if isinstance(config, EncoderConfig) else tokens


def kinds_of(config: ModelConfig) -> LayerKind:
    """Return the kind of every layer; an encoder's are all alike."""
    return LayerKind() if isinstance(config, EncoderConfig) else layer_kinds(config)


def _first_states(config: ModelConfig, model: Checkpoint, tokens: Int[np.ndarray, "rows tokens"]) -> Array:
    """Compute what the first layer gets, in float32."""
    specs = [spec for spec in model.specs.values() if spec.path[0] in ("embed_tokens", "embeddings")]
    tree = tree_of(specs, lambda group: model.read(group[0].name))
    if not isinstance(config, EncoderConfig):
        return embed(config, jnp.asarray(tree["embed_tokens"][tokens], jnp.float32))
    return embedded(config, jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), tree["embeddings"]), tokens)


def _array(stored: Mapping[str, Any], group: Sequence[TensorSpec]) -> Float[Array, "..."]:
    """Return the tensor of a layer at one place of the tree, or stack those of all experts of a mixture."""
    arrays = [jnp.asarray(stored[spec.name], jnp.float32) for spec in group]
    return arrays[0] if len(arrays) == 1 else jnp.stack(arrays)


def norms(
    inputs: Float[Array, "B T columns"], counted: Float[Array, "B T"] | None, delta: Array | None
) -> Float[Array, " columns"]:
    """Compute ‖x_j‖₂ of every input, over all tokens or those that count."""
    squares = inputs * inputs
    return jnp.sqrt(squares.sum(axis=(0, 1)) if counted is None else jnp.einsum("bt,btj->j", counted, squares))


def moments(
    inputs: Float[Array, "B T columns"],
    counted: Float[Array, "B T"] | None,
    delta: Float[Array, "rows columns"] | None,
) -> InputMoments:
    """Compute norms and signed means of the inputs and, with a delta, how much it changes the outputs."""
    counts = jnp.ones(inputs.shape[:2], jnp.float32) if counted is None else counted
    means = jnp.einsum("bt,btj->j", counts, inputs) / jnp.maximum(counts.sum(), 1)
    change = jnp.zeros((), jnp.float32)
    if delta is not None:
        change = (counts * jnp.square(project(inputs, delta)).sum(axis=-1)).sum()
    return InputMoments(norms(inputs, counted, None), means, change)


def _layer(
    config: ModelConfig,
    measure: Measure,
    weights: dict,
    kind: LayerKind,
    hidden: Float[Array, "B T D"],
    deltas: Mapping[str, Array],
    counted: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """Return a layer's output and, by the path of every linear, what is measured of its inputs.

    `counted` is 1 for positions that count and 0 for others; None where all do.
    """
    measured: dict[str, Any] = {}

    def record(path: str, inputs: Array, picked: Array | None) -> None:
        if picked is None:
            measured[path] = measure(inputs, counted, deltas.get(path))
        else:
            picked = picked if counted is None else picked * counted[..., None]
            measured.update(_mixture(config, measure, weights["mlp"]["experts"], inputs, picked, deltas))

    if isinstance(config, EncoderConfig):
        text = jnp.ones(hidden.shape[:2], bool) if counted is None else counted > 0
        return encoder_layer(config, weights, hidden, text, record), measured
    positions = jnp.arange(hidden.shape[1])[None]
    context = context_of(config, positions, positions).of(kind)
    return decoder_layer(config, weights, hidden, None, context, record=record)[0], measured


def _mixture(
    config: DecoderConfig,
    measure: Measure,
    experts: dict,
    hidden: Float[Array, "B T D"],
    picked: Float[Array, "B T E"],
    deltas: Mapping[str, Array],
) -> dict[str, Any]:
    """Measure every expert's inputs, over the tokens that the router sends to it; one expert at a time."""
    names = ("gate_proj", "up_proj", "down_proj")
    own_deltas = {name: deltas[f"mlp.experts.{name}"] for name in names if f"mlp.experts.{name}" in deltas}

    def measured(expert):
        weights, counted, delta = expert
        inputs = {"gate_proj": hidden, "up_proj": hidden, "down_proj": mlp_inner(config, weights, hidden)}
        return {f"mlp.experts.{name}": measure(x, counted, delta.get(name)) for name, x in inputs.items()}

    return jax.lax.map(measured, (experts, jnp.moveaxis(picked, -1, 0), own_deltas))


def norms_of_experts(job: JobConfig, experts: Mapping[str, Checkpoint]) -> dict[str, dict[str, np.ndarray]]:
    """Compute the activation norms of every expert on --calibration text, by expert and tensor."""
    found = {}
    for name, expert in experts.items():
        own = replace(job, calibration=job.text_of(name))
        found[name] = activation_norms(expert, tokens_of(own, expert, f"--score={job.merge.score}"))
        logging.info("activation norms of %s on %s", name, own.calibration)
    return found


def tokens_of(job: JobConfig, expert: Checkpoint, needs: str) -> Int[np.ndarray, "rows tokens"]:
    """Read --calibration text with an expert's tokenizer; `needs` is the flag that wants it."""
    if not job.calibration:
        raise ValueError(f"{needs} needs --calibration=FILE, a text file whose lines the experts read.")
    return calibration_tokens(expert.directory, Path(job.calibration))
