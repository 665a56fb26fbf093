"""--job=finetune --decay_search: train with AdamR for the largest decay that costs little of the expert's score."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from absl import logging
from rich.table import Table

from dppa_jax.checkpoint.output import Unfinished, output_directory, publish
from dppa_jax.config.finetune import FinetuneConfig
from dppa_jax.evaluate.evaluation import open_evaluation
from dppa_jax.evaluate.tasks import every_task
from dppa_jax.finetune.optimizer import PullError
from dppa_jax.flags import command
from dppa_jax.jobs.finetune import run_finetune
from dppa_jax.jobs.places import check_apart
from dppa_jax.runtime import processes
from dppa_jax.runtime.directories import claim_directory, remove_content
from dppa_jax.runtime.files import digest, sources_digest, write_whole
from dppa_jax.runtime.journal import Journal
from dppa_jax.runtime.progress import console
from dppa_jax.runtime.reading import MAX_LINES_BYTES, read_json, read_text
from dppa_jax.search.decay import START, largest_within
from dppa_jax.where import locate, open_checkpoint

RECORD = "decay_search.json"
ROUNDING = 1e-9  # points
ELSEWHERE = ("output", "overwrite", "workdir", "mesh", "resume", "flags", "command", "checkpoint_every", "eval_every")

ScoreOf = Callable[[Path], float]  # of an expert's directory; in points


def run_decay_search(job: FinetuneConfig) -> list[dict]:
    """Find the decay, write the expert that it makes, and return the log of its training. The search is ours.

    The first expert is trained without decay; the score of each other one is compared with it. What was tried is in
    `decay_search.json` beside the expert. A search that was killed goes on where it was.
    """
    if processes.count() > 1:
        raise ValueError("--decay_search takes one process: leave out --coordinator.")
    output = output_directory(job.output, job.overwrite)
    source = locate(job.base, job.seed)
    check_apart({"--output": job.output}, {"base": source}, job.workdir)
    with _scorer(job, source) as (scored_by, score_of), _place(job, source) as directory:
        journal = Journal(directory / "decays.journal", job.resume)
        search = DecaySearch(job, directory, journal, score_of)
        search.is_within(0.0)
        decay = largest_within(search.is_within, job.optimizer.weight_decay or START)
        _show(search, scored_by, decay)
        expert = search.expert(decay)
        content = {"scored by": scored_by, "tolerance": job.decay_tolerance, "found": decay, "tried": search.rows()}
        _publish(expert, output, job.overwrite, {RECORD: json.dumps(content, indent=1) + "\n"})
        journal.close()
    logging.info("wrote %s, trained with --decay_toward=base --weight_decay=%g", job.output, decay)
    return read_json(output / "finetune.json")["log"]


@dataclass
class DecaySearch:
    """Trains and scores an expert for each decay, once; it keeps the expert of the largest decay within the tolerance.

    Attributes:
      tried: by decay the `score`, None where the pull was refused, and the `largest_pull`.
    """

    job: FinetuneConfig
    directory: Path
    journal: Journal
    score_of: ScoreOf
    tried: dict[float, Mapping] = field(default_factory=dict)

    def is_within(self, decay: float) -> bool:
        """Train with a decay, and return whether the score is within the tolerance of the score without decay."""
        if record := self.journal.get(f"{decay:g}"):
            self.tried[decay] = record
            return self._is_good(decay)
        self.tried[decay] = self._measured(decay)
        good = self._is_good(decay)
        for place in self.directory.iterdir():  # experts are large: only the best one stays
            if place.is_dir() and (place == self._place(decay)) != good:
                shutil.rmtree(place)
        return good

    def expert(self, decay: float) -> Path:
        """Return the directory of the expert of a decay; train it where it is not there."""
        place, optimizer = self._place(decay), self.job.optimizer
        if not (place / "finetune.json").is_file():
            flags = {**self.job.flags, "decay_search": False, "decay_toward": "base", "weight_decay": decay}
            run_finetune(
                replace(
                    self.job,
                    output=str(place),
                    decay_search=False,
                    optimizer=replace(optimizer, decay_toward="base", weight_decay=decay),
                    flags=flags,
                    command=command(flags) if self.job.flags else "",
                )
            )
        return place

    def rows(self) -> list[dict]:
        """Return what was tried, by rising decay, and whether it is within the tolerance."""
        decays = sorted(self.tried)
        return [{"weight_decay": decay, **self.tried[decay], "within": self._is_good(decay)} for decay in decays]

    def _measured(self, decay: float) -> Mapping:
        try:
            expert = self.expert(decay)
        except PullError as error:
            logging.info("--weight_decay=%g is refused: %s", decay, error)
            record = {"score": None, "largest_pull": None}
        else:
            log = read_json(expert / "finetune.json")["log"]
            record = {"score": self.score_of(expert), "largest_pull": log[-1]["largest_pull"]}
            logging.info("--weight_decay=%g: score %.2f", decay, record["score"])
        self.journal.add(f"{decay:g}", record)
        return record

    def _is_good(self, decay: float) -> bool:
        score, without = self.tried[decay]["score"], self.tried[0.0]["score"]
        return score is not None and score >= without - self.job.decay_tolerance - ROUNDING

    def _place(self, decay: float) -> Path:
        return self.directory / f"{decay:g}"


@contextmanager
def _scorer(job: FinetuneConfig, source: Path) -> Iterator[tuple[str, ScoreOf]]:
    """Yield what experts are scored by, and the score of one; items that cannot be asked are refused first."""
    tasks = every_task(job.held_out.tasks)
    if not tasks:
        loss_of = lambda expert: read_json(expert / "finetune.json")["log"][-1]["eval_loss"]  # noqa: E731
        yield "100 · exp(−loss on --eval_data)", lambda expert: 100 * math.exp(-loss_of(expert))
        return
    with open_evaluation(job.held_out, source, Path(job.workdir)) as evaluation:
        for task in tasks:
            evaluation.questions(task, "validation")

        def score_of(expert: Path) -> float:
            model = open_checkpoint(expert)
            fingerprint = model.content_digest()
            model.close()
            scores = evaluation.scores("expert", fingerprint, lambda: expert, tasks, "validation")
            evaluation.release()  # the next training needs the memory
            return 100 * sum(score.accuracy for score in scores.values()) / len(scores)

        yield f"validation items of {', '.join(task.name for task in tasks)}, %", score_of


@contextmanager
def _place(job: FinetuneConfig, source: Path) -> Iterator[Path]:
    """Yield the directory of this search, locked; when the search is done, or has done nothing, it is removed."""
    model = open_checkpoint(source)
    files = [read_text(file, MAX_LINES_BYTES) for file in (*job.data, *job.eval_data)]
    options = {name: value for name, value in asdict(job).items() if name not in ELSEWHERE}
    code = sources_digest("finetune/*.py", "model/*.py", "search/decay.py")
    versions = [version(library) for library in ("jax", "optax", "grain")]
    key = digest([options, files, model.content_digest(), code, versions])
    model.close()
    workdir = Path(job.workdir).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    directory = workdir / f"decay-{key[:12]}"
    lock = claim_directory(directory)
    done = False
    try:
        if not job.resume:
            remove_content(lock)
        yield directory
        done = True
    finally:
        if done or not any(place.is_dir() or place.stat().st_size for place in directory.iterdir()):
            remove_content(lock)
        with suppress(OSError):
            directory.rmdir()
        os.close(lock)


def _publish(expert: Path, output: Path, overwrite: bool, texts: Mapping[str, str]) -> None:
    """Copy an expert, and further files, to the output, which appears when it is complete."""
    unfinished = Unfinished(output)
    try:
        shutil.copytree(expert, unfinished.path, dirs_exist_ok=True)
        for name, text in texts.items():
            write_whole(unfinished.path / name, text)
        publish([unfinished], overwrite)
    except BaseException:
        unfinished.remove()
        raise


def _show(search: DecaySearch, scored_by: str, found: float) -> None:
    table = Table("weight decay", "score", "within", "largest pull", title=f"decay toward base; score: {scored_by}")
    for row in search.rows():
        refused = row["score"] is None
        score, pull = ("–", "1 or more") if refused else (f"{row['score']:.2f}", f"{row['largest_pull']:.3g}")
        mark = " ←" if row["weight_decay"] == found else ""
        table.add_row(f"{row['weight_decay']:g}{mark}", score, "yes" if row["within"] else "no", pull)
    console().print(table)
    if not found:
        logging.warning("--decay_search: no decay is within --decay_tolerance; the expert is the one without decay")
