"""Heads and neurons go as a whole, from all linears of their group; the groups are written out here once more."""

from collections.abc import Iterator

import numpy as np
import pytest
from families import llama_config
from support import MemorySource, Merge, assert_same_bits, heavy_tailed, linear_names, merge_to_arrays, random_norms

from dppa_jax.checkpoint import tensor_specs
from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.gone import gone_of
from dppa_jax.merging.merger import Layout

EXPERTS = ("math", "law")
RATE = 0.6
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "dtype": "float32"}
MODELS = {
    "Llama": llama_config(**SMALL, num_attention_heads=10, num_key_value_heads=5, head_dim=4),
    "Mixtral": {
        **llama_config(**SMALL, num_attention_heads=6, head_dim=4),
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 3,
    },
    "GPT-NeoX": llama_config(**SMALL, num_attention_heads=6, num_key_value_heads=None)
    | {"architectures": ["GPTNeoXForCausalLM"]},
}
COLUMNS = ("o_proj", "down_proj", "dense", "dense_4h_to_h")  # linears whose columns are units; of others the rows are
SCORES = ("random_group", "group", "wanda_group")
FAST = (("random_group", "Llama"), ("group", "GPT-NeoX"), ("wanda_group", "Mixtral"))


def family(model: str) -> tuple[MemorySource, dict[str, MemorySource]]:
    config, generator = MODELS[model], np.random.default_rng(0)
    base = {n: generator.normal(0, 0.2, s.shape).astype(np.float32) for n, s in tensor_specs(config).items()}
    experts = {e: heavy_tailed(base, np.random.default_rng(i + 1)) for i, e in enumerate(EXPERTS)}
    return MemorySource(config, base), {e: MemorySource(config, tensors) for e, tensors in experts.items()}


def groups(config: dict) -> dict[str, list[tuple[str, int]]]:
    """The linears of every group and, of each, the axis that units lie on; by the module that they are in."""
    found: dict[str, list[tuple[str, int]]] = {}
    for name in linear_names(config):
        module, _, own = name.removesuffix(".weight").rpartition(".")
        found.setdefault(module, []).append((name, int(own in COLUMNS)))
    return found


def count(config: dict, module: str) -> int:
    """How many heads of keys and values an attention has, how many neurons an MLP."""
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return heads if "attention" in module or "attn" in module else config["intermediate_size"]


def units_of(array: np.ndarray, axis: int, units: int) -> np.ndarray:
    """(units, elements)."""
    return np.moveaxis(array, axis, 0).reshape(units, -1)


def merged(model: str, score: str, mesh: str = "layer=1,row=1", layout: Layout | None = None, rate=RATE) -> Merge:
    base, experts = family(model)
    scaled = {"method": "darex_q", "q": {"math": 0.5, "law": 0.8}} if score == "random_group" else {"method": "wanda"}
    config = MergeConfig(EXPERTS, score=score, rate=rate, **scaled)
    return merge_to_arrays(base, experts, config, mesh, layout, True, random_norms(base, EXPERTS))


