"""--job=convert: there and back with every bit, on any mesh and number of processes; orbax:DIR wherever a model is."""

import itertools
import logging
import re
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from command import Merge, launch, tree
from families import DTYPES, llama_config, random_weights, read_json, write_model
from processes import LAUNCH, check_success, run_processes

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.config.run import ValidateConfig
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.jobs.validate import validate
from dppa_jax.merging import speed
from dppa_jax.where import load_tree, open_checkpoint

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def convert(base: str | Path, output: str | Path, *flags: str) -> None:
    launch("--job=convert", f"--base={base}", f"--output={output}", *flags)


def assert_same_model(found: Path, wanted: Path) -> None:
    """Config, tokenizer files, and every tensor with its bits."""
    ours, theirs = SafetensorsDirectory(found), SafetensorsDirectory(wanted)
    assert ours.specs == theirs.specs
    assert ours.config == theirs.config
    for name in theirs.specs:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), strict=True)
    for path in wanted.iterdir():
        if path.suffix != ".safetensors" and not path.name.startswith(("model.", "config.")):
            assert (found / path.name).read_bytes() == path.read_bytes()


TIED = {"tie_word_embeddings": True, "dtype": "float16", "vocab_size": 61}
WAYS = itertools.product(({}, TIED), ("", "layer=3,row=2", "layer=2,row=4"))
FAST = (({}, ""), (TIED, "layer=3,row=2"))


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [pytest.param(*way, marks=[] if way in FAST else pytest.mark.slow) for way in WAYS],
    ids=str,
)
def test_there_and_back_keeps_every_bit(tmp_path, changes, mesh):
    config = llama_config(**changes)
    wanted = write_model(tmp_path / "model", config, random_weights(config), shards=2)
    convert(wanted, f"orbax:{tmp_path / 'orbax'}", f"--mesh={mesh}")
    convert(f"orbax:{tmp_path / 'orbax'}", tmp_path / "back", "--max_shard_size=20000")
    assert_same_model(tmp_path / "back", wanted)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


@pytest.mark.slow
def test_two_processes_convert_there_and_back(pristine, tmp_path):
    there = ["--job=convert", f"--base={pristine / 'base'}", f"--output=orbax:{tmp_path / 'orbax'}"]
    assert_about_half_each(run_processes(2, [*LAUNCH, *there], devices=2, timeout=300))
    assert len(list((tmp_path / "orbax").glob("ocdbt.process_*"))) == 2  # each wrote what it had
    back = ["--job=convert", f"--base=orbax:{tmp_path / 'orbax'}", f"--output={tmp_path / 'back'}"]
    assert_about_half_each(run_processes(2, [*LAUNCH, *back], timeout=300))
    assert_same_model(tmp_path / "back", pristine / "base")


def assert_about_half_each(processes: list[CompletedProcess]) -> None:
    """Three layers on two processes are two and one, or half of the rows of each."""
    check_success(processes)
    read = [int(re.search(r"read (\d+) bytes here", process.stderr)[1]) for process in processes]
    assert max(read) < 0.65 * sum(read)
    assert sum(read) < 1.02 * sum(array.nbytes for array in random_weights(llama_config()).values())


