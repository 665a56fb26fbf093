"""The responses of models on disk, with their verdicts: JSON lines that an interrupted evaluation goes on from."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TextIO, TypedDict

from absl import logging

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.tasks import Item, Task
from dppa_jax.runtime.files import digest, open_to_append, sources_digest
from dppa_jax.runtime.reading import MAX_LINE_BYTES, MAX_LINES_BYTES, parse_json, read_bytes

# Verdicts of other code are not reused.
SCORER = sources_digest(*(f"evaluate/{name}.py" for name in ("answers", "classes", "equivalence", "limited_worker")))


class Kept(TypedDict):
    """A line with a response and, once it was judged, a verdict with a digest of the rules that gave it."""

    id: str
    tokens: str
    prompt: NotRequired[str]
    answers: NotRequired[list[str]]
    response: str
    scoring: NotRequired[str]
    correct: NotRequired[bool]


class Question(NamedTuple):
    """An item as a model is asked."""

    task: Task
    item: Item
    prompt: list[int]  # token ids
    budget: int  # tokens that the response may have
    digest: str  # of what is read
    types: Sequence[int] = ()  # of the tokens, for an encoder


class ResponseLog:
    """The file of one model's responses to one task: JSON lines, of which the first says all that decides them.

    Args:
      file: which is made with the first response.
      key: the first line.
    """

    def __init__(self, file: Path, key: Mapping):
        self._file, self._key = file, key
        self._lines: dict[tuple[str, str], Kept] = {}  # by the item's id and the digest of the prompt's tokens
        self._out: TextIO | None = None  # opened by the first line that is written
        if os.path.lexists(file):
            self._read()

    def has(self, question: Question) -> bool:
        """Return whether the response to a question is here."""
        return (question.item.id, question.digest) in self._lines

    def add(self, question: Question, response: str) -> None:
        """Keep the response to a question."""
        item = question.item
        line = {"id": item.id, "tokens": question.digest, "prompt": item.prompt, "answers": item.answers}
        self._write({**line, "response": response})

    def verdict(self, question: Question, options: TaskOptions) -> bool:
        """Return whether the response to a question is right; it is judged once for every way of judging."""
        task, item = question.task, question.item
        line = self._lines[item.id, question.digest]
        scoring = digest([SCORER, task.scoring_variant(options), item.answers, item.choices])[:8]
        if line.get("scoring") != scoring or "correct" not in line:
            line = {**line, "scoring": scoring, "correct": task.correct(options, line["response"], item)}
            self._write(line)
        return line["correct"]

    def response(self, question: Question) -> str:
        """Return the response to a question."""
        return self._lines[question.item.id, question.digest]["response"]

    def close(self) -> None:
        """Close the file; the next line that is written opens it again."""
        if self._out:
            self._out.close()
            self._out = None

    def _read(self) -> None:
        """Read the lines that are responses. A part of one at the end, which a killed run left, is cut off."""
        content = read_bytes(self._file, MAX_LINES_BYTES)
        _, *lines, last = content.split(b"\n") if b"\n" in content else (b"", content)
        bad = [number for number, line in enumerate(lines, 2) if line and not self._keep(line)]
        if bad:
            logging.warning(
                "%s: line %d is no response, and passed over; so are %d more", self._file, bad[0], len(bad) - 1
            )
        if last:
            descriptor = open_to_append(self._file)
            if self._keep(last):
                os.write(descriptor, b"\n")
            else:
                os.ftruncate(descriptor, len(content) - len(last))
            os.close(descriptor)

    def _keep(self, line: bytes) -> bool:
        """Keep the response that a line holds; return whether it holds one."""
        if len(line) > MAX_LINE_BYTES:
            return False
        try:
            kept = parse_json(line, str(self._file), Kept)
        except ValueError:
            return False
        self._lines[kept["id"], kept["tokens"]] = kept
        return True

    def _write(self, line: Kept) -> None:
        """Add a line; of several lines of a question the last one counts. They are ASCII: a line cut short is text."""
        self._lines[line["id"], line["tokens"]] = line
        if self._out is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Line by line: a response is in the file as soon as it is written.
            self._out = os.fdopen(open_to_append(self._file), "a", buffering=1, encoding="ascii")
            if not os.fstat(self._out.fileno()).st_size:
                self._out.write(json.dumps(self._key) + "\n")
        self._out.write(json.dumps(line) + "\n")
