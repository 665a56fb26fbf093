"""The grammar of recipes: which keys stand where, and what is said of one that stands nowhere or in a wrong place.

mergekit leaves out what it does not know in silence, so that a recipe with a misspelt or misplaced key makes another
model than its author meant. Here each such key is an error, with file, line, and the place or the key that was meant.
"""

import math
from collections.abc import Iterable, Mapping

from dppa_jax.architecture.rules import nearest
from dppa_jax.config.option import WEIGHT_DTYPES
from dppa_jax.recipes.document import RecipeError, Value
from dppa_jax.recipes.methods import MERGE_METHODS, PARAMETERS, parameter
from dppa_jax.recipes.recipe import Part, Recipe, Setting, Slice

RECIPE, MODEL, SLICE, SOURCE = "the recipe", "a model of models", "a slice", "a source of a slice"
TOKENIZER, REFERENCE, PATH, RULE = "tokenizer", "model", "model", "a rule of a parameter"
KEYS = {  # by level
    RECIPE: (
        *("models", "slices", "merge_method", "base_model", "parameters", "dtype", "out_dtype"),
        *("tokenizer_source", "tokenizer", "chat_template", "name"),
    ),
    MODEL: ("model", "parameters"),
    SLICE: ("sources", "base_model", "parameters"),
    SOURCE: ("model", "layer_range", "parameters"),
}
REFUSED = {  # keys of mergekit's that mean something there
    "modules": "models of several modules are not merged; give models or slices.",
    "tokens": "single tokens are not chosen; leave it out.",
    "pad_to_multiple_of": "rows are not padded; leave it out.",
    "override_architecture": "give --architecture, which says which tensors are linears.",
    "residual_weight": "mergekit reads it and never uses it; leave it out.",
}
WHOLE = {"models": RECIPE, "slices": RECIPE, "sources": SLICE, "layer_range": SOURCE}
FEW = 12  # keys that a message lists


def recipe_of(value: Value, text: str = "") -> Recipe:
    """Make a recipe of a document.

    Args:
      text: of the document, which the output keeps.

    Raises:
      RecipeError: a key or a value is unknown, misplaced or missing; names file, line and fix.
    """
    said = value.mapping("a recipe")
    _check_keys(said, RECIPE)
    method = _method(value, said)
    if len(given := [key for key in ("models", "slices") if key in said]) != 1:
        raise value.error(f"a recipe has models or slices, and this has {'both' if given else 'none of them'}.")
    if "models" in said:
        parts = tuple(_part(item, MODEL, method) for item in said["models"].items("models"))
        slices = (Slice(parts, {}, said["models"].place),)
    else:
        slices = tuple(_slice(item, method, said) for item in said["slices"].items("slices"))
    return Recipe(
        method=method,
        slices=slices,
        base=_optional(said, "base_model", _reference),
        parameters=_parameters(said, method, RECIPE),
        dtype=_optional(said, "dtype", _dtype),
        out_dtype=_optional(said, "out_dtype", _dtype),
        tokenizer=_tokenizer(said),
        chat_template=_optional(said, "chat_template", _chat_template),
        name=_optional(said, "name", lambda one: one.text("name")),
        place=value.place,
        text=text,
    )


def _optional(said: Mapping[str, Value], key: str, read):
    """Return what is read of a key's value; "" where nothing is said."""
    return read(said[key]) if key in said and said[key].data is not None else ""


def _method(value: Value, said: Mapping[str, Value]) -> str:
    if "merge_method" not in said:
        raise value.error(f"merge_method is missing; give one of {', '.join(MERGE_METHODS)}.")
    method = said["merge_method"].text("merge_method")
    return _chosen(said["merge_method"], "merge_method", method, MERGE_METHODS)


