"""A signal ends a run with its cleaning up, also when it arrives where Python drops exceptions."""

import signal
import subprocess
import sys

import pytest

COLLECTING = """
import gc, time
from dppa_jax.runtime.signals import end_on_signals

def collecting(phase, info):
    gc.callbacks.clear()
    print("collecting", flush=True)
    time.sleep(10)  # the signal ends it, and is dropped

end_on_signals()
gc.callbacks.append(collecting)
try:
    gc.collect()
    time.sleep(10)
finally:
    print("cleaned up")
print("not ended")
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
def test_signal_within_a_garbage_collection_is_not_lost(name, status):
    with subprocess.Popen([sys.executable, "-c", COLLECTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"collecting\n", run.stderr.read()
        run.send_signal(getattr(signal, name))
        said, errors = run.communicate(timeout=30)
    assert said == b"cleaned up\n", errors
    assert run.returncode == status


SWALLOWING = """
import time
from dppa_jax.runtime import signals

signals.end_on_signals()
print("ready", flush=True)
try:
    time.sleep(10)
except BaseException:  # as native code may, that calls back into Python
    pass
signals.check()
print("not ended")
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
def test_signal_that_was_swallowed_ends_the_run_at_the_next_check(name, status):
    with subprocess.Popen([sys.executable, "-c", SWALLOWING], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"ready\n", run.stderr.read()
        run.send_signal(getattr(signal, name))
        said, errors = run.communicate(timeout=30)
    assert b"not ended" not in said, errors
    assert run.returncode == status
