"""Make and score candidate merges of models that are already open; a single process keeps them in memory."""

import os
import shutil
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import jax

from dppa_jax.architecture.specs import with_dtype
from dppa_jax.checkpoint.in_memory import for_evaluator, in_memory
from dppa_jax.checkpoint.laid_out import laid_out_writer
from dppa_jax.checkpoint.matched import opened_model, unwrapped
from dppa_jax.config.merge import MergeConfig
from dppa_jax.evaluate.evaluation import Cost, Evaluation, Weights
from dppa_jax.evaluate.reader import Reader
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Split, Task
from dppa_jax.merging.blocks import owners
from dppa_jax.merging.in_memory import merged_model, with_rest
from dppa_jax.merging.merger import ARITHMETIC, Merger, output_tensors
from dppa_jax.merging.opened import Opened
from dppa_jax.merging.rest import copy_rest
from dppa_jax.runtime import processes
from dppa_jax.runtime.directories import open_directory, own_directory
from dppa_jax.runtime.files import digest
from dppa_jax.runtime.reading import MAX_LINES_BYTES, read_text


class Candidates:
    """The open base and experts of a job, which are merged and scored as often as a search asks.

    A merge's fingerprint covers its inputs and everything that decides its bits. A merge whose responses are stored
    under its fingerprint is not made again.

    One process keeps a merge in memory. Several processes write it together, each its own layers, to a directory below
    `job.workdir`; the first process, which has the evaluator, reads it there. All processes must call the same methods
    in the same order.
    """

    def __init__(self, opened: Opened, evaluation: Evaluation):
        self.opened, self.evaluation = opened, evaluation
        self.job, self.base = opened.job, opened.base
        self._written: Path | None = None

    def __enter__(self) -> "Candidates":
        return self

    def __exit__(self, *_) -> None:
        self._remove_written()

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The digest of the weights of "base" and of every expert."""
        digests = lambda: {name: model.content_digest() for name, model in self.opened.models.items()}  # noqa: E731
        return processes.of_first("fingerprints", digests)

    def dense(self, name: str, tasks: Sequence[Task], split: Split = "test", options=None) -> Scores:
        """Return the scores of "base" or of an expert, unpruned. A base without a head has that of the expert."""
        rest, model = self.opened.rest, self.opened.models[name]
        weights, fingerprint = partial(for_evaluator, model), self.fingerprints[name]
        if name == "base" and rest.source is not unwrapped(model):
            weights = lambda: with_rest(in_memory(model), rest)  # noqa: E731
            fingerprint = digest([fingerprint, rest.source.content_digest()])
        return self.evaluation.scores(name, fingerprint, weights, tasks, split, options, self.reader(name))

    def merged(
        self, name: str, merger: Merger, tasks: Sequence[Task], split: Split = "test", options=None, **overrides
    ) -> Scores:
        """Return the scores of the merge by `merger`; `overrides` replace its `factors` and `coefficients`."""
        fingerprint = self.fingerprint(merger.merge_config(**overrides))
        make = lambda: self.made(merger, fingerprint, **overrides)  # noqa: E731
        return self.evaluation.scores(name, fingerprint, make, tasks, split, options, self.merge_reader())

    def reader(self, name: str) -> Reader:
        """Return how "base" or an expert reads and ends."""
        model = opened_model(self.opened.models[name])
        return self.evaluation.readers.of(name, model.config, model.directory)

    def merge_reader(self) -> Reader:
        """Return how a merge reads and ends, whose tokenizer files are those of the model that --tokenizer names."""
        return self.evaluation.readers.of("a merge", self.base.config, self.opened.tokenizer.directory)

    def made(self, merger: Merger, fingerprint: str, **overrides) -> Weights:
        """Return the weights of the merge by `merger` for the evaluator; they are valid until the next call.

        `overrides` replace the merger's `factors` and `coefficients`.
        """
        if processes.count() == 1:
            return merged_model(merger, self.opened.tokenizer.directory, self.opened.rest, **overrides)
        config, base = merger.merge_config(**overrides), self.base
        directory = self._place(fingerprint)
        owner = owners(base.specs, processes.count())
        options = output_tensors(base, config), self.job.max_shard_size, True
        rest = self.opened.rest
        with laid_out_writer(base, directory, *options, owners=owner, copied=rest.tensors) as writer:
            merger(writer, **overrides)
            copy_rest(rest, {}, writer)
            writer.commit(
                with_dtype(rest.config, config.output_dtype or base.dtype.name), self.opened.tokenizer.directory
            )
        if self._written != directory:
            self._remove_written()
        self._written = directory
        return directory

    def _place(self, fingerprint: str) -> Path:
        """Return where several processes write a merge; refuse what another user has put there, or a link."""
        parent = Path(self.job.workdir) / "candidates"
        parent.parent.mkdir(parents=True, exist_ok=True)
        os.close(own_directory(parent))
        directory = parent / fingerprint[:16]  # never one that an evaluator has read
        if os.path.lexists(directory):  # of a run that was killed
            os.close(open_directory(directory))
        return directory

    def _remove_written(self) -> None:
        if self._written and processes.index() == 0:
            shutil.rmtree(self._written, ignore_errors=True)

    def cost(self, config: MergeConfig) -> Cost:
        """Return the seconds that the merge described by `config` took, part by part."""
        return self.evaluation.costs[self.fingerprint(config)]

    def fingerprint(self, config: MergeConfig) -> str:
        """Return the fingerprint of the merge that `config` describes.

        It covers the inputs, the numbers of the merge, the code that computes it, and whose tokenizer files it gets.
        """
        inputs = [self.fingerprints[name] for name in ("base", *config.experts)]
        seed = config.seed if config.has_random_score else None
        reads = config.is_calibrated or config.combination.solves
        texts = [self.job.text_of(name) for name in config.experts if reads]
        calibration = [read_text(text, MAX_LINES_BYTES) for text in texts]
        code = [jax.__version__, ARITHMETIC]
        code += [self.opened.vocabulary.digest] if self.opened.vocabulary else []
        return digest([code, inputs, {**config.as_dict(), "seed": seed}, calibration, self.job.tokenizer])
