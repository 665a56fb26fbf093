"""What is read from a directory: single-file and sharded, every dtype, tied and grouped, whole and by row."""

import numpy as np
import pytest
from families import DTYPES, Q_PROJ, fine_tuned, llama_config, random_weights, write_model

from dppa_jax.checkpoint import CheckpointError, SafetensorsDirectory, save_tree, tensor_specs
from dppa_jax.where import load_tree, locate

EMBEDDINGS = "model.embed_tokens.weight"
LAYER_1 = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=str)
def test_every_tensor_is_read_as_the_safetensors_package_wrote_it(tmp_path, dtype, shards, changes):
    config = llama_config(dtype=dtype, **changes)
    wanted = random_weights(config)
    source = SafetensorsDirectory(write_model(tmp_path / "model", config, wanted, shards, tokenizer=False))
    assert source.specs.keys() == wanted.keys()
    assert source.config == config
    assert source.dtype == DTYPES[dtype]
    for name, array in wanted.items():
        np.testing.assert_array_equal(source.read(name), array, strict=True)


def test_rows_are_read_without_the_rest(tmp_path, monkeypatch):
    config = llama_config()
    weights = random_weights(config)
    source = SafetensorsDirectory(write_model(tmp_path / "model", config, weights, tokenizer=False))
    rows = np.empty((3, 32), DTYPES["bfloat16"])
    counts = count_bytes(monkeypatch)
    source.read_rows(EMBEDDINGS, 10, 13, rows)
    np.testing.assert_array_equal(rows, weights[EMBEDDINGS][10:13])
    assert sum(counts) == 3 * 32 * 2


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    directory = write_model(tmp_path / "model", llama_config(), random_weights(llama_config()), tokenizer=False)
    counts = count_bytes(monkeypatch)
    assert SafetensorsDirectory(directory).specs
    assert counts == []


