"""mergekit 0.1.5 on three experts: task arithmetic bit for bit and, by its conventions, TIES.

By our own conventions they differ: its TIES divides Σ 0.3·δ by Σ 0.3 over the agreeing, ours takes their mean. Both are
within 1 ulp of |base| + Σ|δ|, the largest number that either sum can pass through. The golden sce case is a method that
the engine does not have.
"""

import numpy as np
import pytest
from golden import EXPERTS
from safetensors.numpy import load_file
from support import assert_same_bits, linear_names, merge_to_arrays

from dppa_jax.config.merge import MergeConfig


@pytest.fixture(scope="module")
def models(open_model):
    return open_model("fp32", "base"), {name: open_model("fp32", name) for name in EXPERTS}


@pytest.fixture(scope="module")
def ties(models, golden) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ours and theirs, at density 0.2."""
    ours = merge_to_arrays(*models, MergeConfig(EXPERTS, method="ties", rate=0.8)).tensors
    return ours, load_file(golden / "mergekit" / "ties_d0.2_w0.3_normalize_true.safetensors")


def test_task_arithmetic_bit_for_bit(models, golden):
    config = MergeConfig(EXPERTS, method="task_arithmetic", coefficients=dict.fromkeys(EXPERTS, 0.3))
    found = merge_to_arrays(*models, config).tensors
    assert_same_bits(found, load_file(golden / "mergekit" / "task_arithmetic_w0.3.safetensors"))


def test_ties_of_linears_within_1_ulp(models, ties):
    """Density 0.2 keeps int(0.2·n) in mergekit and n − int(0.8·n) − 1 here: the same number for these sizes.

    Where a fifth of the size is whole mergekit keeps one more.
    """
    base, experts = models
    ours, theirs = ties
    for name in linear_names(base.config):
        size = ours[name].size
        assert int(0.2 * size) == size - int(0.8 * size) - 1
        changed = [(merged[name] != base.read(name)).sum() for merged in ties]
        assert changed[0] == changed[1] > 0.2 * size
        largest = abs(base.read(name)) + sum(abs(e.read(name) - base.read(name)) for e in experts.values())
        assert (abs(ours[name] - theirs[name]) <= np.spacing(largest)).all(), name


def test_ties_bit_for_bit_by_the_conventions_of_mergekit(models, ties):
    coefficients = dict.fromkeys(EXPERTS, 0.3)
    config = MergeConfig(EXPERTS, method="ties", rate=0.8, compatible="mergekit", coefficients=coefficients)
    assert_same_bits(merge_to_arrays(*models, config).tensors, ties[1])


def test_differs_from_mergekit_ties_leaves_embeddings_head_and_norms_untrimmed(models, ties):
    base, _ = models
    for name in base.specs.keys() - set(linear_names(base.config)):
        changed = [(merged[name] != base.read(name)).mean() for merged in ties]
        assert changed[0] > 0.99 > 0.7 > changed[1], name
