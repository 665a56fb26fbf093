"""Coefficients that AdaMerging finds, from the command line, on the demo family."""

import json

import pytest
from command import launch
from families import read_json

TASKS = "--evaluate=addition,sentiment,clause_type"
QUICK = ("--adamerging_steps=6", "--adamerging_batch_size=4", "--adamerging_learning_rate=0.05", "--limit=20")
DPPA = (TASKS, "--method=dppa", "--rate=0.8", "--factors=1.3,1.1")
EXPERTS = ("math", "finance", "law")


@pytest.mark.slow
def test_a_merge_takes_the_coefficients_that_were_found_and_a_file_gives_them_again(family, tmp_path, capsys):
    outputs = {name: tmp_path / name for name in ("found", "again")}
    work = f"--workdir={tmp_path / 'work'}"
    launch(*family, *DPPA, *QUICK, work, "--coefficient=adamerging_layerwise", f"--output={outputs['found']}")
    printed = capsys.readouterr().out
    found = read_json(tmp_path / "work/coefficients.json")["coefficients"]
    assert read_json(outputs["found"] / "recipe.json")["config"]["coefficients"] == found
    for name in EXPERTS:
        by_layer = [found[name][f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)]
        assert len(set(by_layer)) > 1
        assert all(0 <= value <= 1 for value in by_layer)
    assert "200 validation prompts" in printed
    page = (tmp_path / "work/report.html").read_text()
    assert "nats in 6 steps" in page
    assert (tmp_path / "work/figures/adamerging.svg").is_file()
    file = f"--coefficient={tmp_path / 'work/coefficients.json'}"
    launch(*family, *DPPA[1:], file, f"--output={outputs['again']}")
    first, second = (output / "model.safetensors" for output in outputs.values())
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_a_report_has_merges_with_given_and_with_found_coefficients_of_every_seed(trained, tmp_path):
    methods = "--merge_methods=dppa,dppa+adamerging,ties"
    flags = (
        TASKS,
        methods,
        "--rate=0.8",
        "--rates=0.8",
        "--seeds=0,1",
        "--factors=1.3,1.1",
        "--coefficient=0.6",
        *QUICK,
    )
    models = [f"--base={trained / 'base'}", *(f"--expert={name}={trained / name}" for name in EXPERTS)]
    launch(*models, "--job=report", *flags, f"--workdir={tmp_path}")
    tables = read_json(tmp_path / "tables.json")
    rows = [row["row"] for row in tables["tables"]["table_5"]["rows"]]
    assert rows == ["DPPA 80 %", "DPPA, AdaMerging 80 %", "TIES 80 %"]
    for seed in ("0", "1"):
        (of_seed,) = tables["adamerging"][seed].values()
        assert set(of_seed["coefficients"]) == set(EXPERTS)
        assert len(of_seed["entropies"]) == 6
    merged = {seed: [one["coefficients"] for one in tables["measured"][seed]["merged"]] for seed in ("0", "1")}
    assert merged == {"0": ["", "adamerging", ""], "1": ["adamerging"]}  # the others are the same with every seed


@pytest.mark.slow
def test_some_experts_may_have_given_factors_beside_a_search(family, tmp_path):
    flags = ("--method=dppa", "--rate=0.8", "--limit=10", "--search_limit=20", "--search_evaluations=2")
    factors = ("--factors=search", "--factors=math=1.2,1.1", "--factors=law=1.4,1")
    launch(*family, TASKS, *flags, *factors, f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}")
    chosen = read_json(tmp_path / "out/recipe.json")["config"]["factors"]
    assert chosen["math"] == [1.2, 1.1]
    assert chosen["law"] == [1.4, 1.0]
    assert [file.name for file in (tmp_path / "work").glob("search-*.json")] == ["search-finance.json"]
    answer = json.loads((tmp_path / "work/search-finance.json").read_text())["answer"]
    assert chosen["finance"] == answer["factors"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coefficient=adamerging"], "--evaluate is empty"),
        (["--coefficient=adamergin"], "'adamergin' is not a number"),
        ([TASKS, "--coefficient=adamerging", "--method=ties"], "needs --combine=sum"),
        ([TASKS, "--coefficient=adamerging", "--adamerging_start=2"], "--adamerging_start=2"),
        ([TASKS, "--coefficient=adamerging", "--adamerging_positions=first"], "--adamerging_positions=first"),
        (["--coefficient=nowhere.json"], "nowhere.json"),
        ([TASKS, "--job=report", "--merge_methods=dppa+adamerge"], "Did you mean 'adamerging'?"),
        ([TASKS, "--job=report", "--merge_methods=ties+adamerging", "--rates=0.8"], "needs --combine=sum"),
        ([TASKS, "--factors=search", "--factors=math=1,1,1", "--method=dppa"], "3 factors for the 2 partitions"),
    ],
)
def test_what_cannot_be_found_is_refused_before_anything_is_written(family, tmp_path, flags, said):
    with pytest.raises(SystemExit) as error:
        launch(
            *family,
            "--method=dppa",
            "--rate=0.8",
            f"--output={tmp_path / 'out'}",
            f"--workdir={tmp_path / 'work'}",
            *flags,
        )
    assert said in error.value.code
    assert not (tmp_path / "out").exists()
