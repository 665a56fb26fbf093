"""How a model is fine-tuned: data, optimiser, steps, and where the expert goes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.option import REQUIRED, check, option, same
from dppa_jax.config.run import JobConfig

GROUP = "fine-tuning"
TOWARDS = ("zero", "base")  # what weights decay to
OR_NEVER = "--{flag}={value}: a number of steps, or 0 for never."


@dataclass(frozen=True)
class AdamW:
    """AdamW with decay of all weights; its learning rate, which changes from step to step, is elsewhere.

    Decay goes toward 0 (AdamW) or, in its place, toward the weights that training starts from (AdamR, of DAREx).
    `weight_decay` is the strength of whichever it is; the two are never added.

    Attributes:
      decay_toward: "zero", or "base".
      decay_norm: of the decay toward the base; "l1" pulls all weights alike.
    """

    HELP_GROUP: ClassVar[str] = GROUP

    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = option(
        0.0, "strength of the decay", least=0, message="--{flag}={value}: it must be a number of 0 or more."
    )
    decay_toward: str = option("zero", "where weights decay to: zero as in AdamW, base as in AdamR", choices=TOWARDS)
    decay_norm: str = option("l2", "with --decay_toward=base: the norm of the delta that decays", choices=("l2", "l1"))
    max_gradient_norm: float = option(
        1.0,
        "longer gradients are shortened to it",
        above=0,
        infinite=True,
        message="--{flag}={value}: it must be above 0; inf for no limit.",
    )

    def __post_init__(self):
        check(self)
        if self.decay_norm != "l2" and not self.decays_toward_base:
            raise ValueError(
                f"--decay_norm={self.decay_norm}: weights decay to zero, as in AdamW; give --decay_toward=base, or "
                f"leave it out."
            )

    @property
    def decays_toward_base(self) -> bool:
        """Whether the optimiser is AdamR."""
        return self.decay_toward == "base"


@dataclass(frozen=True)
class Lora:
    """An adapter of low rank (LoRA), trained in place of all weights: W + scale · B · A, of which A and B are trained.

    Attributes:
      rank: of B · A; 0 trains the weights.
      alpha, rslora: scale is alpha / rank, or alpha / √rank.
      targets: the linears that have factors, by their names in a layer; without any, all have them.
    """

    HELP_GROUP: ClassVar[str] = GROUP
    FLAG_PREFIX: ClassVar[str] = "lora_"

    rank: int = option(0, "rank of an adapter (LoRA) to train in place of the weights; 0: none", within=(0, 4096))
    alpha: float = option(16.0, "the adapter's B · A counts alpha / rank times", above=0)
    targets: tuple[str, ...] = option((), "linears with factors, such as q_proj,v_proj; default: all", kind="words")
    rslora: bool = option(False, "the adapter's B · A counts alpha / √rank times")

    def __post_init__(self):
        check(self)
        if not self.rank and (self.targets or self.rslora):
            raise ValueError("--lora_targets, --lora_rslora: they are of an adapter; give its --lora_rank, too.")

    @property
    def scale(self) -> float:
        """How often the product of the factors counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class TrainConfig:
    """How a trainer trains.

    Attributes:
      steps: updates of the weights.
      learning_rate: the peak: the rate rises linearly from 0 during the first `warmup` share of the steps, then falls
        along a cosine to `final` times the peak.
      batch_size: rows of a step, which go through the model in `accumulate` parts, one after another.
      dtype: the dtype of the forward and backward pass; weights, moments and the update are always float32.
      remat: recompute layers in the backward pass: less memory, a third more work.
      lora: the adapter that is trained in place of the weights, if its rank is not 0.
      seed: decides the order of the rows, and the first factors of an adapter.
    """

    HELP_GROUP: ClassVar[str] = GROUP

    steps: int = option(REQUIRED, "number of steps", flag="train_steps", least=1)
    learning_rate: float = option(
        REQUIRED,
        "the peak; the rate rises linearly, then falls along a cosine to a 20th",
        least=0,
        message="--{flag}={value}: it must be a number of 0 or more.",
    )
    batch_size: int = option(64, "rows of a step", flag="train_batch_size", least=1)
    warmup: float = option(
        0.1,
        "share of the steps in which the learning rate rises",
        within=(0, 1),
        message="--{flag}={value}: outside [0, 1]; it is the share of the steps.",
    )
    final: float = 0.05
    optimizer: AdamW = AdamW()
    lora: Lora = Lora()
    accumulate: int = option(1, "parts of a step's rows that go through the model one after another", least=1)
    dtype: str = option(
        "float32",
        "dtype of forward and backward pass; the rest is float32",
        flag="train_dtype",
        choices=("float32", "bfloat16"),
    )
    remat: bool = option(False, "recompute layers in the backward pass: less memory, a third more work")
    seed: int = same(MergeConfig, "seed")

    def __post_init__(self):
        check(self)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--accumulate={self.accumulate}: --train_batch_size={self.batch_size} must be a multiple of it."
            )
        if self.lora.rank and self.optimizer.decays_toward_base:
            raise ValueError(
                f"--lora_rank={self.lora.rank}: an adapter has no weights of a base to decay toward; leave "
                f"--decay_toward and --decay_search out: --weight_decay pulls its factors to 0."
            )

    @property
    def rows_together(self) -> int:
        """The number of rows that go through the model at a time."""
        return self.batch_size // self.accumulate


