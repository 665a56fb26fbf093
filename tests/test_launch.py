"""The command line: help, flagfiles, spelling, and what the process says when it ends."""

import re
import subprocess
import sys

import pytest
from absl import flags
from command import launch, tree

from dppa_jax import launch as program
from dppa_jax.flags import GROUPS
from dppa_jax.from_flags import finetune_config, job_config

METHOD_FLAGS = ("--method=dare", "--rate=0.7", "--seed=3", "--coefficient=math=0.5")


def usage(monkeypatch, capsys, flag: str) -> str:
    monkeypatch.setattr(sys, "argv", ["dppa_jax.launch", flag])
    program.run()
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--helpshort", "-h"])
def test_short_help_names_every_flag_on_one_screen(monkeypatch, capsys, flag):
    printed = usage(monkeypatch, capsys, flag)
    assert len(printed.splitlines()) <= 60
    assert max(map(len, printed.splitlines())) <= 120
    assert all(f"--{flag.name}" in printed for flag in defined())


def test_help_explains_every_flag_in_a_group(monkeypatch, capsys):
    printed = usage(monkeypatch, capsys, "--help")
    assert set(re.findall(r"^  --(\w+) +\w", printed, re.MULTILINE)) == {flag.name for flag in defined()}
    assert re.findall(r"^\w.*$", printed, re.MULTILINE)[1:] == list(GROUPS)
    assert max(map(len, printed.splitlines())) <= 120


def defined() -> list[flags.Flag]:
    return flags.FLAGS.flags_by_module_dict()["dppa_jax.flags"]


@pytest.mark.parametrize(
    ("given", "meant"), [("--rat=0.5", "rate"), ("--coeficient=1", "coefficient"), ("--ouput=x", "output")]
)
def test_unknown_flag_shows_the_nearest(given, meant):
    with pytest.raises(flags.UnrecognizedFlagError, match=rf"Did you mean: .*{meant}"):
        launch(given)


def test_flag_of_the_wrong_type():
    with pytest.raises(flags.IllegalFlagValueError, match="--rate=much"):
        launch("--rate=much")


# ---- flagfiles


def test_flagfile_with_comments_is_the_same_as_flags(merge, tmp_path):
    flagfile = tmp_path / "merge.cfg"
    lines = ["# Reproduces nothing.", "", *merge.flags()[:3], "// flags of the method", *METHOD_FLAGS, "# the end"]
    flagfile.write_text("\n".join(lines))
    merge(*METHOD_FLAGS)
    launch(f"--flagfile={flagfile}", f"--output={tmp_path}/other")
    first, second = tree(merge.output), tree(tmp_path / "other")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["config.json"] == second["config.json"]


def test_flags_after_a_flagfile_win(merge, tmp_path):
    (tmp_path / "merge.cfg").write_text("--method=dare\n--coefficient=0.5\n")
    later = ("--method=task_arithmetic", "--coefficient=0.25")
    merge(*later)
    launch(f"--flagfile={tmp_path}/merge.cfg", *merge.flags(), f"--output={tmp_path}/other", *later)
    assert tree(merge.output)["model.safetensors"] == tree(tmp_path / "other")["model.safetensors"]


def test_flags_of_a_run_do_not_stay(merge):
    """Two runs in one process: what the first was given is no default of the second."""
    merge("--method=task_arithmetic", "--coefficient=0.5")
    first = tree(merge.output)["model.safetensors"]
    merge("--method=task_arithmetic", "--overwrite")
    assert tree(merge.output)["model.safetensors"] != first


def test_configs_parse(pytestconfig):
    """Every flagfile of the repository has known flags and values, and a header that starts with a comment."""
    from absl.testing import flagsaver

    configs = sorted((pytestconfig.rootpath / "configs").glob("*.cfg"))
    assert configs
    for config in configs:
        assert config.read_text().startswith("# "), config
        with flagsaver.flagsaver():
            flags.FLAGS(["dppa_jax.launch", f"--flagfile={config}"])
            configured = finetune_config() if flags.FLAGS.job == "finetune" else job_config()
            assert configured.base, config


# ---- the process


def test_error_of_a_process_is_a_line_and_status_1(merge):
    run = subprocess.run(
        [sys.executable, "-m", "dppa_jax.launch", *merge.flags(), "--method=dpa"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: --method=dpa: not one of ")
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr


def test_interruption_is_told(merge, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("dppa_jax.jobs.merge.run_merge", interrupted)
    with pytest.raises(SystemExit) as error:
        merge()
    assert error.value.code == "interrupted; the same command goes on from there"


def test_verbosity_shows_where_an_error_came_from(merge):
    with pytest.raises(ValueError, match=r"--rate: rate 2\.0"):
        merge("--rate=2", "--verbosity=1")
