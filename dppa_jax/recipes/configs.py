"""From a recipe to the configs of a merge: what flags would say, and what only a recipe can, by tensor and model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dppa_jax.config.numbers import Coefficient, each_number, rate_of_density
from dppa_jax.config.run import FromRecipe
from dppa_jax.delta.compatible import COMPATIBLE
from dppa_jax.delta.presets import METHODS, PARAMETERS
from dppa_jax.flags import BY_NAME, Values
from dppa_jax.recipes.document import RecipeError
from dppa_jax.recipes.models import BASE, Models, models_of, tensors_of
from dppa_jax.recipes.recipe import Recipe, Scalar
from dppa_jax.recipes.resolve import Resolved, resolve
from dppa_jax.recipes.table import rows_of
from dppa_jax.where import look_for_plan, runs_of, stated_architecture

SAYS = (  # flags of which a recipe says all
    *("base", "expert", "method", "rate", "coefficient", "score", "allocate", "scale", "combine", "partitions"),
    *("factors", "q", "tensor_rate", "tensor_coefficient", "tokenizer", "vocabulary", "output_dtype"),
    *("expert_rate", "lambda", "divide", "arithmetic", "compare", *PARAMETERS),
)


class Meaning(NamedTuple):
    """What a merge method of a recipe is here.

    Attributes:
      method: of --method.
      coefficient: the parameter that is the experts' coefficient; "" where they have none.
      base: has the base a coefficient, too?
      options: the parameters that are options of the method, with the flag and a factor.
      scales: by the parameter rescale, the value of --scale; {} where there is no such parameter.
      by_row: the parameter that makes every row a tensor, and its value that does.
    """

    method: str
    coefficient: str = "weight"
    base: bool = False
    options: Mapping[str, tuple[str, float]] = {}
    scales: Mapping[bool, str] = {}
    by_row: tuple[str, bool] | None = None


DIVIDED = {True: "weights", False: "none"}
RESCALED = {True: "l1", False: "none"}
RESCALED_CRUMBS = {True: "breadcrumbs_l1", False: "breadcrumbs"}
WINDOW = {"epsilon": ("della_window", 2.0)}  # which is the whole window, and epsilon half of it
GAMMA = {"gamma": ("breadcrumbs_gamma", 1.0)}
KARCHER = {"max_iter": ("karcher_iterations", 1.0), "tol": ("karcher_tolerance", 1.0)}
RAM = {"epsilon": ("ram_epsilon", 1.0)}
MEANINGS = {
    "linear": Meaning("linear", base=True, options={"normalize": ("normalize", 1.0)}),
    "slerp": Meaning("slerp", "t"),
    "nuslerp": Meaning("nuslerp", base=True, by_row=("nuslerp_flatten", False)),
    "multislerp": Meaning("multislerp", base=True, options={"normalize_weights": ("normalize", 1.0)}),
    "karcher": Meaning("karcher", "", True, KARCHER),
    "task_arithmetic": Meaning("task_arithmetic"),
    "ties": Meaning("ties", scales=RESCALED),
    "dare_linear": Meaning("dare", scales=RESCALED),
    "dare_ties": Meaning("dare_ties", scales=RESCALED),
    "della": Meaning("della", options=WINDOW, scales=RESCALED),
    "della_linear": Meaning("della_linear", options=WINDOW, scales=RESCALED),
    "breadcrumbs": Meaning("breadcrumbs", options=GAMMA, scales=RESCALED_CRUMBS),
    "breadcrumbs_ties": Meaning("breadcrumbs_ties", options=GAMMA, scales=RESCALED_CRUMBS),
    "sce": Meaning("sce", "", options={"select_topk": ("sce_topk", 1.0)}),
    "ram": Meaning("ram", "", options=RAM),
    "ramplus_tl": Meaning("ramplus_tl", "", options={**RAM, "r": ("ram_r", 1.0), "alpha": ("ram_alpha", 1.0)}),
    "model_stock": Meaning("model_stock", "", by_row=("filter_wise", True)),
    "nearswap": Meaning("nearswap", "t"),
    "arcee_fusion": Meaning("arcee_fusion", ""),
    "passthrough": Meaning("passthrough", "scale"),
}
OF_DELTAS = {  # what these mean where a recipe names a base beside the models
    "nuslerp": MEANINGS["nuslerp"]._replace(method="nuslerp_deltas", base=False),
    "multislerp": MEANINGS["multislerp"]._replace(method="multislerp_deltas", base=False),
}
UNDONE = {"nuslerp_row_wise": (True, "columns are not merged one by one here; leave it out")}  # values of parameters
CONVENTIONS = "mergekit"  # of --compatible, if nothing else is given


def meaning_of(recipe: Recipe) -> Meaning:
    """Return what the method of a recipe is here."""
    return (OF_DELTAS if recipe.base else {}).get(recipe.method) or MEANINGS[recipe.method]


@dataclass(frozen=True)
class Said:
    """What a recipe says.

    Attributes:
      values: of flags, by name.
      merge: fields of `MergeConfig` that flags cannot say.
      recipe: what the output keeps of it, and what a plan prints.
      name: under which later recipes of the file refer to its result; "" for none.
    """

    values: Values
    merge: Mapping[str, Any] = field(default_factory=dict)
    recipe: FromRecipe | None = None
    name: str = ""


def check_flags(values: Values) -> None:
    """Refuse flags that say what the recipe says.

    Raises:
      ValueError: names the flag.
    """
    for name in SAYS:
        if values[name] != BY_NAME[name].default:
            raise ValueError(
                f"--{name}: --recipe={values['recipe']} says it; leave out the flag, or change the recipe."
            )


def said_by(recipe: Recipe, values: Values, named: Mapping[str, str], like: Mapping[str, str]) -> Said:
    """Return what a recipe says; the base's config.json and headers are looked at, for its tensors and layers.

    Args:
      values: of all flags.
      named: where the results of earlier recipes of the file are, by name.
      like: of each of these places, a model with the same tensors that is there already.

    Raises:
      RecipeError: the recipe says what cannot be meant, or what this program does not do.
    """
    if meaning_of(recipe).method not in METHODS:
        raise RecipeError(f"{recipe.place}: merge_method {recipe.method} is not done here; --help names the methods.")
    found = models_of(recipe, named)
    options = values["seed"], stated_architecture(values["architecture"]), values["dequantise"]
    model = look_for_plan(_replaced(found.base, like), *options)
    places = getattr(getattr(model, "layout", None), "places", {})
    tensors, layers = tensors_of(model.specs, {name: place.stored for name, place in places.items()})
    _check_layers(recipe, layers)
    resolved = resolve(recipe, tensors, layers, found.names)
    return Said(
        values={
            "base": _plain(found.base, like, options),
            "expert": [f"{name}={_plain(where, like, options)}" for name, where in found.experts.items()],
            "method": meaning_of(recipe).method,
            **({} if found.apart else {"allow_other_base": True}),  # models alike need not be fine-tunes of another
            **_output(recipe, found),
        },
        merge=numbers_of(recipe, found, resolved, values["compatible"] or CONVENTIONS),
        recipe=FromRecipe(recipe.text, tuple(rows_of(resolved, tensors, found.names)), recipe.chat_template),
        name=recipe.name,
    )


def _replaced(where: str, like: Mapping[str, str]) -> str:
    """Put models that are there in the place of results that are yet to come."""
    for place, other in like.items():
        where = other if where == place else where.replace(f"{place}[", f"{other}[")
    return where


def _plain(where: str, like: Mapping[str, str], options: tuple) -> str:
    """Return a model in place of all its layers."""
    runs = runs_of(where)
    if len(runs) != 1:
        return where
    ((model, [(_, first, last), *more]),) = runs.items()
    if first or more:
        return where
    looked = look_for_plan(_replaced(model, like), *options)
    return model if last == tensors_of(looked.specs, {})[1] else where


def _check_layers(recipe: Recipe, layers: int) -> None:
    """Refuse slices with other layers than the model that is looked at."""
    total = sum(one.parts[0].layers[1] - one.parts[0].layers[0] for one in recipe.slices if one.parts[0].layers)
    if total and total != layers:
        raise RecipeError(f"{recipe.place}: the slices have {total} layers, and the base {layers}.")


def _output(recipe: Recipe, models: Models) -> dict[str, Any]:
    """Return the flags of the output's dtype and tokenizer."""
    said: dict[str, Any] = {"output_dtype": recipe.out_dtype or recipe.dtype}
    if recipe.tokenizer == "union":
        return said | {"vocabulary": "union"}
    if recipe.tokenizer in ("", BASE, models.base, recipe.base):
        return said
    for name, place in models.places.items():
        if any(one.parts[place].model == recipe.tokenizer for one in recipe.slices):
            return said | {"tokenizer": name}
    raise RecipeError(
        f"{recipe.place}: the tokenizer is that of {recipe.tokenizer}, which is none of the models; give base, union, "
        f"or one of them."
    )


