"""A frankenmerge of the demo's models by a recipe runs in transformers and vLLM with the layers its config says."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from command import launch
from families import read_json
from vllm_python import vllm_python

from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.vllm import VllmEvaluator
from dppa_jax.launch import arguments

RUNS = [("base", 0, 3), ("math", 1, 4), ("base", 2, 4)]
PROMPTS = [[1, 10, 20, 30], [1, 40], list(range(1, 60))]


@pytest.fixture(scope="module")
def franken(trained, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("franken")
    slices = "".join(
        f"  - sources: [{{model: {trained / name}, layer_range: [{first}, {last}]}}]\n" for name, first, last in RUNS
    )
    (root / "franken.yaml").write_text(f"merge_method: passthrough\nslices:\n{slices}dtype: float32\n")
    launch(*arguments([str(root / "franken.yaml"), str(root / "merged")]))
    return root / "merged"


def loaded(directory: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_transformers_computes_the_layers_one_after_another(franken, trained):
    merged, models = loaded(franken), {name: loaded(trained / name) for name in ("base", "math")}
    assert len(merged.model.layers) == read_json(franken / "config.json")["num_hidden_layers"] == 8
    stacked = models["base"]
    layers = [copy.deepcopy(models[name].model.layers[i]) for name, first, last in RUNS for i in range(first, last)]
    stacked.model.layers = torch.nn.ModuleList(layers)
    stacked.config.num_hidden_layers = len(layers)
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            found, wanted = (model(tokens, use_cache=False).logits for model in (merged, stacked))
        assert torch.equal(found, wanted)


@pytest.mark.slow
def test_vllm_answers_as_this_process_does(franken, tmp_path):
    options = {"max_num_seqs": 8, "cpu_cache_gb": 1, "timeout": 300}
    evaluator, here = VllmEvaluator(vllm_python(), tmp_path / "work", **options), JaxEvaluator()
    try:
        for one in (evaluator, here):
            one.use(franken)
        assert evaluator.generate(PROMPTS, 10) == here.generate(PROMPTS, 10)
    finally:
        evaluator.close()
