"""The flags of the command line: made from the options of all configs, explained by --help, read into configs.

A flag is a field of a config (`config.option`); here are the groups of `--help`, how values are written and read, and
the command line that repeats a run. The flags are defined when this module is imported.
"""

import math
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from itertools import starmap
from operator import itemgetter
from typing import Any, NamedTuple

from absl import flags

from dppa_jax.config.benchmark import BenchmarkConfig
from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
from dppa_jax.config.finetune import AdamW, FinetuneConfig, Lora
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.method_options import method_option
from dppa_jax.config.numbers import rate_of_density
from dppa_jax.config.option import Option, options
from dppa_jax.config.q import QConfig
from dppa_jax.config.report import Sweep
from dppa_jax.config.run import PREFIX, ConvertConfig, EvaluateConfig, JobConfig, StartConfig, ValidateConfig
from dppa_jax.config.search import AdaMergingConfig, FactorSearch
from dppa_jax.delta.presets import PARAMETERS

FLAGS = flags.FLAGS
Values = Mapping[str, Any]  # of all flags, by their names

CONFIGS = (
    *(StartConfig, JobConfig, MergeConfig, EvaluationConfig, TaskOptions, FactorSearch, QConfig, AdaMergingConfig),
    *(FinetuneConfig, AdamW, Lora, Sweep, ValidateConfig, BenchmarkConfig, ConvertConfig, EvaluateConfig),
)
TITLES = (  # of the groups of --help, in their order
    *("work", "models", "method", "devices", "evaluation", "search of factors", "DAREx-q", "AdaMerging"),
    *("fine-tuning", "report, validate and benchmark"),
)
EXPLAINED = ("work", "models", "method")  # by --helpshort; the flags of other groups are named there
SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*(?:([KMGT])(I)?)?B?", re.IGNORECASE)
WIDTH, COLUMN = 120, 32  # of a line, and of the flags' names in it
LARGEST = 10**18  # of whole numbers; a larger one fits into no counter of a library
WHOLE = "a whole number of at most 18 digits"
LONGEST = 1000  # numbers of a range
INDENT = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}


# ---- how values are written and read


def read_numbers(flag: str, given: Sequence[str]) -> tuple[float, ...]:
    """Read each text as a number."""
    try:
        return tuple(float(text) for text in given)
    except ValueError as error:
        raise ValueError(f"{flag}: {str(error).rsplit(':', 1)[-1].strip()} is not a number.") from None


def read_integers(flag: str, given: Sequence[str]) -> tuple[int, ...]:
    """Read each text as a whole number.

    >>> read_integers("--seeds", ["0", "1e3"])
    (0, 1000)
    """
    numbers = read_numbers(flag, given)
    for text, number in zip(given, numbers, strict=True):
        if not number.is_integer() or abs(number) > LARGEST:
            raise ValueError(f"{flag}: {text!r} is not {WHOLE}.")
    return tuple(map(int, numbers))