# ---- the numbers of a merge


def numbers_of(recipe: Recipe, models: Models, resolved: Resolved, compatible: str = CONVENTIONS) -> dict[str, Any]:
    """Return the fields of `MergeConfig` for the values of the parameters.

    Args:
      compatible: of --compatible; with none the defaults of normalize and rescale are ours, and so is the arithmetic.
    """
    meaning, reader = meaning_of(recipe), _Reader(recipe, models, resolved)
    said: dict[str, Any] = {
        "coefficients": reader.of_models(meaning.coefficient, meaning.base),
        "method_options": {},
        "tensor_options": {},
    }
    for name, (flag, factor) in meaning.options.items():
        reader.check(name, PARAMETERS[flag].lower / factor, PARAMETERS[flag].upper / factor)
        own = reader.of_all(name, factor)
        key = "tensor_options" if isinstance(own, Mapping) else "method_options"
        said[key][flag] = own
    if meaning.method in COMPATIBLE[CONVENTIONS].divide:
        of_deltas, own = reader.of_deltas(meaning.scales, compatible)
        said |= {**of_deltas, "tensor_options": {**said["tensor_options"], **own}}
    if "density" in resolved.models:
        said["expert_rates"] = {name: _rate(one) for name, one in reader.of_models("density").items()}
    if meaning.by_row and reader.one(meaning.by_row[0]) == meaning.by_row[1]:
        said["compare"] = "row"
    for name, (value, reason) in UNDONE.items():
        if name in resolved.merge and reader.one(name) == value:
            raise reader.error(name, f"is {str(value).lower()}: {reason}")
    return said


