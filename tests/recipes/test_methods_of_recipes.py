"""Merge methods of recipes that prune nothing become merges here, whose configs are written as the same recipes."""

from dataclasses import replace

import pytest
import yaml
from absl import flags
from absl.testing import flagsaver
from command import Merge

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


@pytest.mark.parametrize("values", [VALUES, {"weight": 1, "t": 0.5}], ids=["values", "defaults"])
@pytest.mark.parametrize("method", [name for name, one in MEANINGS.items() if METHODS[one.method].score is None])
def test_the_recipe_of_a_method_is_found_again(method, values, merge):
    job, source = job_of(written(merge, method, values)), open_checkpoint(merge.base)
    again = merge.root / "again.yaml"
    again.write_text(recipe_text(replace(job, from_recipe=None), source.specs, "bfloat16", needed=True))
    found = job_of(str(again))
    assert (found.merge, found.base, found.experts) == (job.merge, job.base, job.experts)
