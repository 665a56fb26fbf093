"""Families without a row: their tensors are recognised by names and shapes, or as a file states them."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command import launch
from families import edit_json, read_json
from merge_oracle import kept
from safetensors.numpy import load_file, save_file
from small_models import tensors
from support import assert_same_bits

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEEPSEEK = {
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "v_head_dim": 8,
}
FAMILIES = {  # the config, and which tensors of the files are linears, by hand
    "falcon": (
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        r"\.h\.\d.*\.weight$",
    ),
    "gpt2": ({"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}, r"\.h\.\d.*\.c_\w+\.weight$"),
    "gpt_oss": ({**SIZES, "num_local_experts": 4, "head_dim": 16}, r"_proj(\.weight)?$"),
    "deepseek_v3": ({**SIZES, **DEEPSEEK}, r"layers.*(_proj|_mqa)\.weight$"),
    "t5": (
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        r"\.block\..*\.(q|k|v|o|wi|wo)\.weight$",
    ),
}
FLAGS = ("--method=magnitude", "--rate=0.6")


def make(family: str, root: Path) -> Path:
    """base in one file, math in shards."""
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family][0], **TOKENS)
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config)
    model.save_pretrained(root / "base")
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.tie_weights()
    model.save_pretrained(root / "math", max_shard_size="20KB")
    return root


def flags(root: Path, *more: str) -> list[str]:
    return [f"--base={root / 'base'}", f"--expert=math={root / 'math'}", f"--output={root / 'out'}", *FLAGS, *more]


def pruned(name: str, delta: np.ndarray, linear: str) -> np.ndarray:
    """The delta as a merge by magnitude leaves it; each expert of three axes is a linear of its own."""
    if delta.ndim < 2 or not re.search(linear, name):
        return delta
    each = delta.reshape(-1, *delta.shape[-2:])
    return np.stack([np.where(kept(own, 0.6), own, np.float32(0)) for own in each]).reshape(delta.shape)


@pytest.fixture
def falcon(tmp_path) -> Path:
    return make("falcon", tmp_path)


def change(directory: Path, edit) -> None:
    """Edit the tensors of a directory of one file."""
    found = load_file(directory / "model.safetensors")
    edit(found)
    save_file(found, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "gpt_oss" else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_without_a_row_is_merged_by_names_and_shapes(family, tmp_path, caplog):
    caplog.set_level(logging.INFO, "absl")
    root, linear = make(family, tmp_path), FAMILIES[family][1]
    launch(*flags(root))
    base, math, found = (tensors(root / name) for name in ("base", "math", "out"))
    assert found.keys() == base.keys()
    for name, array in base.items():
        wanted = array + pruned(name, math[name] - array, linear)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6, err_msg=name)
    said = [record.getMessage() for record in caplog.records if "names and shapes" in record.getMessage()]
    assert len(said) == 1
    assert f"{4 if family == 't5' else 2} layers" in said[0]


def test_a_row_and_its_tensors_alone_give_the_same_bits(merge):
    plain = tensors(merge("--method=ties", "--density=0.3"))
    assert_same_bits(tensors(merge("--method=ties", "--density=0.3", "--architecture=generic", "--overwrite")), plain)


def test_inspect_shows_the_tensors_and_writes_what_can_be_given_back(falcon, capsys):
    work = falcon / "work"
    launch("--job=inspect", *[f for f in flags(falcon) if "output" not in f], f"--workdir={work}")
    shown = capsys.readouterr().out
    assert "by names and shapes: 2 layers" in shown
    assert re.search(r"… self_attention\.dense +│ linear", shown)
    stated = read_json(work / "architecture.json")
    stated["linears"].remove("mlp.dense_4h_to_h.weight")
    (work / "mine.json").write_text(json.dumps(stated), encoding="utf-8")
    launch(*flags(falcon, f"--architecture={work / 'mine.json'}"))
    base, math, found = (tensors(falcon / name) for name in ("base", "math", "out"))
    for name, array in base.items():
        wanted = array + pruned(name, math[name] - array, r"\.h\.\d.*(dense_h_to_4h|dense|query_key_value)\.weight$")
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6, err_msg=name)


def test_a_stated_tensor_is_cut_into_its_parts(falcon):
    """Parts that take turns: rows 0..3 and 12..15 and so on are the first's."""
    stated = {
        "layers": ["transformer.h.{}."],
        "linears": ["mlp.*.weight"],
        "fused": {"self_attention.query_key_value.weight": {"a": 4, "b": 8}},
    }
    (falcon / "mine.json").write_text(json.dumps(stated), encoding="utf-8")
    launch(*flags(falcon, f"--architecture={falcon / 'mine.json'}"))
    name = "transformer.h.1.self_attention.query_key_value.weight"
    base, math, found = (tensors(falcon / directory)[name] for directory in ("base", "math", "out"))
    turns = (math - base).reshape(-1, 12, base.shape[1])
    for part in (turns[:, :4], turns[:, 4:]):
        part[...] = np.where(kept(part, 0.6), part, np.float32(0))
    np.testing.assert_allclose(found, base + turns.reshape(base.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lacks", ["base", "math"])
def test_a_tensor_that_one_model_lacks_is_refused_both_ways(lacks, tmp_path):
    root = make("falcon", tmp_path)
    if lacks == "base":
        change(root / "base", lambda found: found.pop("transformer.h.1.self_attention.dense.weight"))
    else:
        more = np.ones((4, 4), np.float32)
        change(root / "base", lambda found: found.update({"transformer.h.1.extra.weight": more}))
    with pytest.raises(SystemExit, match="has no transformer"):
        launch(*flags(root))
    assert not (root / "out").exists()


def test_a_head_that_only_one_file_has_is_dropped_if_it_is_a_copy_and_refused_if_not(falcon):
    for name in ("base", "math"):
        edit_json(falcon / name / "config.json", tie_word_embeddings=False)
    shards = (falcon / "math").glob("*.safetensors")
    shard = next(file for file in shards if "transformer.word_embeddings.weight" in load_file(file))
    held, index = load_file(shard), falcon / "math" / "model.safetensors.index.json"
    listed = read_json(index)
    listed["weight_map"]["lm_head.weight"] = shard.name
    index.write_text(json.dumps(listed), encoding="utf-8")
    held["lm_head.weight"] = held["transformer.word_embeddings.weight"]
    save_file({name: array.copy() for name, array in held.items()}, shard)
    launch(*flags(falcon))
    assert "lm_head.weight" not in tensors(falcon / "out")
    held["lm_head.weight"] = held["lm_head.weight"] + np.float32(1)
    save_file({name: array.copy() for name, array in held.items()}, shard)
    with pytest.raises(SystemExit, match=r"the base has no lm_head\.weight"):
        launch(*flags(falcon, "--overwrite"))


def test_two_matrices_that_config_calls_one_are_compared(tmp_path):
    root = make("deepseek_v3", tmp_path)
    for name in ("base", "math"):
        edit_json(root / name / "config.json", tie_word_embeddings=True)
    with pytest.raises(SystemExit, match=r"lm_head\.weight is not model\.embed_tokens\.weight.*tie_word_embeddings"):
        launch(*flags(root))


def test_buffers_are_copied_and_a_model_needs_no_config(falcon, caplog):
    caplog.set_level(logging.INFO, "absl")
    table = np.arange(6, dtype=np.int64).reshape(2, 3)
    change(falcon / "base", lambda found: found.update({"transformer.table": table}))
    (falcon / "base" / "config.json").unlink()
    launch(*flags(falcon, "--architecture=generic"))
    found = tensors(falcon / "out")
    np.testing.assert_array_equal(found["transformer.table"], table)
    assert not (falcon / "out" / "config.json").exists()
    assert "1 tensors are copied from the base, first transformer.table" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "mine.json"),
        ('{"layers": [], "linears": [], "heads": []}', "heads"),
        ('{"layers": ["transformer.h.{}."], "linears": ["nothing.weight"]}', "no tensor is a linear of a layer"),
        (
            '{"layers": ["transformer.h.{}."], "linears": [], "fused": {"mlp.dense_4h_to_h.weight": {"a": 5, "b": 6}}}',
            "no multiple of the 11 rows",
        ),
    ],
)
def test_a_statement_that_does_not_fit_is_refused(content, message, falcon):
    (falcon / "mine.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(message)):
        launch(*flags(falcon, f"--architecture={falcon / 'mine.json'}"))
