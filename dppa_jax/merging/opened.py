"""What a job has opened: base and experts, the devices, and where the output goes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.matched import opened_model
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import QConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.merging.bounds import Norms
from dppa_jax.merging.lora_factors import thinned
from dppa_jax.merging.merger import Layout, Merger
from dppa_jax.merging.plan import Plan, plan_of
from dppa_jax.merging.rest import Rest
from dppa_jax.merging.solved import InputGrams
from dppa_jax.merging.vocabulary import Vocabulary
from dppa_jax.runtime import processes


@dataclass(frozen=True)
class Opened:
    """The models of a job, opened and checked once, and closed when the `with` block ends.

    Attributes:
      outputs: the directories to write, by "--output" or by the expert whose delta goes there; none for a job that
        writes no model.
      mesh: the devices of this process.
      rest: what the output has beside the merged tensors.
      vocabulary: where the rows of the models' tokens are, if not at the same places; base and experts are then read in
        the order of the merge's tokens.
      seen_norms: activation norms by tensor, of each expert and text that were asked for; copies of this share them.
    """

    job: JobConfig
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    outputs: Mapping[str, Path]
    mesh: Mesh
    rest: Rest
    vocabulary: Vocabulary | None = None
    seen_norms: dict[tuple[str, str], Mapping[str, np.ndarray]] = field(default_factory=dict, compare=False)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_) -> None:
        for model in self.models.values():
            model.close()

    @property
    def models(self) -> dict[str, Checkpoint]:
        """Base and experts by name, base first."""
        return {"base": self.base, **self.experts}

    @property
    def tokenizer(self) -> Checkpoint:
        """The model whose tokenizer files, chat template and generation config a merge gets (--tokenizer)."""
        return self.models[self.job.tokenizer]

    @property
    def tokenizer_files(self) -> Mapping[str, str]:
        """The contents of the tokenizer files of a merge that are not that model's, by name."""
        return self.vocabulary.files if self.vocabulary else {}

    def chosen(self, merge: MergeConfig) -> dict[str, Checkpoint]:
        """The experts that a merge names, as it reads them: with pruned factors if it says so."""
        experts = {name: self.experts[name] for name in merge.experts}
        return thinned(experts, merge) if merge.lora_factors else experts

    def plan(self, merge: MergeConfig, repeated: bool = False) -> Plan:
        """Plan one merge, or with `repeated` many of the same models."""
        dtypes = [model.dtype.name for model in (self.base, *self.chosen(merge).values())]
        return plan_of(replace(self.job, merge=merge), self.base.specs, dtypes, self.mesh.devices.shape, repeated)

    def layout(self, plan: Plan) -> Layout:
        """Cut the work of this process as the plan says."""
        place = processes.count(), processes.index()
        refuse_zeros = not self.job.allow_other_base
        return Layout(plan.block_layers, plan.resident, *place, refuse_zeros, plan.small_blocks)

    def reading(self, expert: str) -> "Opened":
        """Return the same with the --calibration text that an expert reads."""
        return replace(self, job=replace(self.job, calibration=self.job.text_of(expert)))

    def norms(self, merge: MergeConfig) -> Norms | None:
        """Compute activation norms on --calibration text, where the score of a merge needs them; each expert's once."""
        if not merge.is_calibrated:
            return None
        from dppa_jax.merging.activations import norms_of_experts  # here, as Flax takes a third of a second

        texts = {name: (name, self.job.text_of(name)) for name in merge.experts}
        unseen = {name: opened_model(self.experts[name]) for name in texts if texts[name] not in self.seen_norms}
        for name, norms in norms_of_experts(replace(self.job, merge=merge), unseen).items():
            self.seen_norms[texts[name]] = norms
        return {name: self.seen_norms[text] for name, text in texts.items()}

    def input_grams(self, merge: MergeConfig) -> InputGrams | None:
        """Read --calibration text, where a merge solves for linears; what they read is found when it is asked for."""
        if not merge.combination.solves:
            return None
        from dppa_jax.merging.input_grams import grams_of_experts  # here, as Flax takes a third of a second

        experts = {name: opened_model(self.experts[name]) for name in merge.experts}
        return grams_of_experts(replace(self.job, merge=merge), experts)

    def seen(self, merge: MergeConfig) -> dict[str, Any]:
        """What a `Merger` is given of the experts' inputs on --calibration text, by its arguments."""
        return {"norms": self.norms(merge), "input_grams": self.input_grams(merge)}

    def q_of_linears(self, merge: MergeConfig, q: QConfig, name: str) -> list[dict[str, float]]:
        """Find the q of every linear of an expert by a rule, on --calibration text, with each of its numbers."""
        from dppa_jax.merging.activations import probe, tokens_of  # here, as Flax takes a third of a second
        from dppa_jax.merging.q_of_linears import q_of_linears

        alone = replace(merge, experts=(name,), factors={}, coefficients={}, q={name: merge.q[name]})
        layout = self.layout(self.plan(alone))
        rates = Merger(self.base, self.chosen(alone), alone, self.mesh, layout, quiet=True).rates[0, -1]
        base, expert = opened_model(self.base), opened_model(self.experts[name])
        tokens = probe(tokens_of(self.job, expert, f"--q={q.way}"))
        return q_of_linears(base, expert, alone, q, tokens, rates, self.mesh)

    def merger(self, merge: MergeConfig) -> Merger:
        """Prepare many merges that differ in factors, coefficients and q alone."""
        layout = self.layout(self.plan(merge, repeated=True))
        return Merger(self.base, self.chosen(merge), merge, self.mesh, layout, quiet=True, **self.seen(merge))
