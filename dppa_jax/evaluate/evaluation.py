"""Scores of models on tasks: an evaluator is asked only for responses that are not on disk yet."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
from dppa_jax.evaluate.scores import Score, Scores
from dppa_jax.evaluate.tasks import Item, Split, Task
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest, sources_digest
from dppa_jax.runtime.progress import steps

Weights = Path | Model
SCORER = sources_digest("evaluate/answers.py", "evaluate/equivalence.py")  # verdicts of other code are not kept
BATCHES_AT_A_TIME = 2  # between two writes of responses: little is lost, and vLLM's batch seldom runs empty


@runtime_checkable
class Evaluator(Protocol):
    """Generates greedily, from one model at a time.

    Attributes:
      decoding: what decides the responses beside weights and prompts.
      batch_size: prompts that are decoded together.
    """

    decoding: Mapping[str, str | int | float]
    batch_size: int

    def use(self, weights: Weights) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[list[int]]: ...

    def close(self) -> None: ...


@dataclass
class Cost:
    """Seconds spent on one model, and the responses that they gave."""

    apply: float = 0.0  # making the weights
    hand_over: float = 0.0  # giving them to the evaluator
    generate: float = 0.0
    responses: int = 0


class Question(NamedTuple):
    """An item as a model is asked: token ids, which `digest` names, and how long the response may be."""

    task: Task
    item: Item
    prompt: list[int]
    budget: int
    digest: str


class Evaluation:
    """Asks, judges and remembers.

    Responses are kept in `directory` as JSON lines, a file for each model and task, keyed by the fingerprint of the
    weights and by what else decides a response: prompt, decoding, number of tokens. So nothing is asked twice, and an
    interrupted evaluation goes on where it was. Verdicts are kept beside them with the rules they were made by.
    With resume=False, responses of earlier runs are removed when they are come upon.

    Of several processes the first one asks, and tells the others; all must call `scores` in the same order.
    """

    def __init__(self, evaluator: Evaluator, tokenizer, options: TaskOptions, directory: Path, resume: bool = True):
        self.evaluator, self.tokenizer, self.options, self.directory = evaluator, tokenizer, options, directory
        self._begun: set[Path] | None = None if resume else set()  # by this run, where no other's responses count
        self.costs: dict[str, Cost] = {}  # by fingerprint
        self._in_use = ""
        self._questions: dict[tuple, list[Question]] = {}

    def scores(
        self,
        name: str,
        fingerprint: str,
        weights: Callable[[], Weights],
        tasks: Sequence[Task],
        split: Split = "test",
        options: TaskOptions | None = None,
    ) -> Scores:
        """The scores of a model.

        Args:
          name: of the model, for the log.
          fingerprint: of its weights.
          weights: makes or finds them; called, by all processes, when a response is missing and the evaluator has
            others.
          tasks: what to answer.
          split: "test" for what is reported, "validation" for what is chosen by.
          options: in place of the evaluation's own.
        """
        options = options or self.options
        cost = self.costs.setdefault(fingerprint, Cost())
        questions = {task.name: self.questions(task, split, options) for task in tasks}
        logs: dict[str, ResponseLog] = {}
        missing: list[Question] = []
        if processes.index() == 0:
            logs = {task.name: self._log(fingerprint, task, options) for task in tasks}
            missing = [q for task in tasks for q in questions[task.name] if not logs[task.name].has(q)]
        for question in missing:
            if not question.prompt:  # longer than the model may read
                logs[question.task.name].add(question, "")
        missing = [question for question in missing if question.prompt]
        if processes.of_first("wanted", lambda: bool(missing) and self._in_use != fingerprint):
            self._hand_over(fingerprint, weights, cost)
        if missing:
            self._ask(name, missing, logs, cost)

        def judged() -> Scores:
            return {
                name: Score(sum(logs[name].verdict(question, options) for question in asked), len(asked))
                for name, asked in questions.items()
            }

        return processes.of_first("scores", judged)

    def questions(self, task: Task, split: Split = "test", options: TaskOptions | None = None) -> list[Question]:
        """A task's items as a model is asked; read and encoded once."""
        options = options or self.options
        key = task.name, split, options
        if key not in self._questions:
            items = task.items(options, split)
            prompts = task.encode(options, items, self.tokenizer)
            self._questions[key] = [
                Question(task, item, prompt, task.budget(options, prompt), digest(prompt)[:16])
                for item, prompt in zip(items, prompts, strict=True)
            ]
        return self._questions[key]

    def _log(self, fingerprint: str, task: Task, options: TaskOptions) -> "ResponseLog":
        decides = {
            "task": task.name,
            "prompt": task.prompt_variant(options),
            "decoding": dict(self.evaluator.decoding),
            "max_new_tokens": options.max_new_tokens or task.max_new_tokens,
            "max_length": options.max_length,
        }
        file = self.directory / fingerprint[:16] / f"{task.name}-{digest(decides)[:8]}.jsonl"
        if self._begun is not None and file not in self._begun:
            file.unlink(missing_ok=True)
            self._begun.add(file)
        return ResponseLog(file, {"weights": fingerprint, **decides})

    def release(self) -> None:
        """Free what the evaluator holds; the next model that is asked is handed over anew."""
        self.evaluator.close()
        self._in_use = ""

    def _hand_over(self, fingerprint: str, weights: Callable[[], Weights], cost: Cost) -> None:
        self._in_use = ""
        started = time.perf_counter()
        made = weights()
        cost.apply += time.perf_counter() - started
        if processes.index():
            return
        started = time.perf_counter()
        self.evaluator.use(made)
        cost.hand_over += time.perf_counter() - started
        self._in_use = fingerprint

    def _ask(self, name: str, questions: list[Question], logs: Mapping[str, "ResponseLog"], cost: Cost) -> None:
        started = time.perf_counter()
        at_a_time = BATCHES_AT_A_TIME * self.evaluator.batch_size
        with steps(f"evaluate {name}", len(questions), "responses") as advance:
            for start in range(0, len(questions), at_a_time):
                asked = questions[start : start + at_a_time]
                tokens = self.evaluator.generate([q.prompt for q in asked], [q.budget for q in asked])
                texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
                for question, text in zip(asked, texts, strict=True):
                    logs[question.task.name].add(question, text)
                advance(len(asked))
        cost.generate += time.perf_counter() - started
        cost.responses += len(questions)


