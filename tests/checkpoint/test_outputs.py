"""A merged directory is a model for transformers, and says what it is: recipe.json and the model card."""

import shlex

import numpy as np
import pytest
from command import Merge, launch, tree
from families import (
    CHAT_TEMPLATE,
    DTYPES,
    LINEARS,
    Q_PROJ,
    edit_json,
    fine_tuned,
    llama_config,
    random_weights,
    read_json,
    write_model,
)

from dppa_jax.checkpoint import SafetensorsDirectory

VERBATIM = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
TRANSFORMERS_4 = {"dtype": None, "rope_parameters": None, "rope_theta": 10000.0, "transformers_version": "4.31.0"}
SLOW = pytest.mark.slow


def read_all(directory) -> dict[str, np.ndarray]:
    source = SafetensorsDirectory(directory)
    return {name: source.read(name) for name in source.specs}


def write_family(merge: Merge, config: dict, base: dict) -> None:
    """Another base, and experts of it, for the command line."""
    for seed, name in enumerate(("base", "math", "law")):
        directory = merge.root / "others" / name
        write_model(directory, config, fine_tuned(base, seed) if seed else base)
        setattr(merge, name, directory)


# ---- for transformers


@pytest.mark.parametrize(
    ("changes", "flags", "dtype"),
    [
        pytest.param({}, [], "bfloat16", marks=SLOW),
        ({"tie_word_embeddings": True}, ["--max_shard_size=20000"], "bfloat16"),
        pytest.param({"num_key_value_heads": 4, "dtype": "float16"}, [], "float16", marks=SLOW),
        ({**TRANSFORMERS_4, "torch_dtype": "float32"}, ["--output_dtype=bfloat16"], "bfloat16"),
        pytest.param(
            {**TRANSFORMERS_4, "torch_dtype": "bfloat16"},
            ["--output_dtype=float32", "--max_shard_size=1"],
            "float32",
            marks=SLOW,
        ),
    ],
    ids=str,
)
def test_transformers_loads_what_was_written(merge, changes, flags, dtype):
    transformers = pytest.importorskip("transformers")
    config = llama_config(**changes)
    write_family(merge, config, random_weights(config))
    merge("--method=dare", *flags)

    model = transformers.AutoModelForCausalLM.from_pretrained(merge.output, dtype="auto")
    written = read_all(merge.output)
    assert str(model.dtype) == f"torch.{dtype}"
    loaded = model.state_dict()
    if config["tie_word_embeddings"]:
        assert loaded.pop("lm_head.weight").data_ptr() == loaded["model.embed_tokens.weight"].data_ptr()
    assert loaded.keys() == written.keys()
    for name, tensor in loaded.items():
        assert written[name].dtype == DTYPES[dtype]
        np.testing.assert_array_equal(tensor.float().numpy(), written[name].astype(np.float32), err_msg=name)

    assert model.generation_config.max_new_tokens == 7
    tokenizer = transformers.AutoTokenizer.from_pretrained(merge.output)
    assert tokenizer("word3 word5").input_ids == [6, 8]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi\n"


def test_values_are_those_of_task_arithmetic(merge):
    """In float32, base + 0.5·(math − base) + 0.25·(law − base), rounded once."""
    merge("--method=task_arithmetic", "--coefficient=math=0.5", "--coefficient=law=0.25")
    base, math, law, merged = (read_all(place) for place in (merge.base, merge.math, merge.law, merge.output))
    for name, b in base.items():
        b, m, w = (array.astype(np.float32) for array in (b, math[name], law[name]))
        wanted = (b + (np.float32(0.5) * (m - b) + np.float32(0.25) * (w - b))).astype(DTYPES["bfloat16"])
        np.testing.assert_array_equal(merged[name], wanted, err_msg=name)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("given", [None, "float16"])
def test_dtype_is_under_the_key_that_the_base_uses(merge, key, given):
    edit_json(merge.base / "config.json", **{"dtype": None, key: "bfloat16"})
    before = read_json(merge.base / "config.json")
    merge("--method=task_arithmetic", f"--output_dtype={given or ''}")
    assert read_json(merge.output / "config.json") == before | {key: given or "bfloat16"}


def test_dtype_of_a_config_that_is_wrong_or_silent(merge):
    edit_json(merge.base / "config.json", dtype=None)
    merge("--method=task_arithmetic")
    assert read_json(merge.output / "config.json")["torch_dtype"] == "bfloat16"
    edit_json(merge.base / "config.json", dtype="float32")
    merge("--method=task_arithmetic", "--overwrite")
    assert read_json(merge.output / "config.json")["dtype"] == "bfloat16", "that of the linears in the file"


def test_each_tensor_keeps_its_own_dtype(merge):
    config = llama_config()
    mixed = {name: a.astype(np.float32) if "norm" in name else a for name, a in random_weights(config).items()}
    mixed[Q_PROJ] = mixed[Q_PROJ].astype(np.float16)
    write_family(merge, config, mixed)
    merge("--method=task_arithmetic")
    assert {name: a.dtype for name, a in read_all(merge.output).items()} == {n: a.dtype for n, a in mixed.items()}
    merge("--method=task_arithmetic", "--overwrite", "--output_dtype=float32")
    assert {a.dtype for a in read_all(merge.output).values()} == {np.dtype(np.float32)}


