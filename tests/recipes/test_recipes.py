"""Merges from recipes by the command line: the same bits as flags make, what the output keeps, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from command import launch
from families import read_json
from safetensors.numpy import load_file

from dppa_jax.launch import arguments


def written(merge, said: dict, *more: dict) -> str:
    """A file of recipes whose models are those of the family."""
    places = {name: str(merge.root / name) for name in ("base", "math", "law")}
    text = "---\n".join(yaml.safe_dump(one, sort_keys=False) for one in (said, *more))
    for name, place in places.items():
        text = text.replace(f"@{name}", place)
    file = merge.root.parent / f"{merge.root.name}.yaml"
    file.write_text(text)
    return str(file)


def of(name: str, **parameters) -> dict:
    return {"model": f"@{name}", **({"parameters": parameters} if parameters else {})}


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def same(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


ARITHMETIC = {
    "models": [of("base"), of("math", weight=0.5), of("law", weight=0.25)],
    "merge_method": "task_arithmetic",
    "base_model": "@base",
    "parameters": {"lambda": 2},
    "dtype": "float32",
}


def test_a_recipe_merges_as_flags_do(merge):
    file = written(merge, ARITHMETIC)
    launch(*arguments([file, str(merge.output)]))
    flags = merge("--method=task_arithmetic", "--coefficient=math=1", "--coefficient=law=0.5", "--output_dtype=float32",
                  f"--output={merge.root / 'flags'}")  # fmt: skip
    same(merge.output, flags.parent / "flags")
    kept = (merge.output / "mergekit_config.yml").read_text()
    assert kept == Path(file).read_text()
    assert kept in (merge.output / "README.md").read_text()


def test_the_recipe_of_a_merge_by_flags_makes_the_same_merge(merge, capsys):
    flags = ["--method=task_arithmetic", "--coefficient=math=0.75", "--tensor_coefficient=layers.1.mlp=0.5"]
    merge(*flags)
    written_out = merge.output / "mergekit_config.yml"
    launch("--job=plan", *merge.flags(), *flags, "--print_recipe", f"--workdir={merge.root / 'runs'}")
    assert written_out.read_text() in capsys.readouterr().out
    file = merge.root / "again.yaml"
    file.write_text(written_out.read_text())
    launch(*arguments([str(file), str(merge.root / "again")]))
    same(merge.output, merge.root / "again")


def test_a_merge_that_no_recipe_says(merge):
    message = merge.refusal("--job=plan", "--print_recipe", f"--workdir={merge.root / 'runs'}", "--device_memory=1")
    assert "no recipe can say" in message


def test_gradients_and_filters_weigh_single_tensors(merge):
    rules = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    said = {**ARITHMETIC, "models": [of("math", weight=rules)], "parameters": {}}
    launch(*arguments([written(merge, said), str(merge.output)]))
    base, math, merged = (tensors(merge.root / name) for name in ("base", "math", "out"))
    for name, array in merged.items():
        weight = 0.5 if ".mlp." not in name else int(name.split(".")[2]) / 2
        delta = math[name].astype(np.float32) - base[name].astype(np.float32)
        np.testing.assert_allclose(array, base[name].astype(np.float32) + np.float32(weight) * delta, atol=1e-7)


def test_later_recipes_use_the_results_of_earlier_ones(merge):
    first = {"name": "first", **ARITHMETIC, "parameters": {}}
    second = {**ARITHMETIC, "models": [of("law", weight=1), {"model": "first", "parameters": {"weight": 1}}]}
    workdir = merge.root / "runs"
    launch(*arguments([written(merge, first, second), str(merge.output), f"--workdir={workdir}"]))
    base, math, law = (tensors(merge.root / name) for name in ("base", "math", "law"))
    for name, array in tensors(merge.output).items():
        b, m, one = (each[name].astype(np.float32) for each in (base, math, law))
        wanted = b + 2 * (one - b) + 2 * (0.5 * (m - b) + 0.25 * (one - b))
        np.testing.assert_allclose(array, wanted, atol=1e-5)
    assert read_json(workdir / "first" / "recipe.json")["inputs"].keys() == {"base", "math", "law"}


def test_a_plan_prints_the_value_of_every_parameter(merge, capsys):
    said = {**ARITHMETIC, "models": [of("math", weight=[0, 1]), of("law", weight=0.25)]}
    launch("--job=plan", f"--recipe={written(merge, said)}", f"--workdir={merge.root / 'runs'}", "--device_memory=1")
    printed = capsys.readouterr().out
    assert "weight of math" in printed
    assert "all of a layer" in printed


def test_the_template_that_most_models_have(merge):
    for name, template in (("base", "{{ a }}"), ("math", "{{ b }}"), ("law", "{{ b }}")):
        (merge.root / name / "chat_template.jinja").write_text(template)
    launch(*arguments([written(merge, {**ARITHMETIC, "chat_template": "auto"}), str(merge.output)]))
    assert (merge.output / "chat_template.jinja").read_text() == "{{ b }}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method=ties"], ["--method"]),
        (["--coefficient=2"], ["--coefficient"]),
        (["--divide=none"], ["--divide"]),
        (["--base=demo:base"], ["--base"]),
        (["--density=0.5"], ["--rate"]),
        (["--job=search"], ["--job=search", "takes none"]),
    ],
)
def test_flags_that_say_what_the_recipe_says(flags, said, merge):
    recipe = [f"--recipe={written(merge, ARITHMETIC)}", f"--output={merge.output}"]
    message = merge.refusal(of=[*recipe, *flags])
    assert all(word in message for word in said), message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model": None}, ["base_model is missing"]),
        ({"tokenizer_source": "@other"}, ["tokenizer", "none of the models"]),
        ({"models": [of("math", wieght=1)]}, [".yaml:4", "'weight'"]),
        ({"models": [of("nowhere", weight=1)]}, ["@nowhere", "no such directory"]),
        ({"models": [of("base")]}, ["at least 2"]),
    ],
)
def test_recipes_that_cannot_be_merged(changes, said, merge):
    message = merge.refusal(of=[f"--recipe={written(merge, {**ARITHMETIC, **changes})}", f"--output={merge.output}"])
    assert all(word in message for word in said), message


def test_a_recipe_that_is_not_there(merge):
    assert "none.yaml" in merge.refusal(of=["--recipe=none.yaml", f"--output={merge.output}"])
