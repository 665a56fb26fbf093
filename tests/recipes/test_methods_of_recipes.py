"""Every merge method of recipes becomes a merge here, whose config is written as a recipe that means the same."""

import json
from dataclasses import replace

import pytest
import yaml
from absl import flags
from absl.testing import flagsaver
from command import Merge, launch
from safetensors.numpy import load_file

from dppa_jax.architecture.specs import layer_count
from dppa_jax.config.run import JobConfig
from dppa_jax.delta.presets import METHODS
from dppa_jax.flags import read_flags
from dppa_jax.jobs import JOBS
from dppa_jax.launch import arguments
from dppa_jax.recipes.configs import MEANINGS
from dppa_jax.recipes.methods import MERGE_METHODS, parameter
from dppa_jax.recipes.output import recipe_text
from dppa_jax.where import open_checkpoint

VALUES = {
    "weight": [0.25, 0.75, 0.5],
    "density": 0.5,
    "t": [0, 0.5, 1],
    "scale": 1.5,
    "lambda": 0.75,
    "select_topk": 0.5,
}
VALUES |= {"epsilon": 0.125, "gamma": 0.03125, "max_iter": 5, "filter_wise": True, "normalize": False, "rescale": False}
MLP, ALL = "mlp", "*"
BY_TENSOR = {  # gradients, rules, or both
    **{"weight": 1, "density": 0.5, "t": 0.5, "lambda": [0.5, 1.5], "select_topk": [0.25, 0.75, 1]},
    "epsilon": [{"filter": MLP, "value": [0.125, 0.0625]}, {"value": 0.25}],
    "gamma": [{"filter": MLP, "value": 0.03125}, {"filter": ALL, "value": [0.0625, 0.125]}],
    "max_iter": [{"filter": MLP, "value": 3}, {"value": 5}],
    "tol": [1e-5, 1e-2],
    "r": [0.25, 0.5],
    "alpha": [{"filter": "q_proj", "value": 0.5}, {"value": 0.125}],
    **{name: [{"filter": MLP, "value": False}, {"value": True}] for name in ("normalize", "rescale")},
    "normalize_weights": [{"filter": "norm", "value": True}, {"value": False}],
}
OF_LAW = {"epsilon": 0.375, "gamma": 0.015625}  # where others have rules


def written(merge: Merge, method: str, values: dict) -> str:
    """A recipe of a method with these values of the parameters that it has."""
    known = MERGE_METHODS[method]
    own = {name: value for name, value in values.items() if name in known.parameters}
    of_model = {name: value for name, value in own.items() if parameter(method, name).of_model}
    least, most = known.models
    names = {1: ["math"], 2: ["base", "math"]}.get(most, ["base", "math", "law"][: max(least, 2)])
    said = {
        "merge_method": method,
        "models": [{"model": str(merge.root / name), "parameters": of_model} for name in names],
    }
    if values is BY_TENSOR and len(names) > 2:
        said["models"][2]["parameters"] = {key: OF_LAW.get(key, value) for key, value in of_model.items()}
    if known.base in ("needed", "named"):
        said["base_model"] = str(merge.base)
    said["parameters"] = {name: value for name, value in own.items() if name not in of_model}
    file = merge.root / f"{method}.yaml"
    file.write_text(yaml.safe_dump({**said, "dtype": "float32", "out_dtype": "bfloat16"}))
    return str(file)


def job_of(file: str) -> JobConfig:
    with flagsaver.flagsaver():
        flags.FLAGS(["dppa_jax", *arguments([file, "merged"])])
        return JOBS["merge"].config(read_flags())


@pytest.mark.parametrize(
    "values", [VALUES, BY_TENSOR, {"weight": 1, "t": 0.5}], ids=["values", "by tensor", "defaults"]
)
@pytest.mark.parametrize("method", [name for name, one in MEANINGS.items() if one.method in METHODS])
def test_the_recipe_of_a_method_is_found_again(method, values, merge):
    job, source = job_of(written(merge, method, values)), open_checkpoint(merge.base)
    again = merge.root / "again.yaml"
    again.write_text(recipe_text(replace(job, from_recipe=None), source.specs, "bfloat16", needed=True))
    found = job_of(str(again))
    assert (found.merge, found.base, found.experts) == (job.merge, job.base, job.experts)


@pytest.mark.slow
def test_a_plan_times_a_merge_whose_numbers_differ_by_tensor(merge, capsys):
    file = written(merge, "della", {**BY_TENSOR, "density": [0.25, 0.75], "weight": [0.5, 1]})
    launch("--job=plan", f"--recipe={file}", f"--output={merge.output}", f"--workdir={merge.root / 'runs'}")
    printed = capsys.readouterr().out
    assert "not predicted" not in printed
    assert "the longest of compute" in " ".join(printed.split())


