"""Check 8 of the design of DAREx: adapters as experts; and masks on their factors in place of the product."""

from pathlib import Path

import numpy as np
import pytest
from adapters import PREFIX, PROJECTIONS, factors, write_adapter
from command import launch, tree
from families import llama_config, random_weights, read_json, write_model
from safetensors.numpy import load_file
from small_models import model_of

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.draws import hashed, row_words
from dppa_jax.merging.lora_factors import thinned
from dppa_jax.where import open_checkpoint

CONFIG = llama_config(num_hidden_layers=2, dtype="float32")
BASE = random_weights(CONFIG)
RATE, Q, SCALE = 0.5, 0.7, 2.5
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("lora") / "base", CONFIG, BASE)


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return write_adapter(base.parent / "adapter", factors(BASE))


def tensors_of(where: str) -> dict[str, np.ndarray]:
    source = open_checkpoint(where)
    return {name: source.read(name) for name in source.specs}


def read_rows(source, name: str) -> np.ndarray:
    out = np.empty(source.specs[name].shape, np.float32)
    source.read_rows(name, 0, len(out), out)
    return out


def kept(factor: str, array: np.ndarray, expert: str = "math", seed: int = 0) -> np.ndarray:
    """The mask of a factor over q."""
    rows, columns = array.shape
    u = hashed(row_words(seed, expert, factor, 0, rows), np.arange(columns)[None])
    return (u >= RATE * 2**32) / Q


def test_lora_of_the_golden_files(golden):
    """Scale, the tensors that change, and what peft's merge gives."""
    adapter, facts = golden / "darex" / "lora" / "adapter", read_json(golden / "darex" / "lora" / "facts.json")
    base, merged = (
        golden / "family" / "fp32" / "base",
        load_file(golden / "darex" / "lora" / "merged_layer1.safetensors"),
    )
    before, after = tensors_of(str(base)), tensors_of(f"{base}+{adapter}")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert (len(changed), len(before) - len(changed)) == (16, 23)
    assert changed == facts["tensors"].keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(after[name], tensor, rtol=0, atol=1e-8)
    for name, fact in facts["tensors"].items():
        delta = after[name].astype(float) - before[name]
        np.testing.assert_allclose(np.linalg.norm(delta), fact["frobenius_of_delta"], rtol=1e-6)
        assert np.linalg.matrix_rank(delta, tol=1e-5) <= 4


def test_deltas_are_products_of_pruned_factors_and_are_not_pruned_again(base, adapter, tmp_path):
    """By the command line, with saved deltas; recipe.json and the model card say what is gone of the factors."""
    other = write_adapter(tmp_path / "other", factors(BASE, seed=1))
    flags = [f"--base={base}", f"--expert=math={adapter}", f"--expert=law={other}", "--lora_factors", f"--rate={RATE}"]
    output = tmp_path / "out"
    launch(*flags, "--method=darex_q", f"--q={Q}", f"--output={output}", f"--save_delta={tmp_path / 'deltas'}")
    merged, total = load_file(output / SINGLE), {name: array.astype(np.float64) for name, array in BASE.items()}
    recipe, card = read_json(output / "recipe.json"), (output / "README.md").read_text()
    for expert, where in (("math", adapter), ("law", other)):
        deltas, stored = (
            load_file(tmp_path / "deltas" / expert / SINGLE),
            load_file(where / "adapter_model.safetensors"),
        )
        gone = of = 0
        for name, delta in deltas.items():
            module = name.removesuffix(".weight")
            if not module.endswith(PROJECTIONS):
                assert not delta.any()
                continue
            a, b = (stored[f"{PREFIX}{module}.lora_{letter}.weight"] for letter in "AB")
            masks = kept(f"{module}.lora_A", a, expert), kept(f"{name}.lora_B", b, expert)
            wanted = SCALE * (b * masks[1]) @ (a * masks[0])
            np.testing.assert_allclose(delta, wanted, rtol=0, atol=1e-6)
            assert np.count_nonzero(delta) > 1.5 * (1 - RATE) ** 2 * delta.size
            total[name] += wanted
            gone, of = gone + sum(int((mask == 0).sum()) for mask in masks), of + a.size + b.size
        assert recipe["experts"][expert]["gone"]["parameters"] == {"gone": gone, "of": of}
        assert recipe["experts"][expert]["gone"]["bytes"] == {"gone": 4 * gone, "of": 4 * of}
        assert f"Of the factors of '{expert}' {gone:,} of {of:,} parameters" in card
    for name in merged:
        np.testing.assert_allclose(merged[name], total[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("q", [1 - RATE, Q])
def test_the_mean_product_is_the_product_times_the_square_of_the_mean_factor(q, base, adapter):
    """So q = 1 − p has no bias: within 5 sigma over seeds."""
    source, name = open_checkpoint(f"{base}+{adapter}"), "model.layers.0.mlp.down_proj.weight"
    whole, shares = read_rows(source, name) - BASE[name], []
    for seed in range(400):
        config = MergeConfig(("math",), "darex_q", rate=RATE, q={"math": q}, seed=seed, lora_factors=True)
        found = read_rows(thinned({"math": source}, config)["math"], name) - BASE[name]
        shares.append((found * whole).sum() / np.square(whole).sum())
    sigma = np.std(shares) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - ((1 - RATE) / q) ** 2) < 5 * sigma < 0.1


@pytest.mark.parametrize("family", ["Phi3", "GPT-NeoX"])
def test_linears_that_share_a_factor_share_its_mask(family, tmp_path):
    """A of a module with q, k and v is one; rows of B are those of the linears, head by head in GPT-NeoX."""
    model_of(family, 0).save_pretrained(tmp_path / "base")
    module = {"Phi3": "self_attn.qkv_proj", "GPT-NeoX": "attention.query_key_value"}[family]
    stored = load_file(tmp_path / "base" / SINGLE)
    tensors = factors({n: w for n, w in stored.items() if w.ndim == 2}, (module.rpartition(".")[2],))
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=[module.rpartition(".")[2]])
    source = open_checkpoint(f"{tmp_path / 'base'}+{adapter}")
    config = MergeConfig(("math",), "darex_q", rate=RATE, q={"math": Q}, lora_factors=True)
    found = thinned({"math": source}, config)["math"]
    names = [
        n for n, s in source.specs.items() if s.layer == 1 and s.linear is not None and s.kind.startswith(module[:9])
    ]
    prefix = names[0].removesuffix(".weight").rpartition(".")[0]
    a = tensors[next(n for n in tensors if ".1." in n and "lora_A" in n)]
    b = tensors[next(n for n in tensors if ".1." in n and "lora_B" in n)]
    mask_a = kept(f"{prefix}.{module.rpartition('.')[2]}.lora_A", a)
    for name in names[:3]:
        place = source._low_rank[name].place
        own = np.empty((source.specs[name].rows, 4), np.float32)
        source.adapter.read_part(source._low_rank[name].factors.b.at(place, own.shape), 0, len(own), own)
        assert {row.tobytes() for row in own} < {row.tobytes() for row in b}
        wanted = SCALE * (own * kept(f"{name}.lora_B", own)) @ (a * mask_a)
        np.testing.assert_allclose(read_rows(found, name) - source.base.read(name), wanted, rtol=0, atol=1e-6)


