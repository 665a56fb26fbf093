"""Score models on tasks. Responses are kept on disk, so an evaluator is asked only for those that are missing."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.checkpoint.tokenizer import load_tokenizer
from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
from dppa_jax.evaluate.reader import Reader, Readers
from dppa_jax.evaluate.responses import Question, ResponseLog
from dppa_jax.evaluate.scores import Score, Scores
from dppa_jax.evaluate.tasks import Split, Task
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest
from dppa_jax.runtime.progress import steps

Weights = Path | Model  # a directory, or a model in memory
BATCHES_AT_A_TIME = 2  # between two writes of responses; more would lose more, fewer would leave vLLM's batch empty


@runtime_checkable
class Evaluator(Protocol):
    """What generates responses greedily, from one model at a time.

    Attributes:
      decoding: what decides the responses, beside the weights and the prompts.
      batch_size: how many prompts are decoded together.
    """

    decoding: Mapping[str, str | int | float]
    batch_size: int

    def use(self, weights: Weights) -> None:
        """Answer with these weights from now on."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[list[int]]:
        """Return the answers to prompts of token ids, each with at most so many new tokens.

        An answer has the token that ended it, if one did. A prompt that leaves no room for an answer gets none.
        """

    def close(self) -> None:
        """Free the weights and what else the evaluator holds."""


@dataclass
class Cost:
    """The seconds spent on one model, and the number of responses it gave."""

    apply: float = 0.0  # to make the weights
    hand_over: float = 0.0  # to give them to the evaluator
    generate: float = 0.0  # to generate the responses
    responses: int = 0