def kept_units(merge: Merge, model: str, expert: str, factor: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the units of each group that are kept, which are its delta times the factor in every linear."""
    base, experts = family(model)
    for module, linears in groups(MODELS[model]).items():
        units, masks = count(MODELS[model], module), []
        for name, axis in linears:
            dense = units_of(experts[expert].tensors[name] - base.tensors[name], axis, units)
            found = units_of(merge.deltas[expert][name], axis, units)
            masks.append((found != 0).any(axis=1))
            np.testing.assert_array_equal(found, np.where(masks[-1][:, None], dense * np.float32(factor), 0), name)
            np.testing.assert_array_equal(masks[-1], masks[0], f"{name} and {linears[0][0]}")
            place, e = linear_names(MODELS[model]).index(name), EXPERTS.index(expert)
            assert merge.outcome.densities[e, 0, place] == pytest.approx(masks[0].mean(), abs=1e-12)
        yield module, masks[0]


def importance(model: str, expert: str, linears: list[tuple[str, int]], units: int, by_norms: bool) -> np.ndarray:
    base, experts = family(model)
    norms, total = random_norms(base, EXPERTS)[expert], np.zeros(units)
    for name, axis in linears:
        size = abs(experts[expert].tensors[name] - base.tensors[name])
        size = size * norms[name] if by_norms else size
        total += units_of(size, axis, units).sum(axis=1, dtype=np.float64)
    return total


def some_slow(fast: str) -> list:
    return [pytest.param(score, marks=[] if score == fast else pytest.mark.slow) for score in SCORES]


CASES = [
    pytest.param(score, model, marks=[] if (score, model) in FAST else pytest.mark.slow)
    for score in SCORES
    for model in MODELS
]


@pytest.mark.parametrize(("score", "model"), CASES)
def test_units_go_from_all_linears_of_their_group(score, model):
    """Drawn at about the rate, or those of the least sums; and as many are said to be gone."""
    merge, drawn = merged(model, score), score == "random_group"
    masks = {}
    for expert, q in zip(EXPERTS, (0.5, 0.8), strict=True):
        for module, kept in kept_units(merge, model, expert, 1 / q if drawn else 1.0):
            masks[expert, module] = kept
            if not drawn:
                own = importance(model, expert, groups(MODELS[model])[module], len(kept), "wanda" in score)
                wanted = np.ones(len(kept), bool)
                wanted[np.argsort(own, kind="stable")[: int(len(kept) * RATE)]] = False
                np.testing.assert_array_equal(kept, wanted, module)
    gone = gone_of(MergeConfig(EXPERTS, "magnitude", score=score, rate=RATE), merge.outcome)
    for expert in EXPERTS:
        for kind, part in (("heads", "att"), ("neurons", "mlp")):
            own = np.concatenate([mask for (of, module), mask in masks.items() if of == expert and part in module])
            assert gone[expert][kind] == (int((~own).sum()), len(own))
        deltas = merge.deltas[expert]
        dropped = sum(int((deltas[name] == 0).sum()) for name in linear_names(MODELS[model]))
        assert gone[expert]["parameters"].gone == dropped
    if drawn:
        everything = np.concatenate(list(masks.values()))
        assert abs(everything.mean() - (1 - RATE)) < 5 * np.sqrt(RATE * (1 - RATE) / len(everything))
        neurons = [mask.tobytes() for (_, module), mask in masks.items() if "mlp" in module]
        assert len(set(neurons)) == len(neurons)  # of every layer, expert of a mixture, and expert its own


@pytest.mark.parametrize(
    "score", [pytest.param(s, marks=[] if s == "wanda_group" else pytest.mark.slow) for s in SCORES]
)
def test_the_same_bits_on_any_mesh_and_in_any_blocks(score, monkeypatch):
    """Also where gate, up and down of a mixture's expert lie in blocks of their own."""
    wanted = merged("Mixtral", score)
    found = [merged("Mixtral", score, "layer=4,row=2", Layout(1))]
    monkeypatch.setattr("dppa_jax.merging.blocks.CACHED", 1)
    monkeypatch.setattr("dppa_jax.merging.blocks.MOST", 1)
    found.append(merged("Mixtral", score, layout=Layout(1, small_blocks=True)))
    for merge in found:
        assert_same_bits(merge.tensors, wanted.tensors)
        np.testing.assert_array_equal(merge.outcome.densities, wanted.outcome.densities)


def test_units_that_are_not_known_or_have_several_rates_are_refused(merge):
    message = merge.refusal("--architecture=generic", "--method=magnitude", "--score=group")
    assert "is known only of families that the table of architectures has" in message
    base, experts = family("Llama")
    rules = {"tensor_rates": (("k_proj", 0.5),)}
    with pytest.raises(ValueError, match=r"q_proj.weight and model.layers.0.self_attn.k_proj.weight get several rates"):
        merge_to_arrays(base, experts, MergeConfig(EXPERTS, "magnitude", score="group", **rules))
    whole = {"tensor_rates": (("self_attn", 0.2),)}
    found = merge_to_arrays(base, experts, MergeConfig(EXPERTS, "magnitude", score="group", **whole))
    assert set(found.outcome.densities[0, 0, :7]) == {0.8, 1 - 36 / 40}
