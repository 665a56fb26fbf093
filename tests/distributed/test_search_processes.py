"""Search, AdaMerging, merge and evaluation by several real processes: what one process finds and writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from command import launch, tree
from families import read_json, write_family
from processes import LAUNCH, check_success, run_processes, said
from safetensors.numpy import load_file

from dppa_jax.evaluate.local import JaxEvaluator

CHOSEN = [
    "--method=dppa",
    "--rate=0.8",
    "--factors=search",
    "--factors=law=1.2,1.0",
    "--search_evaluations=3",
    "--coefficient=adamerging",
    "--adamerging_steps=3",
    "--adamerging_learning_rate=0.05",
    "--adamerging_positions=generated",
    "--adamerging_new_tokens=3",
    "--validation_share=0.5",
    "--max_new_tokens=8",
    "--max_length=128",
]


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> list[str]:
    """Flags of random models, and of questions whose answers such models hit now and then."""
    root = write_family(tmp_path_factory.mktemp("family"), ("finance", "law"), "float32", num_hidden_layers=3)
    generator = np.random.default_rng(0)
    questions = [" ".join(f"word{i}" for i in generator.integers(0, 60, 6)) for _ in range(16)]
    rows = [
        {"id": f"q{i}", "question": question, "answer": "word1", "choices": ["word1", "word2"]}
        for i, question in enumerate(questions)
    ]
    (root / "fpb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [f"--base={root}/base", f"--expert=finance={root}/finance", f"--expert=law={root}/law"]
    return [*models, "--evaluate=fpb", f"--data_dir={root}", "--labels=any", *CHOSEN]


def found(work: Path) -> dict:
    content = read_json(work / "search-finance.json")
    for candidate in content["candidates"]:
        del candidate["seconds"]
    return content


@pytest.mark.slow
def test_two_processes_search_find_coefficients_merge_and_evaluate_as_one_does(family, tmp_path, monkeypatch):
    work, alone = tmp_path / "work", tmp_path / "alone"
    of_several = run_processes(2, [*LAUNCH, *family, f"--workdir={work}", f"--output={work}/out"], timeout=500)
    check_success(of_several)
    assert "factors found" in of_several[0].stdout
    assert "factors found" not in of_several[1].stdout, said(of_several)
    launch(*family, f"--workdir={alone}", f"--output={alone}/out", "--mesh=layer=1,row=1")

    assert found(work) == found(alone)
    assert len(found(work)["candidates"]) == 3
    assert read_json(work / "continuations.json")["answers"] == read_json(alone / "continuations.json")["answers"]
    coefficients, wanted = (read_json(root / "coefficients.json")["coefficients"] for root in (work, alone))
    assert coefficients == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted["finance"] - 0.3) > 0.01
    of_one = load_file(alone / "out/model.safetensors")
    shards = [load_file(file) for file in (work / "out").glob("*.safetensors")]
    merged = {name: array for shard in shards for name, array in shard.items()}
    assert len(shards) == 2
    for name in of_one:
        np.testing.assert_allclose(merged[name], of_one[name], rtol=0, atol=1e-6, err_msg=name)
    responses = [{name for name in tree(root / "responses") if ".jsonl" in name} for root in (work, alone)]
    of_merge = read_json(work / "tables.json")["fingerprints"]["merge"][:16]
    assert {name for name in responses[0] if of_merge not in name} < responses[1]
    assert (work / "report.html").is_file()
    assert not list((work / "candidates").iterdir())

    def refuse(*_) -> None:
        raise AssertionError("a known response is asked for again")

    monkeypatch.setattr(JaxEvaluator, "generate", refuse)
    flags = [flag for flag in family if "adamerging" not in flag]
    launch("--job=search", *flags, f"--workdir={work}", "--mesh=layer=1,row=1")
