"""What a run reads, writes and uses: models, outputs, devices and processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dppa_jax.config.advise import AdviseConfig
from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.option import REQUIRED, check, choose, option, same
from dppa_jax.config.q import QConfig
from dppa_jax.config.search import AdaMergingConfig, FactorSearch

MAX_SHARD_SIZE = 2_000_000_000
PREFIX = "orbax:"


@dataclass(frozen=True)
class StartConfig:
    """What happens before a job: which one it is, and how its processes find each other."""

    HELP_GROUP: ClassVar[str] = "devices"

    job: str = option("merge", "what to do; the first word does it as well: dppa_jax plan …", group="work")
    coordinator: str = option("", "the first process, HOST:PORT; auto: from Slurm, TPU, Kubernetes or MPI")
    num_processes: int = option(
        0, "how many there are, with --coordinator=HOST:PORT; plan: to plan for", within=(0, 10_000)
    )
    process_id: int = option(-1, "which process this is, from 0 on")


@dataclass(frozen=True)
class FromRecipe:
    """What a merge keeps of the recipe that it was made from.

    Attributes:
      text: the recipe, as YAML.
      rows: the resolved table: of some tensors and layers, the value of every parameter.
      chat_template: of the output: auto for the one that most models have, a template, or "" for the tokenizer's.
    """

    text: str
    rows: tuple[Mapping[str, str], ...] = ()
    chat_template: str = ""


@dataclass(frozen=True)
class JobConfig:
    """Where the models are and go, and on what devices; `merge` says what is computed.

    Attributes:
      device_memory: bytes of a device to plan for; 0 to ask the device.
      num_processes: processes to plan for; 0 for as many as there are.
      search: how factors are searched; None where they are given.
      adamerging: how coefficients are found; None where they are given.
      q: how DAREx's q is found; None where it is given.
      advise: how the method is chosen; None where it is given.
      from_recipe: what the recipe says, if the job is made from one.
      earlier: jobs whose outputs this one reads, in their order; they come first.
      flags: every flag's value, for recipe.json.
      command: the command line that repeats the job, for the model card.
    """

    HELP_GROUP: ClassVar[str] = "models"

    merge: MergeConfig
    base: str = option(
        REQUIRED, "directory, hub id (owner/name[@revision]), orbax:DIR, demo:base, or BASE+ADAPTER", kind="path"
    )
    experts: Mapping[str, str] = option(
        REQUIRED,
        "NAME=WHERE, repeated; WHERE as of --base (demo:math …), or an adapter of --base",
        flag="expert",
        kind="experts",
    )
    recipe: str = option("", "FILE.yaml, as mergekit has it, that says models, method and numbers", kind="path")
    print_recipe: bool = option(False, "plan: print the merge as such a recipe", rare=True)
    output: str = option("", "directory of the merged model; convert: also orbax:DIR", kind="path")
    architecture: str = option(
        "",
        "FILE.json that says which tensors are linears, or generic: by names and shapes",
        kind="path",
    )
    dequantise: bool = option(False, "read quantised weights (FP8, MXFP4, compressed-tensors) as bfloat16", rare=True)
    overwrite: bool = option(False, "replace what is in --output", group="work")
    workdir: str = option(
        "runs", "directory of responses, searches, reports, benchmark models", group="work", kind="path"
    )
    resume: bool = same(EvaluationConfig, "resume")
    tokenizer: str = option(
        "base",
        "model whose tokenizer a merge gets (base), or evaluate asks all with (each its own)",
        flag_default="",
    )
    vocabulary: str = option(
        "base",
        "tokens that only experts have: base drops them, union adds them",
        choices=("base", "union"),
    )
    save_delta: str = option("", "also write each expert's pruned and scaled delta to DIR/NAME", kind="path")
    max_shard_size: int = option(
        MAX_SHARD_SIZE,
        "bytes of a safetensors file, or 5GB, 500MB, 2GiB",
        kind="size",
        least=1,
        message="--{flag}={value}: a number of bytes, for example 2000000000 or 5GB.",
    )
    mesh: str = option(
        "",
        "layer=2,row=4; finetune: data=2,fsdp=4; default: all local devices on the second",
        group="devices",
    )
    block_layers: int = option(
        0,
        "layers on the devices at a time; 0: as many as memory allows",
        group="devices",
        least=0,
        message="--{flag}={value}: 1 or more layers at a time, or 0 to choose.",
    )
    residency: str = option(
        "auto",
        "whether weights stay on the devices or are streamed",
        group="devices",
        choices=("auto", "resident", "streamed"),
    )
    device_memory: int = option(
        0,
        "GB of a device to plan for; 0: ask the device",
        kind="gigabytes",
        group="devices",
        least=0,
        message="--{flag}={value}: GB of one device, or 0 to ask it.",
    )
    num_processes: int = same(StartConfig, "num_processes")
    allow_other_base: bool = option(
        False, "merge experts whose delta is as large as the weights, and rows of zeros", group="method"
    )
    calibration: str = option(
        "",
        "text for WANDA, RegMean and most of --q, a sample a line: a file, or DIR with NAME.txt",
        group="method",
        kind="path",
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: FactorSearch | None = None
    adamerging: AdaMergingConfig | None = None
    q: QConfig | None = None
    advise: AdviseConfig | None = None
    from_recipe: FromRecipe | None = None
    earlier: tuple["JobConfig", ...] = ()
    flags: Mapping = field(default_factory=dict)
    command: str = ""

    def __post_init__(self):
        check(self)
        choose("--tokenizer", self.tokenizer, ("base", *self.experts))

    def text_of(self, expert: str) -> str:
        """Return the --calibration text of an expert: the file or, of a directory, NAME.txt in it, or DOMAIN.txt.

        The domain is what stands before the first dot of the expert's name. Empty if no text is given.
        """
        place = Path(self.calibration)
        if not self.calibration or not place.is_dir():
            return self.calibration
        names = (f"{expert}.txt", f"{expert.partition('.')[0]}.txt")
        return str(next((place / name for name in names if (place / name).is_file()), place / names[0]))


@dataclass(frozen=True)
class ConvertConfig:
    """What --job=convert reads and writes, and how it is sharded and stored there."""

    HELP_GROUP: ClassVar[str] = "models"

    base: str = same(JobConfig, "base")
    output: str = same(JobConfig, "output")
    architecture: str = same(JobConfig, "architecture")
    dequantise: bool = same(JobConfig, "dequantise")
    mesh: str = same(JobConfig, "mesh")
    output_dtype: str = same(MergeConfig, "output_dtype", default="")
    max_shard_size: int = same(JobConfig, "max_shard_size")
    overwrite: bool = same(JobConfig, "overwrite")
    resume: bool = same(JobConfig, "resume")
    seed: int = same(MergeConfig, "seed")

    def __post_init__(self):
        for flag, given in (("--base", self.base), ("--output", self.output.removeprefix(PREFIX))):
            if not given:
                raise ValueError(
                    f"{flag} is empty: --job=convert reads --base=WHERE and writes --output={PREFIX}DIR, an Orbax "
                    f"checkpoint, or --output=DIR, a Hugging Face directory."
                )
        check(self)


@dataclass(frozen=True)
class ValidateConfig:
    """Which two models, or deltas, --job=validate compares.

    Attributes:
      output, reference: the two; the numbers of the output are held against those of the reference.
      base: what both were made from; kept is then what differs from it. Without it, kept is what is not 0.
      tolerance_ulp: how far two values may be apart and pass for equal, in units in the last place.
    """

    HELP_GROUP: ClassVar[str] = "report, validate and benchmark"

    output: str = same(JobConfig, "output")
    reference: str = option(
        "", "validate: directory by another implementation that --output is compared with", kind="path"
    )
    base: str = same(JobConfig, "base", default="")
    dequantise: bool = same(JobConfig, "dequantise")
    workdir: str = same(JobConfig, "workdir")
    tolerance_ulp: float = option(
        1.0,
        "validate: how far values may be apart, in units in the last place",
        least=0,
        infinite=True,
        message="--{flag}={value}: give 0 or more.",
    )
    seed: int = same(MergeConfig, "seed")

    def __post_init__(self):
        for flag, given in (("--output", self.output), ("--reference", self.reference)):
            if not given:
                raise ValueError(f"{flag} is empty: --job=validate compares --output=DIR with --reference=DIR.")
        check(self)


@dataclass(frozen=True)
class EvaluateConfig:
    """Which models --job=evaluate evaluates.

    Attributes:
      models: where each model is, by the name that tables give it.
      tokenizer: the name of the model whose tokenizer asks all of them; empty to ask each with its own.
      seed: of the demo family.
    """

    HELP_GROUP: ClassVar[str] = "evaluation"

    models: Mapping[str, str]
    evaluation: EvaluationConfig
    dequantise: bool = same(JobConfig, "dequantise")
    workdir: str = same(JobConfig, "workdir")
    seed: int = same(MergeConfig, "seed")
    tokenizer: str = same(JobConfig, "tokenizer", default="")
    command: str = ""

    def __post_init__(self):
        if self.tokenizer:
            choose("--tokenizer", self.tokenizer, self.models)
        if not self.models:
            raise ValueError(
                "--job=evaluate: give a model: --base=WHERE, --expert=NAME=WHERE or --output=DIR, or several."
            )