def test_a_q_below_the_density_is_warned_of(base, adapter, caplog):
    source = open_checkpoint(f"{base}+{adapter}")
    for q, told in ((1 - RATE, 0), (0.9 * (1 - RATE), 1)):
        thinned({"math": source}, MergeConfig(("math",), "darex_q", rate=RATE, q={"math": q}, lora_factors=True))
        assert caplog.text.count("of the factors of its adapter") == told


def test_rows_have_the_same_bits_whoever_asks_for_them(base, adapter):
    config = MergeConfig(("math",), "dare", rate=RATE, lora_factors=True)
    source, name = (
        thinned({"math": open_checkpoint(f"{base}+{adapter}")}, config)["math"],
        "model.layers.1.mlp.down_proj.weight",
    )
    whole = read_rows(source, name)
    for start, stop in ((0, 1), (5, 32), (31, 32)):
        rows = np.empty((stop - start, whole.shape[1]), np.float32)
        source.read_rows(name, start, stop, rows)
        np.testing.assert_array_equal(rows, whole[start:stop])


REFUSED = {
    "--method=ties": "only --score=random (dare, darex_q) prunes factors, not 'magnitude'",
    "--method=task_arithmetic": "prunes factors, not None",
    "--method=darex_q_columns --q=0.5": "prunes factors, not 'random_column'",
    "--method=della": "prunes factors, not 'della'",
    "--method=dare_dpa": "--scale=partition weighs no factors",
    "--method=dare --tensor_rate=q_proj=0.5": "have one rate and one q",
    "--method=darex_q --q=auto": "q is given as a number",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_factors_do_not_have_is_refused(flags, base, adapter, tmp_path):
    given = [f"--base={base}", f"--expert=math={adapter}", f"--output={tmp_path / 'out'}", "--lora_factors"]
    with pytest.raises(SystemExit) as error:
        launch(*given, *flags.split())
    assert REFUSED[flags] in error.value.code


def test_experts_that_are_no_adapters_of_the_base_are_refused(base, adapter, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = write_adapter(tmp_path / "whole", factors(BASE, ("v_proj",)) | {f"{PREFIX}{name}": BASE[name] + 1})
    launch("--job=convert", f"--base={base}+{adapter}", f"--output={tmp_path / 'model'}")
    for expert, message in (
        (tmp_path / "model", "is no adapter of --base"),
        (f"{tmp_path / 'model'}+{adapter}", "is no adapter of --base"),
        (f"{base}+{adapter}+{adapter}", "is no adapter of --base"),
        (whole, f"has {name} whole"),
    ):
        before = tree(tmp_path)
        with pytest.raises(SystemExit) as error:
            launch(
                *(f"--base={base}", f"--expert=math={expert}", f"--output={tmp_path / 'out'}"),
                *("--lora_factors", "--method=dare"),
            )
        assert message in error.value.code
        assert tree(tmp_path) == before
