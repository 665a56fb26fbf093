"""What the project says of itself is so."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import dppa_jax
from dppa_jax.config.advise import AUTO
from dppa_jax.flags import BY_NAME
from dppa_jax.jobs import JOBS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dppa_jax"
README = (ROOT / "README.md").read_text()
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
READMES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/README.md")), *(room / "README.md" for room in ROOMS))
}
OTHERS = {  # flags of absl, pytest and launch/local.py
    *("flagfile", "help", "helpshort"),
    "dist",
    *("processes", "devices"),
}
every_readme = pytest.mark.parametrize("name", READMES)


def commands() -> list[str]:
    """The one-line commands that the README shows."""
    return re.findall(r"^```\n(pip .*)\n```$", README, re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_two_commands_set_everything_up():
    demo, tests = commands()
    assert demo.endswith("python -m dppa_jax.launch --flagfile=configs/demo3.cfg")
    assert (ROOT / "configs" / "demo3.cfg").is_file()
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_top_readme_is_short():
    assert len(README.split()) <= 900


def test_every_room_has_a_readme_with_a_line_for_every_file():
    for room in ROOMS:
        text = READMES[f"dppa_jax/{room.name}/README.md"]
        files = {path.name for path in room.iterdir() if path.is_file()} - {"__init__.py", "README.md"}
        assert {file for file in files if f"`{file}`" not in text} == set(), room.name
        assert text.count("## How to add something\n") == 1, room.name


@every_readme
def test_every_link_leads_to_a_file_and_a_heading(name):
    here = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)]+)\)", READMES[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = here / path if path else ROOT / name
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@every_readme
def test_every_flag_method_and_job_exists(name):
    text = READMES[name]
    switches = {f"no{flag}" for flag, said in BY_NAME.items() if said.kind == "bool"}
    flags = set(re.findall(r"(?<![\w-])--([A-Za-z]\w*)", text))
    assert flags <= BY_NAME.keys() | switches | OTHERS
    given = {value for values in re.findall(r"--(?:merge_)?methods?=([\w,+]+)", text) for value in values.split(",")}
    assert {value.split("+")[0] for value in given} - {"NAME", AUTO} <= dppa_jax.methods.keys()
    jobs = re.findall(r"--job=(\w+)", text) + re.findall(r"(?:`|^)dppa_jax (\w+)(?=`| -| \\\\)", text, re.MULTILINE)
    assert set(jobs) - {"JOB"} <= JOBS.keys()


@every_readme
def test_every_path_and_module_exists(name):
    text = READMES[name]
    paths = set(re.findall(r"\b(?:tests|configs|launch)/[\w/]+(?:\.\w+)?", text)) - {"configs/NAME.cfg"}
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    for module in re.findall(r"python -m (dppa_jax[\w.]*)", text):
        assert find_spec(module), module


def test_the_readme_of_methods_has_a_row_for_every_method():
    text = (ROOT / "dppa_jax" / "delta" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    shown = {name: [cell.strip("`").replace("–", "") or None for cell in cells] for name, *cells in rows}
    assert shown == {
        name: [method.score, method.allocate, method.scale, method.combine] for name, method in dppa_jax.methods.items()
    }


def test_top_level_is_as_designed():
    allowed = {"dppa_jax", "launch", "configs", "tests"}
    ignored = {"runs", "build"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {name for name in folders - ignored if not name.endswith(".egg-info")} <= allowed
