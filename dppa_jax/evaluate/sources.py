"""Read the items of a task: from JSON lines in a directory, or from a data set of the Hugging Face hub."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from absl import logging

from dppa_jax.finetune.labelled import Labelled, read_labelled
from dppa_jax.runtime import reading

Text = Annotated[str, msgspec.Meta(min_length=1)]


class Item(NamedTuple):
    """A question of a task.

    Attributes:
      id: a name that no other item of the task has.
      prompt: the text that the model is asked with.
      answers: texts, each of which is right.
      choices: texts, one of which is the answer; empty where the answer is free.
      texts: what an encoder reads, one or two; the prompt is these, one below the other.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


class Row(msgspec.Struct):
    """A line of a file of items; `read_json_lines` says what the keys mean."""

    id: Text
    question: Text
    answer: Text | Annotated[list[Text], msgspec.Meta(min_length=1)]
    choices: list[Text] | None = None
    text: Text | None = None
    target: Text = ""


@dataclass(frozen=True)
class Dataset:
    """Where the items of one task are, and how a row becomes an item.

    Attributes:
      path: the data set's name on the hub.
      convert: makes an item of a row and its number; the item's prompt is the bare question.
      name: the configuration of the data set, if it has several.
      file: the file of the data set to read, if it has no configurations.
      revision: of the data set; None takes the newest.
      template: makes a prompt of `{text}` and `{target}`; empty where the prompt is the text alone.
      labels: the choices of rows in JSON lines that name none; empty where answers are free.
      no_label: the answer of rows without a label; rows that have only this answer are left out.
      split: of the data set on the hub, which is scored.
      labelled: are lines texts with labels (`finetune.labelled`) in place of questions with answers?
    """

    path: str
    convert: Callable[[Mapping[str, Any], int], Item]
    name: str | None = None
    file: str | None = None
    revision: str | None = None
    template: str = ""
    labels: tuple[str, ...] = ()
    no_label: str = ""
    split: str = "test"
    labelled: bool = False

    @property
    def cue(self) -> str:
        """The last line of the prompt, after which the answer comes."""
        return self.template.rpartition("\n")[2]


