"""--prune: embeddings, norms, biases and heads are pruned as linears are, by the same masks and thresholds."""

import re
from functools import cache

import numpy as np
import pytest
from merge_oracle import kept
from support import (
    AWKWARD,
    ONE_DEVICE,
    Merge,
    assert_same_bits,
    linear_names,
    make_family,
    merge_to_arrays,
    random_norms,
)

from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.merger import Layout

RATE = 0.6
HEAD = "lm_head.weight"
ONE_LAYER = Layout(1)
LINEARS, BACKBONE, ALL = "linears", "backbone", "all"


@cache
def family():
    return make_family(("math",), "float32", num_hidden_layers=2, attention_bias=True, **AWKWARD)


@cache
def merged(prune: str, method: str, mesh: str = ONE_DEVICE, layout: Layout = ONE_LAYER, **more) -> Merge:
    base, experts = family()
    config = MergeConfig(("math",), method=method, rate=RATE, prune=prune, **more)
    return merge_to_arrays(base, experts, config, mesh, layout, deltas=True, norms=random_norms(base, experts))


def deltas() -> dict[str, np.ndarray]:
    base, experts = family()
    return {name: array - base.tensors[name] for name, array in experts["math"].tensors.items()}


def pruned(prune: str) -> set[str]:
    linears = set(linear_names(family()[0].config))
    return {LINEARS: linears, BACKBONE: family()[0].tensors.keys() - {HEAD}, ALL: family()[0].tensors.keys()}[prune]


@pytest.mark.parametrize("prune", [LINEARS, BACKBONE, ALL])
def test_each_tensor_has_a_threshold_of_its_own(prune):
    found = merged(prune, "magnitude")
    for name, delta in deltas().items():
        wanted = np.where(kept(delta, RATE), delta, np.float32(0)) if name in pruned(prune) else delta
        np.testing.assert_array_equal(found.deltas["math"][name], wanted, err_msg=name)
    assert set(found.outcome.linears.names) == pruned(prune)


def test_dare_drops_and_rescales_all_but_the_head():
    found = merged(BACKBONE, "dare").deltas["math"]
    shares = []
    for name, delta in deltas().items():
        if name == HEAD:
            np.testing.assert_array_equal(found[name], delta)
            continue
        mask = found[name] != 0
        np.testing.assert_allclose(found[name], np.where(mask, delta * np.float32(1 / (1 - RATE)), 0), rtol=1e-6)
        shares.append((mask.sum(), mask.size))
    count, size = np.sum(shares, axis=0)
    assert abs(count / size - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / size)


def test_the_masks_of_linears_are_those_without_the_option():
    for method in ("dare", "wanda"):
        alone, wide = (merged(prune, method).deltas["math"] for prune in (LINEARS, ALL))
        assert_same_bits({n: wide[n] for n in pruned(LINEARS)}, {n: alone[n] for n in pruned(LINEARS)}, method)


@pytest.mark.parametrize("method", ["dare", "wanda"])
def test_the_bits_do_not_depend_on_devices_and_blocks(method):
    wanted = merged(ALL, method)
    for mesh, layout in (("layer=4,row=2", Layout(2)), ("layer=1,row=8", Layout(1, resident=True))):
        found = merged(ALL, method, mesh, layout)
        assert_same_bits(found.tensors, wanted.tensors, mesh)
        np.testing.assert_array_equal(found.outcome.densities, wanted.outcome.densities)


def test_what_has_no_q_takes_its_weights_or_the_mean():
    linears = linear_names(family()[0].config)
    q = dict(zip(linears, np.linspace(0.4, 0.9, len(linears)).tolist(), strict=True))
    config = MergeConfig(("math",), method="darex_q", rate=RATE, prune=ALL, q={"math": q})
    base, experts = family()
    found = merge_to_arrays(base, experts, config, deltas=True)
    mean = sum(q.values()) / len(q)
    for name, delta in deltas().items():
        own = q.get(name, q.get(re.sub("bias$", "weight", name), mean))
        mask = found.deltas["math"][name] != 0
        np.testing.assert_allclose(found.deltas["math"][name], np.where(mask, delta / own, 0), rtol=1e-5, err_msg=name)
    assert "model.layers.0.self_attn.q_proj.bias" in deltas()


def test_rates_that_fluctuate_over_layers_are_refused():
    with pytest.raises(ValueError, match="--prune=backbone: --allocate=dp spreads the rate over the linears"):
        MergeConfig(("math",), method="dppa", prune=BACKBONE)
