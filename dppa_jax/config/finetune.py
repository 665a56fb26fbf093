"""TODO."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.option import WEIGHT_DTYPES, choose
from dppa_jax.config.run import MAX_SHARD_SIZE

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class AdamW:
    """AdamW, decay of all weights included, apart from its learning rate, which changes from step to step."""

    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight_decay={self.weight_decay}: it must be a number of 0 or more.")
        if not self.max_gradient_norm > 0.0:
            raise ValueError(f"--max_gradient_norm={self.max_gradient_norm}: it must be above 0; inf for no limit.")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      steps: of the optimiser.
      learning_rate: its peak: it rises linearly from 0 during the first `warmup` share of the steps, then falls along a
        cosine to `final` times the peak.
      batch_size: rows of a step, of which `accumulate` parts go through the model one after another.
      dtype: of the forward and backward pass; weights, moments and the update are float32 whatever it is.
      remat: recompute layers in the backward pass: less memory, a third more work.
      seed: of the rows' order.
    """

    steps: int
    learning_rate: float
    batch_size: int = 64
    warmup: float = 0.1
    final: float = 0.05
    optimizer: AdamW = AdamW()
    accumulate: int = 1
    dtype: str = "float32"
    remat: bool = False
    seed: int = 0

    def __post_init__(self):
        choose("--train_dtype", self.dtype, COMPUTE_DTYPES)
        positive = {"--train_steps": self.steps, "--train_batch_size": self.batch_size, "--accumulate": self.accumulate}
        for flag, value in positive.items():
            if value < 1:
                raise ValueError(f"{flag}={value}: it must be 1 or more.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--accumulate={self.accumulate}: --train_batch_size={self.batch_size} must be a multiple of it."
            )
        if not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"--warmup={self.warmup}: outside [0, 1]; it is the share of the steps.")
        if not 0.0 <= self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate={self.learning_rate}: it must be a number of 0 or more.")

    @property
    def rows_together(self) -> int:
        """That go through the model at a time."""
        return self.batch_size // self.accumulate


@dataclass(frozen=True)
class FinetuneConfig:
    """What --job=finetune does.

    Attributes:
      base, output: the checkpoint to start from, and the directory of the expert.
      data: files of examples, JSON lines; all of them are learned.
      eval_data: files of examples of which only the loss is told.
      epochs: passes over the examples, which give the number of steps where `steps` is 0.
      length: tokens of a row; longer examples are cut.
      pack: several examples to a row, each of which sees itself only.
      checkpoint_every, eval_every: steps; 0 for never.
      resume: go on from what is kept; else it is removed.
      held_out: the tasks whose items must not be learned.
    """

    base: str
    output: str
    data: tuple[str, ...]
    eval_data: tuple[str, ...] = ()
    epochs: float = 1.0
    steps: int = 0
    learning_rate: float = 2e-5
    batch_size: int = 16
    accumulate: int = 1
    length: int = 512
    pack: bool = True
    warmup: float = 0.03
    optimizer: AdamW = field(default_factory=AdamW)
    dtype: str = "bfloat16"
    remat: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    eval_every: int = 0
    mesh: str = ""
    workdir: str = "runs"
    output_dtype: str = ""
    max_shard_size: int = MAX_SHARD_SIZE
    overwrite: bool = False
    resume: bool = True
    held_out: EvaluationConfig = field(default_factory=EvaluationConfig)
    flags: Mapping = field(default_factory=dict)
    command: str = ""

    def __post_init__(self):
        if not self.base:
            raise ValueError("--base is empty: give the model to fine-tune.")
        if not self.output:
            raise ValueError("--output is empty: give the directory of the expert.")
        if not self.data:
            raise ValueError("--train_data is empty: give files of examples, JSON lines of prompt and completion.")
        if self.steps < 0 or (self.steps == 0 and not 0 < self.epochs < math.inf):
            raise ValueError(f"--epochs={self.epochs:g}, --train_steps={self.steps}: one of them must be above 0.")
        if self.length < 2:
            raise ValueError(f"--train_length={self.length}: a row has at least 2 tokens.")
        for flag, value in (("checkpoint_every", self.checkpoint_every), ("eval_every", self.eval_every)):
            if value < 0:
                raise ValueError(f"--{flag}={value}: a number of steps, or 0 for never.")
        if self.output_dtype:
            choose("--output_dtype", self.output_dtype, WEIGHT_DTYPES)
        self.training(rows=1)  # checks what it is given

    def training(self, rows: int) -> TrainConfig:
        """How to train on so many rows."""
        return TrainConfig(
            steps=self.steps or max(1, round(self.epochs * rows / self.batch_size)),
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            warmup=self.warmup,
            optimizer=self.optimizer,
            accumulate=self.accumulate,
            dtype=self.dtype,
            remat=self.remat,
            seed=self.seed,
        )
