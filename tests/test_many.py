"""Sums of many checkpoints: they are read a few at a time, with the bits of all at once and the memory of a few."""

import numpy as np
import pytest
from support import AWKWARD, ONE_DEVICE, assert_same_bits, make_family, merge_to_arrays

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.config.merge import AT_A_TIME, MergeConfig
from dppa_jax.merging.merger import Layout
from dppa_jax.merging.plan import make_plan

MANY = tuple(f"step{i}" for i in range(2 * AT_A_TIME + 1))
COEFFICIENTS = {name: 0.1 + 0.05 * i for i, name in enumerate(MANY)}


@pytest.fixture(scope="module")
def family():
    return make_family(MANY, "float32", num_hidden_layers=1, **AWKWARD)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_experts_of_a_sum_are_added_a_few_at_a_time_with_the_bits_of_all_at_once(method, family):
    """Weights that are resident are all on the devices."""
    config = MergeConfig(MANY, method=method, coefficients=COEFFICIENTS)
    assert config.experts_at_a_time == AT_A_TIME
    few, all_ = (merge_to_arrays(*family, config, ONE_DEVICE, Layout(1, r), deltas=True) for r in (False, True))
    assert_same_bits(few.tensors, all_.tensors)
    for name in MANY:
        assert_same_bits(few.deltas[name], all_.deltas[name], name)


def test_a_mean_of_many_is_that_of_float64(family):
    base, experts = family
    found = merge_to_arrays(base, experts, MergeConfig(MANY, method="linear"), layout=Layout(1)).tensors
    for name, array in base.tensors.items():
        models = np.stack([array, *(expert.tensors[name] for expert in experts.values())]).astype(np.float64)
        np.testing.assert_allclose(found[name], models.mean(axis=0), atol=1e-6, err_msg=name)


def test_nan_in_an_expert_that_is_not_among_the_last_is_told(family):
    base, experts = family
    tensor = "model.layers.0.mlp.up_proj.weight"
    damaged = experts[MANY[1]].tensors[tensor].copy()
    damaged[3, 5] = np.nan
    other = type(base)(base.config, experts[MANY[1]].tensors | {tensor: damaged})
    with pytest.raises(CheckpointError, match=f"'{MANY[1]}' or the base: {tensor}"):
        merge_to_arrays(base, experts | {MANY[1]: other}, MergeConfig(MANY, method="linear"), layout=Layout(1))


def test_a_plan_of_fifty_has_the_memory_of_three(family):
    base, _ = family

    def peak(count: int, method: str) -> int:
        config = MergeConfig(tuple(f"step{i}" for i in range(count)), method=method)
        dtypes = ["float32"] * (1 + count)
        return make_plan(base.specs, dtypes, config, (1, 1), 1, "streamed", 0, "cpu").device_bytes

    assert peak(50, "linear") <= peak(3, "linear")
    assert peak(50, "ties") > 5 * peak(3, "ties")


def test_a_plan_tells_of_embeddings_that_are_read_twice(family):
    """Inner products of tensors that come in pieces are added up before."""
    base, _ = make_family(MANY[:2], "float32", num_hidden_layers=1, **AWKWARD | {"vocab_size": 501})

    def read(method: str) -> int:
        config = MergeConfig(MANY[:2], method=method)
        return make_plan(base.specs, ["float32"] * 3, config, (1, 1), 1, "streamed", 0, "cpu").bytes_read

    pieces = sum(spec.rows * spec.columns for name, spec in base.specs.items() if "embed" in name or "head" in name)
    assert read("model_stock") - read("linear") == 3 * 4 * pieces
