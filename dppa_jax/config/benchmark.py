"""What --job=benchmark times."""

from dataclasses import dataclass
from typing import ClassVar

from dppa_jax.config.option import check, option, same
from dppa_jax.config.report import Sweep
from dppa_jax.config.run import JobConfig


@dataclass(frozen=True)
class BenchmarkConfig:
    """Which benchmark is run, on what, how often.

    Attributes:
      shape: sizes of the synthetic models; several make a table of sizes.
      methods: what to time; empty for all that can be.
      restart: the job whose candidates are timed; None for all benchmarks but --peer=restart.
    """

    HELP_GROUP: ClassVar[str] = "report, validate and benchmark"

    shape: tuple[str, ...] = option(("0.3b",), "benchmark: 0.3b, 1.1b, 3b, 7b, moe; several make a table")
    device: str = option("", "benchmark: time the arithmetic alone, on weights made there", choices=("cpu", "gpu"))
    scaling: bool = option(False, "benchmark: by 1, 2 and 4 processes")
    peer: str = option(
        "",
        "benchmark: mergekit, run alternately; restart: of vLLM, beside a search's candidates",
        choices=("mergekit", "restart"),
    )
    peer_python: str = option(
        "", "benchmark: interpreter of an environment with mergekit; default: this one", kind="path"
    )
    repeats: int = option(1, "benchmark: runs of each; the fastest counts", least=1)
    methods: tuple[str, ...] = same(Sweep, "methods")
    workdir: str = same(JobConfig, "workdir")
    restart: JobConfig | None = None

    def __post_init__(self):
        check(self)
        kinds = {"--peer": self.peer, "--device": self.device, "--scaling": self.scaling}
        if len(given := [flag for flag, value in kinds.items() if value]) > 1:
            raise ValueError(f"--job=benchmark: {' and '.join(given)} are benchmarks of their own; give one of them.")
        if (self.device or self.scaling) and len(self.shape) > 1:
            raise ValueError(f"--shape={','.join(self.shape)}: give one shape with {given[0]}.")
