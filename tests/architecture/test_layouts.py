"""One model in several spellings and cuts: files are compared by what they mean, and written as the base has them."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command import launch
from families import read_json
from safetensors.numpy import load_file, save_file
from small_models import FAMILIES, SIZES, load, model_of, save, tensors, tune
from support import assert_same_bits

import dppa_jax
from dppa_jax.architecture.layout import Place
from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.checkpoint.laid_out import layout_of, stored_tensors
from dppa_jax.model import Decoder, DecoderConfig

FLAGS = ("--method=ties", "--density=0.4")


def flags(root: Path, *more: str) -> list[str]:
    return [f"--base={root / 'base'}", f"--expert=law={root / 'law'}", f"--output={root / 'out'}", *FLAGS, *more]


def family(root: Path, name: str) -> Path:
    """base and law, as transformers saves them."""
    save(name, model_of(name, 0), root / "base")
    save(name, tune(model_of(name, 0), 1), root / "law")
    return root


def rename(directory: Path, new: Callable[[str], str]) -> None:
    """Give the tensors of a directory of one file other names."""
    file = directory / "model.safetensors"
    save_file({new(name): array for name, array in load_file(file).items()}, file, {"format": "pt"})


SPELLINGS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of the layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "DataParallel": lambda name: f"module.{name}",
    "FSDP": lambda name: name.replace("model.layers.", "model._fsdp_wrapped_module.layers."),
    "the decoder within the model": lambda name: name.removeprefix("model."),
    "the text model of another": lambda name: f"language_model.{name}",
    "as transformers has it in memory": lambda name: name.replace("model.", "model.language_model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("respelt", ["base", "law"])
def test_names_with_a_wrapper_are_those_without_and_stay_as_the_base_has_them(spelling, respelt, tmp_path, caplog):
    caplog.set_level(logging.INFO, "absl")
    root, new = family(tmp_path, "Qwen2"), SPELLINGS[spelling]
    launch(*flags(root))
    plain = tensors(root / "out")
    rename(root / respelt, new)
    launch(*flags(root, "--overwrite"))
    wanted = {new(name): array for name, array in plain.items()} if respelt == "base" else plain
    assert_same_bits(tensors(root / "out"), wanted)
    told = [record.getMessage() for record in caplog.records if "are called otherwise" in record.getMessage()]
    assert [repr(respelt) in line for line in told] == [True]
    if spelling != "torch.compile of the layers" and spelling != "FSDP":
        assert new("model.embed_tokens.weight") in told[0]


@pytest.mark.parametrize("base", ["Mixtral", "Mixtral in three axes"])
def test_experts_of_another_cut_are_the_same_model(base, tmp_path):
    """A file for each matrix, or one array for all experts of a layer: the output is cut as the base is."""
    other = {"Mixtral": "Mixtral in three axes", "Mixtral in three axes": "Mixtral"}[base]
    root = family(tmp_path, base)
    launch(*flags(root))
    wanted = tensors(root / "out")
    save(other, tune(model_of(base, 0), 1), root / "law")
    launch(*flags(root, "--overwrite"))
    assert_same_bits(tensors(root / "out"), wanted)


def test_a_resumed_run_takes_up_heads_that_take_turns(tmp_path, monkeypatch):
    """Rows of one linear of GPT-NeoX lie in many pieces; what a killed run has written of them is not written again."""
    root = family(tmp_path, "GPT-NeoX")
    launch(*flags(root))
    wanted, written = tensors(root / "out"), []
    from dppa_jax.checkpoint import safetensors_writer as module

    write = module.SafetensorsWriter.write_rows

    def killed(self, name, start, rows):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, start, rows)

    with monkeypatch.context() as patch:
        patch.setattr(module.SafetensorsWriter, "write_rows", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            launch(*flags(root, "--overwrite"))
    again = []

    def counted(self, name, start, rows):
        again.append(name)
        write(self, name, start, rows)

    monkeypatch.setattr(module.SafetensorsWriter, "write_rows", counted)
    launch(*flags(root, "--overwrite"))
    assert_same_bits(tensors(root / "out"), wanted)
    assert 0 < len(again) < len(SafetensorsDirectory(root / "base").specs)


def test_a_mixture_that_is_cut_into_blocks_and_matrices_has_the_same_bits(tmp_path, monkeypatch):
    """The survey adds up a whole layer before it compares, and the plan knows what it reads."""
    root = family(tmp_path, "Qwen3-MoE in three axes")
    dppa = "--method=dppa", "--rate=0.7", "--partitions=0.9,0.7", "--factors=1.5,1.2", "--significance_multiple=2"
    cost = {}
    for cached, most in ((1 << 23, 1 << 26), (24 * 32 * 2, 1 << 12)):
        monkeypatch.setattr("dppa_jax.merging.blocks.CACHED", cached)
        monkeypatch.setattr("dppa_jax.merging.blocks.MOST", most)
        models = [f"--base={root / 'base'}", f"--expert=law={root / 'law'}"]
        launch(*models, *dppa, f"--output={root / str(most)}")
        launch("--job=plan", *models, *dppa, f"--workdir={root}")
        cost[most] = read_json(root / str(most) / "recipe.json")["cost"]["bytes_read"]
        assert cost[most] == read_json(root / "plan.json")["bytes_read"]
    assert_same_bits(tensors(root / str(1 << 12)), tensors(root / str(1 << 26)))
    assert cost[1 << 12] > cost[1 << 26]


def test_the_usual_layout_is_that_of_files(tmp_path):
    """Of a model without files, such as one in memory, the files are made as transformers makes them."""
    for name in ("Phi3", "GPT-NeoX", "Mixtral", "Qwen3-MoE"):
        save(name, model_of(name, 0), tmp_path / name)
        opened = SafetensorsDirectory(tmp_path / name)

        class InMemory:
            config, specs = opened.config, opened.specs

        wanted = {name: array.shape for name, array in tensors(tmp_path / name).items()}
        promised = {tensor: (spec.shape, np.dtype(np.float32)) for tensor, spec in opened.specs.items()}
        assert {n: shape for n, (shape, _) in stored_tensors(layout_of(InMemory), promised).items()} == wanted
        assert layout_of(InMemory).places == opened.layout.places


def test_a_place_is_cut_where_its_rows_are_not_together():
    place = Place("qkv", first=4, run=2, step=6)
    rows = [stored + i for _, stored, count in place.pieces(0, 6) for i in range(count)]
    assert rows == [4, 5, 10, 11, 16, 17]
    assert list(Place("qkv", first=4).pieces(2, 5)) == [(2, 6, 3)]


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path):
    root = family(tmp_path, "Phi3")
    file = root / "law" / "model.safetensors"
    held = load_file(file)
    held["model.layers.1.self_attn.qkv_proj.weight"] = np.ones((60, 32), np.float32)
    save_file(held, file)
    with pytest.raises(SystemExit, match=r"layers\.1\.self_attn\.qkv_proj\.weight has shape \(60, 32\), .* \(64, 32\)"):
        launch(*flags(root))


def test_text_part_of_a_wrapper_takes_a_text_model_and_another_spelling(tmp_path, caplog):
    """Gemma 3: base with images, one expert re-saved under new names, one of text alone; the tower stays as it is."""
    caplog.set_level(logging.INFO, "absl")
    name = "Gemma3 with images"
    root = family(tmp_path, name)
    launch(*flags(root))
    wanted, base = tensors(root / "out"), tensors(root / "base")
    seen = [tensor for tensor in base if "vision" in tensor or "multi_modal" in tensor]
    assert_same_bits({tensor: wanted[tensor] for tensor in seen}, {tensor: base[tensor] for tensor in seen})
    assert f"{len(seen)} tensors are copied from the base" in caplog.text
    tuned = tune(model_of(name, 0), 1)
    tuned.save_pretrained(root / "law", save_original_format=False)
    launch(*flags(root, "--overwrite"))
    assert_same_bits(tensors(root / "out"), wanted)
    text = transformers.AutoModelForCausalLM.from_config(tuned.config.text_config)
    text.model.load_state_dict(tuned.model.language_model.state_dict())
    text.save_pretrained(root / "law")
    launch(*flags(root, "--overwrite"))
    assert_same_bits(tensors(root / "out"), wanted)


def test_what_an_expert_learned_in_a_part_that_is_copied_is_said(tmp_path, caplog):
    name = "Gemma3 with images"
    root, tuned = family(tmp_path, name), tune(model_of(name, 0), 1)
    tuned.model.multi_modal_projector.mm_input_projection_weight.data += 1
    tuned.save_pretrained(root / "law", save_original_format=False)
    launch(*flags(root))
    assert "expert 'law': 1 tensors that are copied from the base differ there" in caplog.text


def test_a_tied_head_that_is_another_matrix_is_refused_in_any_spelling(tmp_path):
    root = family(tmp_path, "Gemma2")
    for directory in ("base", "law"):
        rename(root / directory, lambda name: f"language_model.{name}")
    file = root / "law" / "model.safetensors"
    held = load_file(file)
    held["language_model.lm_head.weight"] = held["language_model.model.embed_tokens.weight"] + np.float32(1)
    save_file(held, file)
    with pytest.raises(SystemExit, match=r"lm_head\.weight is not model\.embed_tokens\.weight.*tie_word_embeddings"):
        launch(*flags(root))


@pytest.fixture
def encoders(tmp_path) -> Path:
    """A base with a language-model head, law and math with classifiers of 3 and 2 labels."""
    base = model_of("BERT", 0)
    base.save_pretrained(tmp_path / "base")
    for seed, (name, labels) in enumerate({"law": 3, "math": 2}.items(), 1):
        config = transformers.AutoConfig.for_model("bert", **{**SIZES, **FAMILIES["BERT"][1]}, num_labels=labels)
        torch.manual_seed(seed)
        expert = transformers.BertForSequenceClassification(config)
        expert.bert.load_state_dict(base.bert.state_dict(), strict=False)
        tune(expert, seed).save_pretrained(tmp_path / name)
    return tmp_path


def test_a_classifier_is_copied_from_its_expert_and_the_backbone_merged(encoders):
    launch(*flags(encoders, "--method=task_arithmetic", "--coefficient=0.5"))
    base, law, found = (tensors(encoders / name) for name in ("base", "law", "out"))
    assert found.keys() == law.keys()
    for name, array in found.items():
        backbone = name in base
        wanted = base[name] + np.float32(0.5) * (law[name] - base[name]) if backbone else law[name]
        np.testing.assert_allclose(array, wanted, rtol=0, atol=0 if not backbone else 1e-6, err_msg=name)
    config = read_json(encoders / "out" / "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(encoders / "out")
    assert loaded.config.num_labels == 3
    assert torch.equal(loaded.classifier.weight, torch.tensor(law["classifier.weight"]))


def test_a_pooler_is_merged_where_the_base_has_one(encoders):
    """The base is saved without its prefix, as a BertModel is; transformers loads the merge with nothing missing."""
    config = transformers.AutoConfig.for_model("bert", **{**SIZES, **FAMILIES["BERT"][1]})
    torch.manual_seed(7)
    base = transformers.BertModel(config)
    base.load_state_dict(model_of("BERT", 0).bert.state_dict(), strict=False)
    base.save_pretrained(encoders / "base")
    launch(*flags(encoders, "--method=task_arithmetic", "--coefficient=0.5"))
    base, law, found = (tensors(encoders / name) for name in ("base", "law", "out"))
    assert found.keys() == law.keys()
    for part in ("pooler.dense.weight", "pooler.dense.bias", "encoder.layer.1.output.dense.weight"):
        wanted = base[part] + np.float32(0.5) * (law[f"bert.{part}"] - base[part])
        np.testing.assert_allclose(found[f"bert.{part}"], wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found["classifier.weight"], law["classifier.weight"])
    options = {"output_loading_info": True}
    _, said = transformers.AutoModelForSequenceClassification.from_pretrained(encoders / "out", **options)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]


def test_two_classifiers_are_refused_with_the_reason(encoders):
    both = [*flags(encoders), f"--expert=math={encoders / 'math'}"]
    with pytest.raises(SystemExit, match=r"2 experts have heads that the base has not .* a model has one head"):
        launch(*both)
    assert not (encoders / "out").exists()


@pytest.mark.parametrize("name", ["Phi3", pytest.param("Qwen3-MoE", marks=pytest.mark.slow)])
def test_a_model_in_memory_is_computed_and_saved_as_transformers_has_it(name, tmp_path):
    """Fused linears arrive split and leave fused; experts arrive stacked and leave one by one."""
    model = model_of(name, 0)
    save(name, model, tmp_path / "model")
    ours, tokens = dppa_jax.load(tmp_path / "model"), np.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits
        logits = Decoder(DecoderConfig.from_hf(ours.config), ours.tree)(tokens)
        np.testing.assert_allclose(logits, wanted.numpy(), rtol=0, atol=1e-4)
        dppa_jax.save(ours, tmp_path / "again")
        assert torch.equal(load(name, tmp_path / "again")(torch.tensor(tokens)).logits, wanted)


@pytest.mark.parametrize("name", ["Mixtral in three axes", pytest.param("GPT-NeoX", marks=pytest.mark.slow)])
def test_a_conversion_to_orbax_and_back_keeps_every_bit(name, tmp_path):
    model = model_of(name, 0)
    save(name, model, tmp_path / "model")
    launch("--job=convert", f"--base={tmp_path / 'model'}", f"--output=orbax:{tmp_path / 'orbax'}")
    launch("--job=convert", f"--base=orbax:{tmp_path / 'orbax'}", f"--output={tmp_path / 'back'}")
    loaded = load(name, tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[tensor], weight) for tensor, weight in model.state_dict().items())
