"""Numbers of a merge: by expert, by tensor, from files, and as flags write them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec

from dppa_jax.config.option import choose
from dppa_jax.runtime.reading import MAX_KEPT_BYTES, read_json

COEFFICIENT_FIX = 'Give --coefficient a file that AdaMerging wrote, or {"coefficients": {"NAME": 0.7}}.'

Coefficient = float | Mapping[str, float]  # of all tensors of an expert, or of each by its name in the checkpoint


class CoefficientFile(msgspec.Struct):
    """What a merge reads of a file of coefficients."""

    coefficients: dict[str, float | dict[str, float]]
    finished: bool = True


def read_coefficients(file: str | Path, experts: Sequence[str]) -> dict[str, Coefficient]:
    """Read the coefficients that AdaMerging wrote, or any {"coefficients": {expert: number, or numbers by tensor}}.

    Raises:
      ValueError: not such a file, or an expert is missing or unknown.
    """
    content = read_json(file, CoefficientFile, MAX_KEPT_BYTES, COEFFICIENT_FIX)
    if not content.finished:
        raise ValueError(f"--coefficient={file}: AdaMerging has not finished; run it to its end.")
    return of_experts(f"--coefficient={file}", "coefficient", content.coefficients, experts, ("base",))


def of_experts(
    flag: str, what: str, found: Mapping[str, Coefficient], experts: Sequence[str], optional: Sequence[str] = ()
) -> dict:
    """Return the numbers of a file in the order of the experts; refuse unknown and missing ones."""
    for name in found:
        choose(f"{flag}: the expert", name, (*experts, *optional))
    if missing := [name for name in experts if name not in found]:
        raise ValueError(f"{flag}: no {what} of the expert {missing[0]!r}.")
    return {name: found[name] for name in (*experts, *optional) if name in found}


def rate_of_density(name: str, density: float) -> float:
    """Return 1 − density, exact in decimals.

    >>> rate_of_density("density", 0.9)
    0.1
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"{name}: density {density} is outside [0, 1]; it is the share that is kept, 1 − rate.")
    return float(1 - Decimal(repr(float(density))))


def default_partitions(rate: float) -> tuple[float, ...]:
    """Return every 0.1 from 0.9 down to the target; the target alone when it is higher.

    >>> default_partitions(0.75)
    (0.9, 0.8, 0.75)
    """
    tenths = [p / 10 for p in range(9, 0, -1) if p / 10 > rate + 1e-12]
    return (*tenths, rate)


def listed(numbers: Iterable[float]) -> str:
    """Write numbers as a flag takes them: 0.9,0.8."""
    return ",".join(f"{number:g}" for number in numbers)


def each_number(flag: str, numbers: Mapping[str, Coefficient]) -> Iterator[tuple[str, float]]:
    """Yield every number, with the flag, the expert and, where it has its own, the tensor that it is of."""
    for name, given in numbers.items():
        for tensor, value in given.items() if isinstance(given, Mapping) else [("", given)]:
            yield f"{flag} {name} {tensor}".rstrip(), value


def coefficient_of(flag: str, expert: str, given: object) -> Coefficient:
    """Return a number, or one for each tensor, as floats."""
    try:
        return {tensor: float(v) for tensor, v in given.items()} if isinstance(given, Mapping) else float(given)
    except (TypeError, ValueError):
        raise ValueError(f"{flag} of {expert!r}: {given!r} is not a number, or one for each tensor.") from None
