"""--job=validate: compare a merged model, or pruned deltas, with what another implementation wrote.

Both directories are read side by side, tensor by tensor and a few rows at a time. `MEASURED` explains the numbers;
every report repeats it.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from dppa_jax.architecture.specs import tied_heads
from dppa_jax.checkpoint import Checkpoint, tensor_specs
from dppa_jax.checkpoint.compare import (
    DIFFERENT,
    EQUAL,
    IDENTICAL,
    KINDS,
    MASKS,
    MEASURED,
    Comparison,
    compare_tensor,
    percent,
    summarise,
    tensor_kind,
)
from dppa_jax.config.run import ValidateConfig
from dppa_jax.jobs.places import check_apart
from dppa_jax.runtime import markdown
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.progress import Stage, console, stage
from dppa_jax.where import open_checkpoint

READERS = 2

HEADS = (
    "tensors",
    "max diff",
    "mean diff",
    "of largest",
    "removed (theirs)",
    "kept by one only",
    "verdict",
    "worst",
)


@dataclass(frozen=True)
class Validation:
    """The comparison of two directories."""

    output: str
    reference: str
    base: str
    tolerance_ulp: float
    tensors: tuple[Comparison, ...]

    @property
    def total(self) -> Comparison:
        """The comparison of all tensors together."""
        return summarise(self.tensors, self.tolerance_ulp)

    @property
    def verdict(self) -> str:
        """The verdict on all tensors together."""
        return self.total.verdict(self.tolerance_ulp)

    @property
    def passed(self) -> bool:
        """Whether all tensors are identical, or equal within the tolerance."""
        return self.verdict in (IDENTICAL, EQUAL)

    def in_words(self) -> str:
        """Return one line: the verdict, how many tensors have which verdict, and the worst tensor."""
        verdicts = [tensor.verdict(self.tolerance_ulp) for tensor in self.tensors]
        counts = {verdict: verdicts.count(verdict) for verdict in (IDENTICAL, EQUAL, MASKS, DIFFERENT)}
        tally = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        worst = "" if self.verdict == IDENTICAL else f"; worst: {self.total.name}"
        return f"{self.total.in_words(self.tolerance_ulp)} ({tally} of {len(verdicts)} tensors{worst})"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows under HEADS: one for every kind of tensor, then one for all."""
        groups: dict[str, list[Comparison]] = {name: [] for name in KINDS}
        for tensor in self.tensors:
            groups[tensor_kind(tensor.name)].append(tensor)
        groups["all"] = list(self.tensors)
        return [self._row(f"{name} ({len(group)})", group) for name, group in groups.items() if group]

    def _row(self, name: str, group: Sequence[Comparison]) -> tuple[str, ...]:
        total = summarise(group, self.tolerance_ulp)
        numbers = [f"{x:.3g}" for x in (total.max_difference, total.mean_difference, total.relative)]
        ours, theirs = (
            percent(total.elements - total.kept_by_both - kept, total.elements)
            for kept in (total.kept_by_ours, total.kept_by_theirs)
        )
        alone = f"{total.kept_by_one} ({percent(total.kept_by_one, total.elements)})" if total.kept_by_one else "0"
        worst = "" if total.verdict(self.tolerance_ulp) == IDENTICAL else total.name
        worst = worst.removeprefix("model.").removesuffix(".weight")
        return (name, *numbers, f"{ours} ({theirs})", alone, total.in_words(self.tolerance_ulp), worst)

    def notes(self) -> list[str]:
        """Return the notes on single tensors; tensors with the same note share a line."""
        tensors: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for note in (*tensor.notes, *([tensor.problem] if tensor.problem else [])):
                tensors.setdefault(note, []).append(tensor.name)
        more = {note: f" and {len(names) - 1} more" if len(names) > 1 else "" for note, names in tensors.items()}
        return [f"{names[0]}{more[note]}: {note}" for note, names in tensors.items()]

    def printed(self) -> Table:
        """Return the table for a terminal."""
        table = Table(title=f"{self.output} beside the reference {self.reference}")
        for i, head in enumerate(HEADS):
            table.add_column(head, justify="right" if 0 < i < len(HEADS) - 2 else "left", overflow="fold")
        *kinds, everything = self.rows()
        for row in kinds:
            table.add_row(*row)
        table.add_section()
        table.add_row(*everything)
        return table

    def markdown(self) -> str:
        """Return the content of validate.md."""
        output, reference, base = map(markdown.code, (self.output, self.reference, self.base))
        lines = [f"# {output} beside the reference {reference}{f', base {base}' if self.base else ''}", ""]
        lines += [f"Verdict: {markdown.text(self.in_words())}."]
        head, *rows = (markdown.row(map(markdown.text, cells)) for cells in (HEADS, *self.rows()))
        lines += ["", head, "|---" + "|---:" * (len(HEADS) - 3) + "|---|---|", *rows, ""]
        lines += [*(f"- {markdown.text(note)}" for note in self.notes()), "", "## What is measured", "", MEASURED]
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """Return the content of validate.json."""
        return {
            "output": self.output,
            "reference": self.reference,
            "base": self.base,
            "tolerance_ulp": self.tolerance_ulp,
            "verdict": self.verdict,
            "passed": self.passed,
            "in_words": self.in_words(),
            "tensors": {tensor.name: tensor.as_dict(self.tolerance_ulp) for tensor in self.tensors},
        }


