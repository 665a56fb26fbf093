"""Activation norms, against hooks on transformers' model."""

import numpy as np
import torch
from families import write_family
from transformers import LlamaForCausalLM

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.merging.activations import activation_norms


def test_norms_are_those_that_hooks_on_transformers_see(tmp_path):
    directory = write_family(tmp_path, experts=(), dtype="float32") / "base"
    tokens = np.random.default_rng(0).integers(0, 60, (3, 11))
    norms = activation_norms(SafetensorsDirectory(directory), tokens)

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    seen = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].detach()}))
    model(torch.tensor(tokens))
    assert norms.keys() == {f"model.layers.{name}.weight" for name in seen}
    for name, inputs in seen.items():
        expected = inputs.square().sum((0, 1)).sqrt().numpy()
        np.testing.assert_allclose(norms[f"model.layers.{name}.weight"], expected, rtol=1e-4, atol=1e-5)
