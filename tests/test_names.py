"""Paths that are not UTF-8, and a locale that knows ASCII only: jobs end as they do elsewhere."""

import os
import subprocess
import sys

import pytest
from command import Merge, launch, tree

LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture
def latin(merge: Merge) -> Merge:
    """The command line over a family below a directory whose name is not UTF-8."""
    root = merge.root / LATIN
    root.mkdir()
    for name in ("base", "math", "law"):
        (merge.root / name).rename(root / name)
    return Merge(root)


def test_a_merge_over_names_that_are_not_utf8_is_whole(latin):
    latin("--method=task_arithmetic", f"--save_delta={latin.root}/deltas")
    assert sorted(path.name for path in latin.root.iterdir()) == ["base", "deltas", "law", "math", "out"]
    before = tree(latin.output)["model.safetensors"]
    latin("--method=task_arithmetic", "--overwrite")
    assert tree(latin.output)["model.safetensors"] == before
    assert f"{latin.root}/math".encode("utf-8", "backslashreplace").decode() in (latin.output / "README.md").read_text()


def test_results_are_written_below_names_that_are_not_utf8(latin, capsys):
    launch("--job=validate", f"--output={latin.law}", f"--reference={latin.law}", f"--workdir={latin.root}/runs")
    assert "caf\\udce9" in (latin.root / "runs" / "validate.md").read_text(encoding="utf-8")
    assert "caf\\udce9" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["base", "output"])
def test_orbax_below_a_name_that_is_not_utf8_is_refused_before_the_work(latin, place):
    where = {"base": f"--base={latin.base}", "output": f"--output=orbax:{latin.root}/orbax"}
    if place == "base":
        (latin.base / "_METADATA").write_text("{}")
        where |= {"base": f"--base=orbax:{latin.base}", "output": f"--output={latin.output}"}
    message = latin.refusal(of=["--job=convert", *where.values()])
    assert "TensorStore takes only paths that are UTF-8; rename it" in message


def test_a_locale_that_knows_ascii_only_changes_nothing_but_what_is_shown(merge):
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = merge.root / "modèles"
    root.mkdir()
    merge.law.rename(root / "law")
    words = [sys.executable, "-m", "dppa_jax.launch", "plan", f"--base={merge.base}", f"--expert=law={root}/law"]
    run = subprocess.run(
        [*words, "--method=dppa", f"--workdir={root}/runs"], env=ascii_only, capture_output=True, cwd=merge.root
    )
    assert run.returncode == 0, run.stderr
    assert b"+---" in run.stdout
    assert (root / "runs" / "plan.json").is_file()
