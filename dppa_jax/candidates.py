"""Models to choose from or to compare: merges of open checkpoints, made where an evaluator asks for them and scored."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jax

from dppa_jax.cache import digest, sources_digest
from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.config import MergeConfig
from dppa_jax.evaluate.evaluation import Cost, Evaluation
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Split, Task
from dppa_jax.jobs import JobConfig, activation_norms, check_models, open_models, plan_of
from dppa_jax.memory import merged_model
from dppa_jax.pipeline import Layout, Merger
from dppa_jax.sharding import make_mesh

CODE = ("delta/*.py", "kernels.py", "prune.py", "survey.py", "pipeline.py", "blocks.py", "sharding.py")
ARITHMETIC = sources_digest(Path(__file__).parent, *CODE)


class Candidates:
    """The base and experts of a job, and their merges.

    The fingerprint of a merge is that of its inputs and of all that decides its bits, so that one whose responses are
    known is not made again.
    """

    def __init__(self, job: JobConfig, evaluation: Evaluation):
        self.job, self.evaluation = job, evaluation
        self.base, self.experts = open_models(job)
        check_models(job, self.base, self.experts)
        self.mesh = make_mesh(job.mesh)

    def __enter__(self) -> "Candidates":
        return self

    def __exit__(self, *_) -> None:
        for model in (self.base, *self.experts.values()):
            model.close()

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        return {name: model.content_digest() for name, model in (("base", self.base), *self.experts.items())}

    def dense(self, name: str, tasks: Sequence[Task], split: Split = "test", options=None) -> Scores:
        """The scores of the base or of an expert as it is."""
        model = self.base if name == "base" else self.experts[name]
        return self.evaluation.scores(name, self.fingerprints[name], lambda: model.directory, tasks, split, options)

    def merger(self, config: MergeConfig) -> Merger:
        """Of the experts that `config` names."""
        experts = {name: self.experts[name] for name in config.experts}
        models = [{**model.config, "dtype": model.dtype.name} for model in (self.base, *experts.values())]
        plan = plan_of(replace(self.job, merge=config), models, self.mesh.devices.shape, again=True)
        norms = activation_norms(self.job, experts) if config.score == "wanda" else None
        layout = Layout(plan.block_layers, plan.resident)
        return Merger(self.base, experts, config, self.mesh, layout, norms, quiet=True)

    def merged(
        self, name: str, merger: Merger, tasks: Sequence[Task], split: Split = "test", options=None, **numbers
    ) -> Scores:
        """The scores of what `merger` makes with these factors and coefficients."""
        fingerprint = self.fingerprint(merger.merge_config(**numbers))
        make = lambda: merged_model(merger, self.companion.directory, **numbers)  # noqa: E731
        return self.evaluation.scores(name, fingerprint, make, tasks, split, options)

    def cost(self, config: MergeConfig) -> Cost:
        """Of the merge that `config` describes."""
        return self.evaluation.costs[self.fingerprint(config)]

    def fingerprint(self, config: MergeConfig) -> str:
        """Of a merge: its inputs, what is computed, the code that computes it, and whose tokenizer files it gets."""
        inputs = [self.fingerprints[name] for name in ("base", *config.experts)]
        seed = config.seed if config.score == "random" else None
        calibration = Path(self.job.calibration).read_text() if config.score == "wanda" else None
        code = [jax.__version__, ARITHMETIC]
        return digest([code, inputs, {**config.as_dict(), "seed": seed}, calibration, self.job.tokenizer])

    @property
    def companion(self) -> SafetensorsDirectory:
        """The model whose tokenizer and generation config a merge gets."""
        return self.base if self.job.tokenizer == "base" else self.experts[self.job.tokenizer]
