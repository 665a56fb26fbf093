"""The merge methods of mergekit's recipes, and the parameters that each of them has.

Read from mergekit 0.1.5 for their meaning. What becomes of them here says `configs.py`.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Parameter(NamedTuple):
    """A parameter of a merge method.

    Attributes:
      of_model: has each model its own? Else one is for the whole merge, though it may differ by tensor.
      flag: is it true or false, and no number?
    """

    of_model: bool = False
    flag: bool = False


PARAMETERS = {
    "weight": Parameter(of_model=True),
    "density": Parameter(of_model=True),
    "epsilon": Parameter(of_model=True),
    "gamma": Parameter(of_model=True),
    "scale": Parameter(of_model=True),
    "normalize": Parameter(flag=True),
    "rescale": Parameter(flag=True),
    "int8_mask": Parameter(flag=True),
    "lambda": Parameter(),
    "t": Parameter(),
    "nuslerp_flatten": Parameter(flag=True),
    "nuslerp_row_wise": Parameter(flag=True),
    "normalize_weights": Parameter(flag=True),
    "eps": Parameter(),
    "max_iter": Parameter(),
    "tol": Parameter(),
    "select_topk": Parameter(),
    "r": Parameter(),
    "alpha": Parameter(),
    "filter_wise": Parameter(flag=True),
}

WEIGHTED = {"weight": None, "normalize": False, "lambda": 1.0, "int8_mask": False}  # None: must be given
PRUNED = {**WEIGHTED, "density": 1.0, "rescale": False}


class MergeMethod(NamedTuple):
    """A merge method of a recipe.

    Attributes:
      parameters: their defaults by name; None where a recipe must say it.
      base: must there be a base_model that is no model like others ("needed"), may there be ("optional"), or is it one
        of the models, which must be named ("named") or is the first ("alike")?
      models: how many models it takes, the base among them; at least, and at most.
    """

    parameters: Mapping[str, float | bool | None]
    base: str = "needed"
    models: tuple[int, int] = (2, 1000)


MERGE_METHODS = {
    "linear": MergeMethod({"weight": None, "normalize": True}, "alike", (1, 1000)),
    "slerp": MergeMethod({"t": None}, "named", (2, 2)),
    "nuslerp": MergeMethod({"weight": None, "nuslerp_flatten": True, "nuslerp_row_wise": False}, "optional", (2, 3)),
    "multislerp": MergeMethod({"weight": None, "normalize_weights": True, "eps": 1e-8}, "optional"),
    "karcher": MergeMethod({"max_iter": 10.0, "tol": 1e-5}, "alike"),
    "task_arithmetic": MergeMethod(WEIGHTED),
    "ties": MergeMethod({**PRUNED, "normalize": True}),
    "dare_linear": MergeMethod({**PRUNED, "rescale": True}),
    "dare_ties": MergeMethod({**PRUNED, "rescale": True}),
    "della": MergeMethod({**PRUNED, "normalize": True, "rescale": True, "epsilon": 0.15}),
    "della_linear": MergeMethod({**PRUNED, "rescale": True, "epsilon": 0.15}),
    "breadcrumbs": MergeMethod({**PRUNED, "gamma": 0.01}),
    "breadcrumbs_ties": MergeMethod({**PRUNED, "gamma": 0.01}),
    "sce": MergeMethod({"select_topk": 1.0, "int8_mask": False}),
    "ram": MergeMethod({"epsilon": 1e-5}),
    "ramplus_tl": MergeMethod({"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "model_stock": MergeMethod({"filter_wise": False}, models=(3, 1000)),
    "nearswap": MergeMethod({"t": None}, models=(2, 2)),
    "arcee_fusion": MergeMethod({}, models=(2, 2)),
    "passthrough": MergeMethod({"scale": 1.0}, "alike", (1, 1)),
}


def parameter(method: str, name: str) -> Parameter:
    """Return what a parameter of a method is; the epsilon of RAM is one for all models."""
    known = PARAMETERS[name]
    own_density = "density" in MERGE_METHODS[method].parameters
    return known if name != "epsilon" or own_density else known._replace(of_model=False)
