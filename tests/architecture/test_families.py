"""Every row of the table of architectures, on small random checkpoints that transformers itself makes and saves."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command import launch
from decoders import MODELS
from families import edit_json, read_json
from safetensors.numpy import load_file

from dppa_jax.architecture.specs import Role, linears_of, tensor_specs
from dppa_jax.architecture.table import ARCHITECTURES
from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.delta.threshold import index
from dppa_jax.jobs.evaluated import check_forward

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "dtype": "float32",
}
FAMILIES = {  # what differs from SIZES; each row of the table at least once
    "Llama": {},
    "Llama with biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"head_dim": 16, "sliding_window": None},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "Gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "OLMo2": {},
    "OLMo3": {"sliding_window": 8},
    "SmolLM3": {"pad_token_id": 0},
    "Granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0},
}
EXPERTS = ("math", "law")


def one_fast(fast: str) -> pytest.MarkDecorator:
    """Merges of one family, and the slow ones of all others."""
    families = [pytest.param(name, marks=[] if name == fast else pytest.mark.slow) for name in FAMILIES]
    return pytest.mark.parametrize("family", families, indirect=True)


def model_of(family: str, seed: int) -> torch.nn.Module:
    """A model of random weights, biases and norms included."""
    row = ARCHITECTURES[family.split()[0]]
    config = transformers.AutoConfig.for_model(row.model_type, **SIZES, **FAMILIES[family])
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    """base in one file, math and law in shards: the base and deltas of a tenth of its size."""
    root = tmp_path_factory.mktemp("family")
    base = model_of(request.param, 0)
    base.save_pretrained(root / "base")
    for seed, name in enumerate(EXPERTS, 1):
        torch.manual_seed(seed)
        expert = model_of(request.param, 0)
        for parameter in expert.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        expert.save_pretrained(root / name, max_shard_size="20KB")
    return request.param, root


def merged(root: Path, *flags: str) -> Path:
    output = root / "-".join(flag.strip("-").replace("=", "") for flag in flags)
    experts = [f"--expert={name}={root / name}" for name in EXPERTS]
    launch(f"--base={root / 'base'}", *experts, f"--output={output}", *flags)
    return output


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def test_every_row_is_tried():
    assert {name.split()[0] for name in FAMILIES} == ARCHITECTURES.keys()


def test_the_readmes_name_every_row_and_what_it_can_do():
    root = Path(__file__).parent.parent.parent
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    matrix = [line.split("|") for line in lines if line.count("|") == 5]
    said = {re.sub(r" \(.*", "", name).strip(): cells for _, names, *cells in matrix for name in names.split(",")}
    own = (root / "dppa_jax" / "architecture" / "README.md").read_text(encoding="utf-8")
    for name, row in ARCHITECTURES.items():
        assert [cell.strip() for cell in said[name][:2]] == ["yes", "yes" if row.forward else "no"], name
        assert f"| `{name}` | `{row.classes[0]}`" in own


def test_the_row_names_every_tensor_of_the_file_with_its_shape(family):
    _, root = family
    specs = tensor_specs(read_json(root / "base" / "config.json"))
    assert {name: spec.shape for name, spec in specs.items()} == {n: a.shape for n, a in tensors(root / "base").items()}
    for name, spec in specs.items():
        assert (spec.role is Role.BIAS) == name.endswith(".bias")
        assert (spec.role is Role.NORM) == ("norm" in name)
        assert (spec.role is Role.LINEAR) == (len(spec.shape) == 2 and ".layers." in name)
    linears = linears_of(specs)
    assert [specs[name].linear for name in linears.names] == list(range(len(linears)))
    assert linears.by_layer(np.arange(len(linears))).shape == (3, 7)


@one_fast("Qwen2")
def test_a_sum_of_dense_deltas_carries_biases_and_is_the_model_of_the_mean(family):
    """transformers loads the merge, and its logits are those of the merge by hand."""
    name, root = family
    output = merged(root, "--method=task_arithmetic", "--coefficient=0.5")
    base, experts = tensors(root / "base"), [tensors(root / expert) for expert in EXPERTS]
    wanted = {n: b + sum(np.float32(0.5) * (e[n] - b) for e in experts) for n, b in base.items()}
    found = tensors(output)
    assert found.keys() == wanted.keys()
    for tensor, array in wanted.items():
        np.testing.assert_allclose(found[tensor], array, rtol=0, atol=1e-6, err_msg=tensor)
    by_hand = model_of(name, 0)
    by_hand.load_state_dict({n: torch.tensor(a) for n, a in wanted.items()}, strict=False)
    by_hand.tie_weights()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    tokens = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, by_hand(tokens).logits, rtol=0, atol=1e-4)


@one_fast("Llama with biases")
def test_linears_are_pruned_and_biases_are_not(family):
    _, root = family
    output = merged(root, "--method=magnitude", "--rate=0.7")
    base, experts, found = tensors(root / "base"), [tensors(root / e) for e in EXPERTS], tensors(output)
    specs = SafetensorsDirectory(root / "base").specs
    for name, spec in specs.items():
        total = base[name].copy()
        for expert in experts:
            delta = expert[name] - base[name]
            if spec.role is Role.LINEAR:
                threshold = np.sort(abs(delta), axis=None)[int(index(delta.size, 0.7))]
                delta = np.where(abs(delta) > threshold, delta, 0)
            total = total + delta
        np.testing.assert_allclose(found[name], total, rtol=0, atol=1e-6, err_msg=name)
    rates = read_json(output / "recipe.json")["experts"]["math"]["rates"][0]["by_tensor"]
    assert list(rates) == [name for name, spec in specs.items() if spec.role is Role.LINEAR]


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--evaluator=jax", "--evaluator=jax"), ("--coefficient=adamerging", "--coefficient=adamerging")],
)
def test_what_has_no_forward_pass_says_so_before_work(flag, named, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "Qwen2", replace(ARCHITECTURES["Qwen2"], forward=False))
    for name in ("base", "math"):
        model_of("Qwen2", 0).save_pretrained(tmp_path / name)
    flags = [
        f"--base={tmp_path / 'base'}",
        f"--expert=math={tmp_path / 'math'}",
        "--method=dare",
        "--evaluate=addition",
    ]
    with pytest.raises(SystemExit) as refused:
        launch(*flags, flag, f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}")
    assert f"{named} needs a forward pass in JAX, and Qwen2ForCausalLM has none" in str(refused.value)
    assert "evaluated with --evaluator=vllm" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_experts_can_be_evaluated_and_has_no_adamerging(moe_rows, tmp_path):
    model_type, changes = MODELS["Mixtral"]
    transformers.AutoConfig.for_model(model_type, **SIZES | changes).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=["MixtralForCausalLM"])
    check_forward(tmp_path, "--evaluator=jax")
    with pytest.raises(
        ValueError, match=f"{tmp_path}: --coefficient=adamerging merges one matrix .* mixture of experts"
    ):
        check_forward(tmp_path, "--coefficient=adamerging")
    edit_json(tmp_path / "config.json", rope_parameters={"rope_type": "mrope"})
    with pytest.raises(ValueError, match=f"{tmp_path}: --evaluator=jax: config.json: rope type 'mrope'"):
        check_forward(tmp_path, "--evaluator=jax")
    check_forward(tmp_path, None)


def test_an_expert_of_another_architecture_is_refused(tmp_path):
    model_of("Llama", 0).save_pretrained(tmp_path / "base")
    model_of("Mistral", 0).save_pretrained(tmp_path / "law")
    flags = [f"--base={tmp_path / 'base'}", f"--expert=law={tmp_path / 'law'}", "--method=dare"]
    with pytest.raises(SystemExit, match="'law' is a MistralForCausalLM, the base a LlamaForCausalLM"):
        launch(*flags, f"--output={tmp_path / 'out'}")