def _slice(value: Value, method: str, recipe: Mapping[str, Value]) -> Slice:
    said = value.mapping("a slice")
    _check_keys(said, SLICE)
    if "sources" not in said:
        raise value.error("the slice has no sources; give a list of model and layer_range.")
    parts = tuple(_part(item, SOURCE, method) for item in said["sources"].items("sources"))
    for part in parts:
        if part.layers is None:
            raise RecipeError(f"{part.place}: the source has no layer_range; give [FIRST, END], END not among them.")
        if (lengths := [one.layers[1] - one.layers[0] for one in (part, parts[0])])[0] != lengths[1]:
            raise RecipeError(
                f"{part.place}: the source has {lengths[0]} layers, and the first one of its slice {lengths[1]}; the "
                f"sources of a slice are merged layer by layer, so give all as many."
            )
    if "base_model" in said:
        base = _reference(said["base_model"])
        if "base_model" not in recipe or base != _reference(recipe["base_model"]):
            raise said["base_model"].error("one base_model is for all slices; give it at the top of the recipe.")
    return Slice(parts, _parameters(said, method, SLICE), value.place)


def _part(value: Value, level: str, method: str) -> Part:
    """Read a model of a list, or a source of a slice."""
    said = value.mapping(level)
    _check_keys(said, level)
    if "model" not in said:
        raise value.error(f"{level} has no key model; give model: a directory or a hub id.")
    layers = _layers(said["layer_range"]) if "layer_range" in said else None
    return Part(_reference(said["model"]), layers, _parameters(said, method, level), value.place)


def _layers(value: Value) -> tuple[int, int]:
    numbers = [one.data for one in value.items("layer_range")]
    if len(numbers) != 2 or not all(type(one) is int for one in numbers) or not 0 <= numbers[0] < numbers[1] <= 10_000:
        raise value.error("layer_range is not [FIRST, END], two whole numbers of which the first is less.")
    return numbers[0], numbers[1]


# ---- models


def _reference(value: Value) -> str:
    """Return a reference to a model as flags have it: PATH[@REVISION][+ADAPTER]."""
    if not isinstance(value.data, dict):
        return value.text("the model").strip()
    said = value.mapping("the model")
    _check_among(said, ("model", "lora"), REFERENCE)
    if "model" not in said:
        raise value.error("the model has no key model; give model: {path: PATH, revision: REVISION}.")
    adapter = f"+{_path(said['lora'])}" if "lora" in said and said["lora"].data is not None else ""
    return _path(said["model"]) + adapter


def _path(value: Value) -> str:
    if not isinstance(value.data, dict):
        return value.text("the model").strip()
    said = value.mapping("the model")
    _check_among(said, ("path", "revision"), PATH)
    if "path" not in said:
        raise value.error("the model has no path; give path: a directory or a hub id.")
    revision = _optional(said, "revision", lambda one: "@" + one.text("revision"))
    return said["path"].text("path").strip() + revision


# ---- parameters


def _parameters(said: Mapping[str, Value], method: str, level: str) -> dict[str, Setting]:
    """Read the parameters that stand on a level."""
    if "parameters" not in said:
        return {}
    found = {}
    for name, value in said["parameters"].mapping("parameters").items():
        _check_parameter(name, value, method, level)
        if value.data is not None:
            found[name] = _setting(name, value, parameter(method, name).flag)
    return found


def _check_parameter(name: str, value: Value, method: str, level: str) -> None:
    """Refuse a parameter that the method has not, or has not on this level."""
    known = MERGE_METHODS[method].parameters
    if name in known:
        if level in (MODEL, SOURCE) and not parameter(method, name).of_model:
            raise value.error(
                f"{name!r} is one for all models of {method}, and stands with one model, where mergekit leaves it out; "
                f"put it under parameters of the recipe{' or the slice' if level == SOURCE else ''}."
            )
        return
    if name in PARAMETERS:
        having = ", ".join(own for own, one in MERGE_METHODS.items() if name in one.parameters)
        raise value.error(f"{method} has no parameter {name!r} ({having} have it); {_listed(method)}.")
    if name in KEYS[RECIPE] or name in WHOLE:
        raise value.error(f"{name!r} is no parameter: {_belongs(name)}.")
    raise value.error(f"{method} has no parameter {name!r}.{nearest(name, known)} {_listed(method).capitalize()}.")


