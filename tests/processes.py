"""Jobs of several real processes on this machine, each with fake devices of its own."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

LAUNCH = [sys.executable, "-m", "dppa_jax.launch"]
IMPATIENT = "from dppa_jax.runtime import processes; processes.HEARTBEAT_SECONDS = 6"  # until one is taken for dead


def run_processes(
    count: int, command: Sequence[str], devices: int = 1, timeout: float = 300
) -> list[subprocess.CompletedProcess]:
    """Runs a command in `count` processes that find each other, and waits for all; their output is text.

    Args:
      command: what each runs; --coordinator, --num_processes and its own --process_id are added.
      devices: of each process.
      timeout: seconds, after which all are killed.

    Raises:
      AssertionError: they did not end in time; tells what each had said.
    """
    return finish(start_processes(count, command, devices), timeout)


def start_processes(count: int, command: Sequence[str], devices: int = 1) -> list[subprocess.Popen]:
    """The same without waiting, for tests that interfere; end them by `finish`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [*command, *together, f"--process_id={process}"],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for process in range(count)
    ]  # fmt: skip


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[subprocess.CompletedProcess]:
    """Waits for all of them; none is left when this returns."""
    killer = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    outputs: list[tuple[str, str]] = [("", "")] * len(processes)

    def read(number: int) -> None:  # all at once, as one whose output is not read does not go on
        outputs[number] = processes[number].communicate()

    readers = [threading.Thread(target=read, args=(number,)) for number in range(len(processes))]
    killer.start()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    late = killer.finished.is_set()
    killer.cancel()
    found = [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
    assert not late, f"not ended after {timeout:g} s:\n{said(found)}"
    return found


def check_success(found: Sequence[subprocess.CompletedProcess]) -> None:
    assert not any(process.returncode for process in found), said(found)


def said(found: Sequence[subprocess.CompletedProcess]) -> str:
    """What the processes wrote, for a message."""
    return "\n".join(f"process {i} ended with {p.returncode}:\n{p.stdout}{p.stderr}" for i, p in enumerate(found))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
