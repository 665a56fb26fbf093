"""What the project says of itself is so."""

import re
from pathlib import Path

import dppa_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """The one-line commands that the README shows."""
    return re.findall(r"^```\n(pip .*)\n```$", README, re.MULTILINE)


def test_two_commands_set_everything_up():
    demo, tests = commands()
    assert demo.endswith("python -m dppa_jax.launch --flagfile=configs/demo3.cfg")
    assert (ROOT / "configs" / "demo3.cfg").is_file()
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


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
