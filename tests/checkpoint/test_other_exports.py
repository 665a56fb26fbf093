"""What trainers, other tools and half downloads leave in a directory: read where it is sound, else explained."""

import os

import numpy as np
import pytest
from families import Q_PROJ, edit_json, edit_tensors, llama_config, random_weights, read_json, write_json, write_model
from safetensors.numpy import load_file, save_file

from dppa_jax.checkpoint import CheckpointError, SafetensorsDirectory
from dppa_jax.where import load_tree, locate, open_checkpoint

INDEX, HEAD, EMBEDDINGS = "model.safetensors.index.json", "lm_head.weight", "model.embed_tokens.weight"
CONFIG = llama_config(num_hidden_layers=2)
TIED = llama_config(num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", CONFIG, random_weights(CONFIG), tokenizer=False)


@pytest.fixture
def sharded(tmp_path):
    return write_model(tmp_path / "model", CONFIG, random_weights(CONFIG), shards=2, tokenizer=False)


def refusal(directory) -> str:
    with pytest.raises(CheckpointError) as error:
        _ = SafetensorsDirectory(directory).specs
    message = str(error.value)
    assert str(directory) in message
    return message


def rename(directory, change) -> None:
    """Give the tensors of a file other names."""

    def renamed(tensors):
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    edit_tensors(directory / "model.safetensors", renamed)


# ---- names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: f"base_model.model.{name}", ["base_model.model.", "merge_and_unload"]),
        (lambda name: name.replace("q_proj.", "q_proj.base_layer."), ["base_layer", "merge_and_unload"]),
        (lambda name: f"transformer.{name}", ["first 'transformer.lm_head.weight'", "save_pretrained"]),
    ],
    ids=["peft", "peft layers", "unknown"],
)
def test_tensors_of_other_names_are_shown(model, change, said):
    rename(model, change)
    message = refusal(model)
    assert [word for word in said if word not in message] == []
    assert "and lacks" in message
    assert "download" not in message


def test_weights_that_were_not_gathered(model):
    edit_tensors(
        model / "model.safetensors",
        lambda tensors: tensors.update({n: np.zeros(0, np.float16) for n in tensors if "proj" in n}),
    )
    message = refusal(model)
    for word in (f"{Q_PROJ} is empty", "zero_to_fp32.py", "stage3_gather_16bit_weights_on_model_save"):
        assert word in message
    assert "does not belong" not in message


def test_vocabulary_that_config_does_not_know(model):
    edit_json(model / "config.json", vocab_size=63)
    assert "if 64 tokens are right, set vocab_size to 64 in config.json" in refusal(model)


# ---- files


@pytest.mark.parametrize(
    ("present", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["is an adapter", "BASE+ADAPTER"]),
        (["adapter_model.bin", "training_args.bin"], ["is an adapter", "BASE+ADAPTER"]),
        (["pytorch_model.bin", "zero_to_fp32.py"], ["pytorch_model.bin is a pickle"]),
        (["zero_to_fp32.py", "training_args.bin", "optimizer.pt"], ["zero_to_fp32.py puts", "--safe_serialization"]),
        (["consolidated.safetensors"], ["consolidated.safetensors has Mistral's own names"]),
        (["weights.safetensors"], ["weights.safetensors has another name than model.safetensors: rename it"]),
        (["model.Q4_K_M.gguf"], ["model.Q4_K_M.gguf is for llama.cpp"]),
        (["checkpoint-50/config.json"], ["checkpoint-50/config.json belongs to a checkpoint of a training run"]),
        (["training_args.bin"], ["give the directory that holds the weights"]),
    ],
    ids=lambda given: given[0],
)
def test_what_is_there_in_place_of_weights_is_named(model, present, said):
    (model / "model.safetensors").unlink()
    for name in present:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    message = refusal(model)
    assert [word for word in said if word not in message] == []
    assert ("pickle" in message) == ("pytorch_model.bin" in present)


