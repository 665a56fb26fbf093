"""--job=validate: our merges and pruned deltas beside the files that the authors' code wrote, and beside broken ones.

Ours are made by the command line; the authors' tensors become a Hugging Face directory, as they would save them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from command import launch
from families import DTYPES, Q_PROJ, llama_config, random_weights, read_json, write_model
from safetensors.numpy import load_file

UP_PROJ = "model.layers.1.mlp.up_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.norm.weight"
EXPERTS = ("expert0", "expert1", "expert2")
DPA = ("--method=dppa", "--allocate=dp_reference", "--rate=0.8", "--factors=2.1,1.3", "--dpa_combine=max")


class Validate:
    """validate(ours, theirs, *flags) runs the job and returns validate.json; `told` is how it ended, "" if well."""

    def __init__(self, workdir: Path):
        self.workdir, self.told = workdir, ""

    def __call__(self, ours: Path, theirs: Path, *given: str) -> dict:
        self.told = ""
        try:
            launch("--job=validate", f"--output={ours}", f"--reference={theirs}", f"--workdir={self.workdir}", *given)
        except SystemExit as ended:
            self.told = ended.code
        return read_json(self.workdir / "validate.json")


@pytest.fixture
def validate(tmp_path) -> Validate:
    return Validate(tmp_path / "work")


@pytest.fixture
def model(tmp_path) -> Callable[..., Path]:
    """model(tensors) writes a directory of the next name; without tensors, random weights in float32."""
    count = 0

    def write(tensors: Mapping[str, np.ndarray] | None = None, shards: int = 1, **changes) -> Path:
        nonlocal count
        count += 1
        config = llama_config(dtype="float32", **changes)
        return write_model(tmp_path / f"model{count}", config, tensors or random_weights(config), shards, False)

    return write


def changed(tensors: Mapping[str, np.ndarray], name: str, index: tuple, value) -> dict[str, np.ndarray]:
    """A copy with one element set."""
    array = tensors[name].copy()
    array[index] = value
    return {**tensors, name: array}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(llama_config(dtype="float32"))


# ---- beside the authors' code


@pytest.fixture(scope="module")
def merged(golden, tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """merged(dtype, experts, *flags) merges the golden family; (the model, the directory of the deltas)."""

    def make(dtype: str, experts: tuple[str, ...], *given: str) -> tuple[Path, Path]:
        root, family = tmp_path_factory.mktemp("ours"), golden / "family" / dtype
        models = [f"--base={family / 'base'}", *(f"--expert={name}={family / name}" for name in experts)]
        where = (f"--output={root / 'model'}", f"--save_delta={root / 'delta'}", "--mesh=layer=1,row=1")
        launch(*models, *where, *given)
        return root / "model", root / "delta"

    return make


@pytest.fixture
def theirs(golden, tmp_path) -> Callable[[Mapping[str, np.ndarray]], Path]:
    """Tensors of the authors' code as a directory."""
    config = read_json(golden / "family" / "fp32" / "base" / "config.json")
    return lambda tensors: write_model(tmp_path / "theirs", config, tensors, tokenizer=False)


def test_dppa_merge_is_identical_to_the_authors_merged_model(golden, merged, theirs, validate, capsys):
    ours, _ = merged("bf16", ("expert0",), *DPA, "--delta_dtype=bfloat16", "--output_dtype=float32")
    case = golden / "dpa" / "bf16-offset_bf16-prune" / "expert0" / "eight1.3_nine2.1"
    reference = theirs(load_file(case.with_name(f"{case.name}.merged.safetensors")))
    found = validate(ours, reference, f"--base={golden / 'family' / 'bf16' / 'base'}")
    assert validate.told == ""
    assert found["verdict"] == "identical"
    assert "verdict: identical (39 identical of 39 tensors)" in capsys.readouterr().out
    kept = {name: one["kept_by_both"] for name, one in found["tensors"].items() if "_proj" in name}
    removed = sum(found["tensors"][name]["elements"] - kept[name] for name in kept)
    assert removed == read_json(case.with_name(f"{case.name}.json"))["linear_zero"]


