"""LiNeS: coefficients that grow over depth, with any method."""

import numpy as np
import pytest
from support import assert_same_bits, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.merger import Layout

LAYERS = 3
EXPERTS = ("math", "law")


def depth(name: str, tensors: list[str]) -> float:
    """0 in the first layer and before it, 1 in the last and after it."""
    if ".layers." in name:
        return int(name.split(".layers.")[1].split(".")[0]) / (LAYERS - 1)
    first = min(i for i, other in enumerate(tensors) if ".layers." in other)
    return 0.0 if tensors.index(name) < first else 1.0


@pytest.mark.parametrize("method", ["ties", pytest.param("linear", marks=pytest.mark.slow)])
def test_a_tensor_has_its_coefficient_times_that_of_its_depth(method):
    """As if the product had been given for each tensor."""
    base, experts = make_family(EXPERTS, "float32", num_hidden_layers=LAYERS)
    names = list(base.specs)
    factors = {name: 0.25 + 0.5 * depth(name, names) for name in names}
    assert len(set(factors.values())) == LAYERS
    given = {"math": 0.5, "law": 2.0}
    scaled = {expert: {name: own * factors[name] for name in names} for expert, own in given.items()}
    options = {} if method == "linear" else {"rate": 0.5}
    merges = [
        merge_to_arrays(base, experts, MergeConfig(EXPERTS, method=method, **options, **more), layout=Layout(1)).tensors
        for more in ({"coefficients": given, "depth_scaling": (0.25, 0.5)}, {"coefficients": scaled})
    ]
    assert_same_bits(*merges)
    plain = merge_to_arrays(base, experts, MergeConfig(EXPERTS, method=method, **options, coefficients=given))
    assert any(not np.array_equal(plain.tensors[name], merges[0][name]) for name in names)


def test_one_number_is_refused():
    with pytest.raises(ValueError, match="give two numbers"):
        MergeConfig(EXPERTS, method="ties", depth_scaling=(0.5,))