def run_validate(config: ValidateConfig) -> None:
    """Compare two models, or two deltas, as `validate` does; end the process with status 1 if they are not equal."""
    if not validate(config).passed:
        sys.exit(f"--output is not within --tolerance_ulp={config.tolerance_ulp:g} of --reference")


def validate(config: ValidateConfig) -> Validation:
    """Compare two models, or two deltas; print the table, and write validate.json and validate.md to config.workdir.

    Raises:
      ValueError: one of them is not a checkpoint. Differences of any kind raise nothing; they are the result.
    """
    output, reference, base = config.output, config.reference, config.base
    options = config.seed, None, config.dequantise
    opened = [open_checkpoint(where, *options) for where in (output, reference, *([base] if base else []))]
    check_apart({}, {str(model.directory): model.directory for model in opened}, config.workdir)
    validation = Validation(output, reference, base, config.tolerance_ulp, compare(*opened))
    for source in opened:
        source.close()
    directory = Path(config.workdir)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "validate.json", json.dumps(validation.as_dict(), indent=1) + "\n")
    write_whole(directory / "validate.md", validation.markdown())
    out = console()
    out.print(validation.printed())
    details = f"what the numbers mean, and every tensor: {directory}/validate.md, validate.json"
    for line in (*validation.notes(), details):
        out.print(line, soft_wrap=True)
    out.print(f"verdict: {validation.in_words()}", soft_wrap=True, highlight=False)
    return validation


def compare(ours: Checkpoint, theirs: Checkpoint, base: Checkpoint | None = None) -> tuple[Comparison, ...]:
    """Compare every tensor that either model has, in the order of the layers; tensors that no LLaMA has come last."""
    sources = [ours, theirs, *([base] if base else [])]
    listed = [_names(source) for source in sources]
    known = tensor_specs(ours.config)
    either = dict.fromkeys([*listed[0], *listed[1]])
    names = [*(name for name in known if name in either), *(name for name in either if name not in known)]
    present = {name for name in names if all(name in listing for listing in listed[:2])}
    total = sum(source.tensors[name].nbytes for name in present for source in sources if name in source.tensors)
    with ThreadPoolExecutor(READERS, "validate") as pool, stage("validate", total) as progress:
        try:
            pending = [pool.submit(compare_tensor, name, sources) for name in names if name in present]
            measured = dict(_collect(pending, sources, progress))
        finally:
            pool.shutdown(cancel_futures=True)
    missing = {True: "missing in the reference", False: "missing in the output"}
    return tuple(measured.get(name) or Comparison(name, problem=missing[name in listed[0]]) for name in names)


def _names(source: Checkpoint) -> list[str]:
    """Return the names of a model's tensors, without the copy of a tied head that some exports carry."""
    copies = tied_heads(source.config)
    return [name for name in source.tensors if name not in copies]


def _collect(pending: Sequence, sources: Sequence, progress: Stage) -> Iterator[tuple[str, Comparison]]:
    """Yield the comparisons by name as they are done, and advance the progress."""
    done = 0
    for future in pending:
        comparison = future.result()
        done += sum(source.tensors[comparison.name].nbytes for source in sources if comparison.name in source.tensors)
        progress.advance(done)
        yield comparison.name, comparison
