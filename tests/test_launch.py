"""The command line: the first word, help, flagfiles, densities, spelling, and what the process says when it ends."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import grain  # noqa: F401  defines flags, which flagsaver would take back
import hypothesis
import pytest
from absl import flags
from absl.testing import flagsaver
from command import launch, tree
from hypothesis import strategies as st

from dppa_jax import launch as program
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.score import SCORES
from dppa_jax.flags import GROUPS, command, read_flags
from dppa_jax.jobs import JOBS

METHOD_FLAGS = ("--method=dare", "--rate=0.7", "--seed=3", "--coefficient=math=0.5")
SLOW = pytest.mark.slow


MODELS = ("--base=demo:base", "--expert=math=demo:math", "--expert=law=demo:law")


def printed_by(monkeypatch, capsys, *given: str) -> str:
    monkeypatch.setattr(sys, "argv", ["dppa_jax", *given])
    program.run()
    return capsys.readouterr().out


def parsed(*given: str) -> dict:
    """The values of all flags after these arguments."""
    with flagsaver.flagsaver():
        assert len(flags.FLAGS(["dppa_jax", *program.arguments(given)])) == 1
        return read_flags()


# ---- the first word, and none


def script(*given: str) -> list[str]:
    """What pip's script `dppa_jax` does."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["dppa_jax"].split(":")
    return [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())", *given]


def module(*given: str) -> list[str]:
    return [sys.executable, "-m", "dppa_jax.launch", *given]


