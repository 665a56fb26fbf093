"""A child process that talks JSON lines: what it answers, how its failures are told, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dppa_jax.evaluate.worker import Worker, WorkerError

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"heard": json.loads(line)}), flush=True)
"""
GRANDCHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
"""
SLEEP = "import time; time.sleep(300)\n"


@pytest.fixture
def started(tmp_path):
    """started(program) is a worker that runs a Python program."""
    workers = []

    def start(program: str) -> Worker:
        workers.append(Worker([sys.executable, "-c", program], tmp_path / "log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close(grace=0)


def members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def wait_for(condition, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def test_messages_are_answered_in_turn(started):
    worker = started(ECHO)
    for message in ({"text": "naïve\nwords", "numbers": [1, 2.5, None]}, {}, {"again": True}):
        assert worker.ask(message, 30) == {"heard": message}


def test_messages_larger_than_a_pipe_go_both_ways(started):
    message = {"tokens": list(range(300_000))}
    assert started(ECHO).ask(message, 60) == {"heard": message}


def test_a_crash_is_told_with_the_last_lines(started, tmp_path):
    worker = started("for i in range(40): print('line', i, file=__import__('sys').stderr)\nraise SystemExit('no luck')")
    with pytest.raises(WorkerError) as error:
        worker.ask({}, 30)
    told = str(error.value)
    assert "ended with exit code 1" in told
    assert told.endswith("no luck")
    assert "line 39" in told
    assert "line 20" not in told
    assert str(tmp_path / "log") in told


def test_a_signal_is_told_by_name(started):
    worker = started("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        worker.ask({}, 30)


@pytest.mark.parametrize("answer", ["'Loading model...'", "'[1, 2]'"])
def test_an_answer_that_is_no_json_object_is_a_failure(started, answer):
    with pytest.raises(WorkerError, match="no JSON object"):
        started(f"print({answer}, flush=True); input()").ask({}, 30)


def test_a_hang_ends_at_the_timeout_with_all_that_the_child_started(started):
    worker = started(GRANDCHILD + "print('thinking', file=sys.stderr, flush=True)\n" + SLEEP)
    assert wait_for(lambda: len(members(worker.pid)) == 2)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)did not answer within 0.5 s.*thinking"):
        worker.ask({}, 0.5)
    assert time.monotonic() - began < 10
    assert not members(worker.pid)
    assert not worker.alive


def test_after_a_failure_there_are_no_more_answers(started):
    worker = started(SLEEP)
    for _ in range(2):
        with pytest.raises(WorkerError):
            worker.ask({}, 0.1)


def test_a_sign_of_work_gives_the_child_its_time_again(started):
    worker = started(
        """
import json, sys, time
for line in sys.stdin:
    for i in range(4):
        time.sleep(0.5)
        print(json.dumps({"working": i}), flush=True)
    print(json.dumps({"done": True}), flush=True)
"""
    )
    assert worker.ask({}, timeout=20) == {"done": True}  # and Python has started
    assert worker.ask({}, timeout=1.5) == {"done": True}


def test_close_ends_the_child_and_what_it_started(started):
    worker = started(GRANDCHILD + ECHO)
    worker.ask({}, 30)
    assert len(members(worker.pid)) == 2
    worker.close()
    assert not members(worker.pid)
    worker.close()  # again, for nothing


def test_the_log_of_an_earlier_child_is_kept_and_not_told(started, tmp_path):
    (tmp_path / "log").write_text("an earlier failure\n")
    with pytest.raises(WorkerError) as error:
        started("raise SystemExit('this failure')").ask({}, 30)
    assert "an earlier failure" not in str(error.value)
    assert "an earlier failure" in (tmp_path / "log").read_text()


def test_a_program_that_is_not_there_is_told(tmp_path):
    with pytest.raises(WorkerError, match=r"/no/such/python cannot be started: No such file"):
        Worker(["/no/such/python"], tmp_path / "log")


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "ends"])
def test_the_child_does_not_outlive_this_interpreter(tmp_path, end):
    program = f"""
import pathlib, sys, time
from dppa_jax.evaluate.worker import Worker
worker = Worker([sys.executable, "-c", {ECHO!r}], pathlib.Path({str(tmp_path / "log")!r}))
worker.ask({{}}, 30)
print(worker.pid, flush=True)
{"time.sleep(300)" if end else ""}
"""
    root = Path(__file__).parent.parent.parent
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root)
    child = int(parent.stdout.readline())
    if end:
        assert members(child)
        parent.send_signal(end)
    parent.wait(60)
    assert wait_for(lambda: not members(child))
