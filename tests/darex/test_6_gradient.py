"""--q=gradient: the reference's loss and derivatives, what it descends to, and a merge that takes it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from command import Merge
from families import WORDS, llama_config, read_json
from safetensors.numpy import load_file
from support import ONE_DEVICE, MemorySource, linear_names, make_family, merge_to_arrays, random_norms

from dppa_jax.architecture.specs import tree_of
from dppa_jax.checkpoint import tensor_specs
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.score import SCORES, Inputs, Rows, Score
from dppa_jax.merging.activations import PADDING
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.search.entropy import Batch
from dppa_jax.search.mixture import Mixture
from dppa_jax.search.output_change import OutputChange
from dppa_jax.search.prompts import draw, prompts_of
from dppa_jax.search.q_gradient import Descent, descend, optimizer, windows

P = 0.9
ALONE = ("math",)
KEPT = np.uint32(2**32 - 1)


@pytest.fixture
def stack(golden, monkeypatch) -> tuple[Descent, Batch]:
    """The reference's two gated blocks as a decoder: attention gives 0, and every position is a token of its own.

    A score with the reference's masks stands for the random one. The head's rows beyond the reference's vocabulary are
    0: their logits are never among the five largest.
    """
    stored = load_file(golden / "darex/output_change/stack.safetensors")
    stored = {name: array if array.dtype == bool else array.astype(np.float32) for name, array in stored.items()}
    x, inner = stored["x"], len(stored["base.layers.0.gate_proj"])
    rows, width, hidden = x.shape
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "vocab_size": rows * width}
    config = llama_config(dtype="float32", rms_norm_eps=1e-6, **sizes)
    base = {name: np.zeros(spec.shape, np.float32) for name, spec in tensor_specs(config).items()}
    base["model.embed_tokens.weight"][:] = x.reshape(-1, hidden)
    base["lm_head.weight"][: len(stored["lm_head"])] = stored["lm_head"]
    base["model.norm.weight"][:] = stored["norm"]
    expert, masks = dict(base), {}
    for name in linear_names(config):
        of_stack = in_stack(name)
        masks[name] = np.zeros(base[name].shape, np.uint32)
        if "mlp" in name:
            base[name][:] = stored[f"base.{of_stack}"]
            expert[name] = base[name] + stored[f"delta.{of_stack}"]
            masks[name][stored[f"mask.{P}.0.{of_stack}"]] = KEPT
    for layer in range(2):
        base[f"model.layers.{layer}.post_attention_layernorm.weight"][:] = stored[f"layers.{layer}.norm"]

    def make(rows: Rows) -> np.ndarray:
        return masks[rows.tensor][rows.start : rows.stop]

    score = Score(lambda delta, inputs, column: inputs, Inputs(make, sees_weights=False), random=True)
    monkeypatch.setitem(SCORES, "of the reference", score)
    merge = MergeConfig(ALONE, "darex_q", score="of the reference", rate=P, q={"math": 0.1})
    mixture = Mixture(MemorySource(config, base), {"math": MemorySource(config, expert)}, merge, make_mesh(ONE_DEVICE))
    batch = Batch(
        np.arange(rows * width, dtype=np.int32).reshape(rows, width),
        np.tile(np.arange(width, dtype=np.int32), (rows, 1)),
        np.full((rows, width), 1 / (rows * width), np.float32),
    )
    return Descent(mixture, dict.fromkeys(linear_names(config), 1 - P), 0.1, 200), batch


def test_6_loss_and_derivatives_are_those_of_the_reference(golden, stack):
    """Of c in q = 1 − p + |c|, at step 0 with their sign; later c may be negative, as none of ours can."""
    descent, batch = stack
    case = next(c for c in json.loads((golden / "darex/per_layer_q/stack.json").read_text())["cases"] if c["p"] == P)
    for record in case["records"][:4]:
        of_name = {name: in_stack(name) for name in descent.names}
        q = np.array([record["q"].get(of_name[name], 0.1) for name in descent.names])
        wanted = np.array([record["gradient"].get(of_name[name], 0.0) for name in descent.names])
        shares = (1 - np.log(q) / np.log(1 - P)).astype(np.float32)
        loss, gradient = descent.gradient(shares, batch)
        assert loss == pytest.approx(record["loss"], rel=1e-5)
        assert list(descent.named(shares).values()) == pytest.approx(q, rel=1e-6)
        found, signed = gradient / (-np.log(1 - P) * q), record["step"] == 0
        for given, other in zip(found, wanted, strict=True):
            assert given == pytest.approx(other if signed else np.copysign(other, given), rel=1e-4, abs=1e-5)


def test_6_two_hundred_steps_end_as_low_as_the_authors(stack):
    """The same batch in every step, as in the reference."""
    descent, batch = stack
    shares = np.zeros(len(descent.names), np.float32)
    state = optimizer(descent.steps).init(shares)
    for _ in range(descent.steps):
        _, shares, state = descent(shares, state, batch)
    assert descent.loss(shares, batch) <= 0.8747 * 1.02
    q = list(descent.named(shares).values())
    assert 1 - P <= min(q) < 0.12 < 0.2 < max(q) <= 1


# ---- any method, any model


MERGES = {
    "random": {"method": "darex_q", "rate": 0.7},
    "magnitude": {"method": "magnitude_q", "rate": 0.8, "tensor_rates": ((r"layers\.1\..*o_proj", 0.0),)},
    "wanda": {"method": "wanda_q", "rate": 0.6},
    "wanda in rows": {"method": "wanda_q", "rate": 0.6, "compare": "row"},
    "columns": {"method": "darex_q_columns", "rate": 0.7},
}


def descent_of(models, method: str, mesh: str = ONE_DEVICE) -> tuple[Descent, MergeConfig]:
    base, experts = models
    merge = MergeConfig(ALONE, **MERGES[method], q={"math": 0.25})
    mixture = Mixture(base, experts, merge, make_mesh(mesh), random_norms(base, ALONE))
    densities = dict(zip(linear_names(base.config), 1 - mixture.rates[0, -1], strict=True))
    return Descent(mixture, densities, 0.25, 20), merge


def text_of(base, lengths=(9, 16, 5)) -> list:
    generator = np.random.default_rng(4)
    return prompts_of([generator.integers(1, base.config["vocab_size"], n).tolist() for n in lengths], "all")


FAST = ("random",)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m not in FAST)) for m in MERGES])
def test_6_the_loss_is_the_change_of_outputs_of_the_merge_with_these_q(method):
    """As --q=auto measures it on the merge itself; padding, here of three rows, counts in neither."""
    base, experts = models = make_family(ALONE, "float32", vocab_size=4500, tie_word_embeddings=method == "magnitude")
    descent, merge = descent_of(models, method)
    shares = np.random.default_rng(1).uniform(0, 0.8, len(descent.names)).astype(np.float32)
    q = descent.named(shares)
    written = merge_to_arrays(base, experts, replace(merge, q={"math": q}), norms=random_norms(base, ALONE)).tensors
    text = text_of(base)
    batch = draw({"": text}, 0, 3, 0)
    counted = batch.weights > 0
    change = OutputChange(as_model(base, experts["math"].tensors), batch.tokens, "top_logits", counted)
    wanted = change(as_model(base, written))
    assert wanted > 1e-4
    assert descent.loss(shares, batch) == pytest.approx(wanted, rel=1e-4)
    padded = Batch(np.pad(batch.tokens, ((0, 0), (0, 8)), constant_values=7), *batch[1:])
    assert descent.loss(shares, padded) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_6_derivatives_are_those_of_differences_and_the_same_on_eight_devices():
    models = make_family(ALONE, "bfloat16", num_hidden_layers=2)
    batch = draw({"": text_of(models[0])}, 0, 3, 0)
    found = {mesh: descent_of(models, "random", mesh)[0] for mesh in (ONE_DEVICE, "layer=2,row=4")}
    shares = np.full(14, 0.3, np.float32)
    loss, gradient = found[ONE_DEVICE].gradient(shares, batch)
    assert found["layer=2,row=4"].gradient(shares, batch)[0] == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(found["layer=2,row=4"].gradient(shares, batch)[1], gradient, rtol=1e-3, atol=1e-5)
    exact = descent_of(make_family(ALONE, "float32", num_hidden_layers=2), "random")[0]
    gradient = exact.gradient(shares, batch)[1]
    for i in (0, 4, 13):
        step = np.zeros(14, np.float32)
        step[i] = 1e-2
        slope = (exact.loss(shares + step, batch) - exact.loss(shares - step, batch)) / 2e-2
        assert gradient[i] == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_6_the_best_of_held_out_text_is_the_answer_and_five_misses_end_it():
    """A stand-in whose steps raise s by 0.01 each, and whose held-out loss is least at s = 0.3."""

    class Straight:
        names, steps = ("a",), 200

        def __call__(self, shares, state, batch):
            return 1.0, shares + np.float32(0.01), state

        def loss(self, shares, batch):
            return abs(float(shares[0]) - 0.3)

    text = text_of(make_family(ALONE)[0])
    best, losses, looked = descend(Straight(), text, draw({"": text}, 0, 3, 0), 0)
    assert best[0] == pytest.approx(0.3)
    assert len(losses) == 30 + 5 * 10
    assert min(looked, key=looked.get) == 30
    assert list(looked) == list(range(0, 90, 10))


def test_6_text_is_cut_into_rows_of_128_tokens_and_a_batch_of_it_at_most_is_held_out():
    stream = lambda size, width: np.arange(size, dtype=np.int32).reshape(-1, width)  # noqa: E731
    lines = stream(400, 10)
    lines[3, 4:] = PADDING
    for tokens, (count, held, width) in (
        (stream(5 * 512, 512), (19, 1, 128)),
        (stream(100 * 512, 512), (392, 8, 128)),
        (stream(100, 100), (1, 1, 50)),
        (lines, (38, 2, 10)),
    ):
        text, held_out = windows(tokens)
        assert (len(text), len(held_out.tokens), max(len(row.tokens) for row in text)) == (count, held, width)
        learned = [token for row in text for token in row.tokens]
        seen = [*learned, *held_out.tokens[held_out.weights > 0].tolist()]
        assert sorted(seen) == sorted(tokens[tokens != PADDING].tolist())


@pytest.mark.slow
def test_6_a_merge_takes_it_and_a_file_gives_it_again(merge: Merge, tmp_path):
    words, work = tmp_path / "words.txt", tmp_path / "work"
    words.write_text(" ".join(WORDS * 20))
    flags = ("--method=magnitude_q", "--rate=0.9", "--q_steps=20", "--q=gradient", "--q=law=0.3")
    output = merge(*flags, f"--calibration={words}", f"--workdir={work}")
    stored, first = read_json(work / "q.json"), (output / "model.safetensors").read_bytes()
    assert stored["q"] == read_json(output / "recipe.json")["config"]["q"]
    assert stored["q"]["law"] == 0.3
    assert len(set(stored["q"]["math"].values())) > 5
    descended = stored["searches"]["math"]
    assert descended["held_out"]["20"] < descended["held_out"]["0"]
    assert len(descended["losses"]) == 20
    merge("--method=magnitude_q", "--rate=0.9", f"--q={work / 'q.json'}", "--overwrite")
    assert (output / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--q=gradient needs --calibration=FILE"),
        (["--calibration=TEXT", "--combine=ties"], "--q=gradient needs --combine=sum, not 'ties'"),
        (["--calibration=TEXT", "--q_steps=0"], "--q_steps=0"),
        (["--calibration=SHORT"], "needs text of two tokens or more"),
    ],
)
def test_6_what_has_no_gradient_or_no_text_is_refused(flags, said, merge: Merge, tmp_path):
    (tmp_path / "TEXT").write_text(" ".join(WORDS))
    (tmp_path / "SHORT").write_text("word1")
    flags = [flag.replace("calibration=", f"calibration={tmp_path}/") for flag in flags]
    assert said in merge.failure("--method=darex_q", "--q=gradient", f"--workdir={tmp_path / 'work'}", *flags)
    assert not merge.output.exists()


def as_model(base: MemorySource, tensors: dict[str, np.ndarray]) -> Model:
    return Model(base.config, tree_of(base.specs.values(), lambda group: stacked(tensors, group)))


def stacked(tensors: dict[str, np.ndarray], group) -> np.ndarray:
    arrays = [tensors[spec.name] for spec in group]
    return arrays[0] if group[0].layer is None else np.stack(arrays)


def in_stack(name: str) -> str:
    """The reference's name of a linear."""
    return name.removeprefix("model.").removesuffix(".weight").replace("mlp.", "")
