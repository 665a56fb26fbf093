"""`MergeConfig.tensor_options`: each tensor of each expert has the bits of a merge with its own number for all."""

import numpy as np
import pytest
from support import MemorySource, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.merger import Layout

EXPERTS = ("math", "law")
BASE, NEAR = make_family(EXPERTS, "bfloat16", num_hidden_layers=2)
NAMES = list(BASE.specs)
MODELS = {  # far enough apart that a step of Karcher's mean is seen
    expert: MemorySource(
        BASE.config, {name: start + 20 * (near.tensors[name] - start) for name, start in BASE.tensors.items()}
    )
    for expert, near in NEAR.items()
}


def by_tensor(one: float, other: float) -> dict[str, float]:
    """One number for MLPs, another one elsewhere."""
    return {name: one if "mlp" in name else other for name in NAMES}


def merged(experts=EXPERTS, **options) -> dict[str, np.ndarray]:
    models = {name: MODELS[name] for name in experts}
    return merge_to_arrays(BASE, models, MergeConfig(tuple(experts), **options), layout=Layout(1)).tensors


OPTIONS = {  # of a merge; option; two numbers; how one of them is said for a whole merge
    "lambda": ({"method": "ties"}, "lambda", (0.5, 1.25), lambda value: {"lambda_": value}),
    "divide": (
        {"method": "dare", "divide": "weights", "coefficients": {"law": 0.25}},
        "divide",
        (1.0, 0.0),
        lambda value: {"divide": "weights" if value else "none"},
    ),
    "rescale": ({"method": "magnitude"}, "rescale", (1.0, 0.0), lambda value: {"scale": "l1" if value else "none"}),
    "window": (
        {"method": "della", "rate": 0.5},
        "della_window",
        (0.1, 0.8),
        lambda value: {"method_options": {"della_window": value}},
    ),
    "gamma": (
        {"method": "breadcrumbs", "rate": 0.5},
        "breadcrumbs_gamma",
        (0.02, 0.2),
        lambda value: {"method_options": {"breadcrumbs_gamma": value}},
    ),
    "normalize": (
        {"method": "multislerp", "coefficients": {"base": 0.5}},
        "normalize",
        (1.0, 0.0),
        lambda value: {"method_options": {"normalize": value}},
    ),
    "steps": (
        {"method": "karcher", "coefficients": {"base": -0.5}},
        "karcher_iterations",
        (1.0, 8.0),
        lambda value: {"method_options": {"karcher_iterations": value}},
    ),
    "topk": ({"method": "sce"}, "sce_topk", (0.3, 1.0), lambda value: {"method_options": {"sce_topk": value}}),
    "epsilon": (
        {"method": "ram"},
        "ram_epsilon",
        (0.001, 0.02),
        lambda value: {"method_options": {"ram_epsilon": value}},
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_tensor_has_the_bits_of_its_own_number(case):
    common, option, values, said = OPTIONS[case]
    scale = {"scale": "l1"} if case == "rescale" else {}
    found = merged(**common, **scale, tensor_options={option: {"": by_tensor(*values)}})
    mlps, others = (merged(**{**common, **said(value)}) for value in values)
    for name in NAMES:
        wanted, other = (mlps, others) if "mlp" in name else (others, mlps)
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
        assert "proj" not in name or (found[name] != other[name]).any(), name


@pytest.mark.parametrize("case", ["window", "gamma"])
def test_an_expert_has_its_own_numbers(case):
    common, option, (one, other), said = OPTIONS[case]
    own = {option: {"math": one, "law": by_tensor(one, other)}}
    for expert, silent in (EXPERTS, EXPERTS[::-1]):
        found = merged(**common, coefficients={silent: 0.0}, tensor_options=own)
        first, second = (merged(**{**common, **said(value)}, coefficients={silent: 0.0}) for value in (one, other))
        for name in NAMES:
            wanted = second if expert == "law" and "mlp" not in name else first
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{expert} {name}")


REFUSED = {
    "an option that there is not": ({"lamda": {"": 1.0}}, "Did you mean 'lambda'"),
    "an option of another method": ({"sce_topk": {"": 0.5}}, "no option sce_topk; it has della_window, lambda"),
    "one for all experts": ({"lambda": {"math": 0.5}}, "tensor_options of lambda: one is for all experts"),
    "too large": ({"della_window": {"math": {"x": 1.5}}}, r"--della_window=1.5: outside \[0, 1\]"),
    "not finite": ({"lambda": {"": float("nan")}}, "tensor_options of lambda: nan is not a finite number"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_meant_is_refused(wrong):
    options, message = REFUSED[wrong]
    with pytest.raises(ValueError, match=message):
        MergeConfig(EXPERTS, method="della", tensor_options=options)


def test_tensors_without_a_number_and_allocations_are_refused():
    with pytest.raises(ValueError, match="lambda of 'all': none for the tensor"):
        merged(method="ties", tensor_options={"lambda": {"": {NAMES[0]: 0.5}}})
    with pytest.raises(ValueError, match="leave --allocate=owl out"):
        MergeConfig(EXPERTS, "breadcrumbs", allocate="owl", tensor_options={"breadcrumbs_gamma": {"": 0.1}})
