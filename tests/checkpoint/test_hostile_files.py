"""Files that a model's author, an archive or another program can have made so that reading them harms or never ends.

Each reader gives a right answer, or a CheckpointError or OSError that names the file; never another exception.
"""

import json
import os
import shutil
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from command import launch
from families import Q_PROJ, edit_header, llama_config, random_weights, read_json, write_json, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dppa_jax.checkpoint import CheckpointError, SafetensorsDirectory, read_config
from dppa_jax.checkpoint.card import licence
from dppa_jax.checkpoint.headers import MAX_HEADER, read_header
from dppa_jax.checkpoint.inside import RECORDS, companions, records
from dppa_jax.where import load_tree, open_checkpoint

INDEX = "model.safetensors.index.json"
CONFIG = llama_config(num_hidden_layers=2)
SMALL_FILES = ("tokenizer.json", "LICENSE.txt", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja", *RECORDS)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model", CONFIG, random_weights(CONFIG))


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_model(tmp_path / "sharded", CONFIG, random_weights(CONFIG), shards=2)


@pytest.fixture(scope="module")
def converted(pristine, tmp_path_factory) -> Path:
    """The base as an Orbax checkpoint, for reading only."""
    directory = tmp_path_factory.mktemp("orbax") / "base"
    launch("--job=convert", f"--base={pristine / 'base'}", f"--output=orbax:{directory}")
    return directory


@pytest.fixture
def orbax(converted, tmp_path) -> Path:
    return shutil.copytree(converted, tmp_path / "orbax")


def small_files(directory: Path) -> list[Path]:
    """Every small file that is copied or read for the model card."""
    return [*companions(directory), *records(directory)]


def put(file: Path, text: str = "{}") -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(text)
    return file


# ---- links and paths that lead outside


@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_files_that_lead_outside(model, tmp_path, name):
    put(model / name).unlink()
    (model / name).symlink_to(put(tmp_path / "private"))
    with pytest.raises(CheckpointError, match=rf"{name} leads outside the directory: '{name}' is .*private"):
        small_files(model)


def test_small_files_are_listed_by_their_places(model):
    for name in SMALL_FILES:
        put(model / name)
    found = {str(path.relative_to(model)) for path in small_files(model)}
    assert found >= {*SMALL_FILES, "tokenizer_config.json", "generation_config.json"}
    assert not found & {"config.json", "model.safetensors"}


@pytest.mark.parametrize("output", ["out", "orbax:out"])
@pytest.mark.parametrize("name", ["README.md", "recipe.json", "tokenizer.json"])
def test_conversion_refuses_links_that_lead_outside_before_the_work(model, tmp_path, monkeypatch, output, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dppa_jax.jobs.convert.converted_tensors", lambda *_: pytest.fail("the work has begun"))
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(put(tmp_path / "private"))
    with pytest.raises(SystemExit) as error:
        launch("--job=convert", f"--base={model}", f"--output={output}")
    assert f"{model}/{name} leads outside the directory" in error.value.code
    assert not (tmp_path / "out").exists()


def test_merge_refuses_a_model_card_that_leads_outside(merge, tmp_path):
    (merge.law / "README.md").symlink_to(put(tmp_path / "private", "---\nlicense: secret\n---"))
    assert f"{merge.law}/README.md leads outside the directory" in merge.refusal()


@pytest.mark.parametrize("place", ["_METADATA", "manifest.ocdbt", "d"])
def test_files_of_an_orbax_checkpoint_that_lead_outside(orbax, tmp_path, place):
    (orbax / place).rename(tmp_path / "private")
    (orbax / place).symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=rf"orbax/{place} leads outside the directory"):
        open_checkpoint(orbax)


@pytest.mark.parametrize("name", ["../private/norm", "private", "/etc"])
def test_arrays_of_an_orbax_checkpoint_that_are_called_like_paths(orbax, name):
    tree = read_json(orbax / "_METADATA")
    next(iter(tree["tree_metadata"].values()))["key_metadata"] = [{"key": name, "key_type": 2}]
    write_json(orbax / "_METADATA", tree)
    with pytest.raises(CheckpointError, match="1 arrays are missing"):
        open_checkpoint(orbax)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_that_a_user_made_into_the_hub_cache_are_followed(model, tmp_path, name):
    blob = put(tmp_path / "hub" / "models--owner--name" / "blobs" / "0123")
    (model / name).rename(blob)
    (model / name).symlink_to(blob)
    assert open_checkpoint(model).read(Q_PROJ).shape == (32, 32)
    assert companions(model)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "x\0y", "x\ud800", "x" * 5000, "", "."])