def _listed(method: str) -> str:
    return f"it has {', '.join(MERGE_METHODS[method].parameters) or 'none'}"


def _setting(name: str, value: Value, flag: bool) -> Setting:
    """Read a parameter: a number, a gradient, or rules by the names of tensors."""
    items = value.data if isinstance(value.data, list) else [value]
    if any(isinstance(item.data, dict) for item in items):
        rules = tuple(_rule(name, item, flag) for item in items)
    else:
        rules = (("*", _gradient(name, value, flag)),)
    return Setting(rules, value.place)


def _rule(name: str, value: Value, flag: bool) -> tuple[str, tuple]:
    if not isinstance(value.data, dict):
        raise value.error(f"{name} mixes numbers and rules; the last rule may have no filter: - value: {value.data}.")
    said = value.mapping("a rule")
    _check_among(said, ("filter", "value"), RULE)
    if "value" not in said:
        raise value.error(f"a rule of {name} has no value.")
    pattern = _optional(said, "filter", lambda one: one.text("filter"))
    return pattern or "*", _gradient(name, said["value"], flag)


def _gradient(name: str, value: Value, flag: bool) -> tuple:
    """Return the numbers that layers run through; one where all have the same."""
    items = value.items(name) if isinstance(value.data, list) else [value]
    return tuple(_truth(name, item) if flag else _number(name, item) for item in items)


def _truth(name: str, value: Value) -> bool:
    if value.data in (True, False):
        return bool(value.data)
    raise value.error(f"{name} is {value.shown}; give true or false.")


def _number(name: str, value: Value) -> float:
    """Return a number; also one such as 1e-5, which is a text to YAML 1.1."""
    data = value.data
    if isinstance(data, str | int | float) and not isinstance(data, bool):
        try:
            number = float(data)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise value.error(f"{name} is {value.shown}; give a number, a list of numbers, or rules: - filter: … value: ….")


# ---- what is said once


def _dtype(value: Value) -> str:
    return _chosen(value, "the dtype", value.text("the dtype"), WEIGHT_DTYPES)


def _chosen(value: Value, what: str, given: str, allowed: Iterable[str]) -> str:
    if given not in allowed:
        raise value.error(f"{what} is {given[:99]!r}, not one of {', '.join(allowed)}.{nearest(given, allowed)}")
    return given


def _tokenizer(said: Mapping[str, Value]) -> str:
    """Return base, union, or the model whose tokenizer the merge gets; "" where nothing is said."""
    if "tokenizer" not in said:
        return _optional(said, "tokenizer_source", _reference)
    if "tokenizer_source" in said:
        raise said["tokenizer"].error("tokenizer and tokenizer_source are both given; leave one out.")
    inner = said["tokenizer"].mapping("tokenizer")
    _check_among(inner, ("source",), TOKENIZER)
    return _optional(inner, "source", _reference)


def _chat_template(value: Value) -> str:
    text = value.text("chat_template")
    if text != "auto" and "{" not in text:
        raise value.error(f"chat_template is {text[:99]!r}; give auto, or the template itself, in Jinja.")
    return text


# ---- keys


def _check_keys(said: Mapping[str, Value], level: str) -> None:
    _check_among(said, KEYS[level], level)


def _check_among(said: Mapping[str, Value], allowed: Iterable[str], level: str) -> None:
    """Refuse a key that the level has not; say where it belongs, or which key is near it."""
    for key, value in said.items():
        if key in allowed:
            continue
        if key in REFUSED:
            raise value.error(f"{key}: {REFUSED[key]}")
        if key in PARAMETERS:
            raise value.error(f"{key!r} is a parameter; put it under parameters: of {level}.")
        where = f": {_belongs(key)}" if key in KEYS[RECIPE] or key in WHOLE else f".{nearest(key, allowed)}"
        raise value.error(f"{level} has no key {key[:99]!r}{where or '.'} It has {', '.join(allowed)}.")


def _belongs(key: str) -> str:
    """Say where a known key belongs."""
    level = WHOLE.get(key, RECIPE)
    return "it belongs at the top of the recipe" if level == RECIPE else f"it belongs to {level}"
