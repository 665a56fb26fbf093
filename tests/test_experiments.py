"""Jobs that evaluate and search, on the demo family: what they find, print, write and remember."""

import json
import re
from pathlib import Path

import pytest
from command import launch
from families import read_json

from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.tasks import demo_items

TASKS = "--evaluate=addition,sentiment,clause_type"
SMALL = (TASKS, "--limit=40", "--search_limit=40", "--method=dppa", "--rate=0.8")
EXPERTS = ("math", "finance", "law")


@pytest.fixture
def job(family, tmp_path):
    """Runs the command line over the family, with DPPA unless flags say otherwise; its --workdir."""

    def job(*flags: str, workdir: str = "work") -> Path:
        launch(*family, "--method=dppa", f"--workdir={tmp_path / workdir}", *flags)
        return tmp_path / workdir

    return job


@pytest.fixture
def refusal(job):
    def refusal(*flags: str) -> str:
        with pytest.raises(SystemExit) as error:
            job(*flags)
        assert str(error.value.code).startswith("error: ")
        return error.value.code

    return refusal


def without_seconds(file: Path) -> dict:
    content = read_json(file)
    for candidate in content["candidates"]:
        del candidate["seconds"]
    return content


def share_right(work: Path, fingerprint: str, task: str) -> float:
    """By the verdicts that are kept."""
    (file,) = (work / "responses" / fingerprint[:16]).glob(f"{task}-*.jsonl")
    verdicts = {
        line["id"]: line["correct"] for line in map(json.loads, file.read_text().splitlines()) if "correct" in line
    }
    return sum(verdicts.values()) / len(verdicts)


@pytest.mark.slow
def test_a_merge_with_searched_factors_is_the_merge_with_what_was_found(job, tmp_path, capsys):
    output = tmp_path / "merged"
    work = job(*SMALL, "--factors=search", "--search_evaluations=6", f"--output={output}")
    printed = capsys.readouterr().out
    recipe = read_json(output / "recipe.json")
    for name in EXPERTS:
        found = read_json(work / f"search-{name}.json")
        answer = found["answer"]
        assert recipe["config"]["factors"][name] == answer["factors"]
        assert re.search(rf"--factors={name}={','.join(f'{f:g}' for f in answer['factors'])}\b", printed)
        assert len(found["candidates"]) == answer["evaluations"]
        assert {tuple(v["factors"]) for v in found["visits"]} == {tuple(c["factors"]) for c in found["candidates"]}
        assert all(score["total"] == 40 for c in found["candidates"] for score in c["scores"].values())
        begin = next(v["score"] for v in found["visits"] if v["factors"] == [1.0, 1.0])
        assert answer["domain_ratio"] >= begin
    given = [f"--factors={n}={','.join(map(str, recipe['config']['factors'][n]))}" for n in EXPERTS]
    job("--method=dppa", "--rate=0.8", *given, f"--output={tmp_path / 'again'}")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_evaluated_merge_ends_with_a_report(job, tmp_path, capsys):
    work = job(*SMALL, "--factors=1.3,1.1", "--coefficient=0.6", f"--output={tmp_path / 'merged'}")
    printed = capsys.readouterr().out
    scores = read_json(work / "tables.json")["tables"]["evaluated"]["rows"]
    fingerprints = read_json(work / "tables.json")["fingerprints"]
    page = (work / "report.html").read_text()
    for task, domain in (("addition", "math"), ("sentiment", "finance"), ("clause_type", "law")):
        (cells,) = [row["cells"] for row in scores if row["row"] == task]
        for column, model in (("base", "base"), ("dense expert", domain), ("merge", "merge")):
            assert cells[column]["values"] == [share_right(work, fingerprints[model], task)], (task, column)
    for what in ("addition", "sentiment", "clause_type", "domain ratio", "[95 % interval", "dense expert"):
        assert what.strip("[") in page, what
    assert "40 test" in printed
    assert page.count("<svg") == 4  # rates, and for each expert what remains
    assert len(list((work / "responses").rglob("*.jsonl"))) == 3 + 3 + 3  # base, experts, merge
    before = {file: file.stat().st_mtime_ns for file in (work / "responses").rglob("*.jsonl")}
    job(*SMALL, "--factors=1.3,1.1", "--coefficient=0.6", f"--output={tmp_path / 'merged'}", "--overwrite")
    assert {file: file.stat().st_mtime_ns for file in (work / "responses").rglob("*.jsonl")} == before


