"""Read texts with labels, as GLUE's files have them, and make rows of tokens of them for an encoder.

A file holds one JSON object a line: {"sentence": "...", "label": 1}. The text may also be called "text" or "sentence1";
"sentence2" is the second text of a pair. A label is the number of a class, its name, or a number to predict.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from dppa_jax.checkpoint.tokenizer import encode_whole
from dppa_jax.runtime.reading import read_json_lines

FIX = 'A line has the form {"sentence": "...", "label": 1}; see dppa_jax/finetune/README.md.'
Label = str | int | float


class Line(msgspec.Struct):
    """A line of a file of texts with labels."""

    label: Label
    text: str | None = None
    sentence: str | None = None
    sentence1: str | None = None
    sentence2: str | None = None
    id: str | int | None = None
    idx: int | None = None


class Labelled(NamedTuple):
    """A text with a label.

    Attributes:
      texts: one, or the two of a pair.
      label: the number or the name of a class, or a number to predict.
      id: the line's "id" or "idx", or its number.
    """

    texts: tuple[str, ...]
    label: Label
    id: str = ""


class LabelledRows(NamedTuple):
    """Texts as rows of tokens, padded on the right to one length.

    Attributes:
      tokens: token ids.
      text: which of them are text.
      types: 1 for the second text of a pair, 0 elsewhere.
      labels: numbers of classes, or numbers to predict.
      counted: which rows the loss counts.
    """

    tokens: Int[np.ndarray, "*N T"]
    text: Bool[np.ndarray, "*N T"]
    types: Int[np.ndarray, "*N T"]
    labels: Float[np.ndarray, "*N 1"]
    counted: Bool[np.ndarray, "*N 1"]

    def take(self, at: slice | Int[np.ndarray, "n"]) -> "LabelledRows":
        """Return the rows with these indices."""
        return LabelledRows(*(array[at] for array in self))

    def only(self, which: Bool[np.ndarray, " N"]) -> "LabelledRows":
        """Return the rows, of which the others do not count."""
        return self._replace(counted=self.counted & which[:, None])

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.tokens)

    @property
    def terms(self):
        """How many labels the loss counts."""
        return self.counted.sum()

    @property
    def present(self) -> Bool[np.ndarray, "*N T"]:
        """Which tokens are no padding."""
        return self.text


def read_labelled(path: Path | str) -> list[Labelled]:
    """Read a file of texts with labels; other keys are ignored.

    Raises:
      ValueError: the file is not UTF-8, has no texts, or a line is of another form; names the file and the line.
    """
    found = []
    for number, line in read_json_lines(path, Line, fix=FIX):
        first = next((text for text in (line.sentence, line.sentence1, line.text) if text is not None), None)
        if first is None:
            raise ValueError(f"{path}:{number}: it has no text, neither sentence, sentence1 nor text. {FIX}")
        own = next((str(name) for name in (line.id, line.idx) if name is not None), str(number))
        found.append(Labelled((first,) if line.sentence2 is None else (first, line.sentence2), line.label, own))
        if len(found[-1].texts) != len(found[0].texts):
            raise ValueError(f"{path}:{number}: give a sentence2 to all lines or to none.")
    if not found:
        raise ValueError(f"{path}: no texts with labels.")
    return found


def class_names(labels: Sequence[Label], known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the names of the classes of labels, by their numbers; one name where a number is predicted.

    Args:
      labels: of all texts.
      known: the names that a model has already; empty for a model without a head.

    >>> class_names(["no", "yes", "no"]), class_names([0, 2]), class_names([0.5, 3])
    (('no', 'yes'), ('LABEL_0', 'LABEL_1', 'LABEL_2'), ('LABEL_0',))

    Raises:
      ValueError: names and numbers are mixed, or the model does not know a class.
    """
    if len({isinstance(label, str) for label in labels}) > 1:
        raise ValueError("some labels are names and some are numbers; give all as one or the other.")
    if any(isinstance(label, float) for label in labels):
        if len(known) > 1:
            raise ValueError(f"labels are numbers to predict, and the base has the classes {', '.join(known)}.")
        return known or ("LABEL_0",)
    if isinstance(labels[0], str):
        names = known or tuple(sorted(set(labels)))
        unknown = [label for label in labels if label not in names]
    else:
        names = known or tuple(f"LABEL_{i}" for i in range(max(2, max(labels) + 1)))
        unknown = [label for label in labels if not 0 <= label < len(names)]
    if unknown:
        raise ValueError(f"the label {unknown[0]!r} is no class of the base, which has {', '.join(names)}.")
    return names


def encode_labelled(examples: Iterable[Labelled], names: tuple[str, ...], tokenizer, max_length: int) -> LabelledRows:
    """Make one row for each text, with the tokens that the tokenizer puts around it; longer texts are cut."""
    examples = list(examples)
    encoded = encode_whole(tokenizer, [example.texts for example in examples], max_length)
    tokens, types = (np.zeros((len(examples), max_length), np.int32) for _ in "tt")
    tokens[:] = tokenizer.pad_token_id or 0
    text = np.zeros(tokens.shape, bool)
    for row, (ids, kinds) in enumerate(encoded):
        tokens[row, : len(ids)], types[row, : len(ids)], text[row, : len(ids)] = ids, kinds, True
    if cut := int(text.all(axis=1).sum()):
        logging.warning("%d of %d texts fill a row of %d tokens, and may be cut", cut, len(examples), max_length)
    labels = [names.index(one.label) if isinstance(one.label, str) else one.label for one in examples]
    column = np.array(labels, np.float32)[:, None]
    return LabelledRows(tokens, text, types, column, np.ones(column.shape, bool))
