"""Training: full fine-tuning and pre-training."""

from dppa_jax.finetune.train import AdamW, Example, Rows, TrainConfig, encode, read_examples, train

__all__ = ["AdamW", "Example", "Rows", "TrainConfig", "encode", "read_examples", "train"]