def test_small_files_are_copied_verbatim(merge):
    (merge.law / "chat_template.jinja").write_text(CHAT_TEMPLATE + "law")
    merge("--method=task_arithmetic")
    for name in VERBATIM:
        assert (merge.output / name).read_bytes() == (merge.base / name).read_bytes(), name
    merge("--method=task_arithmetic", "--tokenizer=law", "--overwrite")
    assert (merge.output / "chat_template.jinja").read_text() == CHAT_TEMPLATE + "law"


def test_vocabulary_that_an_expert_added_is_dropped(merge):
    """As for Abel, which added a padding token."""
    config = llama_config(vocab_size=66)
    wider = fine_tuned(random_weights(llama_config()), 1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wider[name] = np.concatenate([wider[name], np.ones((2, 32), wider[name].dtype)])
    merge.math = write_model(merge.root / "wider", config, wider)
    merge("--method=task_arithmetic")
    assert read_json(merge.output / "config.json")["vocab_size"] == 64
    assert read_all(merge.output)["lm_head.weight"].shape == (64, 32)


@pytest.mark.parametrize("method", [pytest.param("dppa", marks=SLOW), "dare", "task_arithmetic"])
def test_saved_deltas_add_up_to_the_merge(merge, method):
    """base + Σ coefficient · delta in float32 is the merge, and a delta is a directory that can be read."""
    merge(f"--method={method}", "--coefficient=math=0.5", f"--save_delta={merge.root}/deltas", "--output_dtype=float32")
    base, merged = read_all(merge.base), read_all(merge.output)
    math, law = (read_all(merge.root / "deltas" / name) for name in ("math", "law"))
    assert read_json(merge.root / "deltas" / "law" / "config.json")["dtype"] == "float32"
    for name, b in base.items():
        wanted = b.astype(np.float32) + (np.float32(0.5) * math[name] + law[name])
        np.testing.assert_array_equal(merged[name], wanted, err_msg=name)
    if method != "task_arithmetic":
        linears = [name for name in base if name.endswith("proj.weight")]
        zeros = np.mean(np.concatenate([law[name].ravel() for name in linears]) == 0)
        assert 0.85 < zeros < 0.95


# ---- recipe.json


@pytest.fixture(scope="module")
def merged(pristine, tmp_path_factory):
    """One DPPA merge with two partitions and a tensor rule, and its command line."""
    root = tmp_path_factory.mktemp("merged")
    for name in ("base", "math", "law"):
        (root / name).symlink_to(pristine / name)
    (root / "merge.cfg").write_text(
        "# what this reproduces\n--rate=0.8\n--factors=math=1.8,1.3\n--factors=law=2,1\n// another comment\n\n"
        "--coefficient=law=0.5\n--tensor_rate=layers.1.mlp.up_proj=0\n"
    )
    merge = Merge(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPPA_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        merge(f"--flagfile={root}/merge.cfg")
    return merge


def test_recipe_has_every_flag_as_resolved(merged):
    recipe = read_json(merged.output / "recipe.json")
    flags, config = recipe["flags"], recipe["config"]
    assert flags["rate"] == 0.8
    assert flags["base"] == str(merged.base)
    assert flags["expert"] == [f"math={merged.math}", f"law={merged.law}"]
    assert {"seed", "mesh", "max_shard_size", "delta_dtype", "method", "tokenizer"} <= flags.keys()
    assert (config["score"], config["allocate"], config["scale"], config["combine"]) == (
        "magnitude",
        "dp",
        "partition",
        "sum",
    )
    assert config["partitions"] == [0.9, 0.8]
    assert recipe["factors"] == {"math": [1.8, 1.3], "law": [2.0, 1.0]}
    assert recipe["coefficients"] == {"math": 1.0, "law": 0.5}


def test_recipe_has_rates_and_thresholds_that_explain_the_weights(merged):
    """Per linear: kept are the deltas above the threshold, their share is the density, about 1 − the rate."""
    recipe = read_json(merged.output / "recipe.json")
    base = read_all(merged.base)
    for name, directory in (("math", merged.math), ("law", merged.law)):
        expert, of = read_all(directory), recipe["experts"][name]
        assert of.keys() == {"rates", "thresholds", "densities", "weights"}
        for p, rate in enumerate((0.9, 0.8)):
            assert {of[what][p]["rate"] for what in of} == {rate}
            by_tensor = {what: of[what][p]["by_tensor"] for what in of}
            names = [f"model.layers.{layer}.{linear}.weight" for layer in range(3) for linear in LINEARS]
            assert all(list(values) == names for values in by_tensor.values())
            for tensor in names:
                delta = np.abs(expert[tensor].astype(np.float32) - base[tensor].astype(np.float32))
                density = np.mean(delta > np.float32(by_tensor["thresholds"][tensor]))
                assert by_tensor["densities"][tensor] == pytest.approx(density, rel=1e-12)
                rate = by_tensor["rates"][tensor]
                assert abs(density - (1 - rate)) < 0.02
                assert by_tensor["weights"][tensor] == (0 if rate == 1 else recipe["factors"][name][p])
                assert (rate == 0) == (tensor == "model.layers.1.mlp.up_proj.weight")
            down = {by_tensor["rates"][f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(3)}
            assert len(down) == 3, "DP varies them"


def test_recipe_has_inputs_versions_and_cost(merged):
    recipe = read_json(merged.output / "recipe.json")
    assert recipe["inputs"].keys() == {"base", "math", "law"}
    for name, entry in recipe["inputs"].items():
        assert entry["where"] == str(merged.root / name)
        assert entry["fingerprint"] == SafetensorsDirectory(merged.root / name).fingerprint()
    assert len({entry["fingerprint"] for entry in recipe["inputs"].values()}) == 3
    assert {"dppa_jax", "jax", "numpy", "safetensors"} <= recipe["versions"].keys()
    cost = recipe["cost"]
    assert cost["bytes_written"] == (merged.output / "model.safetensors").stat().st_size
    whole = sum(array.nbytes for array in random_weights(llama_config()).values())
    layers = sum(array.nbytes for name, array in random_weights(llama_config()).items() if ".layers." in name)
    assert cost["bytes_read"] == 3 * (whole + layers), "decoder layers twice, the rest once, of three models"
    assert 0 < cost["seconds"] < 600
    assert cost["peak_memory"] > whole


# ---- the model card


def front_matter(directory) -> dict:
    yaml = pytest.importorskip("yaml")
    start, metadata, _ = (directory / "README.md").read_text().split("---\n", 2)
    assert start == ""
    return yaml.safe_load(metadata)


def test_card_metadata(merged):
    metadata = front_matter(merged.output)
    assert metadata["merged_models"] == [str(merged.math), str(merged.law)]
    assert not {"base_model", "base_model_relation"} & metadata.keys(), "the hub links to models on the hub"
    assert metadata["library_name"] == "transformers"
    assert metadata["license"] == "unknown"
    assert {"merge", "dppa"} <= set(metadata["tags"])


def test_card_tells_method_factors_and_coefficients(merged):
    card = (merged.output / "README.md").read_text()
    assert "method `dppa`" in card
    assert f"| math | `{merged.math}` | 1 | 1.8, 1.3 |" in card
    assert f"| law | `{merged.law}` | 0.5 | 2, 1 |" in card
    assert "80 % of each expert's delta is removed" in card


def test_card_metadata_of_places_with_odd_characters(merge):
    odd = merge.root / "llama: #2 'x' \"y\""
    merge.law.rename(odd)
    merge.law = odd
    merge("--method=task_arithmetic")
    assert front_matter(merge.output)["merged_models"] == [str(merge.math), str(odd)]


@pytest.mark.parametrize(
    ("licences", "field"),
    [(["llama2"] * 3, "llama2"), (["llama2", "mit", "llama2"], "other"), (["apache-2.0", None, "apache-2.0"], "other")],
)
def test_card_licence(merge, licences, field):
    for directory, licence in zip((merge.base, merge.math, merge.law), licences, strict=True):
        if licence:
            (directory / "README.md").write_text(
                f"---\nlanguage: en\nlicense: {licence}  # see LICENSE\n---\n# A model\n"
            )
    merge("--method=task_arithmetic")
    assert front_matter(merge.output)["license"] == field
    listed = ", ".join(dict.fromkeys(licence or "unknown" for licence in licences))
    assert f"The inputs' licences: {listed}." in (merge.output / "README.md").read_text()


def test_card_of_an_input_that_is_no_text(merge):
    (merge.law / "README.md").write_bytes(b"\xff\xfe\x00")
    assert (merge("--method=task_arithmetic") / "README.md").is_file()


def test_command_of_the_card_repeats_the_merge(merged, tmp_path):
    command = (merged.output / "README.md").read_text().split("```\n")[1]
    python, m, module, *flags = shlex.split(command)
    assert (python, m, module) == ("python", "-m", "dppa_jax.launch")
    assert not any(flag.startswith("--flagfile") for flag in flags)
    launch(*flags, f"--output={tmp_path}/again")
    first, second = tree(merged.output), tree(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == ["README.md", "recipe.json"]


def test_names_of_directories_that_are_not_utf8(merge):
    """The card and the recipe escape them."""
    odd = merge.root / "caf\udce9"  # as Python has the byte E9 of a name
    odd.mkdir()
    merge.base, merge.output, deltas = merge.base.rename(odd / "base"), odd / "out", odd / "deltas"
    merge("--method=task_arithmetic", f"--save_delta={deltas}")
    assert read_json(merge.output / "recipe.json")["inputs"]["base"]["directory"] == str(merge.base)
    assert r"caf\udce9/base" in (merge.output / "README.md").read_text()
    assert (deltas / "law" / "config.json").is_file()
