"""DAREx's q of every linear in closed form: the reference, brute force, the authors' code, a whole pass, a merge."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from command import Merge
from darex_golden import LINEARS, moments_of, read_linears
from families import WORDS, read_json
from safetensors.numpy import load_file
from support import ONE_DEVICE, linear_names

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import QConfig
from dppa_jax.delta.q_rules import (
    GAMMA,
    Q_RULES,
    Moments,
    bound_rows,
    kearns_saul,
    mean_square,
    q_of_linear,
    reference_rows,
)
from dppa_jax.merging.activations import layers_seen, moments
from dppa_jax.merging.q_of_linears import q_of_linears
from dppa_jax.runtime.mesh import make_mesh


@pytest.fixture(scope="module")
def expected(golden) -> dict:
    return json.loads((golden / "darex/q_analytic/expected.json").read_text())


@pytest.fixture(scope="module")
def linears(golden) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return read_linears(golden)


def test_5_phi_is_that_of_the_reference_and_one_half_in_the_middle(expected):
    for rate, phi in expected["phi"].items():
        assert kearns_saul(float(rate)) == pytest.approx(phi, rel=1e-12)
    assert kearns_saul(0.5) == 0.5 == pytest.approx(kearns_saul(0.5 + 1e-9), rel=1e-9)
    assert bound_rows(np.array([1.0]), np.array([1.0]), 0.5, 1.5)[0] == 0.75


@pytest.mark.parametrize("name", LINEARS)
def test_5_sums_and_q_are_those_of_the_reference(name, expected, linears):
    found, wanted = moments_of(*linears[name]), expected["linears"][name]
    np.testing.assert_allclose(found.sums, wanted["S"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.squares, wanted["Q"], rtol=1e-12)
    for case in wanted["cases"]:
        rows = bound_rows(found.sums, found.squares, case["p"], case["eta"])
        np.testing.assert_allclose(rows, case["bound"]["rows"], rtol=1e-12)
        found_q = Q_RULES["bound"].q(found, case["p"], case["eta"])
        assert found_q == pytest.approx(case["bound"]["linear"], rel=1e-12)
    for case in wanted["mse"]["cases"]:
        assert mean_square(found.change, found.separate, case["p"]) == pytest.approx(case["q"], rel=1e-12)


def test_5_q_of_aligned_and_tiny_are_those_of_the_specification(linears):
    aligned, tiny = (moments_of(*linears[name]) for name in ("aligned", "tiny"))
    of = {rule: [Q_RULES[rule].q(aligned, p, 0.45) for p in (0.9, 0.99)] for rule in ("bound", "mse")}
    assert of["bound"] == pytest.approx([0.158390540, 0.485944100], abs=1e-9)
    assert of["mse"] == pytest.approx([0.815155907, 0.796671498], abs=1e-9)
    assert [Q_RULES["bound"].q(tiny, p, 0.45) for p in (0.9, 0.99)] == pytest.approx([0.1, 0.010339762], abs=1e-9)
    assert bound_rows(tiny.sums, tiny.squares, 0.9, 0.45)[3] == pytest.approx(0.1)  # a row of zeros


def test_5_the_closed_form_is_the_least_of_200001_values_of_q():
    generator = np.random.default_rng(1)
    for _ in range(200):
        p, eta = generator.uniform(0.05, 0.995), 10 ** generator.uniform(-1, 2)
        s, squares = generator.normal(), generator.lognormal()
        q = np.linspace(1 - p, 1, 200_001)
        bias = abs(1 - (1 - p) / q) * abs(s)
        least = q[np.argmin(eta * bias + eta**2 * kearns_saul(p) * squares / (4 * q**2))]
        assert bound_rows(np.array([s]), np.array([squares]), p, eta)[0] == pytest.approx(least, abs=2e-5)


def test_5_units_and_the_order_of_inputs_do_not_change_q(linears):
    delta, inputs = linears["mixed"]
    order = np.random.default_rng(2).permutation(delta.shape[1])
    for rule, eta in (("bound", 0.45 / 7), ("mse", 0.45)):
        q = Q_RULES[rule].q
        plain = q(moments_of(delta, inputs), 0.9, 0.45)
        assert q(moments_of(7 * delta, inputs), 0.9, eta) == pytest.approx(plain, rel=1e-12)
        assert q(moments_of(delta[:, order], inputs[:, order]), 0.9, 0.45) == pytest.approx(plain, rel=1e-12)
    assert 0.1 < Q_RULES["bound"].q(moments_of(delta, inputs), 0.9, 0.45) < 1


# ---- the authors' code


CASES = [f"{made}_A_p{p}_eta{eta}" for made in ("real", "synth") for p, eta in ((0.9, 0.1), (0.9, 1.0), (0.99, 0.45))]


def with_bias(products: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The authors take a bias as one more column, whose input is 1."""
    bias = products.get(name.removesuffix("weight") + "bias")
    return products[name] if bias is None else np.concatenate([products[name], bias[:, None]], axis=1)


