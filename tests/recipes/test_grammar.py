"""What a recipe may not say, and files that are no recipes: a message with file, line and fix, never a traceback."""

from pathlib import Path

import pytest
from hostile import damaged, read_or_message
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.recipes.document import MOST_BYTES, RecipeError
from dppa_jax.recipes.file import read_recipes

GOOD = """merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1}
"""
SLICES = """merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
parameters: {t: 0.5}
"""


def refusal(text: str, tmp_path: Path) -> str:
    file = tmp_path / "merge.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        read_recipes(str(file))
    return str(error.value).replace(str(file), "FILE")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("base_model", "base_modle", ["FILE:2", "'base_modle'", "'base_model'"]),
        (
            "    parameters: {weight: 1}",
            "    density: 0.5",
            ["FILE:5", "'density' is a parameter", "parameters: of a model"],
        ),
        ("base_model: base", "base_model: base\nnormalize: true", ["FILE:3", "parameters: of the recipe"]),
        ("{weight: 1}", "{weight: 1, dtype: float16}", ["FILE:5", "'dtype'", "top of the recipe"]),
        ("{weight: 1}", "{weight: 1, normalize: true}", ["FILE:5", "'normalize'", "one for all models of ties"]),
        ("{weight: 1}", "{weight: 1, t: 0.5}", ["FILE:5", "ties has no parameter 't'", "slerp"]),
        ("{weight: 1}", "{wieght: 1}", ["FILE:5", "'weight'", "density"]),
        ("{weight: 1}", "{weight: much}", ["FILE:5", "weight is 'much'", "number"]),
        ("{weight: 1}", "{weight: .nan}", ["FILE:5", "weight is nan"]),
        ("{weight: 1}", "{weight: true}", ["FILE:5", "weight is True"]),
        ("{weight: 1}", "{weight: []}", ["FILE:5", "weight is empty"]),
        ("{weight: 1}", "{weight: [{filter: mlp}]}", ["FILE:5", "no value"]),
        ("{weight: 1}", "{weight: [0.5, {filter: mlp, value: 1}]}", ["FILE:5", "mixes numbers and rules"]),
        ("{weight: 1}", "{weight: {fliter: mlp, value: 1}}", ["FILE:5", "'filter'"]),
        ("- model: a", "- model: a\n    layer_range: [0, 2]", ["FILE:5", "'layer_range'", "a source of a slice"]),
        ("- model: a", "- modle: a", ["FILE:4", "'model'"]),
        ("ties", "tise", ["FILE:1", "'tise'", "'ties'"]),
        ("merge_method: ties\n", "", ["FILE:1", "merge_method is missing"]),
        ("base_model: base", "dtype: bfloat", ["FILE:2", "'bfloat16'"]),
        ("base_model: base", "base_model: base\nmodules: {}", ["FILE:3", "modules"]),
        ("base_model: base", "base_model: base\nslices: []", ["FILE:1", "models or slices", "both"]),
        ("base_model: base", "tokenizer: {tokens: {}}", ["FILE:2", "tokens"]),
        ("base_model: base", "tokenizer: {source: a}\ntokenizer_source: a", ["FILE:2", "both given"]),
        ("base_model: base", "chat_template: chatml", ["FILE:2", "chatml", "Jinja"]),
        ("base_model: base", "base_model: base\nbase_model: b", ["FILE:3", "stands twice", "FILE:2"]),
        ("base_model: base", "base_model: !!python/object:os.system x", ["FILE:2", "tag"]),
        ("base_model: base", "base_model: *base", ["FILE:2", "alias"]),
        ("model: a", "model: {path: a}", ["FILE:4", "'path'"]),
        ("model: a", "model: {model: {path: a, version: 2}}", ["FILE:4", "'version'", "'revision'"]),
    ],
)
def test_keys_and_values_that_mean_nothing(old, new, said, tmp_path):
    message = refusal(GOOD.replace(old, new, 1), tmp_path)
    assert all(word in message for word in said), message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{model: b, layer_range: [0, 2]}", "{model: b, layer_range: [0, 3]}", ["FILE:6", "3 layers", "2"]),
        ("{model: b, layer_range: [0, 2]}", "{model: b, layer_range: [2, 0]}", ["FILE:6", "[FIRST, END]"]),
        ("{model: b, layer_range: [0, 2]}", "{model: b}", ["FILE:6", "layer_range"]),
        (
            "{model: b, layer_range: [0, 2]}",
            "{model: b, layer_range: [0, 2], parameters: {t: 1}}",
            ["FILE:6", "'t'", "slice"],
        ),
        ("  - sources:", "  - base_model: b\n    sources:", ["FILE:4", "one base_model"]),
        ("  - sources:", "  - residual_weight: 1\n    sources:", ["FILE:4", "never uses it"]),
        ("  - sources:", "  - models:", ["FILE:4", "'models'", "top of the recipe"]),
    ],
)
def test_slices_that_mean_nothing(old, new, said, tmp_path):
    message = refusal(SLICES.replace(old, new, 1), tmp_path)
    assert all(word in message for word in said), message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["is empty"]),
        ("- 1", ["FILE:1", "a list"]),
        ("a: [", ["FILE:1", "no YAML"]),
        ("[" * 5000, ["nested too deep"]),
        ("&a [*a]", ["alias of itself"]),
        ("a: &a [1,2]\n" + "b: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n" + "c: [" + "*b," * 3000 + "]", ["values"]),
        ("#" * (MOST_BYTES + 1), ["bytes"]),
        (f"{GOOD}---\n{GOOD}", ["FILE:1", "name:"]),
        (f"name: x\n{GOOD}---\nname: x\n{GOOD}", ["given twice", "FILE:1"]),
        (f"name: ../x\n{GOOD}---\n{GOOD}", ["FILE:1", "directory in --workdir"]),
        (f"name: x\n{GOOD.replace('model: a', 'model: y')}---\nname: y\n{GOOD}", ["FILE:1", "uses y", "before"]),
    ],
)
def test_files_that_are_no_recipes(text, said, tmp_path):
    message = refusal(text, tmp_path)
    assert message.startswith("FILE")
    assert all(word in message for word in said), message


@settings(deadline=None)
@given(damaged((Path(__file__).parent / "forty.yaml").read_bytes()) | damaged(SLICES.encode()) | st.binary(max_size=40))
def test_damaged_recipes_are_read_or_refused_with_a_message(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("damaged", numbered=True) / "merge.yaml"
    file.write_bytes(content)
    read_or_message(lambda: read_recipes(str(file)), file)
