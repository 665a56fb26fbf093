#!/usr/bin/env python
"""Tries a run of several processes out: all of them on this machine, on fake devices of its CPU.

    python launch/local.py --processes=2 --devices=2 -- --flagfile=configs/merge3.cfg --factors=1.8,1.3 \
      --coefficient=0.5 --evaluate= --workdir=runs --output=merged

Hardware: any machine; it is not faster than one process, which has all cores as well. What is written has the same bits
as what the same flags write on one host or many.
How to start: as above, in the environment that dppa_jax is installed in; flags after -- are the program's.
What to edit: nothing.

Each line of output begins with the number of its process. When one process fails, the others have a minute to say why
they end, too; then they are ended. Ctrl-C and SIGTERM go to all. The status is that of the first process that failed.
"""

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 60  # for the others, when one has failed; they learn of it themselves and say so
LAST_SECONDS = 10  # from SIGTERM to SIGKILL
LOOK_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    usage = "local.py [--processes=2] [--devices=1] -- FLAGS OF DPPA_JAX"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2, help="processes to start")
    parser.add_argument("--devices", type=int, default=1, help="fake devices of each")
    own = parser.parse_args(arguments[:split])
    program = [sys.executable, "-m", "dppa_jax.launch", *arguments[split + 1 :]]
    program += [f"--coordinator=localhost:{free_port()}", f"--num_processes={own.processes}"]
    commands = [[*program, f"--process_id={number}"] for number in range(own.processes)]
    secret = {"DPPA_JAX_SECRET": secrets.token_hex(32)}  # other users of this machine reach the port, too
    return run(commands, fake_devices(own.devices) | secret)


def run(commands: list[list[str]], environment: dict[str, str]) -> int:
    """Run the commands at the same time; the status of the first that fails, or 0 (a signal's is 128 + its number)."""
    processes: list[subprocess.Popen] = []
    ending = threading.Event()

    def forward(number: int, _) -> None:
        ending.set()
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for command in commands:
        # a session of its own, so that a terminal's Ctrl-C reaches it once, from here
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipe))
    printers = [threading.Thread(target=show, args=numbered, daemon=True) for numbered in enumerate(processes)]
    for printer in printers:
        printer.start()
    status = supervise(processes, ending)
    for printer in printers:
        printer.join(LAST_SECONDS)  # what a killed process has started may keep its output open
    return status


def supervise(processes: list[subprocess.Popen], ending: threading.Event) -> int:
    """Wait for all processes; once one has failed, or the end is asked for, not for longer than GRACE_SECONDS."""
    while any(process.poll() is None for process in processes) and not first_failure(processes) and not ending.is_set():
        time.sleep(LOOK_SECONDS)
    status = first_failure(processes)
    for seconds, end in ((GRACE_SECONDS, subprocess.Popen.terminate), (LAST_SECONDS, subprocess.Popen.kill)):
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            status = status or first_failure(processes)
        for process in processes:
            end(process)  # nothing, where it has ended
    for process in processes:
        process.wait()
    status = status or first_failure(processes)
    return 128 - status if status < 0 else status


def first_failure(processes: list[subprocess.Popen]) -> int:
    return next((process.returncode for process in processes if process.returncode), 0)


def show(number: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"[{number}] {line}", end="", flush=True)


def fake_devices(count: int) -> dict[str, str]:
    """The environment in which JAX has so many devices, all of them this machine's CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