def read(task: str, dataset: Dataset, data_dir: str) -> dict[str, tuple[Item, ...]]:
    """Read all items of a task, in their order; every call reads anew.

    Args:
      task: its name, and that of the files: {task}.jsonl or {task}_test.jsonl, and {task}_validation.jsonl.
      dataset: how rows become items, and where they are on the hub.
      data_dir: the directory of the JSON lines; empty for the hub.

    Returns:
      The items of the split "test" and, where there is a file of them, of "validation".

    Raises:
      ValueError: a line is no item, an id is there twice, or a question is in both splits; names the file.
      OSError: there is no such file, or the hub cannot be reached.
    """
    if not data_dir:
        if not dataset.path:
            raise ValueError(f"the task {task!r} is not on the hub: give --data_dir, the directory of its file.")
        return {"test": _checked(f"{dataset.path} on the hub", _from_hub(task, dataset), dataset)}
    task = task.rpartition(":")[2]
    names = [f"{task}.jsonl", f"{task}_test.jsonl"]
    path = next((Path(data_dir) / name for name in names if (Path(data_dir) / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"--data_dir={data_dir} has neither {' nor '.join(names)}, for the task {task!r}; put one of them "
            f"there, or leave --data_dir out to read from the hub."
        )
    items = {"test": _checked(str(path), read_json_lines(path, dataset), dataset)}
    validation = Path(data_dir) / f"{task}_validation.jsonl"
    if validation.is_file():
        items["validation"] = _checked(str(validation), read_json_lines(validation, dataset), dataset)
        tested = {item.prompt: item.id for item in items["test"]}
        for item in items["validation"]:
            if item.prompt in tested:
                raise ValueError(
                    f"{validation}: {item.id!r} asks what {tested[item.prompt]!r} of {path.name} asks; take it out of "
                    f"one of the files: results are reported on questions by which nothing was chosen."
                )
    return items


def set_aside(items: Sequence[Item], share: float, seed: object) -> dict[str, tuple[Item, ...]]:
    """Split items into "validation", a `share` of the questions, and "test", the others. The order is kept.

    Which items are chosen depends on the seed and on the set of questions, not on their order. Items that ask the same
    question are in the same split.

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


def read_json_lines(path: Path, dataset: Dataset) -> list[Item]:
    """Read the items of a file that has one JSON object in each line.

    The keys are `id`, `question` and `answer`, and where they apply `choices`, `text` and `target`; others are ignored.
    Texts with labels have other keys: see `finetune.labelled.read_labelled`.
    `answer` is a text, or a list of texts each of which is right. Where there are choices, the text may also name
    several of them, joined by ", ". Where there is `text` (and `target`), `question` must be what the task's template
    makes of them, with or without the template's last line.

    Raises:
      ValueError: a line is no such object; names the file and the line.
    """
    if dataset.labelled:
        return [labelled_item(line) for line in read_labelled(path)]
    items = []
    for number, row in reading.read_json_lines(path, Row, fix='Each line needs "id", "question" and "answer".'):
        try:
            items.append(_from_row(row, dataset))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return items


def labelled_item(line: Labelled) -> Item:
    """Make an item of a text with a label; its answer is the name or the number of the class."""
    return Item(line.id, "\n".join(line.texts), (str(line.label),), texts=line.texts)


def _from_row(row: Row, dataset: Dataset) -> Item:
    """Make an item of a line."""
    choices = dataset.labels if row.choices is None else tuple(row.choices)
    answers = row.answer
    if isinstance(answers, str):
        answers = answers.split(", ") if choices and answers not in choices else [answers]
    unknown = [answer for answer in answers if choices and answer not in choices]
    if unknown:
        raise ValueError(f"the answer {unknown[0]!r} is not one of the choices: {', '.join(choices)}.")
    question = with_cue(row.question, dataset)
    if dataset.template and row.text is not None:
        expected = dataset.template.format(text=row.text, target=row.target)
        if question != expected:
            raise ValueError(f'"question" is not what the template makes of "text": it should be {expected[:300]!r}.')
    return Item(row.id, question, tuple(answers), choices)


def with_cue(question: str, dataset: Dataset) -> str:
    """Return the question with the template's last line, which some files leave out."""
    if not dataset.cue or question.rstrip().endswith(dataset.cue):
        return question.rstrip() if dataset.cue else question
    return f"{question}\n{dataset.cue}"


def _checked(where: str, items: Iterable[Item], dataset: Dataset) -> tuple[Item, ...]:
    """Return the items that are asked: those with a label. Refuse items that share an id, or none at all."""
    items = list(items)
    seen = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{where}: the id {item.id!r} is there twice; give each item an id of its own.")
        seen.add(item.id)
    asked = [item for item in items if set(item.answers) - {dataset.no_label}]
    if not asked:
        raise ValueError(f"{where}: no questions that have an answer.")
    if len(asked) < len(items):
        logging.info("%s: %d of %d rows have a label and are asked", where, len(asked), len(items))
    return tuple(asked)


def _from_hub(task: str, dataset: Dataset) -> list[Item]:
    """Read the items of a data set on the hub."""
    files = {"data_files": {dataset.split: dataset.file}} if dataset.file else {}
    try:
        import datasets

        where = {"split": dataset.split, "revision": dataset.revision, **files}
        rows = datasets.load_dataset(dataset.path, dataset.name, **where)
    except Exception as error:  # `datasets` raises errors of its own and of three libraries that it uses
        raise OSError(
            f"the task {task!r}: {dataset.path} cannot be loaded from the hub ({type(error).__name__}: {error}). "
            f"Without a network, put {task}.jsonl into a directory and give --data_dir=DIRECTORY."
        ) from error
    try:
        items = [dataset.convert(row, number) for number, row in enumerate(rows)]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{dataset.path} on the hub has other fields than expected: {error!r}. Put {task}.jsonl into a directory "
            f"and give --data_dir=DIRECTORY."
        ) from error
    items = [item._replace(prompt=with_cue(item.prompt, dataset)) for item in items]
    unlike = [item for item in items if not _follows(dataset, item.prompt)]
    if unlike:
        logging.warning(
            "%s: %d of %d prompts differ from the template; %s is %r",
            *(dataset.path, len(unlike), len(items), *unlike[0][:2]),
        )
    return items


def _follows(dataset: Dataset, prompt: str) -> bool:
    """Return whether a prompt is the template filled once, without worked examples before it."""
    if not dataset.template:
        return True
    first, *middle, last = re.split(r"\{\w+\}", dataset.template)
    rest = prompt.removeprefix(first).removesuffix(last)
    if len(rest) != len(prompt) - len(first) - len(last) or prompt.count(dataset.cue) != 1:
        return False
    for part in middle:
        _, found, rest = rest.partition(part)
        if not found:
            return False
    return True