def test_merge_of_orbax_checkpoints_has_the_same_bits(merge: Merge):
    merge()
    wanted = (merge.output / "model.safetensors").read_bytes()
    for name in ("base", "math", "law"):
        convert(merge.root / name, f"orbax:{merge.root / name}-orbax")
    models = [
        f"--{flag}orbax:{merge.root / name}-orbax" for flag, name in (("base=", "base"), ("expert=math=", "math"))
    ]
    merge(*models, f"--expert=law=orbax:{merge.law}-orbax", "--overwrite")
    assert (merge.output / "model.safetensors").read_bytes() == wanted
    assert (merge.output / "tokenizer.json").read_bytes() == (merge.base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("job", ["plan", pytest.param("inspect", marks=pytest.mark.slow)])
def test_plan_and_inspect_take_orbax_checkpoints(merge: Merge, monkeypatch, job):
    monkeypatch.setattr(speed, "WRITTEN", 1 << 20)
    monkeypatch.setattr(speed, "PIECE", 1 << 18)
    convert(merge.base, f"orbax:{merge.root / 'orbax'}")
    models = [f"--base=orbax:{merge.root / 'orbax'}", f"--workdir={merge.root / 'runs'}"]
    merge(f"--job={job}", *models)
    assert {"plan": "models", "inspect": "math"}[job] in read_json(merge.root / "runs" / f"{job}.json")


def test_validate_compares_both_formats(pristine, tmp_path):
    convert(pristine / "base", f"orbax:{tmp_path / 'orbax'}")
    for name, same in (("base", True), ("math", False)):
        config = ValidateConfig(f"orbax:{tmp_path / 'orbax'}", str(pristine / name), workdir=str(tmp_path))
        assert validate(config).passed == same


def test_trees_are_the_same(pristine, tmp_path):
    convert(pristine / "base", f"orbax:{tmp_path / 'orbax'}")
    (config, found), (_, wanted) = load_tree(f"orbax:{tmp_path / 'orbax'}"), load_tree(pristine / "base")
    np.testing.assert_array_equal(found["layers"]["mlp"]["up_proj"], wanted["layers"]["mlp"]["up_proj"], strict=True)
    assert config["vocab_size"] == 64


def test_evaluator_answers_from_both_formats_alike(pristine, tmp_path):
    convert(pristine / "base", f"orbax:{tmp_path / 'orbax'}")
    evaluator, prompts = JaxEvaluator(), [[1, 5, 9], [1, 7]]
    evaluator.use(pristine / "base")
    wanted = evaluator.generate(prompts, 4)
    evaluator.use(tmp_path / "orbax")
    assert evaluator.generate(prompts, 4) == wanted


def test_output_dtype(pristine, tmp_path):
    convert(pristine / "base", f"orbax:{tmp_path / 'orbax'}", "--output_dtype=float32")
    source = open_checkpoint(f"orbax:{tmp_path / 'orbax'}")
    assert source.config["dtype"] == "float32"
    wanted = SafetensorsDirectory(pristine / "base").read(UP_PROJ).astype(np.float32)
    np.testing.assert_array_equal(source.read(UP_PROJ), wanted, strict=True)


def test_layers_of_several_dtypes_become_float32_without_loss(tmp_path, caplog):
    weights = random_weights(llama_config())
    weights[UP_PROJ] = weights[UP_PROJ].astype(DTYPES["float32"]) + np.float32(1e-6)
    write_model(tmp_path / "model", llama_config(), weights)
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "model", f"orbax:{tmp_path / 'orbax'}")
    assert "layers.mlp.up_proj: layers have several dtypes" in caplog.text
    np.testing.assert_array_equal(open_checkpoint(f"orbax:{tmp_path / 'orbax'}").read(UP_PROJ), weights[UP_PROJ])


def test_existing_output_is_replaced_only_when_asked(pristine, tmp_path):
    output = f"orbax:{tmp_path / 'orbax'}"
    convert(pristine / "base", output)
    with pytest.raises(SystemExit, match=r"not empty; choose another --output, or --overwrite"):
        convert(pristine / "math", output)
    convert(pristine / "math", output, "--overwrite")
    wanted = SafetensorsDirectory(pristine / "math").read(UP_PROJ)
    np.testing.assert_array_equal(open_checkpoint(output).read(UP_PROJ), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]


@pytest.mark.parametrize("orbax", [True, False])
def test_failed_conversion_leaves_nothing_but_what_the_next_one_goes_on_from(pristine, tmp_path, monkeypatch, orbax):
    convert(pristine / "base", f"orbax:{tmp_path / 'first'}")
    base, output = (pristine / "base", f"orbax:{tmp_path / 'second'}")
    if not orbax:
        base, output = f"orbax:{tmp_path / 'first'}", tmp_path / "second"
    source = type(open_checkpoint(base))
    read_rows = source.read_rows

    def fail_late(self, name, *rest):
        if name == "model.norm.weight":
            raise OSError("the disk is gone")
        read_rows(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(source, "read_rows", fail_late)
        with pytest.raises(SystemExit, match="the disk is gone"):
            convert(base, output)
    left = [] if orbax else ["second.incomplete"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", *left]
    convert(base, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base=base", "--output="], "--output is empty"),
        (["--base=", "--output=orbax:out"], "--base is empty"),
        (["--base=base", "--output=orbax:"], "--output is empty"),
        (["--base=base", "--output=orbax:base"], "is not empty"),
        (["--base=base", "--output=orbax:base/orbax"], "one contains the other"),
        (["--base=base", "--output=orbax:out", "--output_dtype=float8"], "--output_dtype"),
        (["--base=orbax:base", "--output=out"], "not an Orbax checkpoint"),
        (["--job=merge", "--base=base", "--expert=law=law", "--output=orbax:out"], "--job=convert --base=DIR"),
    ],
    ids=str,
)
def test_refusals_before_anything_is_written(merge: Merge, monkeypatch, flags, said):
    monkeypatch.chdir(merge.root)
    before = tree(merge.root)
    with pytest.raises(SystemExit) as error:
        launch("--job=convert", *flags)
    assert said in str(error.value.code)
    assert tree(merge.root) == before
