"""Forty recipes resolve to the table that is kept; gradients, rules and levels are those of the formula."""

import json

import pytest
from families import llama_config
from forty import FORTY, KEPT, LAYERS, TENSORS, recipe, resolved, shown

from dppa_jax.checkpoint import tensor_specs
from dppa_jax.recipes.document import RecipeError
from dppa_jax.recipes.models import tensors_of
from dppa_jax.recipes.resolve import resolve

SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"


def test_there_are_forty_of_their_own():
    assert len({one.name for one in FORTY}) == 40


def test_forty_recipes_resolve_to_what_is_kept():
    """`python tests/forty.py` writes the file anew; read the difference."""
    kept = json.loads(KEPT.read_text())
    for one in FORTY:
        assert shown(one) == kept[one.name], one.name
    assert kept.keys() == {one.name for one in FORTY}


def weight(text: str, tensor: str) -> float:
    one = recipe(f"merge_method: linear\n{text}")
    return resolve(one, TENSORS, LAYERS, "a").models["weight"][0][tensor]


@pytest.mark.parametrize(("layer", "value"), [(0, 0.0), (1, 2 / 7), (3, 6 / 7), (5, 1 - 3 / 7), (7, 0.0)])
def test_a_gradient_is_linear_between_its_numbers(layer, value):
    found = weight("models: [{model: a, parameters: {weight: [0, 1, 0]}}]", f"model.layers.{layer}.mlp.up_proj.weight")
    assert found == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_tensors_outside_the_layers_have_the_first_number(tensor):
    assert weight("models: [{model: a, parameters: {weight: [0.25, 1]}}]", tensor) == 0.25


def test_a_slice_of_one_layer_has_the_last_number():
    text = "slices:\n- sources: [{model: a, layer_range: [0, 1], parameters: {weight: [0.25, 1]}}]\n"
    text += "- sources: [{model: a, layer_range: [1, 8], parameters: {weight: 0.5}}]"
    assert weight(text, "model.layers.0.mlp.up_proj.weight") == 1
    assert weight(text, "model.embed_tokens.weight") == 0.25
    assert weight(text, "lm_head.weight") == 0.5


def test_the_innermost_level_that_says_a_value_counts():
    text = """
slices:
- sources:
  - {model: a, layer_range: [0, 8], parameters: {weight: {filter: q_proj, value: 1}}}
  parameters: {weight: {filter: self_attn, value: 2}}
parameters: {weight: 3}
"""
    names = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
    assert [weight(text, f"model.layers.2.{name}.weight") for name in names] == [1, 2, 3]


def test_a_filter_may_be_a_part_of_the_name_in_the_files():
    specs = tensor_specs(llama_config(num_hidden_layers=1))
    fused = {name: name.replace("q_proj", "qkv_proj") for name in specs if "q_proj" in name}
    tensors, _ = tensors_of(specs, fused)
    one = recipe(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: qkv, value: 1}, {value: 2}]}}]"
    )
    found = resolve(one, tensors, 1, "a").models["weight"][0]
    assert {name for name, value in found.items() if value == 1} == fused.keys()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: ties\nbase_model: b\nmodels:\n- model: a\n- model: c\n", ["merge.yaml:4", "weight of a"]),
        (
            f"{SLERP}parameters: {{t: {{filter: mlp, value: 1}}}}",
            ["merge.yaml:1", "parameter t", "model.embed_tokens.weight"],
        ),
        (
            f"{SLERP}parameters:\n  t: [{{filter: mpl, value: 1}}]",
            ["merge.yaml:5", "'mpl'", "'mlp'"],
        ),
    ],
)
def test_what_is_missing_for_a_tensor_is_named(text, said):
    with pytest.raises(RecipeError) as error:
        resolved(recipe(text))
    assert all(word in str(error.value) for word in said), error.value
