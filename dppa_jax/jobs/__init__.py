"""The jobs of the command line: `JOBS` says by name what runs each, and from what its config is made."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dppa_jax.flags import Values
from dppa_jax.jobs import configs


@dataclass(frozen=True)
class Job:
    """A job of the command line.

    Attributes:
      help: what it does, in a line.
      function: MODULE:NAME of what runs it, a function of its config; imported when the job is run, so that a merge
        does not wait for what evaluations and reports import.
      config: makes its config from the values of all flags.
      several: whether several processes can do it together.
    """

    help: str
    function: str
    config: Callable[[Values], Any]
    several: bool = False

    def run(self, config: Any) -> None:
        """Import the function, and call it."""
        module, _, name = self.function.partition(":")
        getattr(import_module(module), name)(config)


JOBS = {
    "merge": Job(
        "merge experts into one model; --evaluate also measures it",
        "dppa_jax.jobs.merge:run_merge",
        configs.job_config,
        several=True,
    ),
    "plan": Job("print memory, bytes, passes and time of a merge", "dppa_jax.jobs.plan:run_plan", configs.job_config),
    "inspect": Job("print what the deltas look like", "dppa_jax.jobs.inspect:run_inspect", configs.inspect_config),
    "advise": Job("choose a method for each expert and rate", "dppa_jax.jobs.advise:run_advise", configs.job_config),
    "evaluate": Job("measure models on tasks", "dppa_jax.jobs.evaluate:run_evaluate", configs.evaluate_config),
    "search": Job(
        "find DPA's factors of every expert", "dppa_jax.jobs.search:run_search", configs.job_config, several=True
    ),
    "finetune": Job(
        "make an expert from examples", "dppa_jax.jobs.finetune:run_finetune", configs.finetune_config, several=True
    ),
    "convert": Job(
        "change a model's format: Hugging Face, Orbax",
        "dppa_jax.jobs.convert:run_convert",
        configs.convert_config,
        several=True,
    ),
    "validate": Job(
        "compare a merge with another program's", "dppa_jax.jobs.validate:run_validate", configs.validate_config
    ),
    "report": Job(
        "compare methods and rates, as the paper does", "dppa_jax.jobs.report:run_report", configs.report_config
    ),
    "benchmark": Job("time merges", "dppa_jax.benchmark.run:run_benchmark", configs.benchmark_config),
}
