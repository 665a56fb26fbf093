"""Every jitted function lowers for TPUs and for NVIDIA GPUs from a machine that has neither: nothing is run here."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import AWKWARD, make_family

from dppa_jax.config.finetune import TrainConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta import consensus
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.delta.presets import METHODS, PARAMETERS
from dppa_jax.delta.score import SCORES, Rows, Units
from dppa_jax.delta.threshold import BOUNDS
from dppa_jax.delta.tied import Placed
from dppa_jax.finetune import data
from dppa_jax.finetune.train import TRAIN_AXES, Trainer, compiled
from dppa_jax.merging import activations, kernels
from dppa_jax.merging.elementwise import Elementwise
from dppa_jax.merging.kernels import ZERO, Kernels
from dppa_jax.model import DecoderConfig, abstract_tree, forward, init_tree
from dppa_jax.model.config import Norms
from dppa_jax.model.context import LayerKind
from dppa_jax.model.decoder import Cache
from dppa_jax.model.generate import decode
from dppa_jax.model.rope import Rope
from dppa_jax.runtime.mesh import PerTensor, make_mesh, over_rows
from dppa_jax.search import adamerging_step
from dppa_jax.search.entropy import Batch
from dppa_jax.search.mixture import Mixture

PLATFORMS = ("tpu", "cuda")
MESH = "layer=2,row=4"
EXPERTS = ("math", "law")
LAYERS, ROWS, COLUMNS = 2, 16, 70
LLAMA = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
PRESETS = sorted({(of.score or "magnitude", of.combine) for of in METHODS.values() if COMBINATIONS[of.combine].prunes})
RANKING = [score for score in SCORES if not SCORES[score].random]  # thresholds of the others are the rates
OTHERS = [(score, "sum") for score in SCORES if (score, "sum") not in PRESETS]
FAST = (("magnitude", "ties"), ("random", "sum"), ("della", "ties"), ("column", "sum"))


def but(fast: str, values: Iterable[str]) -> list:
    """All of them, those slow that are not the one."""
    return [pytest.param(value, marks=[] if value == fast else pytest.mark.slow) for value in values]


def assert_lowers(function: Callable, *arguments, **named) -> jax.export.Exported:
    for platform in PLATFORMS:
        exported = jax.export.export(function, platforms=[platform])(*arguments, **named)
        assert exported.platforms == (platform,)
    return exported


def array(*shape: int, dtype="bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def lowered(monkeypatch) -> None:
    """Kernels lower what they are called with, and give zeros in place of a result."""

    def lowering(mesh: Mesh, function: Callable, replicated: tuple[int, ...] = (), donated=()) -> Callable:
        def run(*arguments):
            shapes = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), arguments)
            exported = assert_lowers(over_rows.__wrapped__(mesh, function, replicated), *shapes)
            return jax.tree.unflatten(exported.out_tree, [jnp.zeros(x.shape, x.dtype) for x in exported.out_avals])

        return run

    monkeypatch.setattr(kernels, "over_rows", lowering)


def inputs_of(score: str) -> jax.ShapeDtypeStruct | PerTensor | None:
    """What a score needs beside the delta, as `Pruner` puts it onto the devices."""
    wanted = SCORES[score].inputs
    if wanted is None:
        return None
    sums = {"row_sums": lambda: np.ones(ROWS), "column_sums": lambda: np.ones(COLUMNS)}
    norms, units = np.ones(COLUMNS, np.float32), Units("heads", 7, False, np.arange(COLUMNS // 7, dtype=np.uint32))
    own = {name: PARAMETERS[name].default for name in SCORES[score].parameters}
    made = wanted.make(Rows(0, "math", "tensor", 0, ROWS, 0.8, parameters=own, norms=norms, units=units, **sums))
    if made.ndim == 1:
        return PerTensor(array(LAYERS, COLUMNS, dtype=made.dtype), array(ROWS, dtype=np.int32))
    return array(*made.shape, dtype=made.dtype)


# ---- merges

BASE, EXPERT = array(ROWS, COLUMNS), array(ROWS, COLUMNS, dtype=np.float32)


@pytest.mark.parametrize("score", but("column", RANKING))
def test_kernels_that_tell_ties_apart_on_a_mesh(score, lowered):
    of = Kernels(make_mesh(MESH), Elementwise(score, "sum", "float32"))

    def drive(base, expert, inputs, bounds, pairs, weights):
        each = tuple(zip(*[(expert, inputs, pairs, weights)] * len(EXPERTS), strict=True))
        return of.merge(base.dtype, base, *each), of.counts(base, expert, inputs, bounds)

    inputs = Placed(inputs_of(score), array(ROWS, 2, dtype=np.uint32))
    bounds, pairs = (array(ROWS, count, 2, dtype=np.uint32) for count in (BOUNDS, 2))
    merged, counts = jax.eval_shape(drive, BASE, EXPERT, inputs, bounds, pairs, array(ROWS, 2, dtype=np.float32))
    assert (merged.shape, counts.shape) == (BASE.shape, (ROWS, BOUNDS))


@pytest.mark.parametrize(
    ("score", "combine"),
    [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in PRESETS + OTHERS],
)
def test_kernels_of_every_preset_and_score_on_a_mesh(score, combine, lowered):
    of = Kernels(make_mesh(MESH), Elementwise(score, combine, "float32"))

    def drive(base, expert, inputs, bounds, weights):
        each = tuple(zip(*[(expert, inputs, bounds, weights)] * len(EXPERTS), strict=True))
        return of.merge(base.dtype, base, *each), of.prune(base, expert, inputs, bounds, weights)

    partitions = [array(ROWS, 2, dtype=dtype) for dtype in (np.uint32, np.float32)]
    merged, pruned = jax.eval_shape(drive, BASE, EXPERT, inputs_of(score), *partitions)
    assert (merged.dtype, pruned.dtype) == (BASE.dtype, np.float32)
    assert merged.shape == pruned.shape == BASE.shape


@pytest.mark.parametrize(("combine", "arithmetic"), [("ties", "bfloat16"), ("sum", "float16")])
def test_kernels_of_sums_step_by_step_on_a_mesh(combine, arithmetic, lowered):
    steps = {"stepwise": True, "divide": "weights", "arithmetic": arithmetic, "gains": False}
    of = Kernels(make_mesh(MESH), Elementwise("magnitude", combine, arithmetic, **steps))

    def drive(base, expert, bounds, weights, numbers):
        each = tuple(zip(*[(expert, None, bounds, weights)] * len(EXPERTS), strict=True))
        return of.merge(base.dtype, base, *each, numbers), of.kept_sums(base, expert, None, bounds, weights)

    tables = array(ROWS, 1, dtype=np.uint32), array(ROWS, 1, dtype=np.float32)
    numbers = array(ROWS, len(EXPERTS) + 2, dtype=np.float32)
    merged, sums = jax.eval_shape(drive, BASE, EXPERT, *tables, numbers)
    assert (merged.shape, merged.dtype, sums.shape[0]) == (BASE.shape, BASE.dtype, ROWS)


@pytest.mark.parametrize("score", but("column", RANKING))
def test_kernels_of_thresholds_on_a_mesh(score, lowered):
    of = Kernels(make_mesh(MESH), Elementwise(score, "sum", "float32"))

    def drive(base, expert, inputs, bounds, starts):
        return of.counts(base, expert, inputs, bounds), of.sample(base, expert, inputs, starts, 3)

    counts, sample = jax.eval_shape(
        drive, BASE, EXPERT, inputs_of(score), array(ROWS, BOUNDS, dtype=np.uint32), array(ROWS, 1, dtype=np.int32)
    )
    assert (counts.shape, sample.shape) == ((ROWS, BOUNDS), (ROWS, 3))


@pytest.mark.parametrize("delta_dtype", but("bfloat16", ["float32", "float16", "bfloat16"]))
def test_kernels_of_surveys_and_inspections_on_a_mesh(delta_dtype, lowered):
    of = Kernels(make_mesh(MESH), Elementwise("magnitude", "sum", delta_dtype, allow_nonfinite=True))

    def drive(base, expert, thresholds, starts):
        sums = [of.row_sums(term, base, expert) for term in ("absolute", "square")]
        sums.append(of.row_sums("above", base, expert, thresholds))
        sums.append(of.product_sums(base, expert, np.ones(base.shape[1], np.float32)))
        sums.append(of.size_sums(of.sizes(base, expert, None)))
        return sums, of.sample_delta(base, expert, starts, 3), of.extremes(base, expert)

    per_row = array(ROWS, 2, dtype=np.float32), array(ROWS, 1, dtype=np.int32)
    sums, sample, extremes = jax.eval_shape(drive, BASE, EXPERT, *per_row)
    assert {x.shape for x in sums} == {extremes.shape} == {(ROWS, 2)}
    assert sample.shape == (ROWS, 3)


def test_check_for_nan_on_a_mesh():
    assert_lowers(over_rows.__wrapped__(make_mesh(MESH), kernels.zeros), BASE)


@pytest.mark.parametrize("allow_nonfinite", but(True, [False, True]))
def test_kernels_of_whole_tensors_on_a_mesh(allow_nonfinite, lowered):
    of = Kernels(make_mesh(MESH), Elementwise("magnitude", "linear", "float32", allow_nonfinite))

    def drive(base, expert, coefficient):
        products = [of.inner_products(way, base, (base, expert), (expert, expert)) for way in (False, True)]
        return products, of.weighted(base.dtype, base, (expert,), (coefficient,) * 2, coefficient)

    products, merged = jax.eval_shape(drive, BASE, EXPERT, array(ROWS, 1, dtype=np.float32))
    assert {x.shape for x in products} == {(ROWS, 2)}
    assert (merged.shape, merged.dtype) == (BASE.shape, BASE.dtype)


@pytest.mark.parametrize("combine", but("arcee_fusion", [name for name, of in COMBINATIONS.items() if of.numbers]))
def test_kernels_of_combinations_that_ask_on_a_mesh(combine, lowered):
    of, experts = Kernels(make_mesh(MESH), Elementwise("magnitude", combine, "float32")), COMBINATIONS[combine].experts
    names = EXPERTS[: experts[1]]

    def drive(base, expert, bounds, weights, numbers, counts, starts):
        each, models = tuple(zip(*[(expert, None, bounds, weights)] * len(names), strict=True)), (expert,) * len(names)
        asked = [of.asked_sums(consensus.divergence, base, models[:1], numbers), of.maxima(base)]
        for key in (consensus.variance, consensus.importance):
            asked.append(of.asked_counts(key, base, models, numbers, counts))
            asked.append(of.asked_sample(key, base, models, numbers, starts, 3))
        return of.merge(base.dtype, base, *each, numbers), asked

    partitions = [array(ROWS, 1, dtype=dtype) for dtype in (np.uint32, np.float32)]
    more = array(ROWS, 6, dtype=np.float32), array(ROWS, BOUNDS, dtype=np.uint32), array(ROWS, 1, dtype=np.int32)
    merged, asked = jax.eval_shape(drive, BASE, EXPERT, *partitions, *more)
    assert (merged.shape, merged.dtype) == (BASE.shape, BASE.dtype)
    assert [x.shape for x in asked] == [(ROWS, 2), (ROWS,), *[(ROWS, BOUNDS), (ROWS, 3)] * 2]


def test_every_combination_is_a_presets():
    assert {method.combine for method in METHODS.values()} == set(COMBINATIONS)


def test_no_kernel_is_left_out():
    """A new one belongs in the tests above."""
    found = {name for name, value in vars(Kernels).items() if isinstance(value, cached_property)}
    assert found == {
        "_sums",
        "_fold_again",
        "_fold_bytes",
        "_unpack",
        "_reached",
        "_products",
        "_absolute",
        "sizes",
        "_inner",
        "maxima",
        "extremes",
        "prune",
        "_ranked",  # on a CPU alone
        "_zeros",
    }


# ---- the model


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_and_decoding(dtype, backend, monkeypatch):
    """With what the model chooses by the backend, as there; in float32 at the highest precision."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    tree, tokens, row = abstract_tree(LLAMA, dtype), array(2, 8, dtype=np.int32), array(2, dtype=np.int32)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        assert_lowers(forward, LLAMA, tree, tokens, remat=True)
        assert_lowers(decode, LLAMA, tree, tokens, row, row, array(1, dtype=np.int32), answer_slots=4)


