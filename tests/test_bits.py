"""The promise of bit-identical output: a merge does not depend on the devices, the blocks, the residency or the run."""

from functools import cache

import numpy as np
import pytest
from support import (
    AWKWARD,
    ONE_DEVICE,
    MemorySource,
    Merge,
    assert_same_bits,
    experts_of,
    given_out,
    make_family,
    merge_to_arrays,
    random_grams,
    random_norms,
)

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.merging.merger import Layout

LAYERS = 3
EXPERTS = ("math", "law")
AXES = {
    "row": {"method": "magnitude", "score": "row"},
    "column": {"method": "magnitude", "score": "column"},
    "random_row": {"method": "magnitude", "score": "random_row"},
    "wanda_column": {"method": "magnitude", "score": "wanda_column"},
    "random_group": {"method": "darex_q", "score": "random_group"},
    "group": {"method": "magnitude", "score": "group"},
    "wanda_group": {"method": "magnitude", "score": "wanda_group"},
    "wanda_row": {"method": "wanda", "compare": "row"},
    "l1": {"method": "breadcrumbs", "scale": "breadcrumbs_l1"},
    "mergekit": {"method": "della", "compatible": "mergekit", "expert_rates": {"law": 0.3}, "lambda_": 0.7},
    "dp_reference": {"method": "dppa", "allocate": "dp_reference", "dpa_combine": "max"},
    "model_stock_row": {"method": "model_stock", "compare": "row"},
    "sce_topk": {"method": "sce", "method_options": {"sce_topk": 0.3}},
}
CHOICES = {**{name: {"method": name} for name in METHODS}, **AXES}
LAYOUTS = {
    "the same again": (ONE_DEVICE, Layout(1)),
    "blocks of 2 layers": (ONE_DEVICE, Layout(2)),
    "one block of all layers": (ONE_DEVICE, Layout(LAYERS)),
    "resident": (ONE_DEVICE, Layout(1, resident=True)),
    "8 devices on the layer axis": ("layer=8,row=1", Layout(LAYERS)),
    "4 by 2 devices": ("layer=4,row=2", Layout(2)),
    "2 by 4 devices, resident": ("layer=2,row=4", Layout(LAYERS, resident=True)),
    "8 devices on the row axis": ("layer=1,row=8", Layout(1)),
}
EVERYWHERE = ("dppa", "dare_ties", "row", "wanda")  # of each kind of score, by what it needs beside the delta, one
ELSEWHERE = ("4 by 2 devices",)
"""In blocks of two layers; the other layouts differ in what no score and combination sees."""
FAST = {  # a ranked score, a random one, and one that needs sums over all rows
    "dppa": ("the same again", "resident", "8 devices on the row axis"),
    "dare_ties": ("4 by 2 devices",),
    "column": ("4 by 2 devices",),
    "mergekit": ("4 by 2 devices",),
    "karcher": ("4 by 2 devices",),
    "linear": ("4 by 2 devices",),
    "regmean": ("4 by 2 devices",),
    "sce_topk": ("4 by 2 devices",),
}
PAIRS = [
    pytest.param(choice, layout, marks=[] if layout in FAST.get(choice, ()) else pytest.mark.slow)
    for choice in CHOICES
    for layout in LAYOUTS
    if choice in EVERYWHERE or layout in ELSEWHERE
]


@pytest.mark.parametrize(("choice", "layout"), PAIRS)
def test_output_bits_do_not_depend_on_devices_blocks_residency_or_run(choice, layout):
    wanted, found = merge(choice, ONE_DEVICE, Layout(1)), merge.__wrapped__(choice, *LAYOUTS[layout])
    assert_same_bits(found.tensors, wanted.tensors, "merged")
    for expert in wanted.deltas:
        assert_same_bits(found.deltas[expert], wanted.deltas[expert], f"delta of {expert}")
    for table in ("rates", "thresholds", "densities", "weights"):
        np.testing.assert_array_equal(getattr(found.outcome, table), getattr(wanted.outcome, table), table)


@pytest.mark.parametrize("mixed", ["base", pytest.param("math", marks=pytest.mark.slow)])
def test_dtypes_that_change_between_layers_of_a_block_do_not_change_the_bits(mixed):
    """Some published checkpoints keep a few layers in float32; each output tensor is rounded once, to its own dtype."""
    base, experts = family()
    models = {"base": base, **experts}
    tensors = {
        name: array.astype(np.float32) * np.float32(1 + 2**-20) if ".layers.1." in name else array
        for name, array in models[mixed].tensors.items()
    }
    models[mixed] = MemorySource(base.config, tensors)
    base, experts = models["base"], {name: models[name] for name in EXPERTS}
    wanted, *found = (
        merge_to_arrays(base, experts, config("task_arithmetic"), layout=Layout(block)) for block in (1, 2, LAYERS)
    )
    for merge in found:
        assert_same_bits(merge.tensors, wanted.tensors)
    assert {name: a.dtype for name, a in wanted.tensors.items()} == {name: a.dtype for name, a in base.tensors.items()}


def test_every_score_and_scale_is_among_the_choices():
    configs = [config(choice) for choice in CHOICES]
    assert {c.score for c in configs} == {None, *SCORES}
    assert {c.scale for c in configs} == set(SCALES)


@pytest.mark.parametrize("choices", [FAST, pytest.param(CHOICES, marks=pytest.mark.slow)], ids=["fast", "all"])
def test_the_compared_merges_prune_and_differ_from_one_another(choices):
    """What is compared above is neither the base nor the same for all choices."""
    outputs = [merge(choice, ONE_DEVICE, Layout(1)).tensors["model.layers.1.mlp.up_proj.weight"] for choice in choices]
    base = family()[0].tensors["model.layers.1.mlp.up_proj.weight"]
    assert len({array.tobytes() for array in [*outputs, base]}) == len(choices) + 1


@cache
def merge(choice: str, mesh: str, layout: Layout) -> Merge:
    base, experts = family()
    experts = {name: experts[name] for name in config(choice).experts}
    return merge_to_arrays(base, experts, config(choice), mesh, layout, deltas=True, norms=norms(), input_grams=grams())


def config(choice: str) -> MergeConfig:
    axes = CHOICES[choice]
    more = {"coefficients": {"math": 0.7}, "rate": 0.8, **axes}
    if axes["method"] in ("dppa", "dare_dpa"):
        more |= {"partitions": (0.9, 0.8), "factors": {"math": (1.8, 1.3), "law": (1.1, -0.4)}}
    if SCALES[METHODS[axes["method"]].scale].takes_q:
        more["q"] = {"math": 0.25, "law": 0.3}
    return MergeConfig(experts_of(axes["method"], EXPERTS), **more)


@cache
def family():
    return make_family(EXPERTS, num_hidden_layers=LAYERS, **AWKWARD)


@cache
def norms() -> dict:
    return random_norms(family()[0], EXPERTS)


@cache
def grams() -> dict:
    return given_out(random_grams(family()[0], EXPERTS))
