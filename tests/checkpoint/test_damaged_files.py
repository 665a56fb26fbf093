"""What the program says of a directory that is broken or not what it should be, and that it writes nothing then."""

import json
import re

import numpy as np
import pytest
from command import launch
from families import (
    Q_PROJ,
    edit_header,
    edit_json,
    edit_tensors,
    llama_config,
    random_weights,
    read_json,
    write_json,
    write_model,
)

NORM = "model.norm.weight"


@pytest.fixture
def weights(merge):
    """The one file of the expert 'law'."""
    return merge.law / "model.safetensors"


@pytest.fixture
def sharded(merge, tmp_path):
    """A base of three shards in place of the one of one file."""
    merge.base = write_model(tmp_path / "sharded", llama_config(), random_weights(llama_config()), shards=3)
    return merge.base


# ---- files


def test_missing_shard(merge, sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.unlink()
    message = merge.refusal()
    assert f"{shard} is missing" in message
    first = next(
        n for n, s in read_json(sharded / "model.safetensors.index.json")["weight_map"].items() if s == shard.name
    )
    assert repr(first) in message
    assert "download it again" in message


def test_truncated_data(merge, weights):
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-100])
    message = merge.refusal()
    assert re.search(rf"{weights}: truncated: model\.\S+ ends at byte \d+ of {size - 100}; download it again", message)


@pytest.mark.parametrize("size", [0, 5, 300])
def test_truncated_header(merge, weights, size):
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"{weights}: truncated or not a safetensors file ({size} bytes); download it again." in merge.refusal()


def test_git_lfs_pointer_in_place_of_the_weights(merge, weights):
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13476835328\n")
    assert f"{weights} is a Git LFS pointer" in (message := merge.refusal())
    assert "git lfs pull" in message


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{'a'}", " is not JSON"),
        (b"\xff\xfe", " is not JSON"),
        (b'{"a":{"b":' + b"[" * 99999, " is not JSON"),
        (b"[1, 2]", ": Expected `object`, got `array`"),
    ],
)
def test_corrupted_header(merge, weights, header, said):
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    message = merge.refusal()
    assert f"the header of {weights}{said}" in message
    assert "download it again" in message


# ---- a header whose entries cannot be


def shift(name, by):
    def change(header):
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]

    return change


@pytest.mark.parametrize("by", [-64, 64])
def test_overlapping_offsets(merge, weights, by):
    last = last_tensor(weights)
    name = last if by < 0 else Q_PROJ
    edit_header(weights, shift(name, by))
    message = merge.refusal()
    assert str(weights) in message
    assert "overlap or leave holes" in message
    assert "download it again" in message


def test_offsets_out_of_range(merge, weights):
    edit_header(weights, shift(last_tensor(weights), 4096))
    assert f"{weights}: truncated: {last_tensor(weights)} ends at byte" in merge.refusal()


def test_negative_offset(merge, weights):
    edit_header(weights, lambda header: header[Q_PROJ].update(data_offsets=[-8, 2040]))
    assert f"{weights}: the header's entry of {Q_PROJ} is damaged" in merge.refusal()


@pytest.mark.parametrize("entry", [{}, {"dtype": "BF16", "shape": 3, "data_offsets": [0, 6]}, 7, "text"])
def test_entry_that_is_none(merge, weights, entry):
    edit_header(weights, lambda header: header.update({Q_PROJ: entry}))
    assert f"{weights}: the header's entry of {Q_PROJ} is damaged" in merge.refusal()


def test_bytes_that_do_not_fit_the_shape(merge, weights):
    edit_header(weights, lambda header: header[Q_PROJ].update(shape=[32, 31]))
    message = merge.refusal()
    assert f"{weights}: {Q_PROJ} has 2048 bytes in the header, its shape (32, 31) in BF16 needs 1984" in message


def test_shape_whose_size_overflows(merge, weights):
    edit_header(weights, lambda header: header[Q_PROJ].update(shape=[2**32, 2**32]))
    assert f"{weights}: {Q_PROJ} has 2048 bytes" in merge.refusal()


def test_bytes_after_the_last_tensor(merge, weights):
    weights.write_bytes(weights.read_bytes() + bytes(12))
    assert f"{weights}: 12 bytes after the last tensor" in merge.refusal()


def last_tensor(file):
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    return max(header, key=lambda name: header[name]["data_offsets"])


# ---- tensors


def test_tensor_missing(merge, weights):
    edit_tensors(weights, lambda tensors: tensors.pop(Q_PROJ))
    message = merge.refusal()
    assert f"{merge.law}: 1 tensors are missing, first {Q_PROJ!r}" in message
    assert "is the download complete" in message


def test_tensor_that_the_index_promises_is_not_in_its_shard(merge, sharded):
    shard = sharded / read_json(sharded / "model.safetensors.index.json")["weight_map"][Q_PROJ]
    edit_tensors(shard, lambda tensors: tensors.pop(Q_PROJ))
    assert f"{shard}: has no tensor {Q_PROJ!r}, which model.safetensors.index.json says it holds" in merge.refusal()


