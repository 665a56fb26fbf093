"""Breadcrumbs: both ends of |δ| are removed. Davari & Belilovsky 2023, arXiv 2312.06795."""

import numpy as np
import pytest
from support import linear_names, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig


@pytest.mark.parametrize(("rate", "gamma"), [(0.8, 0.01), pytest.param(0.6, 0.1, marks=pytest.mark.slow), (0.05, 0.2)])
def test_the_largest_and_the_smallest_are_removed_and_the_rest_is_as_it_was(rate, gamma):
    """Of n elements sorted by |δ|, those after int(n·(p−γ)) up to int(n·(1−γ)) are kept, as they are."""
    base, experts = make_family(("math",), "float32")
    config = MergeConfig(
        ("math",), method="breadcrumbs", rate=rate, method_options={"breadcrumbs_gamma": gamma}, output_dtype="float32"
    )
    deltas = merge_to_arrays(base, experts, config, deltas=True).deltas["math"]
    gamma = min(gamma, rate)
    for name, tensor in experts["math"].tensors.items():
        dense = tensor - base.tensors[name]
        wanted = dense
        if name in linear_names(base.config):
            size = np.sort(abs(dense), axis=None)
            low, high = (size[min(int(size.size * p), size.size - 1)] for p in (rate - gamma, 1 - gamma))
            kept = (abs(dense) <= high) & ((abs(dense) > low) | (rate == gamma))
            wanted = np.where(kept, dense, 0)
            assert kept.mean() == pytest.approx(1 - rate, abs=0.01), name
        np.testing.assert_array_equal(deltas[name], wanted, err_msg=name)


def test_gamma_0_is_magnitude_pruning():
    base, experts = make_family(("math",), "float32")
    plain = MergeConfig(("math",), method="magnitude", rate=0.7)
    none = MergeConfig(("math",), method="breadcrumbs", rate=0.7, method_options={"breadcrumbs_gamma": 0.0})
    wanted, found = (merge_to_arrays(base, experts, config).tensors for config in (plain, none))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
