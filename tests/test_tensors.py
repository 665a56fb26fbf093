"""merge_tensors and merge_state_dicts have the bits of a merge of checkpoints, for arrays of NumPy, JAX and PyTorch."""

from collections.abc import Mapping
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from families import llama_config
from support import (
    Merge,
    assert_same_bits,
    given_out,
    linear_names,
    make_family,
    merge_to_arrays,
    random_grams,
    random_norms,
    same_bits,
)

import dppa_jax
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS, Combination
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES

EXPERTS = ("math", "law")
LINEAR, NORM = "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"
FAST = ("task_arithmetic", "dppa", "dare_ties", "wanda", "regmean")
MORE = {  # ties that are cut, rows, and the conventions of mergekit
    "cut ties": {"method": "ties", "ties": "exact"},
    "rows": {"method": "wanda", "compare": "row"},
    "mergekit": {"method": "breadcrumbs_ties", "compatible": "mergekit", "lambda_": 0.5},
}
CHOICES = {**{name: {"method": name} for name in METHODS}, **MORE}
PARAMETERS = [
    pytest.param(choice, marks=[] if choice in (*FAST, "cut ties", "mergekit") else pytest.mark.slow)
    for choice in CHOICES
]


@cache
def family():
    return make_family(EXPERTS, "bfloat16", num_hidden_layers=2)


def combination(choice: str) -> Combination:
    return COMBINATIONS[METHODS[CHOICES[choice]["method"]].combine]


def experts_of(choice: str) -> tuple[str, ...]:
    return EXPERTS[: combination(choice).experts[1]]


def options(choice: str) -> dict:
    coefficients = {name: {"math": 0.7, "law": 0.4}[name] for name in experts_of(choice)}
    found = {"coefficients": coefficients, "seed": 3, **CHOICES[choice]}
    method = METHODS[found["method"]]
    if method.score:
        found["rate"] = 0.8
    if SCALES[method.scale].takes_q:
        found["q"] = dict.fromkeys(EXPERTS, 0.3)
    if SCALES[method.scale].takes_factors:
        found |= {"partitions": (0.9, 0.8), "factors": {"math": (1.8, 1.3), "law": (1.5, 1.2)}}
    return found


@cache
def merged(choice: str) -> Merge:
    base, experts = family()
    names = experts_of(choice)
    own = {name: experts[name] for name in names}
    seen = {"norms": random_norms(base, names), "input_grams": given_out(random_grams(base, names))}
    return merge_to_arrays(base, own, MergeConfig(names, **options(choice)), **seen)


def of_tensor(choice: str, name: str, jit: bool) -> np.ndarray:
    base, experts = family()
    outcome, given = merged(choice).outcome, options(choice)
    if pruned := name in outcome.linears.names:
        place = outcome.linears.names.index(name)
        if METHODS[given["method"]].score:
            given["rates"] = {expert: outcome.rates[e, :, place] for e, expert in enumerate(EXPERTS)}
        for kind, seen in (("norms", random_norms(base, EXPERTS)), ("input_grams", random_grams(base, EXPERTS))):
            given[kind] = {expert: seen[expert][name] for expert in EXPERTS if name in seen[expert]}

    def merge(own, others):
        return dppa_jax.merge_tensors(own, others, name=name, pruned=pruned, **given)

    arrays = base.tensors[name], {expert: experts[expert].tensors[name] for expert in experts_of(choice)}
    return np.asarray(jax.jit(merge)(*jax.tree.map(jnp.asarray, arrays)) if jit else merge(*arrays))


@pytest.mark.parametrize("choice", PARAMETERS)
def test_a_tensor_has_the_bits_of_the_whole_merge_eagerly_and_in_jit(choice):
    wanted = merged(choice).tensors
    for name in (LINEAR, NORM):
        assert name == NORM or not same_bits(wanted[name], family()[0].tensors[name]), name
        for jit in (False, True) if combination(choice).prunes else (False,):
            found = of_tensor(choice, name, jit)
            assert same_bits(found, wanted[name]), (name, jit, int((found != wanted[name]).sum()))


def test_what_is_summed_on_the_host_is_refused_in_jit_and_merged_outside():
    base, experts = family()
    arrays = base.tensors[LINEAR], {"math": experts["math"].tensors[LINEAR]}
    for given in ({"method": "magnitude", "score": "row"}, {"method": "dare", "scale": "l1"}, {"method": "karcher"}):
        assert dppa_jax.merge_tensors(*arrays, **given).dtype == ml_dtypes.bfloat16
        with pytest.raises(ValueError, match="call it outside of jit"):
            jax.jit(lambda b, e, given=given: dppa_jax.merge_tensors(b, e, **given))(*jax.tree.map(jnp.asarray, arrays))


def as_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(x.view(np.int16)).view(torch.bfloat16).requires_grad_() for n, x in tensors.items()}


def from_torch(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {n: x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for n, x in tensors.items()}


def test_tensors_of_pytorch_come_back_as_such():
    base, experts = family()
    arrays = [as_torch({LINEAR: model.tensors[LINEAR]})[LINEAR] for model in (base, experts["math"], experts["law"])]
    given = options("dare_ties")
    found = dppa_jax.merge_tensors(arrays[0], dict(zip(EXPERTS, arrays[1:], strict=True)), name=LINEAR, **given)
    assert not found.requires_grad
    assert_same_bits(from_torch({LINEAR: found}), {LINEAR: merged("dare_ties").tensors[LINEAR]})


@pytest.mark.parametrize("kind", ["numpy", "torch", "without config.json"])
def test_state_dicts_have_the_bits_of_the_whole_merge(kind):
    base, experts = family()
    models = [base.tensors, *(experts[name].tensors for name in EXPERTS)]
    buffer = np.arange(4, dtype=np.int64)
    if kind == "torch":
        models = [as_torch(tensors) for tensors in models]
    if kind == "without config.json":
        models = [{**tensors, "model.position_ids": buffer} for tensors in models]
    config = None if kind == "without config.json" else base.config
    own, *others = models
    found = dppa_jax.merge_state_dicts(own, dict(zip(EXPERTS, others, strict=True)), config=config, **options("dppa"))
    if kind == "without config.json":
        assert found.pop("model.position_ids") is buffer
    assert_same_bits(from_torch(found) if kind == "torch" else found, merged("dppa").tensors)


def test_a_head_that_is_the_embeddings_is_so_in_the_output():
    config = llama_config(tie_word_embeddings=True, num_hidden_layers=1)
    base, experts = make_family(EXPERTS, "bfloat16", num_hidden_layers=1, tie_word_embeddings=True)
    assert config["tie_word_embeddings"]
    models = [
        {**model.tensors, "lm_head.weight": model.tensors["model.embed_tokens.weight"]}
        for model in (base, *experts.values())
    ]
    own, *others = models
    found = dppa_jax.merge_state_dicts(own, dict(zip(EXPERTS, others, strict=True)), "ties", config=base.config)
    assert same_bits(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert found.keys() == own.keys()


def test_tensors_that_do_not_fit_are_refused():
    base, experts = family()
    tensors = {name: array for name, array in experts["math"].tensors.items() if name != LINEAR}
    with pytest.raises(ValueError, match="down_proj"):
        dppa_jax.merge_state_dicts(base.tensors, {"math": tensors}, "ties", config=base.config)
    with pytest.raises(ValueError, match="expert 'math': shape"):
        dppa_jax.merge_tensors(base.tensors[LINEAR], {"math": base.tensors[NORM]}, "ties")
    assert set(linear_names(base.config)) <= base.tensors.keys()
