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
STEPS = {"lambda": 1.0, "divide": 1.0, "rescale": 1.0}  # what may differ by tensor beside PARAMETERS


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
      ValueError: the method has no such option, or a value is not allowed.
    """
    has = parameters_of(merge.score, merge.scale, merge.combine)
    for name, own in merge.tensor_options.items():
        if name not in {**has, **STEPS}:
            raise ValueError(f"tensor_options: --method={merge.method} has no option {name}.{nearest(name, has)}")
        for where, value in each_number(name, own):
            if name in has:
                method_option(name, has[name]).check(value)
            elif not math.isfinite(value):
                raise ValueError(f"{where}: {value} is not a finite number.")
    options = merge.tensor_options.items()
    return {name: {e: coefficient_of(f"--{name}", e, own) for e, own in of.items()} for name, of in options}


def option_of(merge: Any, name: str, tensor: str = "", expert: str = "") -> float:
    """Return an option of a merge: that of the tensor where it has its own, else the one of all.

    Args:
      merge: a `MergeConfig`.
      name: of `method_options`, or lambda; or divide or rescale, which say whether a tensor's sum is divided, and
        whether its Σ|δ| is kept, where the merge does that.
      expert: whose option it is; "" for one of all experts.
    """
    own = merge.tensor_options.get(name, {}).get(expert)
    if isinstance(own, Mapping):
        own = own.get(tensor)
    return {**STEPS, "lambda": merge.lambda_, **merge.method_options}[name] if own is None else own
