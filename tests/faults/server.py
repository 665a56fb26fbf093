"""Runs command lines in forks of a process that has imported the program: each with a fault, or without one."""

import ctypes
import json
import os
import sys
import traceback

import command
import jax  # noqa: F401

import dppa_jax.jobs.convert
import dppa_jax.jobs.write_merge  # noqa: F401


def child(flags: list[str], fault: list, log: str) -> int:
    """Run a command line with its output in a file; the last line tells how many calls were counted."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if fault:
        directory, count, number, stays = fault
        ctypes.CDLL(None).calls_left.restype = ctypes.c_long
        ctypes.CDLL(None).arm(os.fsencode(directory), ctypes.c_long(count), number, stays)
    try:
        command.launch(*flags)
        os.write(2, b"%d" % (fault[1] - ctypes.CDLL(None).calls_left() if fault else 0))
    except SystemExit as error:
        os.write(2, f"{error.code}\n".encode())
        return 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 2
    return 0


def main() -> None:
    for line in sys.stdin:
        process = os.fork()
        if not process:
            os._exit(child(*json.loads(line)))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
