"""--job=validate: are a merged model, or pruned deltas, the numbers that another implementation wrote?

Both directories are read side by side, tensor by tensor and a few rows at a time. What is measured is in `MEASURED`,
which every report repeats.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

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
        return summarise(self.tensors, self.tolerance_ulp)

    @property
    def verdict(self) -> str:
        return self.total.verdict(self.tolerance_ulp)

    @property
    def passed(self) -> bool:
        """Identical, or equal within the tolerance."""
        return self.verdict in (IDENTICAL, EQUAL)

    def in_words(self) -> str:
        """The verdict in a line: in all, how many tensors are how, and which is the worst."""
        verdicts = [one.verdict(self.tolerance_ulp) for one in self.tensors]
        counts = {verdict: verdicts.count(verdict) for verdict in (IDENTICAL, EQUAL, MASKS, DIFFERENT)}
        said = ", ".join(f"{many} {verdict}" for verdict, many in counts.items() if many)
        worst = "" if self.verdict == IDENTICAL else f"; worst: {self.total.name}"
        return f"{self.total.in_words(self.tolerance_ulp)} ({said} of {len(verdicts)} tensors{worst})"

    def rows(self) -> list[tuple[str, ...]]:
        """The table under HEADS: a row for every kind of tensor, then one for all."""
        groups: dict[str, list[Comparison]] = {name: [] for name in KINDS}
        for one in self.tensors:
            groups[tensor_kind(one.name)].append(one)
        groups["all"] = list(self.tensors)
        return [self._row(f"{name} ({len(group)})", group) for name, group in groups.items() if group]

    def _row(self, name: str, group: Sequence[Comparison]) -> tuple[str, ...]:
        one = summarise(group, self.tolerance_ulp)
        numbers = [f"{x:.3g}" for x in (one.max_difference, one.mean_difference, one.relative)]
        ours, theirs = (
            percent(one.elements - one.kept_by_both - kept, one.elements)
            for kept in (one.kept_by_ours, one.kept_by_theirs)
        )
        alone = f"{one.kept_by_one} ({percent(one.kept_by_one, one.elements)})" if one.kept_by_one else "0"
        worst = "" if one.verdict(self.tolerance_ulp) == IDENTICAL else one.name
        worst = worst.removeprefix("model.").removesuffix(".weight")
        return (name, *numbers, f"{ours} ({theirs})", alone, one.in_words(self.tolerance_ulp), worst)

    def notes(self) -> list[str]:
        """What was told of single tensors, the same of several in one line."""
        found: dict[str, list[str]] = {}
        for one in self.tensors:
            for note in (*one.notes, *([one.problem] if one.problem else [])):
                found.setdefault(note, []).append(one.name)
        more = {note: f" and {len(names) - 1} more" if len(names) > 1 else "" for note, names in found.items()}
        return [f"{names[0]}{more[note]}: {note}" for note, names in found.items()]

    def printed(self) -> Table:
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
        base = f", base `{self.base}`" if self.base else ""
        lines = [f"# `{self.output}` beside the reference `{self.reference}`{base}", "", f"Verdict: {self.in_words()}."]
        head, *rows = ("| " + " | ".join(cells) + " |" for cells in (HEADS, *self.rows()))
        lines += ["", head, "|---" + "|---:" * (len(HEADS) - 3) + "|---|---|", *rows, ""]
        lines += [*(f"- {note}" for note in self.notes()), "", "## What is measured", "", MEASURED]
        return "\n".join(lines)

    def as_dict(self) -> dict:
        return {
            "output": self.output,
            "reference": self.reference,
            "base": self.base,
            "tolerance_ulp": self.tolerance_ulp,
            "verdict": self.verdict,
            "passed": self.passed,
            "in_words": self.in_words(),
            "tensors": {one.name: one.as_dict(self.tolerance_ulp) for one in self.tensors},
        }


def run_validate(
    output: str, reference: str, base: str = "", workdir: str = "runs", tolerance_ulp: float = 1.0, seed: int = 0
) -> Validation:
    """Compare two models, or deltas; print the table, write validate.json and validate.md to workdir.

    Args:
      base: what both were made from; kept is then what differs from it. Without it, kept is what is not 0.
      tolerance_ulp: how far two values may be apart and pass for equal.

    Raises:
      ValueError: what is given is not two checkpoints. Differences of any kind are results.
    """
    for flag, given in (("--output", output), ("--reference", reference)):
        if not given:
            raise ValueError(f"{flag} is empty: --job=validate compares --output=DIR with --reference=DIR.")
    if not tolerance_ulp >= 0:
        raise ValueError(f"--tolerance_ulp={tolerance_ulp}: give 0 or more.")
    opened = [open_checkpoint(where, seed) for where in (output, reference, *([base] if base else []))]
    found = Validation(output, reference, base, tolerance_ulp, compare(*opened))
    for source in opened:
        source.close()
    directory = Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "validate.json").write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    (directory / "validate.md").write_text(found.markdown())
    out = console()
    out.print(found.printed())
    for line in (*found.notes(), f"what the numbers mean, and every tensor: {directory}/validate.md, validate.json"):
        out.print(line, soft_wrap=True)
    out.print(f"verdict: {found.in_words()}", soft_wrap=True, highlight=False)
    return found


def compare(ours: Checkpoint, theirs: Checkpoint, base: Checkpoint | None = None) -> tuple[Comparison, ...]:
    """Every tensor that either has, in the order of the model's layers; what no LLaMA has comes last."""
    sources = [ours, theirs, *([base] if base else [])]
    listed = [_names(source) for source in sources]
    known = tensor_specs(ours.config)
    either = dict.fromkeys([*listed[0], *listed[1]])
    names = [*(name for name in known if name in either), *(name for name in either if name not in known)]
    present = {name for name in names if all(name in one for one in listed[:2])}
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
    tied = source.config.get("tie_word_embeddings")  # then a head in the file is a copy that some exports carry
    return [name for name in source.tensors if not (tied and name == "lm_head.weight")]


def _collect(pending: Sequence, sources: Sequence, progress: Stage) -> Iterator[tuple[str, Comparison]]:
    done = 0
    for future in pending:
        found = future.result()
        done += sum(source.tensors[found.name].nbytes for source in sources if found.name in source.tensors)
        progress.advance(done)
        yield found.name, found
