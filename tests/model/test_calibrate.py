"""Activation norms, against hooks on transformers' model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoders import MODELS, ours, torch_model
from families import write_tokenizer

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.merging.activations import (
    PADDING,
    _layer,
    activation_norms,
    calibration_tokens,
    layers_seen,
    moments,
    norms,
    padded,
    probe,
)
from dppa_jax.model.context import LayerKind

FAST = ("Llama", "Gemma2")
SLOW = ("Qwen2", "Gemma3", "OLMo2", "SmolLM3", "Granite")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_norms_are_those_that_hooks_on_transformers_see(name, tmp_path):
    model = torch_model(*MODELS[name])
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 60, (3, 11))
    found = activation_norms(SafetensorsDirectory(tmp_path), tokens)

    seen = {}
    for path, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, __, path=path: seen.update({path: inputs[0].detach()}))
    model(torch.tensor(tokens))
    assert found.keys() == {f"model.layers.{path}.weight" for path in seen}
    for path, inputs in seen.items():
        expected = inputs.square().sum((0, 1)).sqrt().numpy()
        np.testing.assert_allclose(found[f"model.layers.{path}.weight"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_means_and_changes_are_those_that_hooks_on_transformers_see(name, tmp_path):
    model = torch_model(*MODELS[name])
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 60, (3, 11))
    inputs = {}
    for path, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, __, path=path: inputs.update({path: given[0].detach()}))
    model(torch.tensor(tokens))
    seen = layers_seen(SafetensorsDirectory(tmp_path), tokens, moments, lambda name, weights: jnp.asarray(weights / 3))
    for layer in seen:
        for linear, found in layer.measured.items():
            x = inputs[linear.removeprefix("model.layers.").removesuffix(".weight")]
            np.testing.assert_allclose(found.means, x.mean((0, 1)), rtol=1e-4, atol=1e-5)
            change = (x @ torch.tensor(layer.linears[linear] / 3).T).square().sum()
            np.testing.assert_allclose(found.change, change, rtol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_short_lines_are_rows_and_what_fills_them_up_does_not_count(name, tmp_path):
    torch_model(*MODELS[name]).save_pretrained(tmp_path)
    model, lines = SafetensorsDirectory(tmp_path), [[1, 5, 9, 4, 7, 3], [1, 8, 2], [1, 6, 6, 9]]
    rows = padded(lines)
    assert rows.shape == (3, 6)
    together = activation_norms(model, rows)
    alone = [activation_norms(model, np.array([line])) for line in lines]
    for linear, found in together.items():
        expected = np.sqrt(sum(np.square(one[linear]) for one in alone))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_text_of_short_lines_is_not_one_stream(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "short.txt").write_text("word1 word2 word3\n\nword4\n")
    assert calibration_tokens(tmp_path, tmp_path / "short.txt").tolist() == [[4, 5, 6], [7, PADDING, PADDING]]
    (tmp_path / "long.txt").write_text(" ".join(["word1"] * 65) + "\nword4\n")
    assert calibration_tokens(tmp_path, tmp_path / "long.txt").tolist() == [[4] * 65 + [7]]
    assert probe(padded([[1] * 16] * 4000)).shape == (512, 16)  # 8,192 tokens


@pytest.mark.parametrize("name", ["Mixtral"])
def test_an_expert_of_a_mixture_has_the_norms_of_the_tokens_that_it_sees(name):
    model = torch_model(*MODELS[name])
    config, tree = ours(model)
    tokens = np.random.default_rng(0).integers(0, 60, (3, 11))
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda _, inputs, __: seen.extend(inputs))
    with torch.no_grad():
        model(torch.tensor(tokens))
    seen_hidden, picked, _ = seen
    layer = jax.tree.map(lambda array: jnp.asarray(array[0]), tree["layers"])
    hidden = jnp.asarray(tree["embed_tokens"])[tokens]
    _, measured = jax.jit(partial(_layer, config, norms))(layer, LayerKind(), hidden, {})
    deltas = {
        f"mlp.experts.{path}": jnp.full_like(layer["mlp"]["experts"][path][:, :1], 2.0)
        for path in ("gate_proj", "up_proj", "down_proj")
    }
    _, measured_moments = jax.jit(partial(_layer, config, moments))(layer, LayerKind(), hidden, deltas)
    for expert in range(config.num_experts):
        own = seen_hidden[(picked == expert).any(-1)]
        gate, up = (experts.gate_up_proj[expert] @ own.T).detach().chunk(2)
        inner = torch.nn.functional.silu(gate) * up
        for path, inputs in {"gate_proj": own.T, "up_proj": own.T, "down_proj": inner}.items():
            wanted = inputs.square().sum(1).sqrt()
            means, change = (
                measured_moments[f"mlp.experts.{path}"].means,
                measured_moments[f"mlp.experts.{path}"].change,
            )
            np.testing.assert_allclose(means[expert], inputs.detach().mean(1), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(change[expert], (2 * inputs.detach().sum(0)).square().sum(), rtol=1e-4)
            np.testing.assert_allclose(measured[f"mlp.experts.{path}"][expert], wanted, rtol=1e-4, atol=1e-5)
