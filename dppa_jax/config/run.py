"""TODO."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.option import WEIGHT_DTYPES, choose
from dppa_jax.config.search import AdaMergingConfig, FactorSearch

MAX_SHARD_SIZE = 2_000_000_000


@dataclass(frozen=True)
class JobConfig:
    """Where the models are and go, and on what devices; `merge` says what is computed."""

    merge: MergeConfig
    base: str
    experts: Mapping[str, str]
    output: str = ""
    workdir: str = "runs"
    save_delta: str = ""
    tokenizer: str = "base"
    mesh: str = ""
    block_layers: int = 0
    residency: str = "auto"
    device_memory: int = 0
    num_processes: int = 0  # to plan for; 0: as many as there are
    max_shard_size: int = MAX_SHARD_SIZE
    overwrite: bool = False
    resume: bool = True
    allow_other_base: bool = False
    calibration: str = ""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: FactorSearch | None = None  # None where factors are given
    adamerging: AdaMergingConfig | None = None  # None where coefficients are given
    flags: Mapping = field(default_factory=dict)  # as resolved, for recipe.json
    command: str = ""  # that repeats the job, for the model card

    def __post_init__(self):
        if self.max_shard_size < 1:
            raise ValueError(f"--max_shard_size={self.max_shard_size}: a number of bytes, for example 2000000000.")
        if self.block_layers < 0:
            raise ValueError(f"--block_layers={self.block_layers}: 1 or more layers at a time, or 0 to choose.")
        if self.device_memory < 0:
            raise ValueError(f"--device_memory={self.device_memory / 1e9:g}: GB of one device, or 0 to ask it.")


@dataclass(frozen=True)
class ConvertConfig:
    """What is converted, where to, and how it is sharded and stored there."""

    base: str
    output: str
    mesh: str = ""
    output_dtype: str = ""
    max_shard_size: int = MAX_SHARD_SIZE
    overwrite: bool = False
    resume: bool = True
    seed: int = 0

    def __post_init__(self):
        for flag, given in (("--base", self.base), ("--output", self.output.removeprefix(PREFIX))):
            if not given:
                raise ValueError(
                    f"{flag} is empty: --job=convert reads --base=WHERE and writes --output={PREFIX}DIR, an Orbax "
                    f"checkpoint, or --output=DIR, a Hugging Face directory."
                )
        if self.output_dtype:
            choose("--output_dtype", self.output_dtype, WEIGHT_DTYPES)


PREFIX = "orbax:"