def test_names_in_an_index(sharded, tmp_path, name):
    """Links into the hub's cache are followed for names that are fixed, not for those that a file chooses."""
    index = read_json(sharded / INDEX)
    shard = sharded / index["weight_map"][Q_PROJ]
    if name == shard.name:
        blob = put(tmp_path / "hub" / "models--owner--name" / "blobs" / "0123")
        shard.rename(blob)
        shard.symlink_to(blob)
    index["weight_map"][Q_PROJ] = name
    write_json(sharded / INDEX, index)
    with pytest.raises(CheckpointError) as error:
        SafetensorsDirectory(sharded)
    assert str(sharded) in str(error.value)
    assert str(error.value).isprintable()


def test_chunks_of_an_orbax_checkpoint_that_would_fill_the_memory(pristine, tmp_path):
    import orbax.checkpoint as ocp

    config, tree = load_tree(pristine / "base")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "orbax", args=ocp.args.PyTreeSave(tree))
    write_json(tmp_path / "orbax" / "config.json", config)
    assert open_checkpoint(tmp_path / "orbax").read(Q_PROJ).shape == (32, 32)
    norm = tmp_path / "orbax" / "norm" / ".zarray"
    write_json(norm, read_json(norm) | {"chunks": [10**12]})
    with pytest.raises(CheckpointError, match=r"norm has the shape \(32,\) and chunks of"):
        open_checkpoint(tmp_path / "orbax")


# ---- what is no file, or may not be read


@pytest.mark.parametrize("kind", ["pipe", "directory", "loop", "link to nothing"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, "tokenizer.json", "README.md"])
def test_special_files(model, name, kind):
    file = model / name
    file.unlink(missing_ok=True)
    {
        "pipe": lambda: os.mkfifo(file),
        "directory": file.mkdir,
        "loop": lambda: file.symlink_to(file.name),
        "link to nothing": lambda: file.symlink_to("nothing"),
    }[kind]()
    with pytest.raises((CheckpointError, OSError), match=str(file)):
        _ = SafetensorsDirectory(model).specs, small_files(model), licence(model)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d/pipe"])
def test_special_files_of_an_orbax_checkpoint(orbax, name):
    (orbax / name).unlink(missing_ok=True)
    os.mkfifo(orbax / name)
    with pytest.raises((CheckpointError, OSError), match=str(orbax)):
        open_checkpoint(orbax)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "README.md"])
def test_files_that_may_not_be_read(model, monkeypatch, name):
    put(model / "README.md")
    opened = os.open

    def refuse(path, *rest, **more):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{model / name} may not be read by you"):
        _ = SafetensorsDirectory(model).specs, small_files(model)


def test_reading_that_fails_names_the_file(model, monkeypatch):
    source = SafetensorsDirectory(model)

    def fail(*_):
        raise OSError(5, "Input/output error")

    for name in ("preadv", "pread"):
        monkeypatch.setattr(os, name, fail)
    for read in (lambda: source.read(Q_PROJ), source.fingerprint):
        with pytest.raises(OSError, match=rf"Input/output error.*{model}/model.safetensors"):
            read()


