"""Every row of the table of architectures, on small random checkpoints that transformers itself makes and saves."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command import launch
from families import read_json
from merge_oracle import dppa, elected, joined, split, trimmed
from small_models import FACTORS, FAMILIES, ROWS, linears_of, load, model_of, save, tensors, tune

from dppa_jax.architecture.specs import Role
from dppa_jax.architecture.table import ARCHITECTURES, support_matrix
from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.jobs.evaluated import check_forward, check_whole_layers

EXPERTS = ("math", "law")
DPPA = ("--method=dppa", "--rate=0.7", "--partitions=0.9,0.7", "--factors=1.5,1.2", "--significance_multiple=2")
ON_EIGHT = ("Llama with biases", "Phi3", "Qwen3-MoE in three axes", "GPT-NeoX", "BERT")
"""Of how files hold linears, one each: alone with biases, fused, of a mixture, head by head, of an encoder."""


def one_fast(*fast: str, of=FAMILIES) -> pytest.MarkDecorator:
    """Merges of some families, and the slow ones of all others."""
    families = [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in of]
    return pytest.mark.parametrize("family", families, indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    """base in one file, math and law in shards."""
    root = tmp_path_factory.mktemp("family")
    save(request.param, model_of(request.param, 0), root / "base")
    for seed, name in enumerate(EXPERTS, 1):
        save(request.param, tune(model_of(request.param, 0), seed), root / name, max_shard_size="20KB")
    return request.param, root


@pytest.fixture(scope="module")
def read(family) -> tuple[dict, dict, list[dict], Path]:
    """config.json's text part, the tensors of the base, the deltas of the experts, and where they are."""
    _, root = family
    config = read_json(root / "base" / "config.json")
    base = tensors(root / "base")
    deltas = [{name: array - base[name] for name, array in tensors(root / expert).items()} for expert in EXPERTS]
    return config.get("text_config", config), base, deltas, root


def merged(root: Path, *flags: str) -> Path:
    output = root / re.sub(r"\W+", "-", "-".join(flags))
    experts = [f"--expert={name}={root / name}" for name in EXPERTS]
    launch(f"--base={root / 'base'}", *experts, f"--output={output}", *flags)
    return output


def assert_close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for tensor, array in wanted.items():
        np.testing.assert_allclose(found[tensor], array, rtol=0, atol=2e-6, err_msg=tensor)


def test_every_row_is_tried():
    assert set(ROWS.values()) == ARCHITECTURES.keys()


def test_the_readmes_say_what_every_row_can_do():
    root = Path(__file__).parent.parent.parent
    assert "\n".join(support_matrix()) in (root / "README.md").read_text(encoding="utf-8")
    own = (root / "dppa_jax" / "architecture" / "README.md").read_text(encoding="utf-8")
    for name, row in ARCHITECTURES.items():
        assert f"| `{name}` | `{row.classes[0]}`" in own


def test_the_row_names_every_linear_of_the_file_with_its_rows(read):
    """No tensor is left over, and each linear holds the rows that it should, in this order."""
    config, base, _, root = read
    opened = SafetensorsDirectory(root / "base")
    assert {place.stored for place in opened.layout.places.values()} | set(opened.layout.rest) == base.keys()
    wanted = {}
    for name, array in base.items():
        for rows in linears_of(name, array, config):
            wanted[array.reshape(-1, array.shape[-1])[rows].tobytes()] = name
    linears = [spec for spec in opened.specs.values() if spec.role is Role.LINEAR]
    assert {opened.read(spec.name).tobytes() for spec in linears} == wanted.keys()
    assert [spec.linear for spec in linears] == list(range(len(linears)))
    assert [spec.layer for spec in linears] == sorted(spec.layer for spec in linears)
    for spec in opened.specs.values():
        assert (spec.role is Role.BIAS) == spec.name.endswith(".bias")
        assert (spec.role is Role.NORM) == bool(re.search(r"norm(\w*)\.weight$", spec.name, re.IGNORECASE))


@one_fast("Qwen2", "GPT-NeoX")
def test_a_sum_of_dense_deltas_is_the_model_of_the_mean(family, read):
    """transformers loads the merge, and its logits are those of the merge by hand."""
    name, root = family
    _, base, deltas, _ = read
    output = merged(root, "--method=task_arithmetic", "--coefficient=0.5")
    wanted = {n: b + sum(np.float32(0.5) * delta[n] for delta in deltas) for n, b in base.items()}
    assert_close(tensors(output), wanted)
    by_hand = model_of(name, 0)
    experts = [tune(model_of(name, 0), seed).state_dict() for seed in (1, 2)]
    state = {n: b + sum(0.5 * (expert[n] - b) for expert in experts) for n, b in by_hand.state_dict().items()}
    by_hand.load_state_dict(state)
    by_hand.tie_weights()
    tokens = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        found, wanted = (model(tokens).logits for model in (load(name, output), by_hand))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@one_fast("Llama with biases", "Qwen3-MoE in three axes")
