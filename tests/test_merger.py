"""Merging again with other factors: the same bits as a merge of its own, without the work that is done."""

import itertools

import numpy as np
import pytest
from support import ONE_DEVICE, MemorySink, assert_same_bits, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.merger import Layout, Merger
from dppa_jax.runtime.mesh import make_mesh

EXPERTS = ("math", "law")
FACTORS = {"math": (1.8, 0.7), "law": (0.0, 2.5)}
COEFFICIENTS = {"math": 0.3, "law": 0.9}


@pytest.fixture(scope="module")
def models():
    return make_family(EXPERTS, "bfloat16")


def merged(merger: Merger, base, **numbers) -> dict[str, np.ndarray]:
    sink = MemorySink()
    merger(sink, **numbers)
    return sink.arrays({name: spec.shape for name, spec in base.specs.items()})


FAST = (("dppa", False, ONE_DEVICE), ("dare_dpa", True, ONE_DEVICE))
WAYS = [
    pytest.param(*way, marks=[] if way in FAST else pytest.mark.slow)
    for way in itertools.product(("dppa", "dare_dpa"), (True, False), (ONE_DEVICE, "layer=1,row=8"))
]


@pytest.mark.parametrize(("method", "resident", "mesh"), WAYS)
def test_other_factors_and_coefficients_give_the_bits_of_a_merge_with_them(models, method, resident, mesh):
    base, experts = models
    config = MergeConfig(experts=EXPERTS, method=method, rate=0.8)
    merger = Merger(base, experts, config, make_mesh(mesh), Layout(2, resident), quiet=True)
    first = merged(merger, base)
    second = merged(merger, base, factors=FACTORS, coefficients=COEFFICIENTS)
    wanted = MergeConfig(experts=EXPERTS, method=method, rate=0.8, factors=FACTORS, coefficients=COEFFICIENTS)
    assert_same_bits(second, merge_to_arrays(base, experts, wanted).tensors)
    assert_same_bits(merged(merger, base), first, "back to the first factors")
    assert any((first[name] != second[name]).any() for name in first)


def test_resident_models_are_read_once_and_streamed_ones_once_more_for_every_merge(models):
    base, experts = models
    config = MergeConfig(experts=EXPERTS, method="dppa", rate=0.8)
    read = {}
    for resident in (True, False):
        merger = Merger(base, experts, config, make_mesh(ONE_DEVICE), Layout(1, resident), quiet=True)
        read[resident] = [merger(MemorySink(), factors=f).bytes_read for f in (None, FACTORS, None)]
    one_pass = read[True][0]
    assert read[True] == [one_pass] * 3
    assert read[False][0] > one_pass  # the survey reads the linears, too
    assert np.diff(read[False]).tolist() == [one_pass] * 2


def test_factors_that_do_not_fit_are_refused(models):
    base, experts = models
    config = MergeConfig(experts=EXPERTS, method="dppa", rate=0.8)
    merger = Merger(base, experts, config, make_mesh(ONE_DEVICE), Layout(1), quiet=True)
    with pytest.raises(ValueError, match="3 factors for the 2 partitions"):
        merger(MemorySink(), factors={"math": (1.0, 1.0, 1.0)})