def test_shards_without_their_index(sharded):
    (sharded / INDEX).unlink()
    message = refusal(sharded)
    assert "model-00001-of-00002.safetensors is a shard" in message
    assert f"{INDEX} says what is in which: fetch it" in message


def test_two_sets_of_weights(sharded):
    tensors = {}
    for shard in sharded.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, sharded / "model.safetensors")
    assert f"two sets of weights: model.safetensors, and the shards that {INDEX} names" in refusal(sharded)
    write_json(sharded / INDEX, {"weight_map": dict.fromkeys(tensors, "model.safetensors")})
    assert SafetensorsDirectory(sharded).specs


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_weights_that_are_not_read_are_named(model, caplog, name):
    assert SafetensorsDirectory(model).specs
    assert not caplog.records
    os.link(model / "model.safetensors", model / name)
    assert SafetensorsDirectory(model).specs
    assert f"{model}: not read, as the weights are in other files: {name}" in caplog.text


# ---- heads


def write_tied(directory, head=None, config=TIED, shards=1):
    weights = random_weights(config)
    return write_model(directory, config, weights | ({} if head is None else {HEAD: head(weights)}), shards, False)


def test_head_that_is_missing_where_config_does_not_say_that_it_is_tied(tmp_path):
    directory = write_tied(tmp_path / "model")
    edit_json(directory / "config.json", tie_word_embeddings=None)
    message = refusal(directory)
    assert '"tie_word_embeddings": true' in message
    assert "lm_head.weight is missing" in message
    assert "complete" not in message


@pytest.mark.parametrize(
    "head",
    [
        lambda weights: np.roll(weights[EMBEDDINGS], 1, axis=0),
        lambda weights: weights[EMBEDDINGS].astype(np.float32),
        lambda weights: weights[EMBEDDINGS][:60],
        lambda weights: weights[EMBEDDINGS] * 0 - 0.0,
    ],
    ids=["other rows", "other dtype", "fewer rows", "zeros"],
)
@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_head_that_is_called_tied_and_is_not(tmp_path, head, format, monkeypatch):
    monkeypatch.setattr("dppa_jax.checkpoint.promised.PIECE", 1024)
    directory = write_tied(tmp_path / "model", head)
    if format == "orbax":
        directory = saved_by_orbax(tmp_path / "orbax", head)
    with pytest.raises(CheckpointError) as error:
        _ = open_checkpoint(directory).specs
    message = str(error.value)
    assert str(directory) in message
    assert f"{HEAD} is not {EMBEDDINGS}, though config.json says that they are one (tie_word_embeddings)" in message
    assert "set tie_word_embeddings to false" in message


def saved_by_orbax(directory, head):
    import orbax.checkpoint as ocp

    _, tree = load_tree(write_tied(directory.with_name("tied")))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, {**tree, "lm_head": head({EMBEDDINGS: tree["embed_tokens"]})})
    write_json(directory / "config.json", TIED)
    return directory


def test_nan_in_a_head_that_is_a_copy(tmp_path):
    def head(weights):
        weights[EMBEDDINGS][3, 4] = np.nan
        return weights[EMBEDDINGS].copy()

    assert HEAD not in open_checkpoint(write_tied(tmp_path / "model", head)).specs


@pytest.mark.parametrize("config", [TIED, CONFIG], ids=["tied", "untied"])
def test_index_that_lists_the_head(tmp_path, config):
    directory = write_tied(tmp_path / "model", config=config, shards=2)
    index = read_json(directory / INDEX)
    index["weight_map"].setdefault(HEAD, "model-00001-of-00002.safetensors")
    write_json(directory / INDEX, index)
    assert (HEAD in open_checkpoint(directory).specs) == (config is CONFIG)


# ---- where


@pytest.mark.parametrize("given", ["loop", "dangling", "~nobody/model", "orbax:~nobody/model", "a\x1b[2J"])
def test_places_where_no_model_is(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(CheckpointError, match=r"link to|no such directory") as error:
        locate(given)
    assert str(error.value).isprintable()