MANY = replace(  # what LLaMA lacks
    LLAMA,
    activation="gelu_tanh",
    biases=("q_proj", "o_proj"),
    norms=Norms("input_layernorm", "post_attention_layernorm", None, "post_feedforward_layernorm"),
    unit_norms=True,
    query_key_norm="projection",
    ropes=(Rope(rope_type="longrope", factor=4.0, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0)), None),
    rope_of_layer=tuple(layer % 2 for layer in range(LLAMA.num_hidden_layers)),
    partial_rotary_factor=4 / LLAMA.head_dim,
    sliding_window=3,
    windowed_layers=tuple(layer % 2 > 0 for layer in range(LLAMA.num_hidden_layers)),
    attention_cap=9.0,
    logit_cap=9.0,
    scaled_embeddings=True,
    residual_multiplier=0.3,
    num_experts=4,
    num_experts_per_tok=2,
)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_model_and_decoding_of_other_families(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    tree, tokens, row = abstract_tree(MANY, "bfloat16"), array(2, 8, dtype=np.int32), array(2, dtype=np.int32)
    assert_lowers(forward, MANY, tree, tokens, remat=True)
    assert_lowers(decode, MANY, tree, tokens, row, row, array(1, dtype=np.int32), answer_slots=4)


def test_model_with_a_cache():
    tokens, cache = array(2, 8, dtype=np.int32), jax.eval_shape(lambda: Cache.empty(LLAMA, 2, 16, "bfloat16"))
    assert_lowers(forward, LLAMA, abstract_tree(LLAMA, "bfloat16"), tokens, None, cache)


def test_first_weights():
    assert_lowers(init_tree, LLAMA, jax.random.key(0), "bfloat16")


def test_layer_of_a_calibration():
    weights = jax.tree.map(lambda x: array(*x.shape[1:], dtype=x.dtype), abstract_tree(LLAMA)["layers"])
    assert_lowers(
        jax.jit(partial(activations._layer, LLAMA, activations.moments)),
        weights,
        LayerKind(),
        array(2, 8, LLAMA.hidden_size, dtype=np.float32),
        {"mlp.up_proj": weights["mlp"]["up_proj"]},
    )


# ---- steps


@pytest.mark.parametrize("method", but("dare", ["task_arithmetic", "dare"]))
def test_step_of_adamerging_on_a_mesh(method, monkeypatch):
    """With bfloat16 activations, as on an accelerator."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    base, experts = make_family(EXPERTS, num_hidden_layers=LAYERS, **AWKWARD | {"head_dim": 30})
    mixture = Mixture(base, experts, MergeConfig(EXPERTS, method=method), make_mesh(MESH))
    assert mixture.arithmetic.activations == "bfloat16"
    constants = np.zeros(len(base.specs), np.int32), np.full(len(base.specs), np.nan, np.float32)
    batch = Batch(np.ones((4, 8), np.int32), np.zeros((4, 3), np.int32), np.ones((4, 3), np.float32))
    raw = np.full((1, len(EXPERTS)), 0.3, np.float32)
    adam = optax.ScaleByAdamState(np.int32(0), raw, raw)
    arguments = (np.float32(1e-3), raw, adam, constants, mixture.tree, batch, ZERO)
    assert_lowers(adamerging_step._step, mixture.arithmetic, *arguments)


@pytest.mark.parametrize(("dtype", "accumulate"), [pytest.param("float32", 1, marks=pytest.mark.slow), ("bfloat16", 2)])
def test_step_and_loss_of_fine_tuning_on_a_mesh(dtype, accumulate):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), TRAIN_AXES)
    options = TrainConfig(steps=2, learning_rate=1e-3, batch_size=8, accumulate=accumulate, dtype=dtype, remat=True)
    state = Trainer(LLAMA, options, mesh).abstract()
    update, loss = compiled(LLAMA, options.optimizer, accumulate, dtype, True, mesh, options.lora)
    rows = NamedSharding(mesh, PartitionSpec(None, TRAIN_AXES))
    shape = (accumulate, 8 // accumulate, 12)
    tokens, learned = (jax.ShapeDtypeStruct(shape, d, sharding=rows) for d in (np.int32, bool))
    batch = data.Rows(tokens, learned, tokens)
    assert_lowers(update, state, np.float32(1e-3), batch, None)
    assert_lowers(loss, state.tree, batch, None)