def read_size(flag: str, given: str) -> int:
    """Read a number of bytes, with or without a unit.

    >>> [read_size("--max_shard_size", text) for text in ("2000000000", "5GB", "500mb", "1.5 MiB")]
    [2000000000, 5000000000, 500000000, 1572864]
    """
    found = SIZE.fullmatch(given.strip())
    if not found:
        raise ValueError(f"{flag}={given}: a number of bytes, for example 2000000000, 500MB, 5GB or 2GiB.")
    number, unit, binary = found[1], (found[2] or "").upper(), found[3]
    return int(Decimal(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def read_ranges(flag: str, given: Sequence[str]) -> tuple[float, ...]:
    """Read numbers, and ranges FIRST:LAST:STEP with both ends.

    >>> read_ranges("--rates", ["0.7:0.9:0.1", "0.95"]), read_ranges("--rates", ["0.5:1:0.2"])
    ((0.7, 0.8, 0.9, 0.95), (0.5, 0.7, 0.9))
    """
    found = []
    for text in given:
        numbers = read_numbers(flag, text.split(":"))
        if len(numbers) == 1:
            found += numbers
        elif len(numbers) == 3 and numbers[2] > 0 and numbers[0] <= numbers[1] < numbers[0] + LONGEST * numbers[2]:
            first, last, step = numbers
            found += [round(first + i * step, 10) for i in range(math.floor((last - first) / step + 1e-9) + 1)]
        else:
            raise ValueError(f"{flag}={text}: give numbers, or FIRST:LAST:STEP such as 0.1:0.9:0.1.")
    return tuple(found)


def read_gigabytes(flag: str, given: float) -> int:
    """Return bytes."""
    if not math.isfinite(bytes_ := given * 1e9):
        raise ValueError(f"{flag}={given}: give a finite number of GB.")
    return int(bytes_)


def read_path(flag: str, given: str) -> str:
    """Put the user's home directory in place of a ~ that a path, or orbax:PATH, begins with.

    A shell leaves the ~ of --flag=~/x as it is, and so does a flagfile.
    """
    prefix = PREFIX if given.startswith(PREFIX) else ""
    return prefix + os.path.expanduser(given.removeprefix(prefix))


def read_paths(flag: str, given: Sequence[str]) -> tuple[str, ...]:
    """Read each text as a path."""
    return tuple(read_path(flag, text) for text in given)


def read_experts(flag: str, given: Sequence[str]) -> dict[str, str]:
    """Read NAME=WHERE into a dict; the last place of a name counts, so that a flagfile's can be replaced.

    >>> read_experts("--expert", ["math=GAIR/Abel-7B-001", "law=AdaptLLM/law-chat", "math=/models/abel"])
    {'math': '/models/abel', 'law': 'AdaptLLM/law-chat'}
    """
    return {name: read_path(flag, where) for name, where in _by_name(flag, given).items()}


def _by_name(flag: str, given: Sequence[str]) -> dict[str, str]:
    """Return the last WHERE of each NAME as it was written."""
    experts: dict[str, str] = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not equals or not name or not where:
            raise ValueError(f"{flag}={text}: give NAME=WHERE, for example {flag}=math=GAIR/Abel-7B-001.")
        experts[name] = where
    return experts


def read_rules(flag: str, given: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Read REGEX=NUMBER into pairs.

    >>> read_rules("--tensor_rate", ["mlp.down_proj=0.5"])
    (('mlp.down_proj', 0.5),)
    """
    rules = []
    for text in given:
        pattern, equals, value = text.rpartition("=")
        if not equals:
            raise ValueError(f"{flag}={text}: give REGEX=NUMBER, for example {flag}=mlp.down_proj=0.5.")
        rules.append((pattern, *read_numbers(flag, [value])))
    return tuple(rules)


def _as_it_is(flag: str, given: Any) -> Any:
    return given


class Kind(NamedTuple):
    """How flags of one kind are defined, how a config's value is read from a flag's, and what they take, in words."""

    define: Callable[[str, Any, str], Any]
    read: Callable[[str, Any], Any] = _as_it_is
    takes: str = "values with commas between them"


KINDS = {
    "bool": Kind(flags.DEFINE_boolean, takes="true or false"),
    "integer": Kind(partial(flags.DEFINE_integer, lower_bound=-LARGEST, upper_bound=LARGEST), takes=WHOLE),
    "float": Kind(flags.DEFINE_float, takes="a number"),
    "string": Kind(flags.DEFINE_string),
    "path": Kind(flags.DEFINE_string, read_path),  # of a file or directory; also any other place of a model
    "paths": Kind(flags.DEFINE_list, read_paths),
    "gigabytes": Kind(flags.DEFINE_float, read_gigabytes, "a number"),
    "size": Kind(flags.DEFINE_string, read_size),
    "words": Kind(flags.DEFINE_list, lambda flag, given: tuple(given)),
    "numbers": Kind(flags.DEFINE_list, read_numbers),
    "integers": Kind(flags.DEFINE_list, read_integers),
    "ranges": Kind(flags.DEFINE_list, read_ranges),
    "rules": Kind(flags.DEFINE_multi_string, read_rules),
    "experts": Kind(flags.DEFINE_multi_string, read_experts),
    "named": Kind(flags.DEFINE_multi_string),  # VALUE or NAME=VALUE; read where the experts' names are known
}


# ---- the flags


def _declared() -> Iterator[Option]:
    """Yield the options of all configs, then those of single methods; a complement follows what it complements.

    The options that a class has for its own group come before those that others have for it.
    """
    all_options = [(said.group != config.HELP_GROUP, said) for config in CONFIGS for said in options(config).values()]
    for _, said in sorted(all_options, key=itemgetter(0)):
        yield said
        if said.complement:
            yield _complement(said)
    yield from starmap(method_option, PARAMETERS.items())


def _complement(said: Option) -> Option:
    """Return the flag that gives 1 − value: the density for a rate."""
    return Option(
        f"1 − {said.flag}: the share of each delta that is kept",
        said.complement,
        said.kind,
        said.group,
        None if said.kind == "float" else [],
    )


def _grouped() -> dict[str, list[Option]]:
    groups: dict[str, list[Option]] = {title: [] for title in TITLES}
    known: dict[str, Option] = {}
    for said in _declared():
        if (first := known.setdefault(said.flag, said)) is said:
            groups[said.group].append(said)
        elif (first.kind, first.default) != (said.kind, said.default):
            raise TypeError(f"--{said.flag} is declared with the defaults {first.default!r} and {said.default!r}.")
    return groups


GROUPS = _grouped()
BY_NAME = {said.flag: said for group in GROUPS.values() for said in group}
COMPLEMENTS = {said.complement: said for said in BY_NAME.values() if said.complement}
for _said in BY_NAME.values():
    KINDS[_said.kind].define(_said.flag, _said.default, _said.help)


# ---- from flags to configs


def read_flags() -> dict[str, Any]:
    """Return the value of every flag by its name, in its one form: rates for densities, each expert once.

    Raises:
      ValueError: a rate and its density are both given, or a density is outside [0, 1].
    """
    values = {name: FLAGS[name].value for name in BY_NAME if name not in COMPLEMENTS}
    for name, said in COMPLEMENTS.items():
        if FLAGS[name].present:
            if FLAGS[said.flag].present:
                raise ValueError(
                    f"--{said.flag} and --{name} are both given, and one is 1 − the other: give one of them."
                )
            values[said.flag] = _complemented(f"--{name}", said, FLAGS[name].value)
    experts = _by_name("--expert", values["expert"])
    return values | {"expert": [f"{name}={where}" for name, where in experts.items()]}


def _complemented(flag: str, said: Option, given: Any) -> Any:
    """Return the value of a rate's flag for what its density's flag was given."""
    if said.kind == "float":
        return rate_of_density(flag, given)
    if said.kind == "named":
        parts = [
            (f"{name}{equals}", *read_numbers(flag, [value]))
            for name, equals, value in (text.rpartition("=") for text in given)
        ]
        return [f"{name}{rate_of_density(flag, density)!r}" for name, density in parts]
    read = KINDS[said.kind].read(flag, given)
    if said.kind == "rules":
        return [f"{pattern}={rate_of_density(flag, density)!r}" for pattern, density in read]
    return [repr(rate_of_density(flag, density)) for density in read]


def make(config: type, values: Values, **given: Any) -> Any:
    """Make a config: fields that are not given have the values of their flags."""
    read = {}
    for name, said in options(config).items():
        if name not in given:
            value = values[said.flag]
            read[name] = None if said.optional and not value else KINDS[said.kind].read(f"--{said.flag}", value)
    return config(**read, **given)


def command(values: Values) -> str:
    """Return the command line that says the same without a flagfile: every flag that differs from its default."""
    return shlex.join(["python", "-m", "dppa_jax.launch", *written(values)])


def written(values: Values) -> Iterator[str]:
    """Yield the flags that differ from their defaults, as a flagfile has them."""
    for name, value in values.items():
        if value == BY_NAME[name].default:
            continue
        if KINDS[BY_NAME[name].kind].define is flags.DEFINE_multi_string:
            yield from (f"--{name}={one}" for one in value)
        else:
            yield f"--{name}={','.join(value) if isinstance(value, list) else value}"


# ---- what is printed


FIRST = """\
dppa_jax merges fine-tuned language models: merged = base + the sum over experts of coefficient · (expert − base),
of which a method keeps all or the most important part.

Merge your models; each is a directory or a hub id:

  dppa_jax merge --base=meta-llama/Llama-2-7b-hf --expert=math=GAIR/Abel-7B-001 --expert=law=AdaptLLM/law-chat \\
    --method=task_arithmetic --coefficient=0.5 --output=merged

See it work on small models, which are trained first; the merge is measured beside its experts:

  dppa_jax merge --base=demo:base --expert=math=demo:math --expert=law=demo:law \\
    --method=task_arithmetic --coefficient=0.6 --evaluate=addition,clause_type --output=demo-merge

dppa_jax --helpshort shows every flag on one screen, dppa_jax --help explains them. Instead of merge:
"""


def first_screen(jobs: Mapping[str, str]) -> str:
    """Return what is printed when nothing is asked for: what to type first. `jobs` are the names, with what they do."""
    return "\n".join([FIRST, *_listed(jobs)])


def usage(short: bool, jobs: Mapping[str, str]) -> str:
    """Return what --help prints; short, for one screen, flags of some groups are only named, with their defaults.

    Args:
      jobs: the names of jobs, with what they do.
    """
    lines = ["dppa_jax JOB [--flagfile=FILE] [--FLAG=VALUE ...]" + "; dppa_jax --help explains every flag" * short]
    lines += [f"  JOB: {', '.join(jobs)}"] if short else _listed(jobs)
    for title, group in GROUPS.items():
        if not short:
            lines += ["", title]
            for said in group:
                lines += _explained(said, _help(said))
        elif title in EXPLAINED:
            lines.append(title)
            shown = [said for said in group if said.flag not in COMPLEMENTS]
            for said in shown:
                if not said.rare:
                    lines += _explained(said, said.help if callable(said.choices) else _help(said), said.complement)
            if rare := [
                _written(said) + f" --{said.complement}" * bool(said.complement) for said in shown if said.rare
            ]:
                lines += textwrap.wrap(f"  rarely: {' '.join(rare)}", WIDTH, **INDENT)
        else:
            lines += textwrap.wrap(f"{title}: {' '.join(map(_written, group))}", WIDTH, **INDENT)
    return "\n".join(lines)


def _listed(jobs: Mapping[str, str]) -> list[str]:
    return [f"  {name:<{COLUMN}}{help}" for name, help in jobs.items()]


def _explained(said: Option, help: str, complement: str = "") -> list[str]:
    name = _written(said) + (f", --{complement}" if complement else "")
    name = f"  {name:<{COLUMN}}"
    return textwrap.wrap(name + help, WIDTH, subsequent_indent=" " * (COLUMN + 2), break_on_hyphens=False)


def _written(said: Option) -> str:
    """Return the flag as a command line has it, with its default; 1 for 1.0."""
    default = said.default
    if default is None or default == "" or default == []:
        return f"--{said.flag}"
    text = ",".join(default) if isinstance(default, list) else str(default).lower()
    return f"--{said.flag}={text.removesuffix('.0')}"


def _help(said: Option) -> str:
    return f"{said.help} [{', '.join(said.names)}]" if said.choices else said.help
