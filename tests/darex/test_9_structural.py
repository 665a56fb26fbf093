"""Check 9 of the design of DAREx: rows and columns go as a whole, and the errors are those of the formulas."""

import numpy as np
import pytest
from command import Merge
from families import read_json
from safetensors.numpy import load_file
from support import linear_names, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.draws import column_draws, row_draws, row_words, unit_draws
from dppa_jax.delta.score import SCORES, Rows, Units, random_bound
from dppa_jax.merging.gone import gone_of

EXPERTS = ("math", "law")
WHOLE = ("random_row", "random_column")
TRIALS = 4000


@pytest.fixture(scope="module")
def models():
    return make_family(EXPERTS, "float32")


def dense(models) -> dict[str, np.ndarray]:
    base, experts = models
    return {name: experts["math"].tensors[name] - array for name, array in base.tensors.items()}


@pytest.mark.parametrize("score", WHOLE)
def test_rows_and_columns_go_as_a_whole_at_about_the_rate(score, models):
    """Each is all zero, or its delta times 1/q; masks differ between linears; the recipe has the share that is kept."""
    q = 0.25 if score == "random_column" else 1.0
    axis = WHOLE.index(score)
    options = {"method": "darex_q", "q": dict.fromkeys(EXPERTS, q)} if axis else {"method": "magnitude"}
    config = MergeConfig(EXPERTS, score=score, rate=0.9, **options)
    merge = merge_to_arrays(*models, config, deltas=True)
    whole, linears, units, masks = dense(models), linear_names(models[0].config), [], {}
    for place, name in enumerate(linears):
        found = np.moveaxis(merge.deltas["math"][name], axis, 0)
        kept = (found != 0).any(axis=1)
        wanted = np.moveaxis(whole[name] * np.float32(1 / q), axis, 0)
        np.testing.assert_array_equal(found, np.where(kept[:, None], wanted, 0))
        assert merge.outcome.densities[0, 0, place] == pytest.approx(kept.mean(), abs=1e-12)
        units += [*kept]
        masks[name] = kept
    assert gone_of(MergeConfig(EXPERTS, "dare"), merge.outcome) == {}  # where single elements go
    assert abs(np.mean(units) - 0.1) < 5 * np.sqrt(0.09 / len(units))
    same_length = [masks[n].tobytes() for n in linears if len(masks[n]) == len(masks[linears[0]])]
    assert len(set(same_length)) > 1


@pytest.mark.parametrize("whole", ["column", "row"])
def test_the_error_of_whole_rows_and_columns_is_that_of_the_formula(whole, golden):
    """E|h|² over masks and tokens: columns have the error of single elements, rows p(1−p)/q²·S² in place of Q."""
    linears = load_file(golden / "darex" / "q_analytic" / "linears.safetensors")
    delta, inputs = (linears[f"mixed.{name}"].astype(np.float64) for name in ("delta", "inputs"))
    expected = read_json(golden / "darex" / "structural" / "structural.json")["cases"]
    known = next(case["expected_error"] for case in expected if (case["p"], case["q"]) == (0.9, 0.3))
    assert known["column"] == known["element"]
    changes, bound = inputs[:, None] * delta, random_bound(0.9)  # c, (tokens, rows, columns)
    found = []
    for seed in range(TRIALS):
        if whole == "column":
            kept = column_draws(row_words(seed, "e", "t", 0, 1), delta.shape[1]) >= bound
        else:
            kept = row_draws(row_words(seed, "e", "t", 0, len(delta)), delta.shape[1]) >= bound
        left = 1 - kept / 0.3
        change = changes @ left[0] if whole == "column" else changes.sum(axis=2) * left[:, 0]
        found.append(np.square(change).sum(axis=1).mean())
    assert np.mean(found) == pytest.approx(known[whole], rel=0.03)


def test_what_is_gone_is_said(merge: Merge):
    """recipe.json and the model card have the counts of the delta that is saved; the model keeps its shape."""
    deltas = merge.root / "deltas"
    output = merge("--method=darex_q_columns", "--rate=0.6", "--q=0.5", f"--save_delta={deltas}")
    recipe, card = read_json(output / "recipe.json"), (output / "README.md").read_text()
    base, merged = (load_file(where / "model.safetensors") for where in (merge.base, output))
    assert {n: a.shape for n, a in base.items()} == {n: a.shape for n, a in merged.items()}
    linears = linear_names(read_json(output / "config.json"))
    for expert in EXPERTS:
        delta = load_file(deltas / expert / "model.safetensors")
        kept = [(delta[name] != 0).any(axis=0) for name in linears]
        columns, gone = sum(map(len, kept)), sum(int((~own).sum()) for own in kept)
        parameters = sum(int((~own).sum()) * len(delta[name]) for name, own in zip(linears, kept, strict=True))
        numel = sum(delta[name].size for name in linears)
        said = recipe["experts"][expert]["gone"]
        assert said["columns"] == {"gone": gone, "of": columns}
        assert said["parameters"] == {"gone": parameters, "of": numel}
        assert said["bytes"] == {"gone": 4 * parameters, "of": 4 * numel}
        assert f"{gone:,} of {columns:,} columns are gone" in card


@pytest.mark.slow
def test_the_output_of_whole_neurons_changes_by_the_law_of_single_elements():
    """To first order in δ, where gate, up and down of a neuron are divided by one q: units in place of elements."""
    generator, inner, hidden, p, q = np.random.default_rng(0), 30, 12, 0.8, 0.4
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    base = [generator.normal(0, 0.5, shape) for shape in shapes]
    deltas = [1e-5 * generator.standard_t(3, shape) for shape in shapes]
    x = generator.normal(0, 1, hidden)

    def shares(weight: np.ndarray) -> np.ndarray:
        """What each neuron adds to every output, (outputs, neurons), with weight·δ of it."""
        gate, up, down = (
            w + d * (weight[None] if i == 2 else weight[:, None])
            for i, (w, d) in enumerate(zip(base, deltas, strict=True))
        )
        g = gate @ x
        return down * (g / (1 + np.exp(-g)) * (up @ x))

    whole = shares(np.ones(inner))
    changes = whole - shares(np.zeros(inner))
    total, squares = changes.sum(axis=1), np.square(changes).sum(axis=1)
    expected = np.square((1 - (1 - p) / q) * total) + p * (1 - p) / q**2 * squares
    found = []
    for seed in range(TRIALS):
        rows = Rows(seed, "e", "gate", 0, inner, p, units=Units("layer.neurons", 1, True))
        kept = unit_draws(SCORES["random_group"].inputs.make(rows), hidden)[:, 0] >= random_bound(p)
        columns = Rows(seed, "e", "down", 0, hidden, p, units=Units("layer.neurons", 1, False))
        same = unit_draws(SCORES["random_group"].inputs.make(columns), inner)[0] >= random_bound(p)
        np.testing.assert_array_equal(kept, same)
        found.append(np.square((whole - shares(kept / q)).sum(axis=1)).sum())
    assert np.mean(found) == pytest.approx(expected.sum(), rel=0.05)
