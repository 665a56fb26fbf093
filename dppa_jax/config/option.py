"""Options: fields of config dataclasses that say their default, help, choices and bounds once.

Flags, `--help`, the checks of values and the command line that repeats a run are made from these fields (`flags`).
A new flag is one line:

    rate: float = option(0.9, "share of each delta that is removed", within=(0, 1))
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from dppa_jax.architecture.rules import nearest

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
REQUIRED = MISSING  # in place of a default: the config cannot be made without this field
EMPTY = {"bool": False, "integer": 0, "float": 0.0, "gigabytes": 0.0, "string": "", "path": ""}  # [] for other kinds


@dataclass(frozen=True)
class Option:
    """What a field says about itself to the command line.

    Attributes:
      help: a phrase for `--help`, without default and choices, which are added to it.
      flag: the flag's name; by default the class's FLAG_PREFIX, if it has one, and the field's name.
      kind: how a value is written and read, a key of `flags.KINDS`; by default from the field's type.
      group: the title in `--help`; by default the class's HELP_GROUP.
      default: the value of the flag when it is not given; by default the field's.
      choices: the words that are allowed, or a function that returns them, for tables whose modules import JAX.
      within: both bounds, which are allowed themselves.
      least, above, below: a lower bound that is allowed, a lower and an upper one that are not.
      infinite: whether a bounded number may be infinite.
      message: the error for a value outside the bounds, with {flag} and {value}.
      complement: the name of a second flag, which gives 1 − value.
      rare: whether --helpshort only names it.
      optional: whether the field is None where the flag is 0 or empty; found out from the field's type.
    """

    help: str
    flag: str = ""
    kind: str = ""
    group: str = ""
    default: Any = None
    choices: Iterable[str] | Callable[[], Iterable[str]] = ()
    within: tuple[float, float] | None = None
    least: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False
    message: str = ""
    complement: str = ""
    rare: bool = False
    optional: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The words that are allowed; empty where any is."""
        return tuple(self.choices() if callable(self.choices) else self.choices)

    def check(self, value: Any) -> None:
        """Raise ValueError, with flag, value and what is allowed, for a value that is not."""
        if self.choices:
            choose(f"--{self.flag}", str(value), self.names)
        elif isinstance(value, int | float) and not self._holds(value):
            shown = f"{value / 1e9:g}" if self.kind == "gigabytes" else value
            message = self.message or "--{flag}={value}: " + self._bounds()
            raise ValueError(message.format(flag=self.flag, value=shown))

    def _holds(self, value: float) -> bool:
        low, high = self.within or (self.least, None)
        if all(bound is None for bound in (low, high, self.above, self.below)):
            return True
        return (
            (self.infinite or math.isfinite(value))
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _bounds(self) -> str:
        if self.within:
            return f"outside [{self.within[0]:g}, {self.within[1]:g}]."
        low = f"{self.least:g} or more" if self.above is None else f"above {self.above:g}"
        return f"it must be {low}{'' if self.below is None else f', and less than {self.below:g}'}."


def option(default: Any, help: str, **said: Any) -> Any:
    """Return a dataclass field that is an option of the command line.

    Args:
      default: the default of the field; REQUIRED for a field without one.
      help, **said: fields of `Option`; `flag_default` is the default of the flag where it differs, a value in whose
        place the job chooses one.

    >>> @dataclass(frozen=True)
    ... class Prune:
    ...     rate: float = option(0.9, "share of each delta that is removed", within=(0, 1))
    ...     def __post_init__(self):
    ...         check(self)
    >>> Prune().rate
    0.9
    >>> Prune(1.5)
    Traceback (most recent call last):
    ValueError: --rate=1.5: outside [0, 1].
    """
    return _field(default, Option(help, default=said.pop("flag_default", None), **said))


def same(config: type, name: str, default: Any = ...) -> Any:
    """Return a field like that of another config: flag, help, checks and, unless one is given, default are the same."""
    (given,) = (one for one in fields(config) if one.name == name)
    said = options(config)[name]
    if default is not ...:
        return _field(default, replace(said, default=None))
    return _field(given.default if given.default_factory is MISSING else given.default_factory(), said)


@cache
def options(config: type) -> dict[str, Option]:
    """Return the options of a config by the names of its fields, with flag, kind, group and default filled in."""
    prefix, group = getattr(config, "FLAG_PREFIX", ""), getattr(config, "HELP_GROUP", "")
    found = {}
    for one in fields(config):
        if "option" in one.metadata:
            said = one.metadata["option"]
            kind, optional = _kind(one.type)
            said = replace(
                said,
                flag=said.flag or prefix + one.name,
                kind=said.kind or kind,
                group=said.group or group,
                optional=optional,
            )
            found[one.name] = replace(said, default=_flag_default(one.default, said))
    return found


def check(config: Any) -> None:
    """Raise ValueError for the first field of a config whose value is not among its choices or within its bounds."""
    for name, said in options(type(config)).items():
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and one != "":
                said.check(one)


def choose(flag: str, given: str, allowed: Iterable[str]) -> str:
    """Return `given` when it is allowed, else raise ValueError with the nearest spelling."""
    allowed = list(allowed)
    if given not in allowed:
        raise ValueError(f"{flag}={given}: not one of {', '.join(allowed)}.{nearest(given, allowed)}")
    return given


def per_expert(flag: str, given: Sequence[str], experts: Sequence[str], parse: Callable[[str], Any]) -> dict:
    """Return a dict by expert from `VALUE`, which is for all experts, and `NAME=VALUE`, for one; later ones win."""
    values = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        for expert in [choose(f"{flag} expert", name, experts)] if equals else experts:
            try:
                values[expert] = parse(value)
            except ValueError:
                raise ValueError(f"{flag}={text}: {value!r} is not a number.") from None
    return values


def _field(default: Any, said: Option) -> Any:
    metadata = {"option": said}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(metadata=metadata) if default is REQUIRED else field(default=default, metadata=metadata)


def _kind(annotation: Any) -> tuple[str, bool]:
    """Return the kind of a field's type, and whether the field may be None."""
    optional = get_origin(annotation) is UnionType and NoneType in get_args(annotation)
    if optional:
        annotation = next(one for one in get_args(annotation) if one is not NoneType)
    if get_origin(annotation) is tuple:
        return {str: "words", int: "integers", float: "numbers"}.get(get_args(annotation)[0], ""), optional
    if get_origin(annotation) is Literal:
        return "string", optional
    return {bool: "bool", int: "integer", float: "float", str: "string"}.get(annotation, ""), optional


def _flag_default(default: Any, said: Option) -> Any:
    """Return what a flag is when it is not given: text for lists, 0 or empty in place of None."""
    if said.default is not None:
        return said.default
    if default is None or default is MISSING:
        return EMPTY.get(said.kind, [])
    if said.kind == "size":
        return str(default)
    return [str(one) for one in default] if isinstance(default, tuple) else default
