"""DAREx's q of every linear of a model: the sums of a whole pass, on any mesh, and a merge that takes the answer."""

from collections import Counter

import jax
import numpy as np
import pytest
from command import Merge, launch
from families import WORDS, read_json
from support import ONE_DEVICE, linear_names

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import QConfig
from dppa_jax.delta.q_rules import Q_RULES, Moments, q_of_linear
from dppa_jax.demo.text import held_out
from dppa_jax.merging.activations import layers_seen, moments
from dppa_jax.merging.q_of_linears import q_of_linears
from dppa_jax.runtime.mesh import make_mesh

MERGE = MergeConfig(("math",), "darex_q", rate=0.9, q={"math": 0.1})


@pytest.fixture(scope="module")
def models(pristine) -> tuple[SafetensorsDirectory, SafetensorsDirectory]:
    return SafetensorsDirectory(pristine / "base"), SafetensorsDirectory(pristine / "math")


@pytest.fixture(scope="module")
def tokens(models) -> np.ndarray:
    return np.random.default_rng(0).integers(0, models[0].config["vocab_size"], (3, 17)).astype(np.int32)


def found(models, tokens, way: str, mesh: str = ONE_DEVICE, **numbers) -> dict[str, float]:
    rates = np.full(len(linear_names(models[0].config)), 0.9)
    rates[0] = 0.0
    (one,) = q_of_linears(*models, MERGE, QConfig(way, **numbers), tokens, rates, make_mesh(mesh))
    return one


@pytest.mark.parametrize("way", Q_RULES)
def test_5_q_is_that_of_sums_in_float64(way, models, tokens):
    base, expert = models
    names, wanted = linear_names(base.config), {}
    arrays = lambda model, name: model.read(name).astype(np.float64)  # noqa: E731

    def delta(name: str, weights: np.ndarray) -> jax.Array:
        return jax.numpy.asarray(weights, np.float32) - jax.numpy.asarray(base.read(name), np.float32)

    for seen in layers_seen(expert, tokens, moments, delta):
        for name, inputs in seen.measured.items():
            change = arrays(expert, name) - arrays(base, name)
            c = change * inputs.means
            separate = np.square(change * inputs.norms).sum()
            own = Moments(c.sum(axis=1), np.square(c).sum(axis=1), float(inputs.change), float(separate))
            own = Moments(*vars(own).values()) if way != "reference" else Moments(
                own.sums, own.squares, own.change, own.separate, c.astype(np.float32)
            )  # fmt: skip
            wanted[name] = q_of_linear(way, own, 0.0 if name == names[0] else 0.9, 3.0)
    q = found(models, tokens, way, eta=(3.0,))
    assert list(q) == names
    assert q[names[0]] == pytest.approx(1.0)  # nothing is removed of it
    assert len({round(value, 6) for value in q.values()}) > 5
    np.testing.assert_allclose(
        [q[n] for n in names], [wanted[n] for n in names], rtol=1e-5 if way != "reference" else 0.02
    )


@pytest.mark.parametrize("way", ["bound", "mse"])
def test_5_the_bits_are_the_same_on_1_and_8_devices(way, models, tokens):
    one = found(models, tokens, way)
    assert found(models, tokens, way, "layer=1,row=8") == one
    assert found(models, tokens, way, "layer=2,row=4") == one


@pytest.mark.parametrize("way", Q_RULES)
def test_5_every_tensor_is_read_once(way, pristine, tokens, monkeypatch):
    """With the merge, which reads them again, the weights are passed over twice."""
    read: Counter[str] = Counter()
    whole = SafetensorsDirectory.read
    monkeypatch.setattr(
        SafetensorsDirectory,
        "read",
        lambda self, name: read.update([f"{self.directory.name} {name}"]) or whole(self, name),
    )
    models = SafetensorsDirectory(pristine / "base"), SafetensorsDirectory(pristine / "math")
    found(models, tokens, way)
    assert set(read.values()) == {1}
    assert {f"{model} {name}" for model in ("base", "math") for name in linear_names(models[0].config)} <= set(read)


def test_eta_has_the_unit_of_1_over_the_output(models, tokens):
    small, large = (found(models, tokens, "bound", eta=(eta,)) for eta in (0.01, 100.0))
    assert np.mean(list(small.values())) < np.mean(list(large.values()))