class ResponseLog:
    """The responses of one model to one task: a line that says whose they are, then one line each, as they come."""

    def __init__(self, file: Path, about: Mapping):
        self._file, self._about = file, about
        self._lines: dict[tuple[str, str], dict] = {}  # by item and by the tokens that were asked
        if not file.is_file():
            return
        text = file.read_text()
        if not text.endswith("\n"):  # a run was killed within a line
            with file.open("a") as out:
                out.write("\n")
        for found in text.split("\n"):
            try:
                line = json.loads(found)
                self._lines[line["id"], line["tokens"]] = line
            except (ValueError, KeyError):  # such a line, or the first one
                continue

    def has(self, question: Question) -> bool:
        return (question.item.id, question.digest) in self._lines

    def add(self, question: Question, response: str) -> None:
        item = question.item
        asked = {"id": item.id, "tokens": question.digest, "prompt": item.prompt, "answers": item.answers}
        self._write({**asked, "response": response})

    def verdict(self, question: Question, options: TaskOptions) -> bool:
        """Is the response to a question right? Judged once for every way of judging."""
        task, item = question.task, question.item
        line = self._lines[item.id, question.digest]
        scoring = digest([SCORER, task.scoring_variant(options), item.answers, item.choices])[:8]
        if line.get("scoring") != scoring:
            line = {**line, "scoring": scoring, "correct": task.correct(options, line["response"], item)}
            self._write(line)
        return line["correct"]

    def _write(self, line: dict) -> None:
        """A later line of a question counts. JSON in ASCII, so that a line cut short is still text."""
        self._lines[line["id"], line["tokens"]] = line
        new = not self._file.is_file()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as out:
            if new:
                out.write(json.dumps(self._about) + "\n")
            out.write(json.dumps(line) + "\n")


@contextmanager
def open_evaluation(config: EvaluationConfig, tokenizer_directory: Path, workdir: Path) -> Iterator[Evaluation]:
    """An evaluation with its evaluator, whose memory is free when the block ends."""
    from transformers import AutoTokenizer  # takes seconds, which other jobs should not cost

    evaluator = make_evaluator(config, workdir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
        yield Evaluation(evaluator, tokenizer, config.options, workdir / "responses", config.resume)
    finally:
        evaluator.close()


def make_evaluator(config: EvaluationConfig, workdir: Path) -> Evaluator:
    if config.evaluator == "vllm":
        from dppa_jax.evaluate.vllm import VllmEvaluator

        return VllmEvaluator(
            config.vllm_python or sys.executable,
            workdir,
            dtype=config.dtype,
            max_model_len=config.options.max_length,
            max_num_seqs=config.batch_size,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            timeout=config.vllm_timeout,
        )
    from dppa_jax.evaluate.local import JaxEvaluator

    return JaxEvaluator(dtype=config.dtype, batch_size=config.batch_size, max_length=config.options.max_length)
