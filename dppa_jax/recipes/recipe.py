"""What a recipe says, before the models are known: slices of models, and parameters as they were written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Scalar = float | bool
Rule = tuple[str, tuple[Scalar, ...]]  # a part of tensors' names, or *; the numbers that layers run through


@dataclass(frozen=True)
class Setting:
    """A parameter as it was written on one level: rules, of which the first that matches a tensor's name counts.

    Attributes:
      place: FILE:LINE.
    """

    rules: tuple[Rule, ...]
    place: str


@dataclass(frozen=True)
class Part:
    """A model of `models`, or a source of a slice.

    Attributes:
      model: where it is, as flags have it: PATH[@REVISION][+ADAPTER].
      layers: the first and the one after the last; None for all.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: Mapping[str, Setting]
    place: str


@dataclass(frozen=True)
class Slice:
    """Models that are merged layer by layer into some layers of the output; `models` are one slice with all layers."""

    parts: tuple[Part, ...]
    parameters: Mapping[str, Setting]
    place: str


@dataclass(frozen=True)
class Recipe:
    """A document of a file of recipes; "" where it says nothing.

    Attributes:
      base: where the base is, as flags have it.
      tokenizer: base, union, or where the model is whose tokenizer the merge gets.
      place: FILE:LINE.
      text: the document itself.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str
    parameters: Mapping[str, Setting]
    dtype: str
    out_dtype: str
    tokenizer: str
    chat_template: str
    name: str
    place: str
    text: str

    @property
    def parts(self) -> Iterator[Part]:
        """All models of all slices."""
        return (part for one in self.slices for part in one.parts)

    @property
    def levels(self) -> tuple[Mapping[str, Setting], ...]:
        """The parameters of every source, every slice, and the recipe."""
        return (*(part.parameters for part in self.parts), *(one.parameters for one in self.slices), self.parameters)
