"""The numbers that a score, a scale or a combination has to itself: one for a merge or, in recipes, one by tensor."""

import math
from collections.abc import Mapping
from typing import Any

from dppa_jax.architecture.rules import nearest
from dppa_jax.config.combinations import axis
from dppa_jax.config.numbers import coefficient_of, each_number
from dppa_jax.config.option import Option
from dppa_jax.delta.presets import PARAMETERS

GROUP = "method"  # of the options of a merge, in --help
OF_SUMS = {"lambda", "divide"}  # options of a sum, which then goes step by step
DONE = {"divide": 1.0, "rescale": 1.0}  # is a tensor's sum divided, and is its Σ|δ| kept, where a merge does so?


def parameters_of(score: str | None, scale: str, combine: str) -> dict[str, Any]:
    """Return the records of `PARAMETERS`, by name, that a score, a scale and a combination have."""
    chosen = [("score", score), ("scale", scale), ("combine", combine)]
    names = [name for of, choice in chosen if choice for name in axis(of)[choice].parameters]
    return {name: PARAMETERS[name] for name in names}


def method_option(name: str, parameter: Any) -> Option:
    """Return the option of the command line that a record of `PARAMETERS` describes."""
    return Option(
        parameter.help,
        flag=name,
        kind="float",
        group=GROUP,
        default=parameter.default,
        rare=True,
        within=(parameter.lower, parameter.upper),
    )


def resolved_options(merge: Any) -> dict[str, float]:
    """Return the options of score, scale and combination, checked, with defaults for those that are not given.

    Args:
      merge: a `MergeConfig` whose choices are made.

    Raises:
      ValueError: the method has no such option, or its value is not allowed.
    """
    has = parameters_of(merge.score, merge.scale, merge.combine)
    for name, value in merge.method_options.items():
        if name not in has:
            raise ValueError(f"--{name}={value:g}: --method={merge.method} has no such option.{nearest(name, has)}")
        method_option(name, has[name]).check(value)
    return {name: float(merge.method_options.get(name, parameter.default)) for name, parameter in has.items()}


def resolved_tensor_options(merge: Any) -> dict[str, dict]:
    """Return `MergeConfig.tensor_options`, checked, as floats.

    Args:
      merge: a `MergeConfig` whose choices are made.

    Raises:
      ValueError: the method has no such option, experts have none of their own, or a value is not allowed.
    """
    has = parameters_of(merge.score, merge.scale, merge.combine)
    known, resolved = {**has, "lambda": None, **DONE}, {}
    of_experts = parameters_of(merge.score, merge.scale, "sum")  # a sum has none
    for name, own in merge.tensor_options.items():
        flag = f"tensor_options of {name}"
        if name not in known:
            raise ValueError(
                f"tensor_options: --method={merge.method} has no option {name}; it has {', '.join(known)}."
                f"{nearest(name, known)}"
            )
        if named := [expert for expert in own if expert and name not in of_experts]:
            raise ValueError(f'{flag}: one is for all experts, "", and not for {named[0]!r}.')
        if name in axis("scale")[merge.scale].parameters and merge.allocate != "uniform":
            raise ValueError(f"{flag}: the rates of linears follow from it; leave --allocate={merge.allocate} out.")
        resolved[name] = {expert: coefficient_of(flag, expert, numbers) for expert, numbers in own.items()}
        for where, value in each_number(flag, resolved[name]):
            if name in has:
                method_option(name, has[name]).check(value)
            elif not math.isfinite(value):
                raise ValueError(f"{where}: {value} is not a finite number.")
    return resolved


def option_of(merge: Any, name: str, tensor: str = "", expert: str = "") -> float:
    """Return an option of a merge: that of the expert's tensor, of the expert, or of all, the first that is given.

    Args:
      merge: a `MergeConfig`.
      name: of `method_options`, lambda, or of `DONE`.
      tensor: "" for what holds where a tensor has none of its own.

    Raises:
      KeyError: there are numbers by tensor, and none for this one.
    """
    given = merge.tensor_options.get(name, {})
    own = given.get(expert, given.get(""))
    if isinstance(own, Mapping):
        own = own[tensor] if tensor else None
    return {**DONE, "lambda": merge.lambda_, **merge.method_options}[name] if own is None else own