@pytest.mark.parametrize("case", CASES)
def test_every_q_is_that_of_the_authors_code(case, golden):
    found = json.loads((golden / f"darex_q/{case}.json").read_text())
    products = load_file(golden / f"darex_q/{case.split('_p')[0]}.c.safetensors")
    assert found["prob"] == 1 - GAMMA
    for name, wanted in found["q"].items():
        c = with_bias(products, name)
        rows, steps = reference_rows(c, found["p"], found["eta"])
        np.testing.assert_allclose(rows, wanted["rows"], rtol=0, atol=1e-7, err_msg=name)
        assert steps == wanted["steps"], name
        q = Q_RULES["reference"].q(Moments(np.zeros(len(c)), np.zeros(len(c)), products=c), found["p"], found["eta"])
        assert q == pytest.approx(wanted["q"], abs=1e-7), name


@pytest.mark.slow
def test_5_without_rounding_the_authors_walk_is_that_of_the_reference(golden, expected, linears):
    """In float64 about half of the rows, those whose S is negative, go to the end of the grid."""
    delta, inputs = linears["tiny"]
    for case in expected["linears"]["tiny"]["cases"]:
        rows, steps = reference_rows(delta * inputs.mean(axis=0), case["p"], case["eta"], np.float64)
        np.testing.assert_allclose(rows, case["code64"]["rows"], rtol=0, atol=1e-9)
        assert steps == case["code64"]["steps"]
    sets = json.loads((golden / "darex/q_analytic/existing_sets.json").read_text())
    products, found = load_file(golden / "darex_q/synth_A.c.safetensors"), []
    for name in (f"synth.{i}.weight" for i in (0, 1, 2, 3, "pair")):
        rows, steps = reference_rows(with_bias(products, name), 0.99, 0.45, np.float64)
        (wanted,) = (row[2:4] for row in sets["sets"]["synth_A"][name] if row[:2] == [0.99, 0.45])
        assert [rows.mean(), steps] == pytest.approx(wanted, abs=1e-9)
        found.append(rows.mean())
    assert found == pytest.approx([0.704875, 0.70359375, 0.70596875, 0.583875, 0.998], abs=1e-9)


def test_differs_from_the_bound_on_the_same_products(golden):
    """The means of golden/darex/q_analytic/existing_sets.json: the bound of ours, to 1e-9."""
    sets = json.loads((golden / "darex/q_analytic/existing_sets.json").read_text())
    column = sets["columns"].index("bound mean")
    for name, linears in sets["sets"].items():
        products = load_file(golden / f"darex_q/{name}.c.safetensors")
        for linear, rows in linears.items():
            if not linear.endswith("weight"):
                continue
            c = with_bias(products, linear).astype(np.float64)
            for row in rows:
                q = bound_rows(c.sum(axis=1), np.square(c).sum(axis=1), row[0], row[1]).mean()
                assert q == pytest.approx(row[column], abs=1e-9), (linear, row)


# ---- whole models


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


@pytest.mark.slow
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
    for way in ("0.2", "bound", "gradient"):
        merge("--job=plan", "--method=darex_q", f"--q={way}", f"--workdir={tmp_path / way}")
        plans[way] = read_json(tmp_path / way / "plan.json")
    assert plans["bound"]["passes"] == plans["0.2"]["passes"] + 1 == 2
    assert plans["bound"]["bytes_read"] == 2 * plans["0.2"]["bytes_read"] == plans["gradient"]["bytes_read"]
    models = 2 * 2 * plans["gradient"]["parameters"]  # bytes of the base and one expert, whole
    held = [plans[way]["device_bytes"] for way in ("bound", "gradient")]
    assert held[0] < held[1] == models