MODELS = {
    "math": {"weight": [0, 0.75], "density": 0.25},
    "law": {"weight": 0.5, "density": 0.625},
}
OF_ALL = {"ties": {"normalize": False}, "dare_linear": {}, "della": {"epsilon": 0.125, "rescale": False}}
FLAGS = {
    "ties": ["--method=ties", "--divide=none", "--scale=none"],
    "dare_linear": ["--method=dare"],
    "della": ["--method=della", "--della_window=0.25", "--scale=none"],
}


def of_deltas(merge: Merge, method: str, **more: object) -> str:
    """A recipe with a weight and a density of each model, one of them a gradient, without a dtype of its arithmetic."""
    models = [{"model": str(merge.root / name), "parameters": own} for name, own in MODELS.items()]
    said = {"merge_method": method, "base_model": str(merge.base), "models": models, "out_dtype": "float32"}
    file = merge.root / f"{method}.yaml"
    file.write_text(yaml.safe_dump(said | {"parameters": {"lambda": 0.75, **OF_ALL[method]}} | more))
    return str(file)


def as_flags(merge: Merge, *flags: str) -> bytes:
    """What flags merge that say the models' numbers; those of single tensors are in a file."""
    specs, numbers = open_checkpoint(merge.base).specs, merge.root / "coefficients.json"
    last = layer_count(specs) - 1
    gradient = {one.name: 0.75 * (one.layer or 0) / last for one in specs.values()}
    numbers.write_text(json.dumps({"coefficients": {"math": gradient, "law": 0.5}}))
    densities = [f"--expert_density={name}={one['density']}" for name, one in MODELS.items()]
    output = merge.root / "flags"
    given = [f"--coefficient={numbers}", *densities, "--lambda=0.75", "--output_dtype=float32", f"--output={output}"]
    merge(*given, *flags)
    return (output / "model.safetensors").read_bytes()


def as_recipe(merge: Merge, file: str, *flags: str) -> bytes:
    launch(*arguments([file, str(merge.output), *flags]))
    return (merge.output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", OF_ALL)
def test_a_recipe_has_the_bits_of_flags_with_mergekits_conventions(method, merge):
    wanted = as_flags(merge, "--compatible=mergekit", *FLAGS[method])
    assert as_recipe(merge, of_deltas(merge, method)) == wanted
    assert "Removed of each delta: math 75 %; law 37.5 %." in (merge.output / "README.md").read_text()


def test_a_recipes_dtype_is_that_of_its_arithmetic(merge):
    wanted = as_flags(merge, "--compatible=mergekit", *FLAGS["ties"], "--arithmetic=float16")
    assert as_recipe(merge, of_deltas(merge, "ties", dtype="float16")) == wanted


def test_a_recipe_without_mergekits_conventions_says_what_it_says(merge):
    file = of_deltas(merge, "ties", dtype="float16")
    assert as_recipe(merge, file, "--compatible=none") == as_flags(merge, "--method=ties", "--divide=none")


def test_a_recipe_by_tensor_without_mergekits_conventions(merge):
    values = {
        "lambda": [{"filter": "mlp", "value": 0.5}, {"value": 1.25}],
        "normalize": [{"filter": "mlp", "value": True}, {"value": False}],
    }
    as_recipe(merge, of_deltas(merge, "ties", parameters=values), "--compatible=none", "--overwrite")
    found = load_file(merge.output / "model.safetensors")
    for part, one in (("mlp", {"lambda": 0.5, "normalize": True}), ("", {"lambda": 1.25, "normalize": False})):
        as_recipe(merge, of_deltas(merge, "ties", parameters=one), "--compatible=none", "--overwrite")
        wanted = load_file(merge.output / "model.safetensors")
        for name in [name for name in found if ("mlp" in name) == bool(part)]:
            assert (found[name] == wanted[name]).all(), name


def test_a_number_outside_its_bounds_is_told_with_its_line(merge):
    file = of_deltas(merge, "della", parameters={"epsilon": [{"filter": "mlp", "value": 0.6}, {"value": 0.1}]})
    assert "epsilon is 0.6, outside [0, 0.5]" in (told := merge.refusal(of=arguments([file, str(merge.output)])))
    assert "della.yaml:" in told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"parameters": {"nuslerp_row_wise": True}}, "nuslerp.yaml:3: nuslerp_row_wise is true"),
        ({"parameters": {"nuslerp_row_wise": True, "nuslerp_flatten": False}}, "nuslerp_row_wise is true"),
    ],
)
def test_columns_are_not_merged_one_by_one(more, said, merge):
    models = [{"model": str(merge.root / name), "parameters": {"weight": 1}} for name in ("math", "law")]
    file = merge.root / "nuslerp.yaml"
    file.write_text(yaml.safe_dump({"merge_method": "nuslerp", **more, "models": models}, sort_keys=False))
    assert said in merge.refusal(of=arguments([str(file), str(merge.output)]))
