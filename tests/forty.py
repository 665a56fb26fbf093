"""Forty recipes, resolved for a model of eight layers. `python tests/forty.py` writes anew what is kept of them."""

import json
from pathlib import Path

from families import llama_config

from dppa_jax.checkpoint import tensor_specs
from dppa_jax.recipes.document import parse_documents
from dppa_jax.recipes.file import read_recipes
from dppa_jax.recipes.grammar import recipe_of
from dppa_jax.recipes.models import Models, models_of, tensors_of
from dppa_jax.recipes.recipe import Recipe
from dppa_jax.recipes.resolve import Resolved, resolve
from dppa_jax.recipes.table import rows_of

FILE = Path(__file__).parent / "recipes" / "forty.yaml"
KEPT = FILE.with_suffix(".json")
FORTY = read_recipes(str(FILE))
LAYERS = 8
TENSORS, _ = tensors_of(tensor_specs(llama_config(num_hidden_layers=LAYERS)), {})


def recipe(text: str) -> Recipe:
    [(value, own)] = parse_documents(text, "merge.yaml")
    return recipe_of(value, own)


def resolved(one: Recipe) -> tuple[Models, Resolved]:
    found = models_of(one, {})
    return found, resolve(one, TENSORS, LAYERS, found.names)


def shown(one: Recipe) -> dict:
    found, values = resolved(one)
    return {"base": found.base, "experts": found.experts, "table": rows_of(values, TENSORS, found.names)}


if __name__ == "__main__":
    KEPT.write_text(json.dumps({one.name: shown(one) for one in FORTY}, indent=1, ensure_ascii=False) + "\n")
