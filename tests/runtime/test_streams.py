"""What is printed: streams that outlast their readers, and names that no terminal and no markup obeys."""

import io
import subprocess
import sys

import pytest
from absl import logging
from command import Merge

from dppa_jax.report.tables import Cell, ResultTable
from dppa_jax.runtime import progress
from dppa_jax.runtime.streams import LogFormatter

NAME = "[/x] [red]a[/red] :smile: \x1b[2J caf\udce9"
SHOWN = "[/x] [red]a[/red] :smile: \\x1b[2J caf\\udce9"

WORK = """
import sys
from dppa_jax.runtime.streams import open_streams
open_streams()
with open("shard", "wb", buffering=0) as shard:
    for i in range(3):
        print("x" * 70_000, "é", flush=True)
        print("y" * 70_000, "é", file=sys.stderr, flush=True)
    shard.write(b"weights")
print("still here")
"""


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", "<&- >&- 2>&-", "2>&1 | true", "2>/dev/full", ">/dev/full"])
def test_a_run_outlasts_its_streams_and_writes_no_log_into_a_file(tmp_path, redirect):
    """Closed from the start, a pipe that ends, a full disk."""
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    environment = {"PYTHONPATH": ":".join(sys.path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = ["bash", "-c", f"set -o pipefail; {sys.executable} work.py {redirect}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert run.returncode == 0
    assert (tmp_path / "shard").read_bytes() == b"weights"
    assert b"Traceback" not in run.stderr
    if redirect == ">/dev/full":
        assert b"what is printed is lost from here on: No space left on device" in run.stderr


def test_a_merge_without_any_stream_is_whole(merge: Merge, capfd):
    merge("--method=task_arithmetic")
    words = [sys.executable, "-m", "dppa_jax.launch", *merge.flags(), "--method=task_arithmetic", "--overwrite"]
    before = (merge.output / "model.safetensors").read_bytes()
    run = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *words], cwd=merge.root)
    assert run.returncode == 0
    assert (merge.output / "model.safetensors").read_bytes() == before


def test_tables_show_names_as_they_are(capsys):
    table = ResultTable(NAME, NAME, (NAME,), {(NAME, NAME): [Cell((0.5,))]}, (NAME,))
    progress.console().print(table.printed())
    progress.console().print(NAME, soft_wrap=True)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert printed.splitlines()[-1] == SHOWN
    assert printed.count(SHOWN) == 7


@pytest.mark.parametrize("show", [progress.steps, progress.stage])
def test_bars_show_names_as_they_are(monkeypatch, show):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    with show(NAME, 2):
        shown = progress.sys.stderr
    assert SHOWN in shown.getvalue()
    assert "\x1b[2J" not in shown.getvalue()


def test_log_lines_show_names_as_they_are():
    record = logging.get_absl_logger().makeRecord("absl", 20, "file.py", 1, "made %s", (NAME,), None)
    assert LogFormatter().format(record).endswith(f"made {SHOWN}")
