"""Where a task's questions come from: JSON lines in a directory, or a data set of the Hugging Face hub."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging


class Item(NamedTuple):
    """A question of a task.

    Attributes:
      id: differs between the items of a task.
      prompt: the text the model is asked with.
      answers: any of which is right.
      choices: what the answer is one of; empty where it is free.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """The questions of one task.

    Attributes:
      path: of the data set on the hub.
      convert: a row of it, and the row's number, as an item with the bare question for a prompt.
      name: of the data set's configuration.
      file: of the data set, where it is read without one.
      revision: of the data set; None for the newest.
      template: of a question's text and its target; empty where the question is the text alone.
      labels: the choices of rows in JSON lines that name none; empty where answers are free.
      no_label: rows with no other answer are left out.
    """

    path: str
    convert: Callable[[Mapping[str, Any], int], Item]
    name: str | None = None
    file: str | None = None
    revision: str | None = None
    template: str = ""
    labels: tuple[str, ...] = ()
    no_label: str = ""

    @property
    def cue(self) -> str:
        """The last line of the prompt, after which the answer comes."""
        return self.template.rpartition("\n")[2]


def read(task: str, source: Source, data_dir: str) -> dict[str, tuple[Item, ...]]:
    """All items of a task, "test" and, where there is a file of them, "validation"; in the order of the source.

    Nothing is remembered: another call reads again.

    Args:
      task: its name, which is the files' name: {task}.jsonl or {task}_test.jsonl, and {task}_validation.jsonl.
      data_dir: where the JSON lines are; empty for the hub.

    Raises:
      ValueError: a line that is no item, named with its file; the same id or question twice where it may not be.
      OSError: no such file, or no way to the hub.
    """
    if not data_dir:
        return {"test": _checked(f"{source.path} on the hub", _from_hub(task, source), source)}
    names = [f"{task}.jsonl", f"{task}_test.jsonl"]
    path = next((Path(data_dir) / name for name in names if (Path(data_dir) / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"--data_dir={data_dir}: it has neither {' nor '.join(names)}, for the task {task!r}.")
    items = {"test": _checked(str(path), read_json_lines(path, source), source)}
    validation = Path(data_dir) / f"{task}_validation.jsonl"
    if validation.is_file():
        items["validation"] = _checked(str(validation), read_json_lines(validation, source), source)
        tested = {item.prompt: item.id for item in items["test"]}
        for item in items["validation"]:
            if item.prompt in tested:
                raise ValueError(
                    f"{validation}: {item.id!r} asks what {tested[item.prompt]!r} of {path.name} asks; what is chosen "
                    "by must not be in what is reported."
                )
    return items


def set_aside(items: Sequence[Item], share: float, seed: object) -> dict[str, tuple[Item, ...]]:
    """Splits items into "test" and a `share` of "validation", by their questions.

    Which items these are depends on the seed and on the set of questions, not on their order; items that ask the same
    are on the same side. The order is kept.

    >>> items = [Item(str(i), f"{i}?", ("yes",)) for i in range(8)]
    >>> [item.id for item in set_aside(items, 0.25, seed=1)["validation"]]
    ['0', '6']
    """
    key = lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest()  # noqa: E731
    shuffled = sorted({item.prompt for item in items}, key=key)
    chosen = set(shuffled[: max(1, round(share * len(shuffled)))])
    return {
        "test": tuple(item for item in items if item.prompt not in chosen),
        "validation": tuple(item for item in items if item.prompt in chosen),
    }


def read_json_lines(path: Path, source: Source) -> list[Item]:
    """Items of a file with one JSON object a line: id, question, answer, and choices, text, target where they apply.

    `answer` is text, or a list of texts of which any is right. Where there are choices, the text may also name several
    of them, joined by ", ". With `text` (and `target`), `question` must be what the task's template makes of them, with
    or without the template's last line. Other keys are ignored.
    """
    items = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold other ends of line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_from_json(json.loads(line), source))
            except ValueError as error:
                reason = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}:{number}: {reason}") from None
    return items


def _from_json(row: Any, source: Source) -> Item:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is wanted, not {type(row).__name__}.")
    for key in ("id", "question", "answer"):
        if key not in row:
            raise ValueError(f'no "{key}"; each line needs "id", "question" and "answer".')
    for key in ("id", "question", "text", "target"):
        if not isinstance(row.get(key, ""), str) or row.get(key) == "":
            raise ValueError(f'"{key}" must be text, not {row[key]!r}.')
    choices = _texts("choices", row.get("choices", list(source.labels)))
    answers = row["answer"]
    if isinstance(answers, str):
        answers = answers.split(", ") if choices and answers not in choices else [answers]
    answers = _texts("answer", answers)
    if not answers:
        raise ValueError('"answer" is empty.')
    unknown = [answer for answer in answers if choices and answer not in choices]
    if unknown:
        raise ValueError(f"the answer {unknown[0]!r} is not one of the choices: {', '.join(choices)}.")
    question = with_cue(row["question"], source)
    if source.template and "text" in row:
        wanted = source.template.format(text=row["text"], target=row.get("target", ""))
        if question != wanted:
            raise ValueError(f'"question" is not what the template makes of "text": {wanted!r} is wanted.')
    return Item(row["id"], question, answers, choices)


def with_cue(question: str, source: Source) -> str:
    """The question with the template's last line, which some files leave out."""
    if not source.cue or question.rstrip().endswith(source.cue):
        return question.rstrip() if source.cue else question
    return f"{question}\n{source.cue}"


def _texts(key: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise ValueError(f'"{key}" must be text or a list of texts, not {values!r}.')
    return tuple(values)


def _checked(where: str, items: Iterable[Item], source: Source) -> tuple[Item, ...]:
    """The items that are asked, after checks of what they have in common."""
    items = list(items)
    seen = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{where}: the id {item.id!r} is given twice; ids must differ.")
        seen.add(item.id)
    asked = [item for item in items if set(item.answers) - {source.no_label}]
    if not asked:
        raise ValueError(f"{where}: no questions.")
    if len(asked) < len(items):
        logging.info("%s: %d of %d rows have a label and are asked", where, len(asked), len(items))
    return tuple(asked)


def _from_hub(task: str, source: Source) -> list[Item]:
    files = {"data_files": {"test": source.file}} if source.file else {}
    try:
        import datasets

        rows = datasets.load_dataset(source.path, source.name, split="test", revision=source.revision, **files)
    except Exception as error:  # datasets raises its own kinds, and those of three libraries below it
        raise OSError(
            f"the task {task!r}: {source.path} cannot be loaded from the hub ({type(error).__name__}: {error}). "
            f"Without a network, put {task}.jsonl into a directory and give --data_dir=DIRECTORY."
        ) from error
    try:
        items = [source.convert(row, number) for number, row in enumerate(rows)]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{source.path} on the hub has other fields than expected: {error!r}.") from error
    items = [item._replace(prompt=with_cue(item.prompt, source)) for item in items]
    odd = [item for item in items if not _follows(source, item.prompt)]
    if odd:
        logging.warning(
            "%s: %d of %d prompts differ from the template; %s is %r", source.path, len(odd), len(items), *odd[0][:2]
        )
    return items


def _follows(source: Source, prompt: str) -> bool:
    """The prompt is the template of some text, once: no worked examples before it."""
    if not source.template:
        return True
    fixed = re.split(r"\{\w+\}", source.template)
    return bool(re.fullmatch(".*".join(map(re.escape, fixed)), prompt, re.DOTALL)) and prompt.count(source.cue) == 1
