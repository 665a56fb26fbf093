"""PEFT adapters: a base with an adapter has the rows that numpy and peft compute, and all else is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from adapters import PREFIX, PROJECTIONS, factors, put_onto, write_adapter
from command import launch
from families import (
    edit_json,
    edit_tensors,
    llama_config,
    random_weights,
    read_json,
    write_json,
    write_model,
    write_tokenizer,
)
from safetensors.numpy import load_file
from small_models import FAMILIES, model_of

from dppa_jax.checkpoint import CheckpointError
from dppa_jax.jobs import write_merge
from dppa_jax.where import locate, open_checkpoint

CONFIG = llama_config(num_hidden_layers=2, dtype="float32")
BASE = random_weights(CONFIG)
SINGLE = "model.safetensors"
SIZES = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
V_PROJ = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def base(tmp_path) -> Path:
    return write_model(tmp_path / "base", CONFIG, BASE)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", factors(BASE))


def tensors_of(where: str) -> dict[str, np.ndarray]:
    source = open_checkpoint(where)
    return {name: source.read(name) for name in source.specs}


def assert_close(found, wanted, tolerance=1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name].astype(float), wanted[name].astype(float), rtol=0, atol=tolerance)


def refusal(base, adapter) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(f"{base}+{adapter}")
    message = str(error.value)
    assert str(adapter) in message
    return message


# ---- rows


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_the_base_and_scale_b_a(tmp_path, adapter, shards):
    base = write_model(tmp_path / "base", CONFIG, BASE, shards)
    found, wanted = tensors_of(f"{base}+{adapter}"), put_onto(BASE, factors(BASE))
    assert_close(found, wanted)
    changed = {name for name in BASE if not np.array_equal(found[name], BASE[name])}
    assert changed == {name for name in BASE if name.removesuffix(".weight").endswith(PROJECTIONS)}


def test_sums_are_rounded_once_to_the_dtype_of_the_base(tmp_path):
    weights = random_weights(llama_config())
    base = write_model(tmp_path / "base", llama_config(), weights)
    adapter = write_adapter(tmp_path / "adapter", factors(weights))
    found, wanted = tensors_of(f"{base}+{adapter}"), put_onto(weights, factors(weights))
    for name in wanted:  # but for a sum that lies in the middle of two numbers
        assert found[name].dtype == weights[name].dtype
        np.testing.assert_allclose(found[name].astype(float), wanted[name].astype(float), rtol=2**-8)
        assert (found[name] == wanted[name]).mean() > 0.999


def test_rows_have_the_same_bits_whoever_asks_for_them(tmp_path, adapter):
    wide = llama_config(intermediate_size=200, dtype="float32")
    weights = random_weights(wide)
    base = write_model(tmp_path / "base", wide, weights)
    adapter = write_adapter(tmp_path / "wide", factors(weights, ("gate_proj",)), target_modules="all-linear")
    source, name = open_checkpoint(f"{base}+{adapter}"), "model.layers.1.mlp.gate_proj.weight"
    whole = source.read(name)
    for start, stop in ((0, 1), (31, 33), (40, 41), (63, 160), (199, 200)):
        rows = np.empty((stop - start, 32), np.float32)
        source.read_rows(name, start, stop, rows)
        np.testing.assert_array_equal(rows, whole[start:stop])


def test_rows_are_computed_without_the_whole_matrix(base, adapter, monkeypatch):
    source, read = open_checkpoint(f"{base}+{adapter}"), []
    files = type(source.base._files)
    monkeypatch.setattr(
        files,
        "read_bytes",
        lambda self, name, file, position, view, real=files.read_bytes: (
            read.append((file.name, view.nbytes)),
            real(self, name, file, position, view),
        ),
    )
    source.read_rows("model.layers.0.mlp.down_proj.weight", 3, 4, np.empty((1, 48), np.float32))
    assert ("model.safetensors", 48 * 4) in read
    assert sum(count for file, count in read if file.startswith("adapter")) == (4 * 48 + 32 * 4) * 4


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 2.5), ({"use_rslora": True}, 5), ({"lora_alpha": 4}, 1), ({"alpha_pattern": {"self_attn.v_proj": 10}}, 2.5)],
    ids=["alpha / r", "rslora", "alpha", "another module's alpha_pattern"],
)
def test_scale(tmp_path, base, changes, scale):
    tensors = factors(BASE, ("q_proj",))
    adapter = write_adapter(tmp_path / "adapter", tensors, **changes)
    assert_close(tensors_of(f"{base}+{adapter}"), put_onto(BASE, tensors, scale))


@pytest.mark.parametrize("pattern", ["v_proj", "layers.1.self_attn.v_proj", r"^model\.layers\.\d+\.self_attn.v_proj"])
def test_rank_and_alpha_of_single_modules(tmp_path, base, pattern):
    both, own = factors(BASE, ("q_proj", "v_proj")), factors(BASE, ("v_proj",), rank=8)
    own = {name: factor for name, factor in own.items() if V_PROJ in name or "layers.1" not in pattern}
    patterns = {"rank_pattern": {pattern: 8}, "alpha_pattern": {pattern: 24}}
    adapter = write_adapter(tmp_path / "adapter", both | own, **patterns)
    wanted = put_onto(put_onto(BASE, {n: f for n, f in both.items() if n not in own}), own, 3)
    assert_close(tensors_of(f"{base}+{adapter}"), wanted)


def test_embeddings_of_low_rank(tmp_path, base):
    tensors = factors(BASE, ("embed_tokens", "q_proj"))
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["embed_tokens", "q_proj"])
    source, wanted = open_checkpoint(f"{base}+{adapter}"), put_onto(BASE, tensors)
    assert_close({EMBEDDINGS: source.read(EMBEDDINGS)}, {EMBEDDINGS: wanted[EMBEDDINGS]})
    rows = np.empty((3, 32), np.float32)
    source.read_rows(EMBEDDINGS, 40, 43, rows)
    np.testing.assert_array_equal(rows, source.read(EMBEDDINGS)[40:43])


def test_whole_tensors_stand_in_place_of_the_base(tmp_path):
    config = llama_config(attention_bias=True, dtype="float32", num_hidden_layers=1)
    biases = {f"model.layers.0.self_attn.{name}.bias": np.zeros(size, np.float32) for name, size in SIZES.items()}
    weights = random_weights(config) | biases
    base = write_model(tmp_path / "base", config, weights)
    own = {HEAD: weights[HEAD] + 1, **{name: bias + 2 for name, bias in biases.items()}}
    saved = {f"{PREFIX}{name.replace('.bias', '.base_layer.bias')}": tensor for name, tensor in own.items()}
    adapter = write_adapter(tmp_path / "adapter", factors(weights) | saved, bias="all", modules_to_save=["lm_head"])
    assert_close(tensors_of(f"{base}+{adapter}"), put_onto(weights, factors(weights)) | own)


def test_added_tokens_have_rows_and_a_tokenizer(tmp_path, base):
    more = np.full((3, 32), 0.5, np.float32)
    own = {f"{PREFIX}{name}": np.concatenate([BASE[name], more]) for name in (EMBEDDINGS, HEAD)}
    adapter = write_adapter(tmp_path / "adapter", factors(BASE) | own, modules_to_save=["embed_tokens", "lm_head"])
    source = open_checkpoint(f"{base}+{adapter}")
    assert source.config["vocab_size"] == 67
    assert source.specs[HEAD].shape == (67, 32)
    np.testing.assert_array_equal(source.read(HEAD)[-3:], more)
    assert locate(f"{base}+{adapter}") == base
    write_tokenizer(adapter)
    (adapter / "generation_config.json").unlink()
    edit_json(base / "generation_config.json", eos_token_id=[2, 5])
    assert locate(f"{base}+{adapter}") == adapter
    assert open_checkpoint(f"{base}+{adapter}").config["eos_token_id"] == [2, 5]
    del own[f"{PREFIX}{HEAD}"]
    one = write_adapter(tmp_path / "one", own, modules_to_save=["embed_tokens"])
    assert "changes their number in some tensors only" in refusal(base, one)


def test_heads_that_are_the_embeddings(tmp_path, caplog):
    config = llama_config(tie_word_embeddings=True, dtype="float32", num_hidden_layers=1)
    weights = random_weights(config)
    base = write_model(tmp_path / "base", config, weights)
    own = {f"{PREFIX}{name}": weights[EMBEDDINGS] * 2 for name in (EMBEDDINGS, HEAD)}
    same = write_adapter(tmp_path / "same", own)
    assert_close(tensors_of(f"{base}+{same}"), weights | {EMBEDDINGS: weights[EMBEDDINGS] * 2})
    own[f"{PREFIX}{HEAD}"] = weights[EMBEDDINGS] * 3
    assert "lm_head.weight, which is the embeddings" in refusal(base, write_adapter(tmp_path / "other", own))
    head = {HEAD: np.zeros((64, 32), np.float32)}
    low = write_adapter(tmp_path / "low", factors(head, ("lm_head",)), target_modules=["lm_head"])
    assert "lm_head.weight, which is the embeddings" in refusal(base, low)
    tokens = write_adapter(tmp_path / "tokens", factors(weights, ("embed_tokens",)), target_modules=["embed_tokens"])
    assert_close(tensors_of(f"{base}+{tokens}"), put_onto(weights, factors(weights, ("embed_tokens",))))
    assert "which is the head, too" in caplog.text


# ---- where


def test_a_plus_may_be_part_of_a_name(tmp_path, adapter):
    base = write_model(tmp_path / "my+base", CONFIG, BASE)
    other = shutil.copytree(adapter, tmp_path / "an+adapter")
    wanted = put_onto(BASE, factors(BASE))
    for where in (f"{base}+{adapter}", f"{base}+{other}"):
        assert_close(tensors_of(where), wanted)
    assert_close(tensors_of(str(base)), BASE)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json is there"):
        open_checkpoint(f"{base}+{tmp_path / 'nothing'}")
    with pytest.raises(CheckpointError, match=r"give BASE\+ADAPTER"):
        open_checkpoint(f"+{adapter}")


def test_adapters_lie_on_orbax_and_on_adapters(tmp_path, base, adapter):
    launch("--job=convert", f"--base={base}", f"--output=orbax:{tmp_path / 'orbax'}")
    wanted = put_onto(BASE, factors(BASE))
    assert_close(tensors_of(f"orbax:{tmp_path / 'orbax'}+{adapter}"), wanted)
    second = write_adapter(tmp_path / "second", factors(BASE, seed=1))
    assert_close(tensors_of(f"{base}+{adapter}+{second}"), put_onto(wanted, factors(BASE, seed=1)))


def test_fingerprints_tell_adapters_apart(tmp_path, base, adapter):
    def hashes(one):
        source = open_checkpoint(f"{base}+{one}")
        return source.fingerprint(), source.content_digest()

    first = hashes(adapter)
    assert hashes(shutil.copytree(adapter, tmp_path / "copy")) == first
    alpha, factor = (shutil.copytree(adapter, tmp_path / name) for name in ("alpha", "factor"))
    edit_json(alpha / "adapter_config.json", lora_alpha=11)
    edit_tensors(factor / "adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).fill(1))
    for other in (alpha, factor):
        assert not set(hashes(other)) & set(first)


# ---- refusals

ANY = next(iter(factors(BASE)))
OTHERS = {
    "use_dora": (True, "DoRA"),
    "target_parameters": (["mlp.experts.gate_up_proj"], "an adapter of parameters that are no module"),
    "trainable_token_indices": ([1, 2], "rows for single tokens"),
    "alora_invocation_tokens": ([5], "aLoRA, which acts after certain tokens"),
    "lora_bias": (True, "a bias after B"),
    "use_something_new": (True, "may change what the adapter computes"),
    "peft_type": ("IA3", "peft_type is 'IA3', and only LORA is read"),
    "init_lora_weights": ("pissa_niter_4", "init_lora_weights is pissa_niter_4, which changes the weights of the base"),
    "r": (8, "has rank 4, "),
    "lora_alpha": (float("nan"), "no finite number"),
    "target_modules": (["q_proj", "v_proj"], "belongs to no module that target_modules"),
    "alpha_pattern": ({"((a+)+)+": 1}, "in two places of a name at most, but not '((a+)+)+'"),
    "rank_pattern ": ({"[": 1}, "'[' is no pattern"),
    "alpha_pattern ": ({f"m{i}": 1 for i in range(5001)}, "may name 5000 modules"),
    "rank_pattern": ({"v_proj": "8"}, "Expected `int`, got `str`"),
}


@pytest.mark.parametrize("key", OTHERS)
def test_adapters_that_compute_something_else(base, adapter, key):
    value, said = OTHERS[key]
    edit_json(adapter / "adapter_config.json", **{key.strip(): value})
    message = refusal(base, adapter)
    assert said in message
    assert "adapter_config.json" in message


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name, array=None):
    return lambda tensors: tensors.update({name: np.zeros((4, 32), np.float32) if array is None else array})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop(ANY), "is there without the other factor"),
        (add(f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"), "is no tensor of LoRA as peft writes"),
        (add("model.norm.weight"), "is no tensor of LoRA as peft writes"),
        (add(f"{PREFIX}score.weight"), "changes 1 tensors that the base in"),
        (add(f"{PREFIX}model.norm.weight"), "the shape (4, 32), and model.norm.weight of the base"),
        (add(ANY, np.zeros(0, np.float32)), "gather them before save_pretrained"),
        (add(ANY, np.zeros((4, 32), np.int64)), "is int64, which no weight is"),
    ],
    ids=["one factor", "DoRA", "no prefix", "head of another task", "shape", "not gathered", "numbers"],
)
def test_tensors_without_a_place(base, adapter, change, said):
    edit_tensors(adapter / "adapter_model.safetensors", change)
    message = refusal(base, adapter)
    assert said in message
    assert "adapter_model.safetensors" in message


def test_another_base(tmp_path, adapter, caplog):
    config = llama_config(num_hidden_layers=2, intermediate_size=56, dtype="float32")
    other = write_model(tmp_path / "other", config, random_weights(config))
    message = refusal(other, adapter)
    assert "mlp.down_proj" in message
    assert "it was made from 'owner/base'" in message
    same = write_model(tmp_path / "same", CONFIG, BASE)
    open_checkpoint(f"{same}+{adapter}")
    assert "is that the same model?" in caplog.text
    few = write_model(tmp_path / "few", CONFIG | {"num_hidden_layers": 1}, layers_of(BASE, 1))
    assert "first 'model.layers.1.mlp.down_proj.weight'" in refusal(few, adapter)


def layers_of(weights, count):
    return {name: weight for name, weight in weights.items() if f".layers.{count}." not in name}


def test_pickles_and_files_from_elsewhere(tmp_path, base, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    assert "adapter_model.safetensors is missing" in refusal(base, adapter)
    weights.symlink_to(tmp_path / "elsewhere")
    assert "outside the directory" in refusal(base, adapter)
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"anything")
    assert "is a pickle" in refusal(base, adapter)


# ---- jobs


@pytest.mark.parametrize("method", ["--method=ties", "--method=dare", "--method=task_arithmetic"])
def test_merge_of_adapters_is_that_of_the_models_they_make(merge, tmp_path, method):
    adapters = {}
    for seed, name in enumerate(("math", "law")):
        adapters[name] = write_adapter(tmp_path / f"{name}-adapter", factors(load_file(merge.base / SINGLE), seed=seed))
        launch("--job=convert", f"--base={merge.base}+{adapters[name]}", f"--output={tmp_path / f'{name}-whole'}")
    outputs = []
    for kind in ("adapter", "whole"):
        experts = [f"--expert={name}={tmp_path / f'{name}-{kind}'}" for name in adapters]
        outputs.append(tmp_path / f"out-{kind}")
        merge(*experts, method, "--rate=0.5", f"--output={outputs[-1]}")
    one, other = (load_file(output / SINGLE) for output in outputs)
    for name, tensor in other.items():
        np.testing.assert_array_equal(one[name], tensor)
    recipe = read_json(outputs[0] / "recipe.json")
    assert recipe["inputs"]["math"]["where"] == str(adapters["math"])


def test_tokens_that_an_adapter_adds_are_merged(merge, tmp_path):
    """With its own tokenizer, as the whole model is; --vocabulary=union keeps them."""
    weights = load_file(merge.base / SINGLE)
    more = np.full((2, 32), 0.5, weights[HEAD].dtype)
    own = {f"{PREFIX}{name}": np.concatenate([weights[name], more]) for name in (EMBEDDINGS, HEAD)}
    adapter = write_adapter(tmp_path / "adapter", factors(weights) | own, modules_to_save=["embed_tokens", "lm_head"])
    write_tokenizer(adapter)
    content = read_json(adapter / "tokenizer.json")
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": 64 + i, "content": f"<new{i}>", **token} for i in range(2)]
    write_json(adapter / "tokenizer.json", content)
    launch("--job=convert", f"--base={merge.base}+{adapter}", f"--output={tmp_path / 'whole'}")
    assert read_json(tmp_path / "whole" / "config.json")["vocab_size"] == 66
    for name, place in (("adapter", adapter), ("whole", tmp_path / "whole")):
        merge(f"--expert=math={place}", "--vocabulary=union", "--method=ties", f"--output={tmp_path / f'out-{name}'}")
    one, other = (load_file(tmp_path / f"out-{name}" / SINGLE) for name in ("adapter", "whole"))
    assert one[EMBEDDINGS].shape[0] >= 66
    for name, tensor in other.items():
        np.testing.assert_array_equal(one[name], tensor)


def test_convert_writes_a_whole_model(tmp_path, base, adapter):
    write_tokenizer(adapter)
    (adapter / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>"}'
    )
    (adapter / "generation_config.json").unlink()
    (adapter / "README.md").write_text("an adapter")
    for output in (tmp_path / "whole", tmp_path / "orbax"):
        prefix = "orbax:" if output.name == "orbax" else ""
        launch("--job=convert", f"--base={base}+{adapter}", f"--output={prefix}{output}")
        assert "pad_token" in read_json(output / "tokenizer_config.json")
        assert (output / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
        assert not (output / "README.md").exists()
        assert_close(tensors_of(f"{prefix}{output}"), tensors_of(f"{base}+{adapter}"), 0)


def test_plan_inspect_and_search_of_directories(merge, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors(load_file(merge.base / SINGLE)))
    flags = [f"--base={merge.base}", f"--expert=math={adapter}", f"--workdir={tmp_path / 'runs'}"]
    launch("--job=plan", *flags, "--method=ties")
    assert read_json(tmp_path / "runs" / "plan.json")
    launch("--job=inspect", *flags, "--method=ties")
    norms = read_json(tmp_path / "runs" / "inspect.json")["math"]["norm"]
    assert {name for name, norm in norms.items() if norm} == {n for n in norms if n[:-7].endswith(PROJECTIONS)}
    inside = adapter / "out"
    assert "one contains the other" in merge.refusal(f"--expert=math={adapter}", f"--output={inside}")


def test_files_of_an_adapter_that_change_meanwhile(merge, tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "adapter", factors(load_file(merge.base / SINGLE)))
    weights = adapter / "adapter_model.safetensors"

    def merged(*given, real=write_merge.copy_rest):
        weights.write_bytes(weights.read_bytes())
        return real(*given)

    monkeypatch.setattr(write_merge, "copy_rest", merged)
    message = merge.failure(f"--expert=math={adapter}")
    assert f"{weights} of 'math' was written to" in message


# ---- what others make of them


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed: what it makes of adapters is not compared")


OF_FAMILY = {
    "Llama with biases": {"target_modules": ["q_proj", "lm_head"], "bias": "all", "use_rslora": True},
    "Qwen2": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "bias": "lora_only",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 20},
    },
    "Phi3": {"target_modules": ["qkv_proj", "gate_up_proj"], "modules_to_save": ["lm_head"]},
    "GPT-NeoX": {"target_modules": ["query_key_value", "embed_in"]},
    "Gemma3 with images": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "Mixtral": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    "BERT": {"target_modules": ["query", "dense"]},
    "GPT-2": {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True},  # by names; weights are (in, out)
}
GPT2 = transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)


@pytest.mark.slow
@pytest.mark.parametrize("family", OF_FAMILY)
def test_weights_are_those_of_peft_to_1_ulp(peft, tmp_path, family):
    model = model_of(family, 0) if family in FAMILIES else transformers.AutoModelForCausalLM.from_config(GPT2)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **OF_FAMILY[family]))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    found, wanted = (
        tensors_of(where) for where in (f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "merged")
    )
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_max_ulp(found[name], array, maxulp=1)
    before = tensors_of(tmp_path / "base")
    assert sum(not np.array_equal(before[name], found[name]) for name in before) >= 5
