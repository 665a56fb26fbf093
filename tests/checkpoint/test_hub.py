"""Models on the hub, through huggingface_hub itself and a small hub on this machine (`hub_server`).

What cannot work is refused by config.json and headers; only then weights are fetched, of the same commit.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from adapters import factors, write_adapter
from command import Merge, launch
from families import (
    Q_PROJ,
    edit_header,
    edit_json,
    edit_tensors,
    fine_tuned,
    llama_config,
    random_weights,
    read_json,
    write_json,
    write_model,
)
from hub_server import Hub, asking, serving
from processes import LAUNCH, run_processes
from safetensors.numpy import load_file

from dppa_jax.checkpoint import CheckpointError
from dppa_jax.checkpoint import hub as product
from dppa_jax.checkpoint.hub import bytes_to_fetch
from dppa_jax.where import look, open_checkpoint

FAST = "--method=task_arithmetic"
K_PROJ = Q_PROJ.replace("q_proj", "k_proj")
FIRST = 1000  # bytes that the first request for a header asks for, in these tests


class HubMerge(Merge):
    """A merge whose models are on the hub."""

    hub: Hub

    def flags(self) -> list[str]:
        models = ["--base=owner/base", "--expert=math=owner/math", "--expert=law=owner/law@main"]
        return [*models, f"--output={self.output}", FAST]

    def push(self, *names: str) -> None:
        """Make root/NAME the newest commit of owner/NAME."""
        for name in names:
            self.hub.push(f"owner/{name}", self.root / name)

    def cached_weights(self) -> list[str]:
        """The names of all weights in the hub's cache."""
        return sorted(path.name for path in (self.root / "hub").rglob("*.safetensors"))


@pytest.fixture
def merge(tmp_path, monkeypatch) -> Iterator[HubMerge]:
    """base in two shards, math and law, with what a repository has besides, on the hub."""
    config = llama_config()
    base = random_weights(config)
    write_model(tmp_path / "base", config, base, shards=2)
    write_model(tmp_path / "math", config, fine_tuned(base, 1))
    write_model(tmp_path / "law", config, fine_tuned(base, 2))
    for name in ("pytorch_model.bin", "modeling_llama.py", "consolidated.safetensors"):
        (tmp_path / "math" / name).write_bytes(b"\x80" * 5000)
    monkeypatch.setattr(product, "FIRST", FIRST)
    with serving(Hub()) as hub, asking(hub, tmp_path / "hub"):
        found = HubMerge(tmp_path)
        found.hub = hub
        found.push("base", "math", "law")
        yield found


def other_shape(root: Path) -> None:
    """Make law a fine-tune of another base."""
    shutil.rmtree(root / "law")
    config = llama_config(intermediate_size=64)
    write_model(root / "law", config, random_weights(config))


def weights(directory: Path) -> int:
    """Bytes of the files that hold a model's weights."""
    return sum(path.stat().st_size for path in directory.glob("model*.safetensors"))


def assert_headers_only(merge: HubMerge, *names: str) -> None:
    """Of each model the hub has served the headers, by two requests for each file, and no weights are in the cache."""
    assert merge.cached_weights() == []
    for name in names:
        files = list((merge.root / name).glob("model*.safetensors"))
        headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
        served = merge.hub.weights_served(f"owner/{name}")
        assert headers <= served <= headers + FIRST * len(files) < weights(merge.root / name) / 4, name


# ---- before weights are fetched


def test_wrong_third_expert_costs_the_headers_of_all(merge):
    other_shape(merge.root)
    message = merge.failure()
    assert "expert 'law': model.layers.0.mlp.gate_proj.weight has shape (64, 32), base has (48, 32)" in message
    assert_headers_only(merge, "base", "math", "law")
    assert not merge.output.exists()


def test_what_else_needs_no_weights(merge):
    """Names of tensors, a head of its own, rules of flags."""
    assert "no tensor matches" in merge.failure("--tensor_coefficient=law:no.such.tensor=0.5")
    edit_json(merge.root / "law" / "config.json", tie_word_embeddings=True)
    merge.push("law")
    assert "expert 'law' has no lm_head.weight, the base has" in merge.failure()
    edit_json(merge.root / "law" / "config.json", tie_word_embeddings=False, hidden_act="gelu")
    merge.push("law")
    assert "hidden_act" in merge.failure()
    assert merge.cached_weights() == []