class Evaluation:
    """Asks models, judges their responses, and remembers both.

    Responses are kept as JSON lines, in a file for each model and task. Their key is the fingerprint of the weights and
    all else that decides a response: prompt, decoding, number of tokens, vocabulary. So nothing is asked twice, and an
    interrupted evaluation goes on where it was. Verdicts are kept beside the responses, with the rules by which they
    were made.

    Of several processes, process 0 asks and tells the others; all must call `scores` in the same order.

    Args:
      evaluator: generates the responses.
      tokenizer: of the models that have none of their own.
      options: how items are read, asked and judged.
      directory: of the responses.
      resume: use the responses of earlier runs; otherwise remove them.
      shared: ask all models with `tokenizer`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        tokenizer: Any,
        options: TaskOptions,
        directory: Path,
        resume: bool = True,
        shared: bool = False,
    ):
        self.evaluator, self.options, self.directory = evaluator, options, directory
        self.readers = Readers(tokenizer, shared)
        self._begun: set[Path] | None = None if resume else set()  # the files that this run has begun anew
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
        reader: Reader | None = None,
    ) -> Scores:
        """Return the scores of a model, by task.

        Args:
          name: of the model, for the log.
          fingerprint: of its weights, config.json and generation_config.json.
          weights: makes or finds the weights. All processes call it when a response is missing and the evaluator has
            other weights.
          tasks: to answer.
          split: "test" for results that are reported, "validation" for results by which something is chosen.
          options: how items are asked and judged; None takes the options of this evaluation.
          reader: the model's, of `readers`; None takes the tokenizer of this evaluation.
        """
        options, reader = options or self.options, reader or self.readers.default
        cost = self.costs.setdefault(fingerprint, Cost())
        questions = {task.name: self.questions(task, split, options, reader) for task in tasks}
        logs: dict[str, ResponseLog] = {}
        missing: list[Question] = []
        if processes.index() == 0:
            logs = {task.name: self._log(fingerprint, task, options, reader) for task in tasks}
            missing = [q for task in tasks for q in questions[task.name] if not logs[task.name].has(q)]
        for question in missing:
            if not question.prompt:  # the prompt is longer than the model may read
                logs[question.task.name].add(question, "")
        missing = [question for question in missing if question.prompt]
        if processes.of_first("weights needed", lambda: bool(missing) and self._in_use != fingerprint):
            self._hand_over(fingerprint, weights, cost)
        if missing:
            self._ask(name, missing, reader, logs, cost)

        def judged() -> Scores:
            return {task.name: _score(task, logs[task.name], questions[task.name], options) for task in tasks}

        scores = processes.of_first("scores", judged, Scores)
        for log in logs.values():
            log.close()
        return scores

    def questions(
        self,
        task: Task,
        split: Split = "test",
        options: TaskOptions | None = None,
        reader: Reader | None = None,
    ) -> list[Question]:
        """Return a task's items as a model is asked; they are read and encoded once for each tokenizer."""
        options, tokenizer = options or self.options, (reader or self.readers.default).tokenizer
        key = task.name, split, options, id(tokenizer)  # the readers hold it, so that no other gets its id
        if key not in self._questions:
            items = task.items(options, split)
            if task.kind.classifies:
                read = task.encode_texts(options, items, tokenizer)
                self._questions[key] = [
                    Question(task, item, tokens, 1, digest([tokens, types])[:16], types)
                    for item, (tokens, types) in zip(items, read, strict=True)
                ]
                return self._questions[key]
            prompts = task.encode(options, items, tokenizer)
            self._questions[key] = [
                Question(task, item, prompt, task.budget(options, prompt), digest(prompt)[:16])
                for item, prompt in zip(items, prompts, strict=True)
            ]
        return self._questions[key]

    def _log(self, fingerprint: str, task: Task, options: TaskOptions, reader: Reader) -> ResponseLog:
        """Open the responses of a model to a task; the file's name says all that decides them."""
        key = {
            "task": task.name,
            "prompt": task.prompt_variant(options),
            "decoding": dict(self.evaluator.decoding),
            "max_new_tokens": options.max_new_tokens or task.max_new_tokens,
            "max_length": options.max_length,
            "vocabulary": reader.vocabulary,
        }
        file = self.directory / fingerprint[:16] / f"{task.name}-{digest(key)[:8]}.jsonl"
        if self._begun is not None and file not in self._begun:
            file.unlink(missing_ok=True)
            self._begun.add(file)
        return ResponseLog(file, {"weights": fingerprint, **key})

    def release(self) -> None:
        """Free what the evaluator holds; the next model must be handed over again."""
        self.evaluator.close()
        self._in_use = ""

    def _hand_over(self, fingerprint: str, weights: Callable[[], Weights], cost: Cost) -> None:
        """Make the weights in all processes, and give them to the evaluator in process 0."""
        self._in_use = ""
        started = time.perf_counter()
        model = weights()
        cost.apply += time.perf_counter() - started
        if processes.index():
            return
        started = time.perf_counter()
        self.evaluator.use(model)
        cost.hand_over += time.perf_counter() - started
        self._in_use = fingerprint

    def _ask(
        self, name: str, questions: list[Question], reader: Reader, logs: Mapping[str, ResponseLog], cost: Cost
    ) -> None:
        """Ask the model in use, and write its responses as they come."""
        started = time.perf_counter()
        at_a_time = BATCHES_AT_A_TIME * self.evaluator.batch_size
        with steps(f"evaluate {name}", len(questions), "responses") as advance:
            for start in range(0, len(questions), at_a_time):
                batch = questions[start : start + at_a_time]
                prompts = [q.prompt for q in batch]
                if batch[0].task.kind.classifies:  # and so do all: a model either classifies or generates
                    texts = self.evaluator.classify(prompts, [q.types for q in batch])
                else:
                    tokens = self.evaluator.generate(prompts, [q.budget for q in batch])
                    texts = reader.tokenizer.batch_decode(tokens, skip_special_tokens=True)
                for question, text in zip(batch, texts, strict=True):
                    logs[question.task.name].add(question, text)
                advance(len(batch))
        cost.generate += time.perf_counter() - started
        cost.responses += len(questions)


def _score(task: Task, log: ResponseLog, questions: Sequence[Question], options: TaskOptions) -> Score:
    """Judge a model's responses to all items of a task."""
    verdicts = [log.verdict(question, options) for question in questions]
    return task.score(verdicts, [log.response(question) for question in questions], [q.item for q in questions])


@contextmanager
def open_evaluation(
    config: EvaluationConfig, tokenizer_directory: Path, workdir: Path, shared: bool = False
) -> Iterator[Evaluation]:
    """Yield an evaluation with its evaluator; the evaluator's memory is freed when the block ends.

    Args:
      config: says which evaluator, and how items are asked and judged.
      tokenizer_directory: has the tokenizer of models that have none of their own; with `shared`, of all.
      workdir: gets the responses, in a folder of their own, and the log of vLLM.
    """
    evaluator = make_evaluator(config, workdir)
    try:
        tokenizer = load_tokenizer(tokenizer_directory)
        yield Evaluation(evaluator, tokenizer, config.options, workdir / "responses", config.resume, shared)
    finally:
        evaluator.close()


def make_evaluator(config: EvaluationConfig, workdir: Path) -> Evaluator:
    """Make the evaluator that the config names; vLLM's starts with the first weights."""
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