@pytest.mark.parametrize(
    "way", ["bound", "auto", *(pytest.param(w, marks=pytest.mark.slow) for w in ("mse", "reference"))]
)
def test_a_merge_takes_the_q_that_was_found_and_a_file_gives_it_again(way, merge: Merge, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text(" ".join(WORDS * 3))
    flags, work = ("--method=darex_q", "--rate=0.9", f"--calibration={words}"), tmp_path / "work"
    output = merge(*flags, f"--workdir={work}", "--q=0.7", f"--q={way}", "--q=law=0.3")
    stored, first = read_json(work / "q.json"), (output / "model.safetensors").read_bytes()
    assert stored["q"] == read_json(output / "recipe.json")["config"]["q"]
    assert stored["q"]["law"] == 0.3
    assert isinstance(stored["q"]["math"], dict if way in Q_RULES else float)
    merge("--method=darex_q", "--rate=0.9", f"--q={work / 'q.json'}", "--overwrite")
    assert (output / "model.safetensors").read_bytes() == first


def test_of_several_eta_the_one_is_taken_that_changes_outputs_least(merge: Merge, tmp_path):
    """Each alone leaves its q in q.json; what `auto` would measure of them decides."""
    words = tmp_path / "words.txt"
    words.write_text(" ".join(WORDS * 3))
    flags, found = ("--method=darex_q", "--rate=0.95", f"--calibration={words}", "--overwrite", "--q=bound"), {}
    for etas in ("1", "1000", "1,1000", "1000,1"):
        merge(*flags, f"--workdir={tmp_path / etas}", f"--q_eta={etas}")
        found[etas] = read_json(tmp_path / etas / "q.json")["q"]
    assert found["1"]["math"] != found["1000"]["math"]
    assert found["1,1000"] == found["1000,1"]
    assert found["1,1000"]["math"] in (found["1"]["math"], found["1000"]["math"])


def test_a_rule_is_one_more_pass_in_the_plan(merge: Merge, tmp_path):
    plans = {}
    for way in ("0.2", "bound"):
        merge("--job=plan", "--method=darex_q", f"--q={way}", f"--workdir={tmp_path / way}")
        plans[way] = read_json(tmp_path / way / "plan.json")
    assert plans["bound"]["passes"] == plans["0.2"]["passes"] + 1 == 2
    assert plans["bound"]["bytes_read"] == 2 * plans["0.2"]["bytes_read"]


@pytest.fixture
def text(tmp_path):
    """Questions and answers of the finance tasks that are held out for validation."""
    samples = [sample for task in ("sentiment", "trend") for sample in held_out(task, "validation", 60)]
    (tmp_path / "text.txt").write_text("".join(f"{sample.prompt}{sample.answer}\n" for sample in samples))
    return f"--calibration={tmp_path / 'text.txt'}"


@pytest.mark.slow
def test_12_without_labels_finance_is_far_above_dare_and_above_the_base(family, text, tmp_path):
    """Accuracy at rate 0.99 over both tasks: at least 40 points above DARE."""
    models = [family[0], "--expert=finance=demo:finance", "--evaluate=sentiment,trend", "--rate=0.99"]
    accuracy = {}
    for name, flags in (("dare", ["--method=dare"]), ("auto", ["--method=darex_q", "--q=auto", text])):
        launch(*models, *flags, f"--output={tmp_path / name}", f"--workdir={tmp_path / ('work-' + name)}")
        rows = read_json(tmp_path / f"work-{name}/tables.json")["tables"]["evaluated"]["rows"][:2]
        accuracy |= {of: np.mean([row["cells"][of]["values"][0] for row in rows]) for of in ("base", "merge")}
        accuracy[name] = accuracy.pop("merge")
    assert accuracy["auto"] >= accuracy["dare"] + 0.4
    assert accuracy["auto"] > accuracy["base"] + 0.1


@pytest.mark.slow
def test_labels_find_q_by_either_rule(family, tmp_path):
    models = [family[0], "--expert=finance=demo:finance", "--evaluate=sentiment", "--rate=0.99", "--method=darex_q"]
    for rule in ("parabola", "darex"):
        places = f"--output={tmp_path / rule}", f"--workdir={tmp_path / 'work'}"
        launch(*models, "--q=search", f"--q_rule={rule}", "--search_limit=60", *places)
        stored = read_json(tmp_path / "work/q.json")
        visits = stored["searches"]["finance"]["result"]["visits"]
        assert 0.03 < stored["q"]["finance"] < 0.3
        assert max(visit["score"] for visit in visits) == stored["searches"]["finance"]["result"]["score"]
