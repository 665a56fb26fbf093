"""Merges of whole tensors, which see Gram matrices, against their formulas on the tensors themselves, in float64."""

from itertools import combinations

import numpy as np
import pytest
from support import AWKWARD, MemorySource, assert_same_bits, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.whole import WHOLE, multislerp
from dppa_jax.flags import BY_NAME
from dppa_jax.jobs.configs import job_config
from dppa_jax.merging.merger import Layout

THREE = ("math", "law", "finance")
CUT = AWKWARD | {"vocab_size": 501}  # embeddings of more elements than the largest linear, which are cut
WEIGHTS = {"base": 0.5, "math": 0.7, "law": 1.0, "finance": 0.2}


def norm(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).sum()))


def mean(models, weights, normalize=True):
    return sum(w * x for w, x in zip(weights, models, strict=True)) / (sum(weights) if normalize else 1)


def arc(a, b, t, straight=1.0):
    cosine = (a / norm(a) * (b / norm(b))).sum()
    if cosine > straight:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def on_sphere(models, weights):
    """With the step in the tangent space, whose length is 0 but for rounding."""
    shares = np.array(weights) / sum(weights)
    units = [x / norm(x) for x in models]
    centre = mean(units, shares, False)
    centre = centre / norm(centre)
    step = mean([u - (u * centre).sum() * centre for u in units], shares, False)
    length = norm(step) + 1e-30
    return (np.cos(length) * centre + np.sin(length) / length * step) * mean([norm(x) for x in models], shares)


def karcher(models, weights, steps=10):
    shares = np.array(weights) / sum(weights)
    units = [x / norm(x) for x in models]
    centre = mean(units, shares, False)
    centre = centre / norm(centre)
    for _ in range(steps):
        angles = [np.arccos((u * centre).sum()) for u in units]
        pulls = [(u - np.cos(a) * centre) * a / np.sin(a) for u, a in zip(units, angles, strict=True)]
        step = mean(pulls, shares, False)
        if norm(step) < 1e-5:
            break
        centre = np.cos(norm(step)) * centre + np.sin(norm(step)) * step / norm(step)
    return centre * mean([norm(x) for x in models], shares, False)


def stock(base, deltas):
    count = len(deltas)
    cosine = np.mean([(a * b).sum() / (norm(a) * norm(b)) for a, b in combinations(deltas, 2)])
    t = count * cosine / (1 + (count - 1) * cosine)
    return base + t * mean(deltas, [1] * count)


def weighted_stock(x, weights):
    return stock(x[0], [w * (one - x[0]) for w, one in zip(weights[1:], x[1:], strict=True)])


CASES = {  # number of experts, options, and from (models, coefficients) to the merge
    "linear": (3, {}, mean),
    "linear, as it is": (3, {"method_options": {"normalize": 0.0}}, lambda x, w: mean(x, w, False)),
    "passthrough": (1, {}, lambda x, w: w[1] * x[1]),
    "slerp": (1, {}, lambda x, w: arc(x[0], x[1], w[1], 0.9995)),
    "nuslerp": (1, {}, lambda x, w: arc(x[0], x[1], w[1] / (w[0] + w[1]))),
    "nuslerp_deltas": (2, {}, lambda x, w: x[0] + arc(x[1] - x[0], x[2] - x[0], w[2] / (w[1] + w[2]))),
    "multislerp": (3, {}, on_sphere),
    "multislerp_deltas": (3, {}, lambda x, w: x[0] + on_sphere([one - x[0] for one in x[1:]], w[1:])),
    "karcher": (3, {}, karcher),
    "model_stock": (3, {}, weighted_stock),
}
ROWS = {  # what every row is a tensor for
    "slerp": (1, {"compare": "row"}, lambda x, w: arc(x[0], x[1], w[1], 0.9995)),
    "model_stock": (3, {"compare": "row"}, weighted_stock),
}


def family(spread: float):
    """Experts whose angles with the base are as large as the spread says."""
    base, experts = make_family(THREE, "float32", num_hidden_layers=1, **CUT)

    def further(expert: MemorySource) -> dict[str, np.ndarray]:
        return {n: start + np.float32(spread) * (expert.tensors[n] - start) for n, start in base.tensors.items()}

    return base, {name: MemorySource(base.config, further(expert)) for name, expert in experts.items()}


def merged(case: str, given: tuple, base, experts):
    count, options, formula = given
    method = case.split(",")[0]
    chosen = {name: experts[name] for name in THREE[:count]}
    weighed = ("base", *chosen) if COMBINATIONS[METHODS[method].combine].weighs_base else chosen
    coefficients = {name: WEIGHTS[name] for name in weighed}
    config = MergeConfig(tuple(chosen), method=method, coefficients=coefficients, **options)
    weights = [coefficients.get(name, 1.0) for name in ("base", *chosen)]
    return merge_to_arrays(base, chosen, config, layout=Layout(1)).tensors, chosen, weights, formula