@pytest.mark.parametrize("rate", [pytest.param(0.8, marks=pytest.mark.slow), 0.9])
def test_saved_delta_is_identical_to_the_authors_pruned_offset(rate, golden, merged, theirs, validate):
    _, delta = merged("fp32", ("expert0",), "--method=dp", "--allocate=dp_reference", f"--rate={rate}")
    offset = load_file(golden / "offset" / "fp32" / "expert0.safetensors")
    folder = golden / "prune" / "fp32-offset_fp32-prune" / "expert0"
    facts = read_json(folder / f"{rate}_magnitude_owl_layer_wei.json")
    masks = load_file(folder / f"{rate}_magnitude_owl_layer_wei.mask.safetensors")
    kept = {n: np.unpackbits(bits)[: offset[n].size].reshape(offset[n].shape) for n, bits in masks.items()}
    found = validate(delta / "expert0", theirs({n: a * kept[n] if n in kept else a for n, a in offset.items()}))
    differing = {n for n, one in found["tensors"].items() if one["verdict"] != "identical"}
    signs = {n for n in differing if found["tensors"][n]["max_difference"] == 0}  # 0 · -x is -0, which is not pruned
    assert differing == signs
    assert validate.told == ""
    for linear in facts["linears"]:
        one = found["tensors"][f"model.layers.{linear['layer']}.{linear['name']}.weight"]
        assert one["sparsity"] == one["sparsity_of_reference"] == pytest.approx(linear["sparsity"], abs=1e-12)
        assert one["mask_agreement"] == 1


def test_dense_delta_is_identical_to_the_authors_offset(golden, merged, theirs, validate):
    _, delta = merged("bf16", ("expert0",), "--method=task_arithmetic", "--delta_dtype=bfloat16")
    found = validate(delta / "expert0", theirs(load_file(golden / "offset" / "bf16" / "expert0.safetensors")))
    assert found["verdict"] == "identical"


def test_mergelm_is_equal_within_1_ulp_of_what_is_added(golden, merged, theirs, validate):
    """Where base and deltas cancel, one rounding is thousands of the result's own ulps."""
    ours, _ = merged("fp32", EXPERTS, "--method=task_arithmetic", "--coefficient=0.3")
    reference = theirs(load_file(golden / "mergelm" / "task_arithmetic_scale0.3.safetensors"))
    found = validate(ours, reference, f"--base={golden / 'family' / 'fp32' / 'base'}")
    assert validate.told == ""
    assert found["verdict"] == "equal"
    assert found["in_words"].startswith("equal within 1 ulp, 5.43 % differ (2 identical, 37 equal of 39 tensors")
    assert max(one["ulp"] for one in found["tensors"].values()) <= 1
    assert max(one["own_ulp"] for one in found["tensors"].values()) > 1000
    validate(ours, reference)
    assert "not within --tolerance_ulp=1" in validate.told  # without the base its part in the sums is not known
    validate(ours, reference, "--tolerance_ulp=2")
    assert validate.told == ""


def test_mergekit_ties_differs_where_it_trims_what_we_do_not(golden, merged, theirs, validate):
    """Embeddings, head and norms: they are told apart from the linears, which are equal."""
    ours, _ = merged("fp32", EXPERTS, "--method=ties", "--rate=0.8")
    reference = theirs(load_file(golden / "mergekit" / "ties_d0.2_w0.3_normalize_true.safetensors"))
    found = validate(ours, reference, f"--base={golden / 'family' / 'fp32' / 'base'}")
    assert found["verdict"] == "different"
    assert validate.told
    different = {one["kind"] for one in found["tensors"].values() if one["verdict"] == "different"}
    assert different == {"embed_tokens", "lm_head", "norms"}
    assert {one["verdict"] for one in found["tensors"].values() if one["kind"].endswith("_proj")} <= {
        "equal",
        "identical",
    }
    embeddings = found["tensors"][EMBEDDINGS]
    assert embeddings["kept_by_ours"] > 0.4 * embeddings["elements"]
    assert embeddings["sparsity"] < 0.01 < 0.4 < embeddings["sparsity_of_reference"]


# ---- what is broken is told