@pytest.mark.parametrize("method", ["wanda", "regmean"])
def test_a_merge_that_reads_a_text_is_asked_again_with_another(family, tmp_path, method):
    flags = [*family[:3], "--job=report", f"--merge_methods={method}", "--rates=0.5", f"--workdir={tmp_path}"]
    flags += ["--evaluate=addition,sentiment", "--limit=2", f"--calibration={tmp_path / 'text.txt'}"]
    models = []
    for text in ("What is 317 plus 3? Sum:\n", "Which is larger, 89 or 74? Larger:\n"):
        (tmp_path / "text.txt").write_text(text)
        launch(*flags)
        models.append(len(list((tmp_path / "responses").iterdir())))
    assert models == [4, 5]  # base, two experts, and the merge


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_where_it_was(job, monkeypatch):
    one = ("--job=search", "--evaluate=sentiment", "--search_limit=40", "--rate=0.8")
    undisturbed = job(*one, workdir="undisturbed")
    wanted = without_seconds(undisturbed / "search-finance.json")
    generate, calls = JaxEvaluator.generate, []

    def mortal(self, *given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *given)

    monkeypatch.setattr(JaxEvaluator, "generate", mortal)
    with pytest.raises(SystemExit, match="interrupted"):
        job(*one)
    work = job(*one)
    assert without_seconds(work / "search-finance.json") == wanted
    assert len(calls) - 1 == wanted["answer"]["evaluations"] + 1  # of each candidate and of the dense expert once


@pytest.mark.slow
def test_dare_with_dpa_is_searched_downwards_from_its_own_factors(job):
    work = job("--job=search", "--evaluate=sentiment", "--search_limit=40", "--rate=0.8", "--method=dare_dpa")
    found = read_json(work / "search-finance.json")
    factors = [candidate["factors"] for candidate in found["candidates"]]
    assert [5.0, 5.0] in factors
    assert all(nine <= 10.0 and eight <= 5.0 for nine, eight in factors)


def test_a_search_by_what_is_reported_says_so(job, tmp_path, capsys):
    flags = ("--evaluate=sentiment", "--search_limit=10", "--limit=10", "--search_evaluations=3")
    work = job("--job=search", *flags, "--search_split=test", "--rate=0.8")
    assert "--search_split=test" in capsys.readouterr().out
    found = read_json(work / "search-finance.json")
    assert found["split"] == "test"
    rows = read_json(work / "tables.json")["tables"]["search-finance"]["rows"]
    assert [row["row"] for row in rows] == [",".join(f"{f:g}" for f in c["factors"]) for c in found["candidates"]]
    assert "--search_split=test" in (work / "report.html").read_text()


def test_every_given_model_is_evaluated_on_every_task(job):
    work = job("--job=evaluate", "--evaluate=addition,sentiment", "--limit=20")
    rows = json.dumps(read_json(work / "tables.json"))
    assert all(name in rows for name in ("base", *EXPERTS, "addition", "sentiment"))
    assert len(list((work / "responses").rglob("*.jsonl"))) == 8


def test_a_report_compares_methods(family, tmp_path):
    (tmp_path / "text.txt").write_text("What is 100 plus 2? Sum:\nWhich is larger, 11 or 12? Larger:\n")
    compared = ["--methods=dare,dppa", "--merge_methods=dare,darex_q+mse", "--rates=0.8:0.9:0.1", "--limit=10"]
    compared += [f"--calibration={tmp_path / 'text.txt'}", f"--workdir={tmp_path}"]
    launch(*family[:2], "--job=report", "--evaluate=addition", *compared)
    tables = read_json(tmp_path / "tables.json")["tables"]
    assert {"dense", "table_1", "merges", "table_7"} <= set(tables)
    assert [row["row"] for row in tables["table_1"]["rows"]] == ["80 %", "90 %"]
    assert [row["row"] for row in tables["merges"]["rows"]] == [
        *("DARE 90 %", "DAREx-q, mse 90 %"),
        *("DARE 80 %", "DAREx-q, mse 80 %"),
    ]
    assert {file.stem for file in (tmp_path / "figures").glob("*.svg")} >= {"accuracy", "ratio"}
    assert (tmp_path / "tables.md").is_file()