# ---- sizes


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "README.md", "generation_config.json"])
def test_files_of_three_gigabytes_are_not_read(model, name):
    os.truncate(put(model / name), 3_000_000_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=rf"{model / name}: 3000000000 bytes"):
        _ = SafetensorsDirectory(model).content_digest(), small_files(model)
    assert licence(model) == "unknown"
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("value", [10**9, 10**300, 10**4000, -1, True, 1e300, float("nan"), "3", [3], None])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim"])
def test_sizes_that_no_model_has(model, key, value):
    write_json(model / "config.json", {**CONFIG, key: value})
    if (key, value) == ("head_dim", None):
        assert read_config(model)["hidden_size"] == 32
        return
    with pytest.raises(CheckpointError, match=f"{model}/config.json: {key} is "):
        read_config(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": {"a": 1}}, "architectures"),
        ({"architectures": 7}, "architectures"),
        ({"architectures": [7]}, "architectures"),
        ({"torch_dtype": ["float16"]}, "torch_dtype"),
        ({"dtype": {"text": "float16"}}, "dtype"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor"),
        ({"rms_norm_eps": 10**4000}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_config_of_other_types(model, change, said):
    write_json(model / "config.json", {**CONFIG, **change})
    with pytest.raises(CheckpointError, match=f"{model}/config.json: .*{said}"):
        read_config(model)


def test_a_license_is_read_from_the_first_bytes_of_any_card(model):
    card = model / "README.md"
    card.write_bytes("---\nlicense: caf\xe9\x1b[2J # note\n---\n".encode("latin-1") + bytes(200_000))
    assert licence(model) == "caf�\\x1b[2J"


# ---- headers


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["BF16"], "shape": [32, 32], "data_offsets": [0, 2048]},
        {"dtype": "BF16", "shape": [True, 32], "data_offsets": [0, 2048]},
        {"dtype": "BF16", "shape": [10**300], "data_offsets": [0, 2048]},
        {"dtype": "BF16", "shape": [1] * 99, "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [32, 32], "data_offsets": [0, 2048, 1]},
        {"dtype": "BF16", "shape": [32, 32]},
        [],
        None,
    ],
    ids=str,
)
def test_header_of_other_types(model, entry):
    edit_header(model / "model.safetensors", lambda header: header.update({Q_PROJ: entry}))
    with pytest.raises(CheckpointError, match=f"model.safetensors: the header's entry of {Q_PROJ} is damaged"):
        SafetensorsDirectory(model)


def test_names_in_a_header_are_printed_escaped(model):
    edit_header(
        model / "model.safetensors", lambda header: header.update({"a\x1b[2J\n" + "b" * 9999: header.pop(Q_PROJ)})
    )
    with pytest.raises(CheckpointError) as error:
        _ = SafetensorsDirectory(model).specs
    assert len(message := str(error.value)) < 1000
    assert message.isprintable()


HEADERS = {
    "entries": lambda i: f'"{i:06x}":{{"dtype":"F32","shape":[300],"data_offsets":[{i * 1200},{i * 1200 + 1200}]}}',
    "empty": lambda i: f'"{i:06x}":{{}}',
    "nested": lambda i: '"a":' + "[" * 400 + "]" * 400,
    "unknown": lambda i: f'"{i:06x}":{{"x":[{"[],{},"}1]}}',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_take_little_more_memory_than_their_size(tmp_path, kind):
    """A 32nd of the largest header; the memory grows with it, and that of the largest must be below 200 MB."""
    one = HEADERS[kind]
    count = MAX_HEADER // 32 // (len(one(1 << 20)) + 1)
    header = ("{" + ",".join(map(one, range(count))) + "}").encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + 1200 * count)
    tracemalloc.start()
    with suppress(CheckpointError):
        assert read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 200_000_000 / 32
    tracemalloc.stop()


# ---- anything


TEXT = st.text("aZ0_./\\ \0\x1bé\ud800", max_size=5)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**25, 10**300, 2**63, -1, 0, 1, 4, 32])
    | st.floats()
    | TEXT
    | st.sampled_from(["F32", "BF16", "model.safetensors", "a/../b", "/etc/passwd", "\0", "\x1b", "linear"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
FAST = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def altered(content: dict, path: list[int], value) -> bytes:
    """JSON of `content` with another value at a place that the numbers of the path choose."""
    content = node = json.loads(json.dumps(content))
    for step in path:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[step % len(keys)]
        if isinstance(node[key], dict | list) and node[key] and step % 3:
            node = node[key]
        else:
            node[key] = value
            break
    return json.dumps(content).encode(errors="surrogatepass")


def damaged(content: dict):
    """Strategy for the bytes of a JSON file that should hold `content`: with another value, cut, or anything."""
    whole = json.dumps(content).encode()
    paths = st.lists(st.integers(0, 99), min_size=1, max_size=6)
    return (
        st.builds(altered, st.just(content), paths, VALUES)
        | st.integers(0, len(whole)).map(lambda cut: whole[:cut])
        | VALUES.map(lambda value: json.dumps(value).encode())
        | st.binary(max_size=50)
    )


def read_whatever(directory: Path) -> None:
    """Open and read a model: it is right, or refused with the place."""
    try:
        source = open_checkpoint(directory)
        shape = source.specs[Q_PROJ].shape
        assert source.read(Q_PROJ).shape == shape
        source.fingerprint()
        source.close()
    except (CheckpointError, OSError) as error:
        assert str(directory) in str(error)  # noqa: PT017


def test_any_config(model):
    @FAST
    @given(damaged(CONFIG))
    def check(content):
        (model / "config.json").write_bytes(content)
        read_whatever(model)

    check()


def test_any_index(sharded):
    @FAST
    @given(damaged(read_json(sharded / INDEX)))
    def check(content):
        (sharded / INDEX).write_bytes(content)
        read_whatever(sharded)

    check()


def test_any_header(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")

    @FAST
    @given(damaged(json.loads(whole[8 : 8 + length])), st.integers(-9, 9))
    def check(header, more):
        announced = max(0, len(header) + (more if more % 3 == 0 else 0))
        file.write_bytes(announced.to_bytes(8, "little") + header + whole[8 + length :])
        read_whatever(model)

    check()


def test_any_metadata_of_orbax(orbax):
    @FAST
    @given(damaged(read_json(orbax / "_METADATA")))
    def check(content):
        (orbax / "_METADATA").write_bytes(content)
        read_whatever(orbax)

    check()
