"""Decide whether two formulas in LaTeX are equal, by sympy in a child process that cannot hang its parent.

A model may write what sympy computes for ever, or with all memory (9^{9^{9^9}}), in places where no Python signal
handler is reached. So the child has a limit on its memory, and the operating system ends it by a timer.

This file is both sides. Imported, it asks. Run as a script, it is the child: it reads pairs as JSON lines and answers
each with true or false.
"""

import atexit
import json
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from absl import logging

SECONDS = 5.0  # of processor time for a pair; an answer of MATH takes a hundredth of a second
CLOCK_FACTOR = 12  # a pair may take this many times as long by the clock, on a machine with other work
MEMORY = 2 << 30  # bytes of address space; sympy with its parser takes a quarter of it
TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
READY = "ready"


@lru_cache(maxsize=1 << 16)  # the candidates of a search give the same few wrong answers
def equivalent(gold: str, predicted: str, seconds: float = SECONDS) -> bool:
    """Return whether the difference of two LaTeX formulas simplifies to 0.

    The answer is also False where the parser does not read a formula, and where a pair takes more than `seconds` of
    processor time, twelve times that by the clock, or more than `MEMORY`. The parser stops at the first sign that it
    cannot place. So "5,6" equals "5", as it does in every evaluation that uses this parser.

    Raises:
      ChildProcessError: sympy or its parser cannot be loaded.
    """
    return _CHILD.ask([gold, predicted, seconds])


class _Child:
    """The child process. The first question starts it; after it has been ended, the next question starts it again."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        atexit.register(self.close)

    def ask(self, question: list) -> bool:
        """Return the child's verdict on [gold, predicted, seconds]; False when it took too long or too much memory."""
        for _ in range(2):  # once more if the process was ended from outside
            if self.process is None:
                self._start()
            try:
                answer = self._exchange(json.dumps(question) + "\n")
            except BaseException:  # e.g. an interrupt: the next answer would belong to this question
                self.close()
                raise
            if answer:
                return json.loads(answer)
            ended_by = -self.process.wait()
            self.close()
            if ended_by in TIMERS.values():
                break
        logging.warning(
            "%r against %r: sympy took more than %g s, or too much memory; they count as unequal", *question
        )
        return False

    def _exchange(self, line: str) -> str:
        """Send a line and return the answer; empty when the child has ended."""
        with suppress(BrokenPipeError):  # the child has ended; the missing answer will say so
            self.process.stdin.write(line)
            self.process.stdin.flush()
        return self.process.stdout.readline()

    def close(self) -> None:
        """End the child."""
        if self.process is not None:
            self.process.kill()
            with suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None

    def _start(self) -> None:
        """Start the child and wait until it has loaded sympy."""
        # -P: Python must not take the modules beside this file for libraries of the same names
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # else Ctrl-C would end it, and that would pass for a wrong answer
        )
        first_line = self.process.stdout.readline().strip()
        if first_line != READY:
            self.close()
            raise ChildProcessError(
                f"the math scorer does not start: {first_line or 'its process ended'}; run "
                "`pip install sympy antlr4-python3-runtime==4.11.*`."
            )


_CHILD = _Child()


def _main() -> None:
    """Answer questions from stdin until it ends."""
    try:
        _equal("1", "1")  # loads sympy and the parser before the first question's time begins
    except ImportError as error:
        print(str(error).replace("\n", " "), flush=True)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(READY, flush=True)
    for line in sys.stdin:
        gold, predicted, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # either timer ends the process: no handler is set
        signal.setitimer(signal.ITIMER_REAL, CLOCK_FACTOR * seconds)
        try:
            equal = _equal(gold, predicted)
        except Exception:  # not a formula, not subtractable, too deep, out of memory: the rule says unequal
            equal = False
        for timer in TIMERS:
            signal.setitimer(timer, 0)
        print(json.dumps(equal), flush=True)


def _equal(gold: str, predicted: str) -> bool:
    """Return whether two LaTeX formulas are equal, by sympy."""
    from sympy import simplify
    from sympy.parsing.latex import parse_latex

    return bool(simplify(parse_latex(gold) - parse_latex(predicted)) == 0)


if __name__ == "__main__":
    _main()