def test_a_report_finds_q_by_the_way_that_a_method_names_and_keeps_it(family, tmp_path, monkeypatch):
    """Of two experts of a domain; the second reads the text of the first."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/law.txt").write_text("The tenant pays in Alaska.\nCourts in Ohio decide.\n")
    flags = [family[0], "--job=report", "--expert=law=demo:law", "--expert=law.other=demo:law", "--rates=0.9"]
    flags += ["--evaluate=clause_type", "--limit=10", f"--calibration={tmp_path / 'texts'}", f"--workdir={tmp_path}"]
    methods = "dare", "darex_q+auto", "darex_q/random_column+bound", "dppa+auto"
    launch(*flags, f"--methods={','.join(methods)}")
    content = read_json(tmp_path / "tables.json")
    assert {"rates-law", "rates-law.other", "q", "trainings"} <= set(content["tables"])
    mean, ratio = content["measured"]["0"]["sizes"]["law"]
    assert 0.005 < mean < 0.02
    assert 0.1 < ratio < 0.2
    single = content["measured"]["0"]["single"]
    assert [(one["name"], one["expert"]) for one in single] == [(m, e) for m in methods for e in ("law", "law.other")]
    by_name = {(one["name"], one["expert"]): one for one in single}
    column = by_name["darex_q/random_column+bound", "law"]
    parts = {"method": "darex_q", "score": "random_column", "way": "bound", "rate": 0.9}
    assert {part: column[part] for part in parts} == parts
    assert len(column["q"]) == 28
    kept = read_json(tmp_path / "darex_q-auto-0.9-seed0/q-law.json")
    assert by_name["darex_q+auto", "law"]["q"] == kept["number"] == kept["search"]["result"]["q"]
    kept = read_json(tmp_path / "dppa-auto-0.9-seed0/factors-law.json")
    assert by_name["dppa+auto", "law"]["factors"] == kept["number"] == kept["search"]["factors"] != [1.0, 1.0]
    assert by_name["dare", "law"]["q"] is None

    with pytest.raises(SystemExit, match="a merge has one expert of each domain"):
        launch(*flags, "--merge_methods=dare")
    monkeypatch.setattr("dppa_jax.jobs.compared.q_of_expert", lambda *_: pytest.fail("searched again"))
    monkeypatch.setattr("dppa_jax.jobs.compared.factors_by_change", lambda *_: pytest.fail("searched again"))
    launch(*flags, "--methods=darex_q+auto,dppa+auto")
    again = read_json(tmp_path / "tables.json")["measured"]["0"]["single"]
    assert again == [
        by_name[found, expert] for found in ("darex_q+auto", "dppa+auto") for expert in ("law", "law.other")
    ]


@pytest.mark.slow
def test_a_report_has_the_papers_tables_and_figures(family, tmp_path):
    pair = [flag for flag in family if "law" not in flag]
    compared = ["--methods=magnitude,owl,dare,dp,dppa,dare_dpa", "--merge_methods=dare,dppa", "--rates=0.8:0.9:0.1"]
    short = ["--limit=20", "--search_limit=20", "--search_evaluations=2", "--factors=search"]
    launch(*pair, "--job=report", "--evaluate=addition,sentiment", *compared, *short, f"--workdir={tmp_path}")
    tables = read_json(tmp_path / "tables.json")["tables"]
    assert {"dense", "table_1", "table_2", "table_3", "table_6", "table_7"} <= set(tables)
    assert {file.stem for file in (tmp_path / "figures").glob("*.svg")} >= {"accuracy", "ratio", "search-dppa-0.9-math"}
    assert len(list((tmp_path / "tables").glob("*.csv"))) == len(tables)
    assert (tmp_path / "tables.md").is_file()


@pytest.mark.slow
def test_items_that_a_search_chose_by_are_not_reported(job, tmp_path):
    """With the default share; the rows are the demo's, as the data of a task of the paper."""
    rows = [
        {"id": item.id, "question": item.prompt.removesuffix("\nAnswer:"), "answer": item.answers[0]}
        | {"choices": ["negative", "neutral", "positive"]}
        for item in demo_items("sentiment", "test")
    ]
    (tmp_path / "fpb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--evaluate=fpb", f"--data_dir={tmp_path}", "--max_new_tokens=4", "--search_evaluations=2", "--rate=0.8")
    launched = ("--expert=finance=demo:finance", "--method=dppa", "--factors=search", f"--output={tmp_path / 'out'}")
    launch("--base=demo:base", *launched, f"--workdir={tmp_path / 'work'}", *flags)
    asked = {}
    for file in (tmp_path / "work/responses").rglob("fpb-*.jsonl"):
        about, *lines = map(json.loads, file.read_text().splitlines())
        asked[about["weights"]] = {line["id"] for line in lines}
    fingerprints = read_json(tmp_path / "work/tables.json")["fingerprints"]
    reported = asked[fingerprints["base"]]
    assert asked[fingerprints["merge"]] == reported
    assert len(reported) == 160
    searched = [ids for weights, ids in asked.items() if weights not in fingerprints.values()]
    assert len(searched) == 2
    assert all(len(ids) == 40 and not ids & reported for ids in searched)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--factors=search"], "--evaluate is empty"),
        (["--job=search", "--evaluate=adition"], "Did you mean 'addition'?"),
        (["--evaluate=gsm8k", "--data_dir=nowhere"], "nowhere"),
        (["--factors=search", "--evaluate=addition,sentiment"], "expert 'law' has no tasks"),
        (["--factors=search", TASKS, "--method=magnitude"], "--scale=partition"),
        ([TASKS, "--evaluator=vllm", "--vllm_python=/bin/true"], "--vllm_python=/bin/true"),
        ([TASKS, "--search_bounds=1", "--factors=search"], "--search_bounds=1"),
        ([TASKS, "--validation_share=1.5"], "--validation_share=1.5"),
        ([TASKS, "--factors=search", "--search_rule=parabol"], "Did you mean 'parabola'?"),
        ([TASKS, "--factors=search", "--search_start=1,1,1"], "--search_start"),
        ([TASKS, "--job=report", "--methods=darex_q"], "--q"),
        ([TASKS, "--job=report", "--methods=dp", "--allocate=owl"], "--allocate"),
        ([TASKS, "--job=report", "--methods=dare+auto"], "dare has no q and no factors; "),
        ([TASKS, "--job=report", "--methods=darex_q+aut"], "Did you mean 'auto'?"),
        ([TASKS, "--job=report", "--methods=dare/randm"], "Did you mean 'random'?"),
        ([TASKS, "--job=report", "--methods=task_arithmetic/row"], "prunes nothing, so that no score"),
        ([TASKS, "--job=report", "--methods=darex_q+auto"], "--q=auto needs --calibration"),
        ([TASKS, "--job=report", "--methods=dare,wanda"], "--methods=wanda needs --calibration"),
        ([TASKS, "--job=report", "--merge_methods=regmean"], "--merge_methods=regmean needs --calibration"),
        ([TASKS, "--job=report", "--methods=dppa+auto"], "--methods=dppa+auto needs --calibration"),
        ([TASKS, "--job=report", "--methods=dppa+search"], "as --factors=search says for dppa"),
        ([TASKS, "--job=report", "--methods=dare+adamerging"], "has the coefficient 1"),
        ([TASKS, "--job=report", "--methods=dp", "--rates=0.9:0.1:0.1"], "--rates=0.9:0.1:0.1"),
        (["--evaluate=addition,addition"], "addition is given twice"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(refusal, tmp_path, flags, said):
    assert said in refusal("--rate=0.8", f"--output={tmp_path / 'out'}", *flags)
    assert not (tmp_path / "out").exists()


def test_a_task_needs_the_expert_of_its_domain(family, tmp_path):
    with pytest.raises(SystemExit) as error:
        launch(
            *family[:2],
            "--method=dppa",
            "--evaluate=sentiment",
            f"--output={tmp_path / 'out'}",
            f"--workdir={tmp_path}",
        )
    assert "give --expert=finance=WHERE" in error.value.code


@pytest.mark.slow
def test_the_benchmark_of_a_candidate_has_every_part_of_both_ways(job, capsys):
    work = job("--job=benchmark", "--peer=restart", "--evaluate=sentiment", "--limit=10", "--rate=0.8")
    seconds = read_json(work / "restart/restart.json")
    assert all(value > 0 for values in seconds.values() for value in values)
    assert {part: len(values) for part, values in seconds.items()} == {
        **dict.fromkeys(("apply", "hand over", "responses"), 5),
        **dict.fromkeys(("merge and save", "start"), 2),
    }
    assert "times as fast" in capsys.readouterr().out