def test_extra_tensor(merge, weights):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(weights, lambda tensors: tensors.update({name: np.zeros((4, 32), np.float32)}))
    message = merge.refusal()
    assert f"{merge.law}: model.safetensors has 1 tensors that a model of this config.json does not have" in message
    assert repr(name) in message
    assert "merge adapters into the model before" in message


def test_old_exports_carry_a_buffer_that_is_no_tensor_of_ours(merge, weights):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(weights, lambda tensors: tensors.update({name: np.arange(4)}))
    assert (merge("--method=task_arithmetic") / "model.safetensors").is_file()


def test_shape_that_is_not_that_of_the_config(merge, weights):
    edit_tensors(weights, lambda tensors: tensors.update({NORM: np.ones(31, np.float32)}))
    message = merge.refusal()
    assert f"{weights}: {NORM} has shape (31,), config.json says (32,)" in message
    assert "config.json does not belong to these weights" in message


def test_more_layers_in_the_config_than_in_the_files(merge):
    for directory in (merge.base, merge.math, merge.law):
        edit_json(directory / "config.json", num_hidden_layers=4)
    message = merge.refusal()
    assert f"{merge.base}: 9 tensors are missing, first 'model.layers.3.self_attn.q_proj.weight'" in message
    assert "config.json (num_hidden_layers 4)" in message


@pytest.mark.parametrize(
    ("dtype", "code", "fix"),
    [
        (np.int32, "I32", "give --dequantise"),
        (np.uint8, "U8", "give --dequantise"),
        (np.float64, "F64", "dtype='float32'"),
        (np.int64, "I64", "leave it out"),
    ],
)
def test_dtypes_that_weights_cannot_have(merge, weights, dtype, code, fix):
    edit_tensors(weights, lambda tensors: tensors.update({Q_PROJ: np.ones((32, 32), dtype)}))
    message = merge.refusal()
    assert f"{weights}: {Q_PROJ} is stored as {code}; weights must be F32, F16, BF16" in message
    assert fix in message
    assert ("uantise" in message) == ("dequantise" in fix)


def test_float8(merge, weights):
    def to_float8(header):
        header[Q_PROJ].update(dtype="F8_E4M3", shape=[32, 64])

    edit_header(weights, to_float8)
    assert f"{weights}: {Q_PROJ} is stored as F8_E4M3" in merge.refusal()


@pytest.mark.parametrize(
    "tensors",
    [{Q_PROJ: np.ones((4, 32), np.int32)}, {Q_PROJ: np.ones((32, 16), np.float16)}, {"scales": np.ones(3, np.float16)}],
    ids=["integers", "shape", "scales"],
)
def test_quantised_by_its_config(merge, weights, tensors):
    edit_json(merge.law / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    edit_tensors(weights, lambda found: found.update(tensors))
    for of in (merge.flags(), ["--job=plan", *merge.flags()]):
        message = merge.refusal(of=of)
        assert f"{merge.law}/config.json: the weights are quantised (quant_method 'gptq')" in message
        assert "give --dequantise" in message


def test_quantization_config_that_was_left_over(merge, capsys, caplog):
    edit_json(merge.base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    launch("--job=plan", *merge.flags()[:3], "--method=dppa", f"--workdir={merge.root / 'runs'}")
    output = merge("--method=task_arithmetic")
    assert "quantization_config" not in read_json(output / "config.json")
    assert f"{merge.base}/config.json: the weights are not quantised, so its quantization_config is left" in caplog.text


# ---- pickles and adapters


def test_pickle_is_refused_with_a_conversion_that_works(merge, weights):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(weights), merge.law / "pytorch_model.bin")
    weights.unlink()
    message = merge.refusal()
    assert f"{merge.law}: pytorch_model.bin is a pickle, which can run code when it is read" in message
    assert "copy the tokenizer files" in message

    exec(re.search(r'python -c "(.*)" and', message)[1], {})
    merge.law = merge.law.with_name("law-safetensors")
    assert (merge("--method=task_arithmetic") / "model.safetensors").is_file()


def test_neither_weights_nor_pickles(merge, weights):
    weights.unlink()
    assert f"{merge.law}: neither model.safetensors nor model.safetensors.index.json is there" in merge.refusal()


def test_adapter_in_place_of_a_model(merge, weights):
    (merge.law / "config.json").rename(merge.law / "adapter_config.json")
    weights.rename(merge.law / "adapter_model.safetensors")
    assert f"{merge.law / 'adapter_config.json'}: peft_type is None" in merge.refusal()
    message = merge.refusal(f"--base={merge.law}")
    assert f"{merge.law} is an adapter, not a model: give it behind the model" in message


# ---- config.json and the index


def test_config_missing(merge):
    (merge.law / "config.json").unlink()
    message = merge.refusal()
    assert f"{merge.law}/config.json is missing; is {merge.law} a Hugging Face model directory?" in message


@pytest.mark.parametrize(
    ("text", "said"), [("{'a': 1}", " is not JSON (Expecting property"), ("[]", ": Expected `object`, got `array`")]
)
def test_config_that_is_no_json_object(merge, text, said):
    (merge.law / "config.json").write_text(text)
    assert f"{merge.law}/config.json{said}" in merge.refusal()


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_config_without_a_size(merge, key):
    edit_json(merge.law / "config.json", **{key: None})
    assert f"{merge.law}/config.json: has no {key!r}; download config.json again" in merge.refusal()


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "32"), ("num_hidden_layers", 0), ("vocab_size", 64.5), ("num_key_value_heads", -2)],
)
def test_config_with_a_size_that_is_none(merge, key, value):
    edit_json(merge.law / "config.json", **{key: value})
    assert f"{merge.law}/config.json: {key} is {value!r}, it must be a positive integer" in merge.refusal()