def test_dppa(read):
    config, base, deltas, root = read
    pruned = [dppa(delta, config, (0.9, 0.7), FACTORS) for delta in deltas]
    wanted = {name: array + (pruned[0][name] + pruned[1][name]) for name, array in base.items()}
    assert_close(tensors(merged(root, *DPPA, "--mesh=layer=1,row=1")), wanted)


@one_fast("Qwen3-MoE in three axes", of=ON_EIGHT)
def test_the_bits_of_dppa_are_the_same_on_eight_devices(read):
    *_, root = read
    one, eight = (merged(root, *DPPA, f"--mesh={mesh}", "--overwrite") for mesh in ("layer=1,row=1", "layer=2,row=4"))
    assert [f.read_bytes() for f in one.glob("*.safetensors")] == [f.read_bytes() for f in eight.glob("*.safetensors")]


@one_fast("Phi3")
def test_ties(read):
    config, base, deltas, root = read
    pruned = [trimmed(delta, config, 0.6) for delta in deltas]
    merge = {name: array + elected([each[name] for each in pruned]) for name, array in base.items()}
    assert_close(tensors(merged(root, "--method=ties", "--density=0.4")), merge)


@one_fast("Mixtral")
def test_dare_rescales_what_it_keeps_of_linears_alone(read):
    """Each expert's saved delta has linears of which a quarter is kept, four times as large, and all else whole."""
    config, base, deltas, root = read
    output = merged(root, "--method=dare", "--density=0.25", f"--save_delta={root / 'deltas'}", "--overwrite")
    saved = [tensors(root / "deltas" / expert) for expert in EXPERTS]
    for own, delta in zip(saved, deltas, strict=True):
        found, whole = split(own, config), split(delta, config)
        for key, linear in found.items():
            wanted = np.where(linear == 0, np.float32(0), np.float32(4) * whole[key])
            np.testing.assert_allclose(linear, wanted, rtol=1e-6, atol=1e-7, err_msg=str(key))
        share = np.concatenate([linear.ravel() for linear in found.values()]) != 0
        assert abs(share.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / share.size)
        assert_close(joined(own, whole, config), {name: delta[name] for name in own})
    rest = {name: array for name, array in base.items() if name not in saved[0]}
    sums = {name: base[name] + (saved[0][name] + saved[1][name]) for name in saved[0]}
    assert_close(tensors(output), rest | sums)


@pytest.mark.parametrize("flag", ["--evaluator=jax", "--coefficient=adamerging"])
def test_what_has_no_forward_pass_says_so_before_work(flag, tmp_path):
    for name in ("base", "math"):
        save("GPT-NeoX", model_of("GPT-NeoX", 0), tmp_path / name)
    flags = [f"--base={tmp_path / 'base'}", f"--expert=math={tmp_path / 'math'}", "--method=dare", flag]
    with pytest.raises(SystemExit) as refused:
        launch(*flags, "--evaluate=addition", f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}")
    assert f"{flag} needs a forward pass in JAX, and GPTNeoXForCausalLM has none" in str(refused.value)
    assert "evaluated with --evaluator=vllm" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_experts_can_be_evaluated_and_has_no_adamerging(tmp_path):
    save("Mixtral", model_of("Mixtral", 0), tmp_path)
    looked = SafetensorsDirectory(tmp_path)
    check_forward(looked, "--evaluator=jax")
    with pytest.raises(
        ValueError, match=f"{tmp_path}: --coefficient=adamerging merges one matrix .* mixture of experts"
    ):
        check_whole_layers(looked, "--coefficient=adamerging", "numbers")
    looked.config |= {"rope_parameters": {"rope_type": "mrope"}}
    with pytest.raises(ValueError, match=f"{tmp_path}: --evaluator=jax: config.json: rope type 'mrope'"):
        check_forward(looked, "--evaluator=jax")
    check_forward(looked, None)


def test_an_expert_of_another_architecture_is_refused(tmp_path):
    model_of("Llama", 0).save_pretrained(tmp_path / "base")
    model_of("Mistral", 0).save_pretrained(tmp_path / "law")
    flags = [f"--base={tmp_path / 'base'}", f"--expert=law={tmp_path / 'law'}", "--method=dare"]
    with pytest.raises(SystemExit, match="'law' is a MistralForCausalLM, the base a LlamaForCausalLM"):
        launch(*flags, f"--output={tmp_path / 'out'}")