def test_one_element(model, weights, validate, capsys):
    wanted = float(weights[UP_PROJ][7, 5])
    found = validate(model(weights), model(changed(weights, UP_PROJ, (7, 5), wanted + 0.25)))
    assert validate.told == "--output is not within --tolerance_ulp=1 of --reference"
    one = found["tensors"].pop(UP_PROJ)
    assert {other["verdict"] for other in found["tensors"].values()} == {"identical"}
    assert (one["verdict"], one["differing"]) == ("different", 1)
    assert one["worst"] == {"index": [7, 5], "ours": wanted, "theirs": pytest.approx(wanted + 0.25)}
    assert one["max_difference"] == pytest.approx(0.25)
    assert one["mean_difference"] == pytest.approx(0.25 / one["elements"])
    assert one["relative"] == pytest.approx(0.25 / max(abs(weights[UP_PROJ]).max(), abs(wanted + 0.25)))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("verdict: different: ")
    assert said.endswith(f"1 different of {len(weights)} tensors; worst: {UP_PROJ})")


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_one_position_of_a_mask(who, model, weights, validate):
    """Deltas of which half is removed; one of the two keeps an element more."""
    deltas = {name: np.where(np.arange(a.size).reshape(a.shape) % 2, a, np.float32(0)) for name, a in weights.items()}
    more = changed(deltas, Q_PROJ, (3, 4), 0.01)
    models = (model(more), model(deltas)) if who == "ours" else (model(deltas), model(more))
    found = validate(*models)
    assert validate.told
    assert found["verdict"] == "masks differ"
    assert found["in_words"].startswith("masks differ at 1 position (")
    one = found["tensors"][Q_PROJ]
    size = one["elements"]
    assert one[f"kept_by_{who}"] == 1
    assert one["mask_agreement"] == 1 - 1 / size
    assert abs(one["sparsity"] - one["sparsity_of_reference"]) == pytest.approx(1 / size)


def test_masks_with_a_base_are_where_models_differ_from_it(model, weights, validate):
    """0 in a model is nothing special then, and a value equal to the base's is removed."""
    tuned = {name: array + np.float32(0.01) for name, array in weights.items()}
    ours = changed(tuned, Q_PROJ, (0, 0), 0.0)
    theirs = changed(ours, Q_PROJ, (1, 1), weights[Q_PROJ][1, 1])
    found = validate(model(ours), model(theirs), f"--base={model(weights)}")
    one = found["tensors"][Q_PROJ]
    assert (found["verdict"], one["kept_by_ours"], one["kept_by_theirs"]) == ("masks differ", 1, 0)
    assert one["kept_by_both"] == one["elements"] - 1
    delta = abs(theirs[Q_PROJ] - weights[Q_PROJ]).max()
    assert one["relative"] == pytest.approx(one["max_difference"] / delta, rel=1e-5)


def test_another_mask_and_another_value_is_different(model, weights, validate):
    theirs = changed(changed(weights, Q_PROJ, (3, 4), 0.0), Q_PROJ, (5, 6), 9.0)
    assert validate(model(weights), model(theirs))["verdict"] == "different"


def test_one_tensor(model, weights, validate):
    found = validate(model(weights), model({**weights, NORM: weights[NORM] * 2}))
    assert [name for name, one in found["tensors"].items() if one["verdict"] != "identical"] == [NORM]
    assert validate.told


def test_missing_and_extra_tensors_and_shapes_are_told(model, weights, validate, capsys):
    theirs = {name: array for name, array in weights.items() if name != NORM}
    theirs |= {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32), Q_PROJ: weights[Q_PROJ][:, :16].copy()}
    found = validate(model(weights), model(theirs))
    assert validate.told
    problems = {name: one["problem"] for name, one in found["tensors"].items() if one["problem"]}
    assert problems == {
        NORM: "missing in the reference",
        "model.layers.0.self_attn.q_proj.bias": "missing in the output",
        Q_PROJ: "the output's shape is (32, 32), the reference's (32, 16)",
    }
    printed = capsys.readouterr().out
    assert all(f"{name}: {problem}" in printed for name, problem in problems.items())


def test_nan_is_different_unless_both_have_the_same(model, weights, validate):
    broken = changed(weights, UP_PROJ, (2, 2), np.nan)
    found = validate(model(weights), model(broken))
    assert found["tensors"][UP_PROJ]["nonfinite"] == 1
    assert found["tensors"][UP_PROJ]["max_difference"] == 0
    assert "1 NaN or Inf" in found["in_words"]
    assert validate(model(broken), model(broken))["verdict"] == "identical"


# ---- what an ulp is


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_neighbouring_values_are_1_ulp_apart(dtype, model, weights, validate):
    stored = {name: array.astype(DTYPES[dtype]) for name, array in weights.items()}
    stored = changed(stored, UP_PROJ, (2, 3), 1.5)
    up = (stored[UP_PROJ][2:3, 3].view(f"u{stored[UP_PROJ].itemsize}") + 3).view(DTYPES[dtype])[0]
    models = model(stored), model(changed(stored, UP_PROJ, (2, 3), up))
    assert validate(*models, "--tolerance_ulp=3")["tensors"][UP_PROJ]["ulp"] == 3
    assert validate.told == ""
    validate(*models, "--tolerance_ulp=2")
    assert validate.told


