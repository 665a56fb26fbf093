"""Recipes whose parameters are gradients and rules by tensor, merged by `dppa_jax FILE OUTPUT` and by mergekit 0.1.5.

In float32 throughout. Which of two elements that tie at a threshold is kept depends on the sort of the machine there.
"""

from pathlib import Path

import numpy as np
import pytest
import yaml
from command import launch
from families import write_model
from mergekit_python import mergekit_merges
from safetensors.numpy import load_file
from support import make_family

from dppa_jax.launch import arguments

pytestmark = pytest.mark.slow
EXPERTS = ("math", "law", "code")
TIED = 3  # elements of a tensor that may differ, where elements are ranked
UNITS = 40  # of float32, of the largest of the models' elements: mergekit's norms and products are float32
ADDED = 4  # where none is taken: PyTorch fuses the additions of linear


def mlp(inside: object, elsewhere: object) -> list:
    return [{"filter": "mlp", "value": inside}, {"value": elsewhere}]


SUM = {"lambda": [0.5, 1.25], "normalize": mlp(True, False)}
CUT = {"density": mlp([0.25, 0.75], 0.5), "weight": [0.25, 1.0]}
GAMMAS = {"math": mlp(0.0625, [0.03125, 0.125]), "law": 0.25, "code": [0.125, 0.0]}
CRUMBS = {name: {**CUT, "gamma": gamma} for name, gamma in GAMMAS.items()}  # by model
RAMS = {"epsilon": [0.002, 0.006], "r": mlp([0.25, 0.75], 0.5), "alpha": mlp(0.5, [0.125, 0.25])}
MERGES = {  # parameters of the recipe and of each model; models; elements and units that may differ
    "task_arithmetic": (SUM, {"weight": mlp([0.5, 1.0], 0.25)}, EXPERTS, 0, 0),
    "ties": (SUM, CUT, EXPERTS, TIED, 0),
    "breadcrumbs": (SUM, CRUMBS, EXPERTS, TIED, 0),
    "breadcrumbs_ties": (SUM, CRUMBS, EXPERTS, TIED, 0),
    "linear": ({"normalize": mlp(True, False)}, {"weight": [0.5, 0.25]}, ("base", *EXPERTS), 0, ADDED),
    "multislerp": ({"normalize_weights": mlp(True, False)}, {"weight": [0.5, 0.25]}, ("base", *EXPERTS), 0, UNITS),
    "karcher": ({"tol": mlp(1e-9, 1e-2)}, {}, ("base", *EXPERTS), 0, UNITS),
    "sce": ({"select_topk": mlp([0.25, 0.75], 0.5)}, {}, EXPERTS, TIED, UNITS),
    "ram": ({"epsilon": mlp([0.002, 0.006], 0.004)}, {}, EXPERTS, 0, 0),
    "ramplus_tl": (RAMS, {}, EXPERTS, 0, ADDED),
    "slerp": ({"t": mlp([0, 0.5, 1], 0.25)}, {}, ("base", "math"), 0, UNITS),
    "passthrough": ({}, {"scale": mlp([0.5, 2], 1.5)}, ("math",), 0, 0),
}
RANDOM = {
    "dare_linear": ({"rescale": mlp(True, False), "lambda": [0.5, 1.25]}, {"density": mlp([0.25, 0.75], 0.5)}),
    "della_linear": ({"rescale": mlp(False, True)}, {"density": 0.5, "epsilon": mlp([0.4, 0.1], 0.3)}),
}
FACTORS = (0.5, 0.875, 1.25)  # lambda of each layer
BASELESS = ("linear", "multislerp", "karcher", "passthrough")


def layer_of(name: str) -> int:
    return int(name.split(".")[2]) if ".layers." in name else 0


def recipe(root: Path, method: str, of_all: dict, of_model: dict, models: tuple[str, ...]) -> dict:
    given = [{} if method == "slerp" else of_model.get(name, of_model) for name in models]
    entries = [{"model": str(root / name), "parameters": own} for name, own in zip(models, given, strict=True)]
    base = {} if method in BASELESS else {"base_model": str(root / "base")}
    said = {"merge_method": method, **base, "models": entries, "parameters": of_all, "dtype": "float32"}
    return yaml.safe_load(yaml.safe_dump(said))  # without the anchors of what stands there twice


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("family")
    base, experts = make_family(EXPERTS, "float32", num_hidden_layers=3)
    for name, model in {"base": base, **experts}.items():
        write_model(root / name, base.config, model.tensors, tokenizer=False)
    return root


@pytest.fixture(scope="module")
def recipes(models) -> dict[str, dict]:
    found = {method: recipe(models, method, *given[:3]) for method, given in MERGES.items()}
    of_one = {method: (of_all, {**own, "weight": 1.0}) for method, (of_all, own) in RANDOM.items()}
    return found | {method: recipe(models, method, *given, ("math",)) for method, given in of_one.items()}


@pytest.fixture(scope="module")
def theirs(recipes, tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    return mergekit_merges(recipes, tmp_path_factory.mktemp("mergekit"))


@pytest.fixture
def ours(recipes, tmp_path):
    def merged(method: str) -> dict[str, np.ndarray]:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipes[method]))
        launch(*arguments([str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]))
        return load_file(tmp_path / "out" / "model.safetensors")

    return merged


@pytest.mark.parametrize("method", MERGES)
def test_parameters_by_tensor_mean_what_they_mean_to_mergekit(method, models, ours, theirs):
    _, _, names, elements, units = MERGES[method]
    inputs = [load_file(models / name / "model.safetensors") for name in {"base", *names}]
    for name, found in ours(method).items():
        wanted = theirs[method][name]
        unit = np.spacing(np.max(np.abs([*(tensors[name] for tensors in inputs), wanted]), axis=0))
        assert (np.abs(found - wanted) > units * unit).sum() <= elements, name


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_keep_as_much_by_tensor(method, models, ours, theirs):
    base, expert = (load_file(models / name / "model.safetensors") for name in ("base", "math"))
    more = []
    for name, found in ours(method).items():
        delta, wanted = expert[name] - base[name], theirs[method][name]
        changes = [(one - base[name]).astype(np.float64) for one in (found, wanted)]
        masks = [np.abs(change) > 0 for change in changes]
        assert abs(masks[0].mean() - masks[1].mean()) < 5 * np.sqrt(2 * 0.25 / delta.size), name
        rescaled = ("mlp" in name) == (method == "dare_linear")
        for change, mask in zip(changes, masks, strict=True):
            norm = np.abs(delta).sum() / np.abs(delta[mask]).sum() if rescaled else 1.0
            wanted = norm * (FACTORS[layer_of(name)] if method == "dare_linear" else 1.0)
            assert np.median(change[mask] / delta[mask]) == pytest.approx(wanted, rel=1e-3), name
        if "della" in method and "mlp" in name:
            large = np.abs(delta) > np.median(np.abs(delta), axis=1, keepdims=True)
            more.append([layer_of(name), *(mask[large].mean() - mask[~large].mean() for mask in masks)])
    for layer, wanted in zip(range(3), (0.4, 0.25, 0.1), strict=True) if more else ():  # the half of each window
        for share in np.mean([row[1:] for row in more if row[0] == layer], axis=0):
            assert share == pytest.approx(wanted, abs=0.05)
