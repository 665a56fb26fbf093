"""Orbax checkpoints: what is written is an ordinary one, and what Orbax wrote is read lazily and by row."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from command import launch
from families import DTYPES, llama_config, random_weights, write_json, write_model
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppa_jax.checkpoint import CheckpointError, OrbaxDirectory
from dppa_jax.where import load_tree, locate, open_checkpoint

LAYER_1 = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def converted(pristine: Path, tmp_path_factory) -> Path:
    """The base as an Orbax checkpoint, for reading only."""
    directory = tmp_path_factory.mktemp("orbax") / "base"
    launch("--job=convert", f"--base={pristine / 'base'}", f"--output=orbax:{directory}", "--mesh=layer=3,row=2")
    return directory


def save_by_orbax(directory: Path, tree: dict, config: dict) -> Path:
    """As a user of Orbax would."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), tree)
    write_json(directory / "config.json", config)
    return directory


def test_every_tensor_is_read_with_its_bits(pristine, converted):
    stored, source = open_checkpoint(pristine / "base"), open_checkpoint(f"orbax:{converted}")
    assert isinstance(source, OrbaxDirectory)
    assert source.specs == stored.specs
    assert source.config == stored.config
    assert source.dtype == stored.dtype
    for name in stored.specs:
        np.testing.assert_array_equal(source.read(name), stored.read(name), strict=True)


def test_rows_are_those_of_the_tensor(pristine, converted):
    stored, source = open_checkpoint(pristine / "base"), open_checkpoint(f"orbax:{converted}")
    for name in (LAYER_1, "model.embed_tokens.weight"):
        rows = np.zeros((5, stored.tensors[name].shape[1]), stored.dtype)
        source.read_rows(name, 7, 12, rows)
        np.testing.assert_array_equal(rows, stored.read(name)[7:12])


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (4, 2)], ids=str)
def test_orbax_restores_it_onto_another_mesh(pristine, converted, shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("one", "other"))
    _, wanted = load_tree(pristine / "base")

    def target(array: np.ndarray) -> jax.ShapeDtypeStruct:
        rows = {1: PartitionSpec(), 2: PartitionSpec(), 3: PartitionSpec(None, "one", "other")}[array.ndim]
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, rows))

    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(converted, jax.tree.map(target, wanted))
    assert found["layers"]["mlp"]["up_proj"].sharding.mesh.devices.shape == shape
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True), found, wanted)


def test_orbax_restores_it_without_being_told_anything(pristine, converted):
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(converted)
    _, wanted = load_tree(pristine / "base")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True), found, wanted)


def test_mesh_decides_how_it_is_sharded(converted):
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(converted).item_metadata.tree
    assert stored["layers"]["mlp"]["up_proj"].sharding.partition_spec == ("layer", "row")
    assert list(stored["layers"]["mlp"]["up_proj"].sharding.shape) == [3, 2]


def test_a_layer_is_read_without_the_others(tmp_path):
    config = llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    write_model(tmp_path / "model", config, random_weights(config))
    launch("--job=convert", f"--base={tmp_path / 'model'}", f"--output=orbax:{tmp_path / 'orbax'}")
    source = open_checkpoint(f"orbax:{tmp_path / 'orbax'}")
    before = bytes_read()
    source.read(LAYER_1)
    one_layer = source.tensors[LAYER_1].nbytes
    assert one_layer <= bytes_read() - before < 1.2 * one_layer


def bytes_read() -> int:
    """From files, by TensorStore, since the process began."""
    [metric] = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_what_orbax_saved_is_a_model_read_slowly(pristine, tmp_path, caplog):
    config, tree = load_tree(pristine / "base")
    directory = save_by_orbax(tmp_path / "saved", tree, config)
    stored, source = open_checkpoint(pristine / "base"), open_checkpoint(f"orbax:{directory}")
    assert "a chunk of layers.self_attn.q_proj has 3 layers" in caplog.text
    for name in stored.specs:
        np.testing.assert_array_equal(source.read(name), stored.read(name), strict=True)


def test_copied_head_of_tied_embeddings_is_ignored(tmp_path):
    config = llama_config(tie_word_embeddings=True)
    _, tree = load_tree(write_model(tmp_path / "model", config, random_weights(config), tokenizer=False))
    directory = save_by_orbax(tmp_path / "saved", {**tree, "lm_head": tree["embed_tokens"]}, config)
    assert "lm_head.weight" not in open_checkpoint(f"orbax:{directory}").specs


def test_fingerprint_and_digest_tell_checkpoints_apart(converted, tmp_path):
    other = shutil.copytree(converted, tmp_path / "other")
    source = open_checkpoint(f"orbax:{converted}")
    assert open_checkpoint(f"orbax:{other}").fingerprint() == source.fingerprint()
    assert open_checkpoint(f"orbax:{other}").content_digest() == source.content_digest()
    largest = max((path for path in other.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert OrbaxDirectory(other).content_digest() != source.content_digest()


def test_directory_of_safetensors_is_not_an_orbax_checkpoint(pristine):
    with pytest.raises(CheckpointError, match=r"not an Orbax checkpoint .*--job=convert"):
        locate(f"orbax:{pristine / 'base'}")


def test_no_such_checkpoint():
    with pytest.raises(CheckpointError, match="orbax:/no/such/place: no such directory"):
        locate("orbax:/no/such/place")


def test_checkpoint_without_config(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"bare/config.json is missing"):
        open_checkpoint(f"orbax:{tmp_path / 'bare'}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree["layers"]["mlp"].pop("up_proj"), r"1 arrays are missing, first 'layers.mlp.up_proj'"),
        (lambda tree: tree.update(step=np.zeros(3, np.float32)), r"1 arrays that a model .* first 'step'"),
        (lambda tree: tree.update(norm=np.ones(32, np.int8)), r"norm is stored as int8; weights must be"),
    ],
    ids=["missing", "added", "integers"],
)
def test_arrays_that_are_not_those_of_the_model_are_named(pristine, tmp_path, change, said):
    config, tree = load_tree(pristine / "base")
    change(tree)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(f"orbax:{save_by_orbax(tmp_path / 'saved', tree, config)}")


def test_array_of_another_shape_is_named(converted, tmp_path):
    other = shutil.copytree(converted, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**config, "intermediate_size": 50})
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj has shape \(3, 48, 32\), config.json says \(3, 50, 32\)"):
        open_checkpoint(f"orbax:{other}")


def test_lost_data_are_an_error_and_not_zeros(converted, tmp_path):
    damaged = shutil.copytree(converted, tmp_path / "damaged")
    for file in (damaged / "ocdbt.process_0" / "d").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Copy the checkpoint again"):
        open_checkpoint(f"orbax:{damaged}").read(LAYER_1)


def test_dtypes_are_those_that_were_saved(tmp_path):
    config = llama_config(dtype="float16")
    weights = random_weights(config)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    write_model(tmp_path / "model", config, weights)
    launch("--job=convert", f"--base={tmp_path / 'model'}", f"--output=orbax:{tmp_path / 'orbax'}")
    source = open_checkpoint(f"orbax:{tmp_path / 'orbax'}")
    assert source.dtype == DTYPES["float16"]
    assert source.tensors["model.norm.weight"].dtype == np.float32
