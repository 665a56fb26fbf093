"""Full fine-tuning against PyTorch: transformers' models, torch's AdamW, torch's clipping."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dppa_jax.checkpoint import save_tree
from dppa_jax.config.finetune import AdamW, TrainConfig
from dppa_jax.finetune.data import Rows, batches
from dppa_jax.finetune.train import learning_rates, train
from dppa_jax.model import DecoderConfig, init_tree
from dppa_jax.where import load_tree

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # torch learns no embedding of it
}
FAMILIES = {
    "Llama": LLAMA,
    "Gemma2": LLAMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 4},
    "Qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
}
OPTIONS = TrainConfig(
    steps=5,
    learning_rate=3e-3,
    batch_size=4,
    warmup=0.4,
    optimizer=AdamW(beta2=0.999, weight_decay=0.1, max_gradient_norm=0.5),
)


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "Qwen2")) for name in FAMILIES])
def start(request, tmp_path) -> Path:
    config = FAMILIES[request.param]
    tree = init_tree(DecoderConfig.from_hf(config), jax.random.key(3), stddev=0.15)
    save_tree(tmp_path / "start", jax.tree.map(np.asarray, tree), config)
    return tmp_path / "start"


@pytest.fixture
def rows() -> Rows:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, LLAMA["vocab_size"], (12, 10)).astype(np.int32)
    return Rows(tokens, np.arange(10) >= generator.integers(2, 8, 12)[:, None])


def by_torch(directory: Path, rows: Rows) -> tuple[dict[str, np.ndarray], list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.1)
    losses = []
    order = batches(rows.count, OPTIONS.batch_size, OPTIONS.steps, OPTIONS.seed)
    for rate, batch in zip(learning_rates(OPTIONS), order, strict=True):
        tokens = torch.tensor(rows.tokens[batch]).long()
        labels = torch.where(torch.tensor(rows.learned[batch]), tokens, -100)
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5, "nothing is clipped"
        optimizer.step()
        losses.append(float(loss))
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}, losses


def test_five_steps_are_those_of_pytorch(start, rows, tmp_path):
    wanted, wanted_losses = by_torch(start, rows)
    hf_config, tree = load_tree(start)
    before = jax.tree.map(np.copy, tree)
    with jax.default_matmul_precision("highest"):
        trained, losses = train(DecoderConfig.from_hf(hf_config), tree, rows, OPTIONS)
    np.testing.assert_allclose(losses, wanted_losses, rtol=2e-6)
    assert losses[-1] < losses[0]
    save_tree(tmp_path / "found", jax.tree.map(np.asarray, trained), hf_config)
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "found" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name in wanted:  # Adam divides the rounding of small gradients by small second moments
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5, err_msg=name)
    moved = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, trained)), strict=True))
    assert moved > 5e-3, "the tolerance above says nothing"