def test_heads_that_do_not_divide(merge):
    edit_json(merge.law / "config.json", num_key_value_heads=3)
    assert f"{merge.law}/config.json: num_attention_heads 4 does not fit num_key_value_heads 3" in merge.refusal()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "FalconForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"architectures": None, "model_type": None}, "model of an unknown class"),
    ],
)
def test_other_architecture(merge, changes, found):
    edit_json(merge.law / "config.json", **changes)
    assert f"expert 'law' is a {found}, the base a LlamaForCausalLM" in (message := merge.refusal())
    assert "--architecture=generic merges models whose tensors have the same names" in message


@pytest.mark.parametrize("index", [{"metadata": {}}, {"weight_map": ["a"]}, {"weight_map": {Q_PROJ: 1}}])
def test_index_without_a_weight_map(merge, sharded, index):
    write_json(sharded / "model.safetensors.index.json", index)
    assert f"{sharded}/model.safetensors.index.json: " in (message := merge.refusal())
    assert "It must have a weight_map from tensors to files; download it again" in message


# ---- paths that lead outside


@pytest.mark.parametrize("kind", ["parent", "absolute"])
def test_index_that_points_outside(merge, sharded, tmp_path, kind):
    outside = tmp_path / "elsewhere.safetensors"
    (sharded / "model-00001-of-00003.safetensors").rename(outside)
    index = sharded / "model.safetensors.index.json"
    name = f"../{outside.name}" if kind == "parent" else str(outside)
    index.write_text(index.read_text().replace("model-00001-of-00003.safetensors", name))
    message = merge.refusal()
    assert f"{index} names a file outside the directory: {name!r} is {outside}" in message
    assert f"Copy the file into {sharded}" in message


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"],
)
def test_links_that_lead_outside(merge, tmp_path, name):
    outside = tmp_path / "outside"
    link = merge.base / name
    if link.exists():
        link.rename(outside)
    else:
        write_json(outside, {"weight_map": {}})
    link.symlink_to(outside)
    message = merge.refusal()
    assert f"{link} leads outside the directory: {name!r} is {outside}" in message


def test_links_are_looked_at_before_the_work(merge, tmp_path, monkeypatch):
    def working(*_):
        raise AssertionError("the merge has begun")

    monkeypatch.setattr("dppa_jax.jobs.write_merge.merge_checkpoints", working)
    (merge.law / "tokenizer.json").rename(tmp_path / "outside")
    (merge.law / "tokenizer.json").symlink_to(tmp_path / "outside")
    assert f"{merge.law}/tokenizer.json leads outside the directory" in merge.refusal("--tokenizer=law")


def test_links_within_the_directory_are_followed(merge):
    (merge.law / "weights").mkdir()
    (merge.law / "model.safetensors").rename(merge.law / "weights" / "blob")
    (merge.law / "model.safetensors").symlink_to("weights/blob")
    assert merge("--method=task_arithmetic").is_dir()


def test_links_of_the_hub_cache_are_followed(merge, tmp_path):
    """models--owner--name/snapshots/REVISION/FILE links to ../../blobs/HASH."""
    cache = tmp_path / "hub" / "models--owner--law"
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(merge.law.iterdir())):
        file.rename(cache / "blobs" / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    merge.law = snapshot
    assert (merge("--method=task_arithmetic", "--tokenizer=law") / "tokenizer.json").is_file()


def test_links_of_the_hub_cache_that_leave_the_repository(merge, tmp_path):
    blobs = tmp_path / "hub" / "models--owner--other" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "hub" / "models--owner--law" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    merge.law.rename(snapshot)
    (snapshot / "model.safetensors").rename(blobs / "0")
    (snapshot / "model.safetensors").symlink_to("../../../models--owner--other/blobs/0")
    merge.law = snapshot
    assert f"{snapshot}/model.safetensors leads outside the directory" in merge.refusal()