@pytest.mark.slow  # as it loads a tokenizer of transformers
def test_evaluated_merge_fetches_no_model_before_all_are_looked_at(merge):
    (merge.root / "gsm8k.jsonl").write_text(json.dumps({"id": "1", "question": "word1", "answer": "7"}))
    other_shape(merge.root)
    flags = ["--evaluate=gsm8k", f"--data_dir={merge.root}", f"--workdir={merge.root / 'work'}"]
    assert "expert 'law': model.layers.0.mlp.gate_proj.weight has shape" in merge.failure(*flags)
    assert merge.cached_weights() == []


def overlap(header: dict) -> None:
    header[K_PROJ]["data_offsets"] = header[Q_PROJ]["data_offsets"]


def quantised(header: dict) -> None:
    header[Q_PROJ]["dtype"] = "I8"


def too_long(file: Path) -> None:
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: edit_header(file, overlap), "tensors overlap or leave holes; the hub has it so: take another"),
        (lambda file: edit_header(file, quantised), f"{Q_PROJ} is stored as I8; weights must be"),
        (too_long, "truncated or not a safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated: "),
        (lambda file: file.write_bytes(b"\x10" + bytes(7) + b"{" * 16), "owner/law/model.safetensors is not JSON"),
    ],
    ids=["overlap", "quantised", "too long", "cut off", "no JSON"],
)
def test_hostile_header_on_the_hub(merge, damage: Callable[[Path], None], reason: str):
    damage(merge.root / "law" / "model.safetensors")
    message = merge.failure()
    assert reason in message
    assert "owner/law/model.safetensors" in message
    assert_headers_only(merge, "base", "math")


@pytest.mark.parametrize(("shard", "reason"), [("../../x", "outside the directory"), ("x", "owner/base/x is missing")])
def test_index_on_the_hub_that_names_other_files(merge, shard, reason):
    index = merge.root / "base" / "model.safetensors.index.json"
    write_json(index, {"weight_map": read_json(index)["weight_map"] | {Q_PROJ: shard}})
    assert reason in merge.failure()


def test_pickles_on_the_hub(merge):
    law = merge.root / "law"
    (law / "model.safetensors").rename(law / "pytorch_model.bin")
    message = merge.failure()
    assert "owner/law: pytorch_model.bin is a pickle" in message
    assert "from_pretrained('owner/law', dtype='auto')" in message


def test_adapters_on_the_hub(merge):
    base = {name: weight for file in merge.base.glob("*.safetensors") for name, weight in load_file(file).items()}
    adapter = write_adapter(merge.root / "adapter", factors(base))
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    merge.push("adapter")
    here = merge(f"--base={merge.base}", f"--expert=math={adapter}", f"--output={merge.root / 'here'}")
    merge("--expert=math=owner/adapter@main")
    merge("--expert=math=owner/base+owner/adapter@main", f"--output={merge.root / 'with base'}")
    for output in (merge.output, merge.root / "with base"):
        for file in merge.output.glob("*.safetensors"):
            assert (output / file.name).read_bytes() == (here / file.name).read_bytes()
    assert merge.cached_weights().count("adapter_model.safetensors") == 1
    assert not list((merge.root / "hub").rglob("training_args.bin"))
    assert not [path for path in merge.hub.asked if "consolidated" in path]


