"""Search, merge and evaluation by real vLLM, on the demo family, from the command line."""

import json
from pathlib import Path

import pytest
from command import launch
from families import read_json
from vllm_python import vllm_python

LIMIT = 30
TASKS = ("addition", "comparison", "sentiment", "trend", "clause_type", "governing_law")
EXPERTS = ("math", "finance", "law")


@pytest.fixture(scope="module")
def flags(trained, tmp_path_factory) -> list[str]:
    output = tmp_path_factory.mktemp("vllm") / "merged"
    models = [f"--base={trained / 'base'}", *(f"--expert={name}={trained / name}" for name in EXPERTS)]
    merge = ["--method=dppa", "--rate=0.8", "--coefficient=0.6", f"--output={output}", "--overwrite"]
    return [*models, *merge, f"--evaluate={','.join(TASKS)}", f"--limit={LIMIT}"]


@pytest.fixture(scope="module")
def by_vllm(flags, tmp_path_factory) -> Path:
    """The --workdir of a merge with a short search, all answers by vLLM in float32."""
    work = tmp_path_factory.mktemp("work")
    vllm = ["--evaluator=vllm", f"--vllm_python={vllm_python()}", "--evaluate_dtype=float32"]
    search = ["--factors=search", "--search_limit=20", "--search_evaluations=3"]
    launch(*flags, *vllm, *search, f"--workdir={work}")
    return work


@pytest.fixture(scope="module")
def by_jax(flags, by_vllm, tmp_path_factory) -> Path:
    """The same with the factors that were found, answered in this process."""
    work = tmp_path_factory.mktemp("jax")
    found = {name: read_json(by_vllm / f"search-{name}.json")["answer"]["factors"] for name in EXPERTS}
    factors = [f"--factors={name}={','.join(map(str, numbers))}" for name, numbers in found.items()]
    launch(*flags, *factors, f"--workdir={work}")
    return work


def answers(work: Path) -> dict[tuple[str, str], tuple[str, bool]]:
    """(response, verdict) of the merge's items by task and id."""
    fingerprint = read_json(work / "tables.json")["fingerprints"]["merge"]
    found = {}
    for file in (work / "responses" / fingerprint[:16]).glob("*.jsonl"):
        about, *lines = map(json.loads, file.read_text().splitlines())
        judged = [line for line in lines if "correct" in line]
        found |= {(about["task"], line["id"]): (line["response"], line["correct"]) for line in judged}
    return found


@pytest.mark.slow
def test_a_search_a_merge_and_its_evaluation_take_one_start_of_vllm(by_vllm):
    log = (by_vllm / "vllm.log").read_text()
    assert log.count("Starting to load model") == 1, "weights are to be handed over in place"
    for name in EXPERTS:
        found = read_json(by_vllm / f"search-{name}.json")
        assert found["answer"]["evaluations"] == 3
        assert len({tuple(c["factors"]) for c in found["candidates"]}) == 3


@pytest.mark.slow
def test_vllm_and_jax_answer_alike(by_vllm, by_jax):
    vllm, jax = answers(by_vllm), answers(by_jax)
    assert vllm.keys() == jax.keys()
    assert len(vllm) == LIMIT * len(TASKS)
    assert sum(vllm[item][0] == jax[item][0] for item in vllm) >= 0.95 * len(vllm)
    for task in TASKS:
        right = [sum(verdict for (of, _), (_, verdict) in found.items() if of == task) for found in (vllm, jax)]
        assert abs(right[0] - right[1]) <= 1, task


@pytest.mark.slow
def test_the_merge_answers_unlike_the_base(by_vllm):
    tables = read_json(by_vllm / "tables.json")
    assert tables["fingerprints"]["merge"] != tables["fingerprints"]["base"]
    about = [read_json(by_vllm / "tables.json")["fingerprints"][name] for name in ("base", "merge")]
    texts = [
        {line["id"]: line["response"] for line in responses(by_vllm, fingerprint, "sentiment")} for fingerprint in about
    ]
    assert texts[0].keys() == texts[1].keys()
    assert sum(texts[0][i] != texts[1][i] for i in texts[0]) > LIMIT / 4


def responses(work: Path, fingerprint: str, task: str) -> list[dict]:
    (file,) = (work / "responses" / fingerprint[:16]).glob(f"{task}-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]
