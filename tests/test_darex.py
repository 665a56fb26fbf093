"""DAREx in merges: random columns and rows, WANDA within rows."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import MemorySource, assert_same_bits, linear_names, make_family, merge_to_arrays, random_norms

from dppa_jax.config.merge import MergeConfig

EXPERTS = ("math", "law")


WHOLE = ("random_row", "random_column")


@pytest.fixture(scope="module")
def models():
    return make_family(EXPERTS, "float32")


def deltas(models, method: str, **options) -> dict[str, np.ndarray]:
    """The pruned delta of the first expert, by tensor."""
    config = MergeConfig(EXPERTS, method, **{"rate": 0.9} | options)
    norms = random_norms(models[0], EXPERTS)
    return merge_to_arrays(*models, config, deltas=True, norms=norms).deltas["math"]


def dense(models) -> dict[str, np.ndarray]:
    base, experts = models
    return {name: experts["math"].tensors[name] - array for name, array in base.tensors.items()}


@pytest.mark.parametrize("score", WHOLE)
def test_9_rows_and_columns_go_as_a_whole_at_about_the_rate(score, models):
    """Each is all zero, or its delta times 1/q; masks differ between linears; the recipe has the share that is kept."""
    q = 0.25 if score == "random_column" else 1.0
    axis = WHOLE.index(score)
    options = {"method": "darex_q", "q": dict.fromkeys(EXPERTS, q)} if axis else {"method": "magnitude"}
    config = MergeConfig(EXPERTS, score=score, rate=0.9, **options)
    merge = merge_to_arrays(*models, config, deltas=True)
    whole, linears, units, masks = dense(models), linear_names(models[0].config), [], {}
    for place, name in enumerate(linears):
        found = np.moveaxis(merge.deltas["math"][name], axis, 0)
        kept = (found != 0).any(axis=1)
        wanted = np.moveaxis(whole[name] * np.float32(1 / q), axis, 0)
        np.testing.assert_array_equal(found, np.where(kept[:, None], wanted, 0))
        assert merge.outcome.densities[0, 0, place] == pytest.approx(kept.mean(), abs=1e-12)
        units += [*kept]
        masks[name] = kept
    assert abs(np.mean(units) - 0.1) < 5 * np.sqrt(0.09 / len(units))
    same_length = [masks[n].tobytes() for n in linears if len(masks[n]) == len(masks[linears[0]])]
    assert len(set(same_length)) > 1


def test_10_wanda_is_the_reference_mask_of_rows_and_of_linears(golden, models):
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


def test_10_wanda_is_magnitude_where_all_inputs_have_one_norm(models):
    base, _ = models
    level = {e: {n: np.ones_like(a) * 2 for n, a in of.items()} for e, of in random_norms(base, EXPERTS).items()}
    wanda = merge_to_arrays(*models, MergeConfig(EXPERTS, "wanda", rate=0.8), deltas=True, norms=level)
    assert_same_bits(wanda.deltas["math"], deltas(models, "magnitude", rate=0.8))


def test_rows_are_cut_at_the_rank_and_nothing_is_counted(models):
    found = deltas(models, "magnitude", rate=0.75, compare="row")
    for name in linear_names(models[0].config):
        columns = found[name].shape[1]
        np.testing.assert_array_equal((found[name] != 0).sum(axis=1), columns - int(columns * 0.75))