def test_disk_without_room_for_weights_and_output(merge, monkeypatch):
    """Each model once, although one is given twice, and the merge."""
    models = [weights(merge.root / name) for name in ("base", "math", "law")]
    output = sum(array.nbytes for array in random_weights(llama_config()).values())
    twice = "--expert=again=owner/law"
    usage = shutil.disk_usage(merge.root)
    free = [sum(models) + output - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    message = merge.failure(twice)
    assert f"{free[0] / 1e9:.2f} GB free, the weights from the hub, and the output, need 0.00 GB. Make room" in message
    assert "set HF_HUB_CACHE to a directory on another disk" in message
    assert merge.cached_weights() == []
    free[0] += 1
    merge(twice)


def test_bytes_to_fetch_count_a_model_once(merge):
    assert bytes_to_fetch([look("owner/law"), look("owner/law@main")]) == weights(merge.root / "law")
    open_checkpoint("owner/law")
    assert bytes_to_fetch([look("owner/law")]) == 0


# ---- a plan


def test_plan_of_models_on_the_hub(merge, capsys):
    """The dtype is that of the files, whatever config.json says."""
    edit_json(merge.root / "base" / "config.json", dtype="float32")
    work = merge.root / "work"
    launch("--job=plan", *merge.flags(), f"--workdir={work}")
    assert_headers_only(merge, "base", "math", "law")
    found = read_json(work / "plan.json")
    assert found["bytes_read"] == 3 * 2 * found["parameters"]
    assert found["bytes_fetched"] == sum(weights(merge.root / name) for name in ("base", "math", "law"))
    assert "fetched from the hub" in capsys.readouterr().out


def test_plan_without_a_network_is_from_config_files(merge, monkeypatch, capsys):
    launch("--job=plan", *merge.flags(), f"--workdir={merge.root / 'work'}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(merge.hub.asked)
    launch("--job=plan", *merge.flags(), f"--workdir={merge.root / 'again'}")
    assert read_json(merge.root / "again" / "plan.json")["bytes_fetched"] == 0
    assert len(merge.hub.asked) == asked


# ---- the weights


def local_merge(merge: HubMerge) -> bytes:
    """The weights of the merge of the same models from their directories."""
    models = [f"--base={merge.base}", f"--expert=math={merge.math}", f"--expert=law={merge.law}"]
    launch(*models, FAST, f"--output={merge.root / 'local'}")
    return (merge.root / "local" / "model.safetensors").read_bytes()


def test_merge_from_the_hub_then_without_a_network(merge, monkeypatch):
    """Only what is read comes: no pickle, no code, no weights under another name. Then no request is made."""
    found = (merge() / "model.safetensors").read_bytes()
    assert found == local_merge(merge)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert set(merge.cached_weights()) == {*shards, "model.safetensors"}
    assert not any(file.endswith((".bin", ".py")) or "consolidated" in file for _, file in merge.hub.served)
    asked = len(merge.hub.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    merge("--overwrite")
    assert len(merge.hub.asked) == asked


def test_revision_that_moves_between_headers_and_weights(merge):
    """All of a model is of the commit that main was at first."""
    wanted = local_merge(merge)
    config = llama_config()
    write_model(merge.root / "later", config, random_weights(config, seed=9), shards=2)

    def move(name: str, file: str) -> None:
        if file.endswith(".safetensors") and len(merge.hub.commits["owner/base"]) == 1:
            merge.hub.push("owner/base", merge.root / "later")

    merge.hub.before_file = move
    assert (merge() / "model.safetensors").read_bytes() == wanted
    assert len(merge.hub.commits["owner/base"]) == 2
    for name in ("base", "math", "law"):
        asked = [path for path in merge.hub.asked if f"owner/{name}" in path]
        assert [path for path in asked if "main" in path] == [f"GET /api/models/owner/{name}/revision/main"]


def test_weights_that_are_not_those_of_the_headers(merge):
    law = look("owner/law")
    edit_tensors(merge.law / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="weights that came have other headers than the hub showed before"):
        law.fetch()


@pytest.mark.slow
def test_processes_take_the_same_commits(merge):
    local_merge(merge)
    place = {"HF_ENDPOINT": merge.hub.endpoint, "HF_HUB_CACHE": str(merge.root / "hub")}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in place.items():
            patch.setenv(key, value)
        for done in run_processes(2, [*LAUNCH, *merge.flags()]):
            assert done.returncode == 0, done.stderr
    found, wanted = (open_checkpoint(place) for place in (merge.output, merge.root / "local"))
    for name in wanted.specs:
        np.testing.assert_array_equal(found.read(name), wanted.read(name))
    assert sum(path.endswith("/revision/main") for path in merge.hub.asked) == 3


# ---- what the hub refuses


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("owner/none", "RepositoryNotFoundError"),
        ("owner/law@v9", "RevisionNotFoundError"),
        ("owner/gated", "GatedRepoError"),
    ],
)
def test_model_that_the_hub_does_not_give(merge, model, reason):
    merge.hub.push("owner/gated", merge.law)
    merge.hub.gated.add("owner/gated")
    message = merge.failure(f"--expert=law={model}")
    assert f"{model}: no such directory, and fetching it from the hub failed: {reason}: 40" in message
    assert "Check the name, the network and, for a gated model, HF_TOKEN; or download it elsewhere" in message
    assert merge.cached_weights() == []


def test_hub_that_cannot_be_reached(merge, monkeypatch):
    """What is in the cache is enough; what is not is an error that says so."""
    open_checkpoint("owner/law")
    look("owner/math")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of huggingface_hub
    assert open_checkpoint("owner/law").read(Q_PROJ).shape == (32, 32)
    for model in ("owner/math", "owner/base"):
        with pytest.raises(CheckpointError, match=rf"{model}(@\w+)?: no such directory, and fetching it"):
            open_checkpoint(model)