@dataclass(frozen=True)
class FinetuneConfig:
    """What --job=finetune does.

    Attributes:
      base, output: the checkpoint to start from, and the directory of the expert.
      data: files of examples, JSON lines; all of them are learned.
      eval_data: files of examples that are not learned; their loss is logged.
      epochs: passes over the examples, which give the number of steps where `steps` is 0.
      length: tokens of a row; longer examples are cut.
      pack: several examples to a row, each of which sees itself only.
      checkpoint_every, eval_every: steps; 0 for never.
      resume: go on from what is kept; else it is removed.
      held_out: the tasks whose items must not be learned.
      decay_search: train with AdamR, again and again, for the largest weight decay that costs little.
      decay_tolerance: what the found decay may cost, in points of the score without decay. The score is the mean
        accuracy in % on the validation items of `held_out`; without tasks it is 100 · exp(−loss on eval_data), the
        geometric mean of a token's probability in %.
    """

    HELP_GROUP: ClassVar[str] = GROUP

    base: str = same(JobConfig, "base")
    output: str = same(JobConfig, "output")
    data: tuple[str, ...] = option(
        (),
        "files of examples, JSON lines: prompt and completion (learned); encoders: text, label",
        flag="train_data",
        kind="paths",
    )
    eval_data: tuple[str, ...] = option((), "files of examples whose loss is logged", kind="paths")
    epochs: float = option(1.0, "passes over the examples")
    steps: int = option(0, "number of steps, in place of --epochs", flag="train_steps")
    learning_rate: float = same(TrainConfig, "learning_rate", default=2e-5)
    batch_size: int = same(TrainConfig, "batch_size", default=16)
    accumulate: int = same(TrainConfig, "accumulate")
    length: int = option(
        512, "tokens of a row", flag="train_length", least=2, message="--{flag}={value}: a row has at least 2 tokens."
    )
    pack: bool = option(True, "several examples to a row, each of which sees itself only")
    warmup: float = same(TrainConfig, "warmup", default=0.03)
    optimizer: AdamW = field(default_factory=AdamW)
    lora: Lora = field(default_factory=Lora)
    dtype: str = same(TrainConfig, "dtype", default="bfloat16")
    remat: bool = same(TrainConfig, "remat", default=True)
    seed: int = same(MergeConfig, "seed")
    checkpoint_every: int = option(
        100, "steps between checkpoints in --workdir, to go on from; 0: none", least=0, message=OR_NEVER
    )
    eval_every: int = option(0, "steps between losses on --eval_data; 0: at the end", least=0, message=OR_NEVER)
    decay_search: bool = option(False, "find the largest decay toward base that keeps the score")
    decay_tolerance: float = option(
        0.5,
        "points of accuracy on --evaluate, or of token probability on --eval_data, that it may cost",
        least=0,
        message="--{flag}={value}: it must be a number of 0 or more.",
    )
    mesh: str = same(JobConfig, "mesh")
    workdir: str = same(JobConfig, "workdir")
    output_dtype: str = same(MergeConfig, "output_dtype", default="")
    max_shard_size: int = same(JobConfig, "max_shard_size")
    overwrite: bool = same(JobConfig, "overwrite")
    resume: bool = same(JobConfig, "resume")
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
        if self.decay_search and not (self.held_out.tasks or self.eval_data):
            raise ValueError(
                "--decay_search: nothing says how good an expert is: give tasks with validation items as --evaluate, "
                "or files of examples as --eval_data."
            )
        check(self)
        self.training(rows=1)  # checks how what it is given fits together

    def training(self, rows: int) -> TrainConfig:
        """Return the training of `rows` rows, with its number of steps."""
        return TrainConfig(
            steps=self.steps or max(1, round(self.epochs * rows / self.batch_size)),
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            warmup=self.warmup,
            optimizer=self.optimizer,
            lora=self.lora,
            accumulate=self.accumulate,
            dtype=self.dtype,
            remat=self.remat,
            seed=self.seed,
        )
