"""Compute what strangers wrote, such as formulas and chat templates, in a child process that cannot hang its parent.

A model may write what sympy computes for ever, or with all memory (9^{9^{9^9}}), in places where no Python signal
handler is reached; and a chat template is a program. So the child has a limit on its memory, and the operating system
ends it by a timer. `limited_worker.py` is the child.
"""

import atexit
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dppa_jax.evaluate.limited_worker import READY, TIMERS
from dppa_jax.runtime.reading import parse_json

WORKER = Path(__file__).with_name("limited_worker.py")


class LimitedChild:
    """A child process. The first question starts it; after it has been ended, the next question starts it again.

    Args:
      work: what it does, a key of `limited_worker.WORK`.
      name: what messages call it.
      fix: a command that makes the child start where a library is missing.
    """

    def __init__(self, work: str, name: str, fix: str):
        self._work, self._name, self._fix = work, name, fix
        self._process: subprocess.Popen | None = None
        atexit.register(self.close)

    def ask(self, question: list, seconds: float, shape: Any) -> Any:
        """Return the answer; None when the child took too long or too much memory, or ended in another way.

        Args:
          question: the arguments of the work; what JSON cannot hold is sent as text.
          seconds: of processor time; by the clock it may take twelve times as long.
          shape: of the answer, see `parse_json`.

        Raises:
          ChildProcessError: the child does not start.
        """
        for _ in range(2):  # once more if the process was ended from outside
            if self._process is None:
                self._start()
            try:
                answer = self._exchange(json.dumps([seconds, *question], default=str) + "\n")
            except BaseException:  # e.g. an interrupt: the next answer would belong to this question
                self.close()
                raise
            if answer.endswith("\n"):
                return parse_json(answer, f"the answer of {self._name}", shape)
            ended_by = -self._process.wait()
            self.close()
            if ended_by in TIMERS.values():
                break
        return None

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None

    def _exchange(self, line: str) -> str:
        """Send a line and return the answer; without its end when the child has ended."""
        with suppress(BrokenPipeError):  # the child has ended; the missing answer will say so
            self._process.stdin.write(line)
            self._process.stdin.flush()
        return self._process.stdout.readline()

    def _start(self) -> None:
        """Start the child and wait until it has loaded its libraries."""
        # -P: Python must not take the modules beside the worker for libraries of the same names
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), self._work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # else Ctrl-C would end it, and that would pass for a wrong answer
        )
        first_line = self._process.stdout.readline().strip()
        if first_line != READY:
            self.close()
            raise ChildProcessError(f"{self._name} does not start: {first_line or 'its process ended'}; {self._fix}")
