"""Check 10 of the design of DAREx: WANDA's masks are the reference's, within a row and within a linear."""

import numpy as np
from safetensors.numpy import load_file
from support import MemorySource, assert_same_bits, linear_names, make_family, merge_to_arrays, random_norms

from dppa_jax.config.merge import MergeConfig

EXPERTS = ("math", "law")


def test_wanda_is_the_reference_mask_of_rows_and_of_linears(golden):
    """The weights of the reference, tiled over a linear of the family; masks exact."""
    stored = load_file(golden / "darex/wanda/wanda.safetensors")
    delta, norms = stored["delta"], np.linalg.norm(stored["inputs"].astype(np.float64), axis=0).astype(np.float32)
    rows, columns = delta.shape
    base, experts = make_family(("math",), "float32", hidden_size=columns, intermediate_size=rows, num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = {n: np.zeros_like(a) for n, a in base.tensors.items()}
    expert = MemorySource(base.config, {**experts["math"].tensors, name: delta})
    known = random_norms(base, ("math",))
    known["math"][name] = norms
    for compare in ("row", "linear"):
        for rate in (0.1, 0.5, 0.6, 0.9):
            config = MergeConfig(
                ("math",), "wanda", rate=rate, compare=compare, ties="auto" if compare == "row" else "drop"
            )
            source = MemorySource(base.config, zeros)
            merge = merge_to_arrays(source, {"math": expert}, config, deltas=True, norms=known)
            np.testing.assert_array_equal(
                merge.deltas["math"][name] != 0, stored[f"{compare}.{rate}"], f"{compare} {rate}"
            )


def test_wanda_is_magnitude_where_all_inputs_have_one_norm():
    models = base, _ = make_family(EXPERTS, "float32")
    level = {e: {n: np.ones_like(a) * 2 for n, a in of.items()} for e, of in random_norms(base, EXPERTS).items()}
    wanda = merge_to_arrays(*models, MergeConfig(EXPERTS, "wanda", rate=0.8), deltas=True, norms=level)
    magnitude = merge_to_arrays(*models, MergeConfig(EXPERTS, "magnitude", rate=0.8), deltas=True)
    assert_same_bits(wanda.deltas["math"], magnitude.deltas["math"])


def test_rows_are_cut_at_the_rank_and_nothing_is_counted():
    base, experts = make_family(EXPERTS, "float32")
    found = merge_to_arrays(base, experts, MergeConfig(EXPERTS, "magnitude", rate=0.75, compare="row"), deltas=True)
    for name in linear_names(base.config):
        delta = found.deltas["math"][name]
        np.testing.assert_array_equal((delta != 0).sum(axis=1), delta.shape[1] - int(delta.shape[1] * 0.75))
