"""configs/merge3.cfg and merge2.cfg as users run them, where the hub has the paper's models in small (`llama2`)."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 - gives NumPy the dtype bfloat16
import numpy as np
import pytest
from families import read_json
from llama2 import BASE, DOMAINS, EXPERTS, QUESTIONS, ROWS, write_hub, write_questions
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).parent.parent.parent
PUBLISHED = {
    "merge3": {"math": 0.9128, "finance": 0.9520, "law": 1.4623},  # table 5, DPPA 80 %
    "merge2": {"math": 0.9275, "finance": 0.9545},  # table 6
}
VALIDATION = 2  # of the 10 questions of a task, the fifth that is set aside
CANDIDATES, STEPS, START = 4, 3, 0.9
SMALL = (
    f"--search_limit={VALIDATION}",
    f"--search_evaluations={CANDIDATES}",
    "--search_start=0.4",  # these experts know all their answers with factors of 1
    f"--adamerging_steps={STEPS}",
    f"--adamerging_start={START}",  # a third of such deltas answers nothing
    "--max_new_tokens=16",
    "--max_length=64",
)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Paper:
    """What a configuration made of the models in small.

    Attributes:
      experts: their names.
      models: directories of base and experts.
      log: what was printed, of the first run and, of merge3, of one more with --overwrite.
      answered: every file of responses after the first run, with its content, and of merge3 after the second.
      weights: the merged tensors after each run.
    """

    name: str
    experts: tuple[str, ...]
    models: Mapping[str, Path]
    output: Path
    work: Path
    log: tuple[str, ...]
    answered: tuple[dict[str, bytes], ...]
    weights: tuple[dict[str, np.ndarray], ...]

    @property
    def recipe(self) -> dict:
        return read_json(self.output / "recipe.json")

    @property
    def tables(self) -> dict:
        return read_json(self.work / "tables.json")

    def accuracy(self, model: str, task: str) -> float:
        """The share of right answers, counted in the files of responses; of the items that the base was asked, too."""
        verdicts, reported = self._verdicts(model, task), self._verdicts("base", task)
        assert len(reported) == QUESTIONS - VALIDATION
        return sum(verdicts[item] for item in reported) / len(reported)

    def _verdicts(self, model: str, task: str) -> dict[str, bool]:
        fingerprint = self.tables["fingerprints"][model]
        (file,) = (self.work / "responses" / fingerprint[:16]).glob(f"{task}-*.jsonl")
        lines = map(json.loads, file.read_text().splitlines()[1:])
        return {line["id"]: line["correct"] for line in lines if "correct" in line}

    def ratio(self, domain: str) -> dict:
        """The cell of the domain's ratio in the first table."""
        rows = self.tables["tables"]["evaluated"]["rows"]
        (row,) = [row for row in rows if row["section"].lower() == domain and row["row"] == "domain ratio"]
        return row["cells"]["ratio"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A place with data/ and hub/, and the directories of the models."""
    root = tmp_path_factory.mktemp("llama2")
    return root, write_hub(root / "hub", write_questions(root / "data"))


@pytest.fixture(scope="module", params=["merge3", "merge2"])
def paper(request, small, tmp_path_factory) -> Paper:
    root, models = small
    name, place = request.param, tmp_path_factory.mktemp(request.param)
    experts = tuple(EXPERTS) if name == "merge3" else ("math", "finance")
    flags = [f"--data_dir={root / 'data'}", f"--output={place / 'merged'}", f"--workdir={place / 'work'}"]
    flags += [*SMALL, "--evaluator=jax"]
    log, answered, weights = [], [], []
    for more in ([], ["--overwrite"]) if name == "merge3" else ([],):
        log.append(launch(name, [*flags, *more], root))
        responses = sorted((place / "work" / "responses").rglob("*.jsonl"))
        answered.append({str(file): file.read_bytes() for file in responses})
        weights.append(tensors(place / "merged"))
    models = {model: models[model] for model in ("base", *experts)}
    return Paper(name, experts, models, place / "merged", place / "work", tuple(log), tuple(answered), tuple(weights))


def launch(config: str, flags: list[str], root: Path) -> str:
    """The program in a process of its own, which finds the models under their ids of the hub; what it prints."""
    command = [sys.executable, "-m", "dppa_jax.launch", f"--flagfile=configs/{config}.cfg", *flags]
    found = {"HF_HUB_CACHE": str(root / "hub"), "HF_HUB_OFFLINE": "1", "DPPA_JAX_CACHE": str(root / "cache")}
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | found, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(directory.glob("*.safetensors")) for name, array in load_file(file).items()}


def test_the_factors_of_every_expert_are_searched_and_taken(paper):
    recipe = paper.recipe
    for name in paper.experts:
        found = read_json(paper.work / f"search-{name}.json")
        assert (found["partitions"], found["split"]) == ([0.9, 0.8], "validation")
        assert found["answer"]["evaluations"] == len(found["candidates"]) == CANDIDATES
        assert found["expert_scores"].keys() == set(DOMAINS[name])
        assert all(score["total"] == VALIDATION for score in found["expert_scores"].values())
        assert recipe["factors"][name] == found["answer"]["factors"] != [1, 1]
    assert recipe["factors"].keys() == set(paper.experts)


def test_the_coefficients_are_adamergings(paper):
    found = read_json(paper.work / "coefficients.json")
    assert found["finished"]
    assert len(found["state"]["entropies"]) == STEPS
    assert found["coefficients"].keys() == set(paper.experts)
    assert paper.recipe["coefficients"] == found["coefficients"]
    for coefficient in found["coefficients"].values():
        assert 0 < abs(coefficient - START) <= 1.01e-3 * STEPS, "so far Adam gets from where it starts"


def test_the_merge_is_a_model_like_the_base_for_transformers(paper):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(paper.output, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.config.vocab_size == ROWS
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == ROWS
    assert len(AutoTokenizer.from_pretrained(paper.output)) == ROWS
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (paper.output / file).read_bytes() == (paper.models["base"] / file).read_bytes()
    assert not (paper.output / "added_tokens.json").exists(), "the experts' token for padding has no row"


def test_the_dropped_row_of_every_expert_is_told(paper):
    for name in paper.experts:
        for tensor in VOCABULARY:
            assert tensors(paper.models[name])[tensor].shape[0] == ROWS + 1
            assert f"expert {name!r}: 1 rows of {tensor} beyond the base's are dropped" in paper.log[0]


def test_the_rows_that_are_left_are_merged_with_what_the_recipe_says(paper):
    """Embeddings and head are not pruned; they take the factor of what every partition keeps, the first one."""
    recipe, merged, base = paper.recipe, paper.weights[0], tensors(paper.models["base"])
    for tensor in VOCABULARY:
        start = wanted = base[tensor].astype(np.float32)
        for name in paper.experts:
            given = recipe["coefficients"][name]
            coefficient = given[tensor] if isinstance(given, dict) else given
            expert = tensors(paper.models[name])[tensor][:ROWS].astype(np.float32)
            wanted = wanted + coefficient * recipe["factors"][name][0] * (expert - start)
        assert merged[tensor].dtype == np.float16
        np.testing.assert_allclose(merged[tensor], wanted, rtol=1e-3, atol=1e-5)
        assert np.abs(wanted - start).max() > 0.01


def test_recipe_and_model_card_name_the_models_of_the_hub(paper):
    recipe, card = paper.recipe, (paper.output / "README.md").read_text()
    ids = {"base": BASE, **{name: EXPERTS[name] for name in paper.experts}}
    assert {name: about["where"] for name, about in recipe["inputs"].items()} == ids
    assert recipe["config"]["rate"] == 0.8
    assert recipe["config"]["method"] == "dppa"
    assert 'license: "llama2"' in card
    for name in paper.experts:
        factors = ", ".join(f"{factor:g}" for factor in recipe["factors"][name])
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} | `{ids[name]}` |")]
        assert row.endswith(f"| {factors} |")


def test_domain_ratios_are_those_of_the_answers_and_stand_beside_the_papers(paper):
    page = (paper.work / "report.html").read_text()
    for domain in paper.experts:
        tasks = [paper.accuracy("merge", task) / paper.accuracy(domain, task) for task in DOMAINS[domain]]
        cell = paper.ratio(domain)
        assert cell["values"] == pytest.approx([math.prod(tasks) ** (1 / len(tasks))])
        assert cell["published"] == PUBLISHED[paper.name][domain]
        assert f"({100 * cell['published']:.2f})" in page
        assert f"({100 * cell['published']:.2f})" in paper.log[0]


def test_every_expert_answers_and_the_base_does_not(paper):
    for domain in paper.experts:
        for task in DOMAINS[domain]:
            assert paper.accuracy("base", task) == 0
            assert paper.accuracy(domain, task) >= 0.75


@pytest.mark.parametrize("paper", ["merge3"], indirect=True)
def test_another_run_asks_nothing_again_and_makes_the_same_merge(paper):
    first, second = paper.answered
    assert len(first) > 0
    assert first == second
    assert paper.weights[0].keys() == paper.weights[1].keys()
    for tensor, weights in paper.weights[0].items():
        assert weights.tobytes() == paper.weights[1][tensor].tobytes(), tensor
