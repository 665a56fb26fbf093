"""Fine-tuning and pre-training of decoders, and fine-tuning of encoders."""

from dppa_jax.config.finetune import AdamW, TrainConfig
from dppa_jax.finetune.data import Example, Rows, encode, encode_packed, read_examples
from dppa_jax.finetune.train import Trainer, train

__all__ = ["AdamW", "Example", "Rows", "TrainConfig", "Trainer", "encode", "encode_packed", "read_examples", "train"]