@pytest.mark.parametrize("program", [script, pytest.param(module, marks=SLOW)])
def test_the_first_word_is_the_job(program, merge):
    imagined = "--device_memory=1"  # no speed is measured for the plan
    given = program("plan", *merge.flags(), imagined, f"--workdir={merge.root / 'runs'}")
    run = subprocess.run(given, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "base + 2 experts" in run.stdout
    assert (merge.root / "runs" / "plan.json").is_file()
    assert not merge.output.exists()


@pytest.mark.parametrize(
    ("word", "meant", "program"),
    [
        ("mrege", "merge", script),
        pytest.param("mrege", "merge", module, marks=SLOW),
        *(
            pytest.param(*words, program, marks=SLOW)
            for words in (("evalute", "evaluate"), ("planning", "plan"))
            for program in (script, module)
        ),
    ],
)
def test_a_mistyped_job_gets_the_nearest(program, word, meant):
    run = subprocess.run(program(word, "--base=x"), capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: --job={word}: not one of {', '.join(JOBS)}.")
    assert run.stderr.endswith(f"Did you mean '{meant}'?\n")


def test_the_first_word_counts_also_beside_a_flagfile_with_a_job(tmp_path):
    (tmp_path / "report.cfg").write_text("--job=report\n")
    assert parsed("plan", f"--flagfile={tmp_path}/report.cfg")["job"] == "plan"
    assert parsed(f"--flagfile={tmp_path}/report.cfg")["job"] == "report"


def test_without_arguments_a_screen_says_what_to_type_first(monkeypatch, capsys):
    printed = printed_by(monkeypatch, capsys)
    assert len(printed.splitlines()) <= 30
    assert max(map(len, printed.splitlines())) <= 120
    commands = [shlex.split(line) for line in printed.replace("\\\n", "").splitlines() if line.startswith("  dppa_jax")]
    assert len(commands) == 2
    for name, *given in commands:
        assert name == "dppa_jax"
        assert JOBS["merge"].config(parsed(*given)).output
    assert all(re.search(rf"^  {job} ", printed, re.MULTILINE) for job in JOBS)
    assert "--helpshort" in printed


def test_every_job_can_be_imported():
    for job in JOBS.values():
        found, _, name = job.function.partition(":")
        assert callable(getattr(__import__(found, fromlist=[name]), name))


# ---- help


@pytest.mark.parametrize("flag", ["--helpshort", "-h"])
def test_short_help_names_every_flag_on_one_screen(monkeypatch, capsys, flag):
    printed = printed_by(monkeypatch, capsys, flag)
    assert len(printed.splitlines()) <= 60
    assert max(map(len, printed.splitlines())) <= 120
    assert all(f"--{flag.name}" in printed for flag in defined())
    assert all(job in printed for job in JOBS)


@pytest.mark.parametrize("flag", ["--helpshort", "--help"])
def test_help_shows_defaults(monkeypatch, capsys, flag):
    printed = printed_by(monkeypatch, capsys, flag)
    for name, value in (("rate", "0.9"), ("seed", "0"), ("resume", "true"), ("evaluator", "jax"), ("shape", "0.3b")):
        assert f"--{name}={value}" in printed
    assert "--method " in printed, "it has no default"


def test_help_explains_every_flag_in_a_group(monkeypatch, capsys):
    printed = printed_by(monkeypatch, capsys, "--help")
    assert set(re.findall(r"^  --(\w+)(?:=\S+)? +\w", printed, re.MULTILINE)) == {flag.name for flag in defined()}
    assert re.findall(r"^\w.*$", printed, re.MULTILINE)[1:] == list(GROUPS)
    assert max(map(len, printed.splitlines())) <= 120
    one_line = re.sub(r"\s+", " ", printed)
    for choices in (SCORES, METHODS, ("auto", "resident", "streamed")):
        assert f"[{', '.join(choices)}]" in one_line


def test_short_help_does_without_slow_imports():
    code = "import sys; from dppa_jax import launch; launch.run(); print(sorted({'jax', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code, "--helpshort"], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


def test_a_merge_does_without_slow_imports():
    code = "import sys, dppa_jax.jobs.merge; print(sorted({'flax', 'transformers', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


def defined() -> list[flags.Flag]:
    return flags.FLAGS.flags_by_module_dict()["dppa_jax.flags"]


WRONG_FLAGS = {
    "--rat=0.5": "--rat=0.5: no such flag. Did you mean 'rate'?",
    "--ouput=x": "--ouput=x: no such flag. Did you mean 'output'?",
    "--rate=much": "--rate=much: give a number.",
    "--rate=": "--rate=: give a number.",
    "--seed=1.5": "--seed=1.5: give a whole number of at most 18 digits.",
    "--seed=1" + "0" * 30: "give a whole number of at most 18 digits.",
    "--resume=maybe": "--resume=maybe: give true or false.",
    "--noresume=3": "--noresume=3 does not take an argument",
    "--verbosity=loud": "--verbosity=loud: invalid literal for int() with base 10: 'loud'",
    '--methods="dare': '--methods="dare: give values with commas between them.',
    "--base=a\nb": r"--base=a\nb: holds the control character '\n'; leave it out.",
    "--base=\x1b[2J": r"--base=\x1b[2J: holds the control character '\x1b'; leave it out.",
    "--device_memory=inf": "--device_memory=inf: give a finite number of GB.",
    "--device_memory=1e308": "--device_memory=1e+308: give a finite number of GB.",
    "--num_processes=-1": "--num_processes and --process_id need --coordinator=HOST:PORT, the first process's address.",
    "--seeds=0.5": "--seeds: '0.5' is not a whole number of at most 18 digits.",
    "--seeds=inf": "--seeds: 'inf' is not a whole number of at most 18 digits.",
    "--rates=0:1:1e-9": "--rates=0:1:1e-9: give numbers, or FIRST:LAST:STEP such as 0.1:0.9:0.1.",
}


@pytest.mark.parametrize("given", WRONG_FLAGS)
def test_a_wrong_flag_is_told_in_one_line(given):
    with pytest.raises(SystemExit) as error:
        launch("--job=report", *MODELS, "--evaluate=addition", "--methods=ties", given)
    assert error.value.code.startswith("error: ")
    assert error.value.code.endswith(WRONG_FLAGS[given])
    assert "\n" not in error.value.code


@pytest.mark.parametrize("job", [job for job in JOBS if job != "convert"])
def test_a_workdir_that_cannot_be_made_is_refused_before_the_work(merge, job):
    (merge.root / "file").write_text("")
    given = [f"--job={job}", f"--workdir={merge.root}/file/runs", "--evaluate=addition", "--methods=dppa"]
    message = merge.refusal(*given, f"--reference={merge.law}", "--shape=0.3b")
    assert f"--workdir={merge.root}/file/runs: {merge.root}/file is no directory; give a directory for the" in message


def test_a_workdir_that_may_not_be_written_to_is_refused(merge, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(merge.root))
    message = merge.refusal("--job=inspect", f"--workdir={merge.root}/runs")
    assert f"--workdir={merge.root}/runs: {merge.root} may not be written to" in message


# ---- flagfiles

WRONG_FLAGFILES = {
    b"# first\n--rat=0.5": "{file}:2: --rat=0.5: no such flag. Did you mean 'rate'?",
    b"--seed=0\n\n --rate=much": "{file}:3: --rate=much: give a number.",
    b"base=x": "{file}:1: unexpected argument 'base=x'; every input is a flag. Did you mean 'base'?",
    b"--base=x\n--expert=\xe9=x": "{file}:2: not UTF-8 (invalid continuation byte). A flagfile has a flag in each line",
    b"\x7fELF\0\0": r"{file}:1: \x7fELF\x00\x00: holds the control character '\x7f'; leave it out.",
    b"--base=a\0": r"{file}:1: --base=a\x00: holds the control character '\x00'; leave it out.",
    b"--flagfile={file}": "{file}:1: --flagfile={file}: the file includes itself; remove the line.",
    b"# next\n--flagfile=gone.cfg": "{file}:2: --flagfile=gone.cfg: No such file or directory; give a file of flags.",
    b"--flagfile={folder}": "{folder} is a directory in place of a file",
}


@hypothesis.settings(max_examples=50, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.one_of(st.binary(max_size=60), st.text("-=ratesdm01,.\n#/ \0", max_size=60).map(str.encode)))
def test_no_flagfile_gives_anything_but_flags_or_a_line(tmp_path, content):
    (tmp_path / "merge.cfg").write_bytes(content)
    told = "error: none"
    with flagsaver.flagsaver():
        try:
            program.parse(["dppa_jax", f"--flagfile={tmp_path}/merge.cfg"])
        except SystemExit as error:
            told = error.code
    assert re.fullmatch("error: .+", told)


@pytest.mark.parametrize("content", WRONG_FLAGFILES)
def test_a_wrong_flagfile_is_told_with_its_name_and_line(tmp_path, content):
    file = tmp_path / "merge.cfg"
    file.write_bytes(content.replace(b"{file}", bytes(file)).replace(b"{folder}", bytes(tmp_path)))
    with pytest.raises(SystemExit) as error:
        launch(f"--flagfile={file}")
    told = WRONG_FLAGFILES[content].format(file=file, folder=tmp_path)
    assert error.value.code.startswith(f"error: {told}")
    assert "\n" not in error.value.code


def test_a_flagfile_may_include_others_and_be_given_as_two_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "outer.cfg").write_text("--rate=0.5\n--flagfile=~/inner.cfg\n--seed=1\n")
    (tmp_path / "inner.cfg").write_text("--rate=0.6\n--seed=2\n")
    for given in (["--flagfile", "~/outer.cfg"], ["--flagfile=~/outer.cfg"]):
        with flagsaver.flagsaver():
            assert program.parse(["dppa_jax", *given, "--method=dare"]) == ["dppa_jax"]
            values = read_flags()
            assert (values["rate"], values["seed"], values["method"]) == (0.6, 1, "dare")


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
    configs = sorted((pytestconfig.rootpath / "configs").glob("*.cfg"))
    assert configs
    for config in configs:
        assert config.read_text().startswith("# "), config
        values = parsed(f"--flagfile={config}")
        configured = JOBS[values["job"]].config(values)
        assert getattr(configured, "run", configured).base, config


def test_the_command_of_a_run_repeats_it(tmp_path):
    (tmp_path / "merge.cfg").write_text("--rate=0.7\n--factors=1.2,1.1\n--tensor_rate=mlp=0\n")
    given = (*MODELS, "--seeds=0,1", "--noresume", "--device_memory=2.5", "--expert=law=elsewhere", "--score=random")
    values = parsed("search", f"--flagfile={tmp_path}/merge.cfg", *given)
    python, m, name, *again = shlex.split(command(values))
    assert (python, m, name) == ("python", "-m", "dppa_jax.launch")
    assert len(again) == len(given) + 3
    assert parsed(*again) == values


# ---- densities


@pytest.mark.parametrize(
    ("density", "rate"),
    [
        ("--density=0.3", "--rate=0.7"),
        ("--density=0.9", "--rate=0.1"),
        ("--density=1", "--rate=0"),
        ("--tensor_density=mlp.up_proj=1", "--tensor_rate=mlp.up_proj=0.0"),
        ("--densities=0.1:0.3:0.1,0.05", "--rates=0.9,0.8,0.7,0.95"),
    ],
)
def test_a_density_is_one_minus_a_rate_and_told_as_a_rate(density, rate):
    by_density, by_rate = parsed(density), parsed(rate)
    assert by_density == by_rate
    assert command(by_density) == command(by_rate)
    assert "densit" not in command(by_density)


@pytest.mark.slow
def test_a_merge_at_a_density_has_the_bits_of_its_rate(merge):
    merge("--method=magnitude", "--density=0.2", "--tensor_density=o_proj=0.3")
    first = tree(merge.output)["model.safetensors"]
    merge("--method=magnitude", "--rate=0.8", "--tensor_rate=o_proj=0.7", "--overwrite")
    assert tree(merge.output)["model.safetensors"] == first


@pytest.mark.parametrize(
    ("rate", "density"),
    [("rate=0.8", "density=0.2"), ("tensor_rate=mlp=1", "tensor_density=q=1"), ("rates=0.8", "densities=0.3")],
)
def test_a_rate_and_its_density_together_are_refused(merge, rate, density):
    names = [f"--{text.partition('=')[0]}" for text in (rate, density)]
    message = merge.refusal(f"--{rate}", f"--{density}")
    assert f"{names[0]} and {names[1]} are both given" in message
    assert "give one of them" in message


@pytest.mark.parametrize("given", ["--density=1.5", "--density=nan", "--tensor_density=mlp=-1", "--densities=2"])
def test_a_density_outside_its_bounds_is_told_as_a_density(merge, given):
    message = merge.refusal(given)
    assert f"{given.partition('=')[0]}: density " in message
    assert "is outside [0, 1]; it is the share that is kept, 1 − rate" in message


# ---- no method


@pytest.mark.parametrize("job", ["merge", "plan", "search"])
def test_without_a_method_two_good_choices_are_told(merge, job):
    given = [flag for flag in merge.flags() if not flag.startswith("--method")]
    error, *choices = merge.refusal(f"--job={job}", "--evaluate=addition", of=given).splitlines()
    assert error.startswith("error: --method is missing")
    assert len(choices) == 2
    for line in choices:
        assert len(line) <= 120
        advised = [word for word in line.split() if word.startswith("--")]
        values = parsed(*given, *advised)
        assert JOBS["merge"].config(values).merge.method == values["method"]


def test_a_report_needs_no_method_but_for_what_it_writes():
    given = ("report", *MODELS, "--methods=dare,ties", "--evaluate=addition,clause_type")
    config = JOBS["report"].config(parsed(*given))
    assert config.sweep.methods == ("dare", "ties")
    assert "--method=" not in config.run.command
    with pytest.raises(ValueError, match="--method is missing"):
        JOBS["report"].config(parsed(*given, "--output=merged"))


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        pytest.param("--factors=1,1", True, marks=SLOW),
        ("--seed=0", True),
        ("--factors=1,1.1", False),
        pytest.param("--method=dp", False, marks=SLOW),
    ],
)
def test_dppa_with_plain_factors_says_that_it_amplifies_nothing(merge, caplog, given, warned):
    with caplog.at_level("WARNING"):
        merge("--rate=0.8", given)
    assert ("amplifies nothing" in caplog.text) == warned
    assert ("--factors=search --evaluate=TASKS" in caplog.text) == warned


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
