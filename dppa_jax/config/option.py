"""TODO."""

from collections.abc import Iterable, Sequence

from dppa_jax.architecture.rules import nearest


def choose(flag: str, given: str, allowed: Iterable[str]) -> str:
    """`given` when it is allowed, else an error with the nearest spelling."""
    allowed = list(allowed)
    if given not in allowed:
        raise ValueError(f"{flag}={given}: not one of {', '.join(allowed)}.{nearest(given, allowed)}")
    return given


def per_expert(flag: str, given: Sequence[str], experts: Sequence[str], parse) -> dict:
    """`VALUE` for all experts or `NAME=VALUE` for one, repeated: a dict by expert name."""
    values = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        for expert in [choose(f"{flag} expert", name, experts)] if equals else experts:
            try:
                values[expert] = parse(value)
            except ValueError:
                raise ValueError(f"{flag}={text}: {value!r} is not a number.") from None
    return values


WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
