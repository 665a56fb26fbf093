"""The notebook's functions: load, merge, save."""

import numpy as np
import pytest
from command import launch
from families import write_family
from support import same_bits

import dppa_jax
from dppa_jax.where import load_tree


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"))


def test_merge_in_memory_has_the_bits_of_the_command_line(family, tmp_path):
    base, *experts = (dppa_jax.load(family / name) for name in ("base", "math", "law"))
    merged = dppa_jax.merge(
        base,
        dict(zip(("math", "law"), experts, strict=True)),
        "dppa",
        rate=0.8,
        factors={"math": (1.5, 1.2), "law": (2.0, 1.0)},
        coefficients={"law": 0.5},
        mesh="layer=1,row=1",
    )
    flags = ["--factors=math=1.5,1.2", "--factors=law=2.0,1.0", "--coefficient=law=0.5", "--mesh=layer=1,row=1"]
    experts = [f"--expert={name}={family / name}" for name in ("math", "law")]
    launch(
        f"--base={family / 'base'}", *experts, "--method=dppa", "--rate=0.8", *flags, f"--output={tmp_path / 'merged'}"
    )
    written = dppa_jax.load(tmp_path / "merged")
    for name, array in merged.tensors.items():
        assert same_bits(array, written.tensors[name]), name


def test_save_writes_what_load_reads_with_the_tokenizer(family, tmp_path):
    model = dppa_jax.load(family / "math")
    dppa_jax.save(model, tmp_path / "copy")
    config, tree = load_tree(tmp_path / "copy")
    assert config["hidden_size"] == model.config["hidden_size"]
    assert same_bits(tree["layers"]["mlp"]["up_proj"], model.tree["layers"]["mlp"]["up_proj"])
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (family / "math" / "tokenizer.json").read_bytes()


def test_merging_leaves_the_inputs_alone(family):
    base, expert = dppa_jax.load(family / "base"), dppa_jax.load(family / "math")
    before = np.array(base.tree["norm"]), np.array(expert.tree["norm"])
    merged = dppa_jax.merge(base, {"math": expert}, "task_arithmetic", mesh="layer=1,row=1")
    assert same_bits(base.tree["norm"], before[0])
    assert same_bits(expert.tree["norm"], before[1])
    assert merged.directory == base.directory


def test_methods_are_the_presets():
    assert {"dppa", "dare", "ties", "task_arithmetic"} <= set(dppa_jax.methods)
