"""--dequantise: FP8, MXFP4 and compressed-tensors as bfloat16, against formulas and transformers' own code."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from command import launch
from families import edit_json, llama_config, read_json, shapes, write_model
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from dppa_jax.architecture.generic import GENERIC
from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.checkpoint.in_memory import for_evaluator
from dppa_jax.checkpoint.quantised import FP4
from dppa_jax.where import open_all

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), ml_dtypes.float8_e4m3fn
CONFIG = llama_config(num_hidden_layers=1, hidden_size=32, intermediate_size=48, vocab_size=32)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
BLOCK = (16, 24)


def compressed(strategy: str, bits: int = 8, **more) -> dict:
    weights = {"num_bits": bits, "strategy": strategy, "symmetric": True, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


CASES = {  # what config.json says, and the kind of numbers
    "fp8": ({"quant_method": "fp8", "weight_block_size": list(BLOCK)}, "fp8"),
    "tensor": (compressed("tensor"), "fp8"),
    "channel": (compressed("channel"), "int8"),
    "group": (compressed("group", 4, group_size=8), "int4"),
    "group of 8 bits": (compressed("group", 8, group_size=8), "packed"),
    "block": (compressed("block", block_structure=list(BLOCK)), "fp8"),
}
SIZES = {"fp8": BLOCK, "block": BLOCK, "tensor": (1 << 20, 1 << 20), "channel": (1, 1 << 20), "group": (1, 8)}
SIZES |= {"group of 8 bits": (1, 8)}


def quantised(name: str, shape: tuple, case: str, generator: np.random.Generator) -> tuple[dict, np.ndarray]:
    """(tensors of the file, what they stand for): the formula w · scale, one number at a time in numpy."""
    height, width = (min(size, whole) for size, whole in zip(SIZES[case], shape, strict=True))
    counts = [-(-whole // size) for whole, size in zip(shape, (height, width), strict=True)]
    scale = generator.uniform(0.001, 0.01, counts).astype(BF16 if "group" in case else np.float32)
    rows, columns = np.indices(shape)
    each = scale[rows // height, columns // width].astype(np.float32)
    if CASES[case][1] == "fp8":
        numbers = generator.normal(0, 40, shape).astype(FP8)
    else:
        low = -8 if CASES[case][1] == "int4" else -128
        numbers = generator.integers(low, -low, shape).astype(np.int8)
    stored = {f"{name}.weight": numbers, f"{name}.weight_scale": scale}
    if case == "fp8":
        stored = {f"{name}.weight": numbers, f"{name}.weight_scale_inv": scale}
    if bits := {"int4": 4, "packed": 8}.get(CASES[case][1]):
        count, added = 32 // bits, 2 ** (bits - 1)
        each_word = [(numbers[:, i::count].astype(np.int64) + added) << (bits * i) for i in range(count)]
        packed = sum(each_word).astype(np.uint32)
        shaped = {f"{name}.weight_shape": np.array(shape, np.int64)}
        stored = {f"{name}.weight_packed": packed.view(np.int32), f"{name}.weight_scale": scale, **shaped}
    if case == "tensor":
        stored |= {f"{name}.weight_scale": scale.reshape(1), f"{name}.input_scale": np.ones(1, np.float32)}
    return stored, (numbers.astype(np.float32) * each).astype(BF16)


def model(directory: Path, case: str, seed: int = 0, without: str = "") -> dict[str, np.ndarray]:
    """Write a quantised model, of which a tensor may be missing; return what its tensors stand for."""
    generator, stored, meant = np.random.default_rng(seed), {}, {}
    for name, shape in shapes(CONFIG).items():
        if ".layers." in name and len(shape) == 2:
            parts, meant[name] = quantised(name.removesuffix(".weight"), shape, case, generator)
            stored |= parts
        else:
            stored[name] = meant[name] = generator.normal(1, 0.1, shape).astype(BF16)
    stored.pop(without, None)
    write_model(directory, CONFIG | {"quantization_config": CASES[case][0]}, stored, shards=2)
    return meant


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_its_numbers_times_their_scales(case, tmp_path):
    meant = model(tmp_path / "model", case)
    source = SafetensorsDirectory(tmp_path / "model", dequantise=True)
    assert source.is_dequantised
    assert source.dtype == BF16
    assert source.tensors.keys() == meant.keys()
    assert len(source.files()) == 2
    for name, wanted in meant.items():
        assert (source.read(name).view(np.uint16) == wanted.view(np.uint16)).all(), name
    some = np.empty((5, 48), BF16)
    source.read_rows(f"{DOWN}.weight", 13, 18, some)
    assert (some == meant[f"{DOWN}.weight"][13:18]).all()


def test_blocks_of_fp8_as_transformers_dequantises_them(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    meant = model(tmp_path / "model", "fp8")
    stored = {n: a for file in (tmp_path / "model").glob("*.safetensors") for n, a in load_torch(file).items()}
    weight, scale = stored[f"{Q}.weight"][:, :24], stored[f"{Q}.weight_scale_inv"][:, :1]  # whole blocks
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale)
    assert (theirs.to(torch.bfloat16).float().numpy() == meant[f"{Q}.weight"][:, :24].astype(np.float32)).all()


def test_mxfp4_as_transformers_dequantises_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator, experts, outputs, groups = np.random.default_rng(0), 3, 6, 2
    blocks = generator.integers(0, 256, (experts, outputs, groups, 16)).astype(np.uint8)
    scales = generator.integers(118, 130, (experts, outputs, groups)).astype(np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    linear = generator.normal(size=(8, 8)).astype(BF16)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, "model.layers.0.self_attn.q_proj.weight": linear}
    write_model(tmp_path / "model", {"quantization_config": {"quant_method": "mxfp4"}}, tensors, tokenizer=False)
    source = SafetensorsDirectory(tmp_path / "model", GENERIC, dequantise=True)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.bfloat16)
    wanted = theirs.float().numpy()
    [stored] = [stored for stored in source.layout.shapes if "gate_up" in stored]
    assert source.layout.shapes[stored] == wanted.shape == (experts, 64, outputs)
    for own, place in source.layout.places.items():
        if place.stored == stored:
            part = wanted if place.whole else wanted.reshape(-1, outputs)[place.first :][: source.specs[own].rows]
            assert (source.read(own).astype(np.float32).ravel() == part.ravel()).all(), own
    assert FP4[np.uint8(7)] == 6


def test_a_merge_of_quantised_models_says_so_and_writes_bfloat16(tmp_path, capsys):
    places, meant = {}, {}
    for seed, name in enumerate(("base", "math")):
        meant[name] = model(tmp_path / name, "fp8" if name == "base" else "channel", seed)
        places[name] = str(tmp_path / name)
    flags = [f"--base={places['base']}", f"--expert=math={places['math']}", "--method=task_arithmetic"]
    flags += [f"--workdir={tmp_path / 'runs'}", "--allow_other_base", "--coefficient=0.5"]
    launch("--job=plan", *flags, "--dequantise")
    assert "dequantised while read" in capsys.readouterr().out
    launch(*flags, "--dequantise", f"--output={tmp_path / 'merged'}")
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json")
    for name, array in load_file(tmp_path / "merged" / "model.safetensors").items():
        base, expert = (meant[model][name].astype(np.float32) for model in ("base", "math"))
        assert (array == (base + np.float32(0.5) * (expert - base)).astype(BF16)).all(), name


def test_other_jobs_read_quantised_models_too(tmp_path):
    """Two of one content, quantised and as bfloat16, are found equal; an evaluator gets numbers, not the directory."""
    meant = model(tmp_path / "quantised", "block")
    write_model(tmp_path / "plain", CONFIG, meant)
    compared = [f"--output={tmp_path / 'quantised'}", f"--reference={tmp_path / 'plain'}"]
    launch("--job=validate", *compared, f"--workdir={tmp_path / 'runs'}", "--tolerance_ulp=0", "--dequantise")
    places = {"whole": str(tmp_path / "quantised"), "layers": f"layers:{tmp_path / 'quantised'}[0:1]"}
    for opened in open_all(places, dequantise=True).values():
        given = for_evaluator(opened)
        assert all((given.tensors[name] == array).all() for name, array in meant.items())
    with pytest.raises(CheckpointError, match="give --dequantise"):
        open_all(places)


WRONG = {
    "without the flag": (lambda root: None, False, "give --dequantise"),
    "an unknown method": (lambda root: say(root, {"quant_method": "awq"}), True, "quant_method 'awq'"),
    "no method": (lambda root: say(root, None), True, "is stored as F8_E4M3"),
    "another block": (
        lambda root: say(root, {"quant_method": "fp8", "weight_block_size": [8, 8]}),
        True,
        "does not fit a weight of",
    ),
    "no block": (lambda root: say(root, {"quant_method": "fp8"}), True, "the two sizes of a block"),
    "a lost scale": (f"{Q}.weight_scale_inv", True, f"{Q}.weight is stored as F8_E4M3"),
    "a lost weight": (f"{Q}.weight", True, f"{Q}.weight_scale_inv is the scale of no"),
    "asymmetric": (lambda root: say(root, compressed("channel", symmetric=False)), True, "not asymmetric"),
    "an unknown strategy": (lambda root: say(root, compressed("token")), True, "not token"),
}


def say(root: Path, quantization: dict | None) -> None:
    edit_json(root / "config.json", quantization_config=quantization)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_read_is_refused_by_name(wrong, tmp_path):
    change, flag, message = WRONG[wrong]
    model(tmp_path / "model", "fp8", without=change if isinstance(change, str) else "")
    if not isinstance(change, str):
        change(tmp_path / "model")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        _ = SafetensorsDirectory(tmp_path / "model", dequantise=flag).specs