@pytest.mark.parametrize("spread", [pytest.param(1.0, marks=pytest.mark.slow), 20.0])
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_its_formula_of_every_tensor(case, spread):
    """Within 2 ulp of the largest of the models, in float32: the coefficients and three products are rounded to it."""
    base, experts = family(spread)
    found, chosen, weights, formula = merged(case, CASES[case], base, experts)
    for name, array in base.tensors.items():
        models = [source.tensors[name].astype(np.float64) for source in (base, *chosen.values())]
        wanted = formula(models, weights)
        size = max(np.abs(model).max() for model in models)
        assert np.abs(found[name] - wanted).max() <= 4 * np.spacing(np.float32(size)), name
        assert case == "passthrough" or not np.array_equal(found[name], array), name


@pytest.mark.parametrize("case", ROWS)
def test_with_rows_compared_every_row_is_a_tensor(case):
    base, experts = family(20.0)
    found, chosen, weights, formula = merged(case, ROWS[case], base, experts)
    whole, *_ = merged(case, CASES[case], base, experts)
    for name in base.tensors:
        models = [np.atleast_2d(source.tensors[name]).astype(np.float64) for source in (base, *chosen.values())]
        wanted = np.array([formula([model[row] for model in models], weights) for row in range(len(models[0]))])
        size = max(np.abs(model).max() for model in models)
        assert np.abs(np.atleast_2d(found[name]) - wanted).max() <= 4 * np.spacing(np.float32(size)), name
        assert base.tensors[name].ndim == 1 or not np.array_equal(found[name], whole[name]), name


@pytest.mark.parametrize(("t", "model"), [(0.0, "base"), (1.0, "math")])
def test_slerp_ends_at_the_models_themselves(t, model):
    base, experts = family(20.0)
    config = MergeConfig(("math",), method="slerp", coefficients={"math": t})
    found = merge_to_arrays(base, {"math": experts["math"]}, config, layout=Layout(1)).tensors
    assert_same_bits(found, {"base": base, **experts}[model].tensors)


def test_directions_that_cancel_have_no_mean():
    gram = np.array([[[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]])
    with pytest.raises(ValueError, match="cancel"):
        multislerp(gram, np.ones((1, 3)), {"normalize": np.ones(1)})


@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher"])
def test_coefficients_that_add_up_to_0_are_refused(method):
    base, experts = family(1.0)
    config = MergeConfig(("math",), method=method, coefficients={"base": 1.0, "math": -1.0})
    with pytest.raises(ValueError, match=r"--method=.*: the coefficients add up to 0"):
        merge_to_arrays(base, {"math": experts["math"]}, config, layout=Layout(1))


def test_every_whole_method_is_compared():
    """What solves for linears is compared in tests/merging/test_regmean.py."""
    assert {case.split(",")[0] for case in CASES} == {name for name, whole in WHOLE.items() if not whole.solve}


WRONG = {
    "two experts": (("math", "law"), {"method": "slerp"}, "exactly 1 experts"),
    "one expert": (("math",), {"method": "model_stock"}, "at least 2 experts"),
    "a weight of the base": (("math",), {"method": "slerp", "coefficients": {"base": 1.0}}, "none for the base"),
    "a score": (("math",), {"method": "slerp", "score": "magnitude"}, "leave --score out"),
    "a rate of a tensor": (("math",), {"method": "slerp", "tensor_rates": (("q_proj", 0.5),)}, "prunes nothing"),
    "q": (("math",), {"method": "slerp", "q": {"math": 0.5}}, "--q"),
    "rows of a mean": (("math",), {"method": "linear", "compare": "row"}, "compares nothing"),
    "an option of another method": (("math",), {"method": "slerp", "method_options": {"normalize": 0.0}}, "no such"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_method_has_no_use_for_is_refused(wrong):
    experts, given, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        MergeConfig(experts, **given)


@pytest.mark.parametrize("given", [["base=0.5", "0.25"], ["0.25", "base=0.5"], ["found.json"]])
def test_the_command_line_weighs_the_base(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found.json").write_text('{"coefficients": {"math": 0.25, "base": 0.5}}')
    flags = {"base": "demo:base", "expert": ["math=demo:math"], "method": "linear", "coefficient": given}
    values = {name: said.default for name, said in BY_NAME.items()} | flags
    assert job_config(values).merge.coefficients == {"math": 0.25, "base": 0.5}
