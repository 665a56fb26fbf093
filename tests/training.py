"""A model and examples that are fine-tuned in a few seconds, by the command line."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command import launch
from transformers import AutoTokenizer

from dppa_jax.checkpoint import save_tree
from dppa_jax.demo.family import examples, model_config, save_companions
from dppa_jax.finetune.data import Rows
from dppa_jax.model import DecoderConfig, init_tree

SMALL = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
STEPS = 30
WEIGHTS = "model.safetensors"


def random_rows() -> Rows:
    """Random rows for the model `SMALL`, each learned from a place of its own on."""
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (16, 12)).astype(np.int32)
    return Rows(tokens, np.arange(12) >= np.random.default_rng(1).integers(1, 9, 16)[:, None])


def write_material(root: Path) -> Path:
    """A tiny random LLaMA with the demo tokenizer, and sums to learn."""
    save_companions(root / "tokenizer")
    config = model_config(AutoTokenizer.from_pretrained(root / "tokenizer"))
    weights = jax.tree.map(np.asarray, init_tree(config, jax.random.key(0), stddev=0.08))
    save_tree(root / "base", weights, config.to_hf(), root / "tokenizer")
    sums = examples("math", 0)[-240:]
    for name, part in (("train", sums[:200]), ("eval", sums[200:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(example._asdict()) + "\n" for example in part))
    return root


def flags(material: Path, root: Path, *more: str) -> list[str]:
    inputs = [f"--base={material}/base", f"--train_data={material}/train.jsonl", f"--eval_data={material}/eval.jsonl"]
    sizes = [f"--train_steps={STEPS}", "--train_length=48", "--train_batch_size=4", "--learning_rate=3e-3"]
    rest = ["--job=finetune", f"--output={root}/out", f"--workdir={root}/runs", "--checkpoint_every=5", "--mesh=data=1"]
    return [*rest, *inputs, *sizes, "--train_dtype=float32", "--noremat", *more]


def kept(root: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in root.glob("runs/*/*") if path.name.isdigit())


def stop_before_writing(monkeypatch, given: list[str]) -> None:
    """Train, and end as if the disk were full when the expert is to be written."""

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dppa_jax.jobs.finetune.write_expert", fail)
        with pytest.raises(SystemExit, match="disk full"):
            launch(*given)