def test_a_small_bfloat16_value_has_its_own_ulp(model, weights, validate):
    """bfloat16 results were rounded from float32, so small ones are as exact as large ones: nothing is excused."""
    stored = {name: array.astype(DTYPES["bfloat16"]) for name, array in weights.items()}
    models = [model(changed(stored, UP_PROJ, (2, 3), value)) for value in (0.001, 0.0011)]
    assert validate(*models)["tensors"][UP_PROJ]["ulp"] > 10


def test_zeros_of_other_sign_are_equal_within_0_ulp(model, weights, validate):
    zero, negative = (changed(weights, NORM, (0,), value) for value in (0.0, -0.0))
    found = validate(model(zero), model(negative), "--tolerance_ulp=0")
    assert found["in_words"].startswith("equal within 0 ulp")
    assert validate.told == ""


def test_a_finer_reference_is_rounded_to_our_dtype(model, weights, validate):
    ours = {name: array.astype(DTYPES["bfloat16"]) for name, array in weights.items()}
    found = validate(model(ours), model(weights))
    assert found["verdict"] == "identical"
    notes = {note for one in found["tensors"].values() for note in one["notes"]}
    assert notes == {"bfloat16 in the output, float32 in the reference; compared in bfloat16"}


# ---- layouts of files


def test_shards_and_pieces_change_nothing(model, validate):
    """Embeddings of more rows than are read at a time; the last element is broken."""
    weights = random_weights(llama_config(dtype="float32", vocab_size=9001))
    broken = changed(weights, EMBEDDINGS, (9000, 31), 7.0)
    size = {"vocab_size": 9001}
    assert validate(model(weights, **size), model(weights, shards=3, **size))["verdict"] == "identical"
    found = validate(model(weights, **size), model(broken, shards=3, **size))
    one = found["tensors"][EMBEDDINGS]
    assert one["worst"]["index"] == [9000, 31]
    assert one["kept_by_both"] == one["elements"] == 9001 * 32


@pytest.mark.parametrize("longer", ["ours", "theirs"])
def test_rows_beyond_the_others_vocabulary_are_named_and_ignored(longer, model, weights, validate, capsys):
    more = {n: np.concatenate([a, a[:1]]) if n in (EMBEDDINGS, "lm_head.weight") else a for n, a in weights.items()}
    models = [model(more, vocab_size=65), model(weights)]
    found = validate(*(models if longer == "ours" else reversed(models)), f"--base={models[1]}")
    assert found["verdict"] == "identical"
    what = {"ours": "output", "theirs": "reference"}[longer]
    assert found["tensors"][EMBEDDINGS]["notes"] == [f"row 64 is in the {what} only, ignored"]
    assert f"{EMBEDDINGS} and 1 more: row 64 is in the {what} only, ignored" in capsys.readouterr().out


def test_report_has_a_row_for_every_kind_and_json_every_tensor(model, weights, validate):
    found = validate(model(weights), model(weights))
    assert found["tensors"].keys() == weights.keys()
    report = (validate.workdir / "validate.md").read_text()
    table = [line.split("|") for line in report.splitlines() if line.startswith("|")]
    assert len({len(cells) for cells in table}) == 1
    rows = [cells[1].strip() for cells in table if cells[1] != "---"]
    linears = [f"{name}_proj (3)" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert rows == ["tensors", *linears, "embed_tokens (1)", "lm_head (1)", "norms (7)", f"all ({len(weights)})"]
    assert "Verdict: identical" in report


# ---- refusals


def test_a_pickle_is_refused_with_how_to_convert_it(model, weights, tmp_path, validate):
    theirs = model(weights)
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    with pytest.raises(SystemExit, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        launch("--job=validate", f"--output={model(weights)}", f"--reference={theirs}", f"--workdir={tmp_path}")


def test_another_models_base_is_refused(model, weights, tmp_path):
    other = model(hidden_size=64, num_attention_heads=8)
    models = (f"--output={model(weights)}", f"--reference={model(weights)}", f"--base={other}")
    with pytest.raises(SystemExit, match=r"error: .*is --base the model that both were made from"):
        launch("--job=validate", *models, f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--output=x",), "--reference is empty"),
        (("--reference=x",), "--output is empty"),
        (("--output=x", "--reference=x", "--tolerance_ulp=-1"), "--tolerance_ulp=-1.0: give 0 or more"),
        (("--output=nowhere", "--reference=nowhere"), "nowhere: no such directory"),
    ],
)
def test_what_is_missing_or_wrong_is_refused(given, said):
    with pytest.raises(SystemExit, match=said):
        launch("--job=validate", *given)