def count_bytes(monkeypatch) -> list[int]:
    import os

    counts, preadv = [], os.preadv

    def counted(*arguments):
        counts.append(preadv(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return counts


def test_file_that_shrinks_while_it_is_read(tmp_path):
    directory = write_model(tmp_path / "model", llama_config(), random_weights(llama_config()), tokenizer=False)
    source = SafetensorsDirectory(directory)
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(9000)
    with pytest.raises(CheckpointError, match=rf"{directory}/model.safetensors: ends inside .*; the file changed"):
        list(map(source.read, source.specs))


def test_tied_model_that_carries_a_copy_of_its_embeddings(tmp_path):
    config = llama_config(tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights[EMBEDDINGS]
    source = SafetensorsDirectory(write_model(tmp_path / "model", config, weights, tokenizer=False))
    assert "lm_head.weight" not in source.specs


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_are_read_where_the_config_has_them(tmp_path, bias):
    config = llama_config(**{bias: True})
    specs = tensor_specs(config)
    biases = {n: np.full(s.shape, 0.5, DTYPES["bfloat16"]) for n, s in specs.items() if n.endswith(".bias")}
    assert len(biases) == (12 if bias == "attention_bias" else 9)
    weights = random_weights(config) | biases
    directory = write_model(tmp_path / "model", config, weights, tokenizer=False)
    _, tree = load_tree(directory)
    group = tree["layers"]["self_attn" if bias == "attention_bias" else "mlp"]
    assert any(name.endswith("_bias") and (array == 0.5).all() for name, array in group.items())


def test_fingerprint_tells_models_apart(tmp_path):
    config = llama_config()
    weights = random_weights(config)
    same = [SafetensorsDirectory(write_model(tmp_path / n, config, weights, tokenizer=False)) for n in ("a", "b")]
    other = SafetensorsDirectory(write_model(tmp_path / "c", config, fine_tuned(weights, 1), tokenizer=False))
    assert same[0].fingerprint() == same[1].fingerprint() != other.fingerprint()


# ---- trees


@pytest.mark.parametrize("changed", ["a norm", "generation_config.json", "nothing"])
def test_content_digest_sees_every_weight_and_what_ends_a_response(tmp_path, changed):
    config = llama_config(vocab_size=5000)  # a file of more pages than a fingerprint looks at
    tensors = random_weights(config)
    before = SafetensorsDirectory(write_model(tmp_path / "before", config, tensors)).content_digest()
    if changed == "a norm":
        tensors["model.layers.1.input_layernorm.weight"][3] += 1
    after = write_model(tmp_path / "after", config, tensors)
    if changed == "generation_config.json":
        (after / changed).write_text('{"eos_token_id": 7}')
    assert (SafetensorsDirectory(after).content_digest() == before) == (changed == "nothing")


def test_tree_is_stacked_over_layers(tmp_path):
    config = llama_config()
    weights = random_weights(config)
    found, tree = load_tree(write_model(tmp_path / "model", config, weights, shards=2, tokenizer=False))
    assert found == config
    assert tree.keys() == {"embed_tokens", "norm", "lm_head", "layers"}
    assert tree["layers"]["mlp"].keys() == {"gate_proj", "up_proj", "down_proj"}
    assert tree["layers"]["self_attn"]["k_proj"].shape == (3, 16, 32)
    assert tree["layers"]["input_layernorm"].shape == (3, 32)
    np.testing.assert_array_equal(tree["layers"]["mlp"]["down_proj"][1], weights[LAYER_1], strict=True)
    np.testing.assert_array_equal(tree["norm"], weights["model.norm.weight"], strict=True)


def test_tied_tree_has_no_head(tmp_path):
    config = llama_config(tie_word_embeddings=True)
    _, tree = load_tree(write_model(tmp_path / "model", config, random_weights(config), tokenizer=False))
    assert "lm_head" not in tree


def test_layers_of_different_dtypes_become_float32(tmp_path):
    config = llama_config()
    weights = random_weights(config)
    weights[LAYER_1] = weights[LAYER_1].astype(np.float32) + np.float32(1e-6)
    _, tree = load_tree(write_model(tmp_path / "model", config, weights, tokenizer=False))
    stacked = tree["layers"]["mlp"]["down_proj"]
    assert stacked.dtype == np.float32
    for layer in range(3):
        wanted = weights[f"model.layers.{layer}.mlp.down_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(stacked[layer], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_round_trip_to_the_byte(tmp_path, dtype, tied):
    config = llama_config(dtype=dtype, tie_word_embeddings=tied)
    foreign = write_model(tmp_path / "foreign", config, random_weights(config))
    save_tree(tmp_path / "first", load_tree(foreign)[1], config, tokenizer_from=foreign)
    found, tree = load_tree(tmp_path / "first")
    save_tree(tmp_path / "second", tree, found, tokenizer_from=tmp_path / "first")
    assert found == config
    files = sorted(path.name for path in foreign.iterdir())
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == files
    for name in files:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
        if not name.startswith(("model", "config")):
            assert (tmp_path / "first" / name).read_bytes() == (foreign / name).read_bytes(), name
    for name, array in random_weights(config).items():
        np.testing.assert_array_equal(SafetensorsDirectory(tmp_path / "second").read(name), array, strict=True)


# ---- where


def test_place_that_is_neither_directory_nor_hub_id():
    with pytest.raises(CheckpointError, match=r"/no/such/place: no such directory, and not of the form owner/name"):
        locate("/no/such/place")


def test_file_in_place_of_its_directory(pristine):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; give the directory that holds it"):
        locate(pristine / "base" / "model.safetensors")


@pytest.mark.parametrize("said", ["[Errno -2] Name or service not known", ""])
def test_hub_without_a_network(monkeypatch, said):
    def snapshot_download(repository, **options):
        raise ConnectionError(said)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError) as error:
        locate("meta-llama/Llama-2-7b-hf")
    message = str(error.value)
    assert (
        "meta-llama/Llama-2-7b-hf: no such directory, and fetching it from the hub failed: ConnectionError" in message
    )
    assert said in message
    assert "download it elsewhere and give its directory" in message


def test_hub_offline_and_not_cached(monkeypatch, tmp_path):
    """Through huggingface_hub itself, told that there is no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="fetching it from the hub failed: LocalEntryNotFoundError"):
        locate("nobody/nothing-of-this-name")


def test_specs_name_every_tensor_once_in_the_order_of_a_model():
    names = list(tensor_specs(llama_config()))
    assert names[0] == EMBEDDINGS
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert names[1] == Q_PROJ
    assert set(names) == set(random_weights(llama_config()))