def _rate(density: Coefficient) -> Coefficient:
    """Return the rate of a density, or those of each tensor."""
    if isinstance(density, Mapping):
        return {name: rate_of_density("density", value) for name, value in density.items()}
    return rate_of_density("density", density)


class _Reader:
    """Reads the values of parameters as the fields of a merge need them."""

    def __init__(self, recipe: Recipe, models: Models, resolved: Resolved):
        self.recipe, self.models, self.resolved = recipe, models, resolved

    def of_models(self, name: str, base: bool = False, factor: float = 1.0) -> dict[str, Coefficient]:
        """Return a parameter by model, a number or one for each tensor: of the experts, and of the base if it has one.

        A base that is none of the models weighs nothing, whatever others weigh by default.

        Args:
          name: of the parameter; "" where all have the default.
          base: has the base one?
          factor: what the numbers are multiplied by.
        """
        if name in self.resolved.merge:
            return {expert: _one_or_all(self.resolved.merge[name], factor) for expert in self.models.places}
        by_place, base_place = self.resolved.models.get(name, ()), self.models.place
        found = {expert: _one_or_all(by_place[place], factor) for expert, place in self.models.places.items() if name}
        if base and (name or base_place is None):
            found[BASE] = 0.0 if base_place is None else _one_or_all(by_place[base_place], factor)
        return found

    def own(self, name: str, factor: float = 1.0) -> dict[str, Coefficient]:
        """Return a parameter, times a factor, by the experts that have their own, or "" where all have one."""
        of_merge = self.resolved.merge.get(name)
        return {"": _one_or_all(of_merge, factor)} if of_merge else self.of_models(name, factor=factor)

    def of_all(self, name: str, factor: float = 1.0) -> float | dict[str, Coefficient]:
        """Return the one value of a parameter, times a factor, or those of `own`."""
        found = self.own(name, factor)
        values = list(found.values())
        return values[0] if isinstance(values[0], float) and values.count(values[0]) == len(values) else found

    def of_deltas(self, scales: Mapping[bool, str], compatible: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return how a sum of deltas is computed: each step as the recipe says, or as is the custom of a program.

        Args:
          scales: those of a `Meaning`.

        Returns:
          Fields of `MergeConfig`, and `tensor_options` for what differs by tensor.
        """
        said, own, factor = {"compatible": compatible}, {}, self.of_all("lambda")
        if isinstance(factor, Mapping):
            own["lambda"] = factor
        else:
            said["lambda_"] = factor
        is_known = lambda name: compatible in COMPATIBLE or any(_said_in(self.recipe, name))  # noqa: E731
        choices = ("normalize", "divide", "divide", DIVIDED), ("rescale", "rescale", "scale", scales)
        for name, option, flag, meant in choices:
            if not meant or not is_known(name):
                continue
            by_tensor = {tensor: float(bool(value)) for tensor, value in self.resolved.merge[name].items()}
            said[flag] = meant[any(by_tensor.values())]
            if len(set(by_tensor.values())) > 1:
                own[option] = {"": by_tensor}
        if compatible in COMPATIBLE and self.recipe.dtype:
            said["arithmetic"] = self.recipe.dtype
        return said, own

    def one(self, name: str) -> Scalar:
        """Return the one value that a parameter of the whole merge has for all tensors."""
        found = set(self.resolved.merge[name].values())
        if len(found) > 1:
            raise self.error(name, "differs by tensor, and is one for all here; give one value")
        return found.pop()

    def check(self, name: str, lower: float, upper: float) -> None:
        """Refuse a parameter that is outside its bounds for a tensor of a model."""
        for _, value in each_number(name, self.own(name)):
            if not lower <= value <= upper:
                raise self.error(name, f"is {value:g}, outside [{lower:g}, {upper:g}]")

    def error(self, name: str, message: str) -> RecipeError:
        """Return an error about a parameter, with the first line that says it."""
        return RecipeError(f"{next(_said_in(self.recipe, name), self.recipe.place)}: {name} {message}.")


def _one_or_all(values: Mapping[str, Scalar], factor: float = 1.0) -> Coefficient:
    """Return the value that all tensors have, or those of each, times a factor."""
    found = set(values.values())
    by_tensor = {name: float(value) * factor for name, value in values.items()}
    return float(found.pop()) * factor if len(found) == 1 else by_tensor


def _said_in(recipe: Recipe, name: str) -> Iterator[str]:
    """Yield the lines that say a parameter."""
    return (level[name].place for level in recipe.levels if name in level)
