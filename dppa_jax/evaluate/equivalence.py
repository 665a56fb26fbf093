"""Whether two formulas in LaTeX are equal, decided by sympy in a child process that cannot hang its parent.

This file is both sides: imported, it asks; run as a script, it is the child, which reads pairs as JSON lines and
answers each with true or false. sympy can take for ever or all memory on what a model writes (9^{9^{9^9}}), in places
where no Python handler is reached, so the child has a limit on its memory and the system ends it by a timer.
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

SECONDS = 5.0  # of processor time per pair; the golds of MATH take a hundredth of a second each
WAITING = 12  # times as long by the clock, for a machine with other work
MEMORY = 2 << 30  # bytes of address space; sympy with its parser takes a quarter of it
TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
READY = "ready"


@lru_cache(maxsize=1 << 16)  # a search scores the same few wrong answers for every candidate
def equivalent(gold: str, predicted: str, seconds: float = SECONDS) -> bool:
    """Whether the difference of two LaTeX formulas simplifies to 0.

    False as well for what the parser does not read, and for a pair that takes more than `seconds` of processor time,
    twelve times that by the clock, or `MEMORY` of memory. The parser stops at the first sign that it cannot place, so
    "5,6" equals "5", as it does for everyone who scores by it.

    Raises:
      ChildProcessError: sympy or its parser cannot be loaded.
    """
    return _CHILD.ask([gold, predicted, seconds])


class _Child:
    """The child process; started by the first question, and again by the next one after it has been ended."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        atexit.register(self.close)

    def ask(self, question: list) -> bool:
        for _ in range(2):  # once more for a process that was ended from outside
            if self.process is None:
                self._start()
            try:
                answer = self._exchange(json.dumps(question) + "\n")
            except BaseException:  # an interrupt between question and answer: the next answer would be this one's
                self.close()
                raise
            if answer:
                return json.loads(answer)
            ended_by = -self.process.wait()
            self.close()
            if ended_by in TIMERS.values():
                break
        logging.warning("%r against %r: sympy took over %g s, or too much memory: unequal", *question)
        return False

    def _exchange(self, line: str) -> str:
        with suppress(BrokenPipeError):  # it has ended, as the missing answer says
            self.process.stdin.write(line)
            self.process.stdin.flush()
        return self.process.stdout.readline()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None

    def _start(self) -> None:
        # -P: the modules beside this file are not to be taken for libraries of the same names
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # an interrupt of the terminal would end it, and pass for a wrong answer
        )
        said = self.process.stdout.readline().strip()
        if said != READY:
            self.close()
            raise ChildProcessError(
                f"the math scorer does not start: {said or 'its process ended'}; it needs "
                "`pip install sympy antlr4-python3-runtime==4.11.*`."
            )


_CHILD = _Child()


def _main() -> None:
    try:
        _equal("1", "1")  # loads sympy and the parser outside any question's time
    except ImportError as error:
        print(str(error).replace("\n", " "), flush=True)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(READY, flush=True)
    for line in sys.stdin:
        gold, predicted, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # either ends the process: no handler is set
        signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
        try:
            found = _equal(gold, predicted)
        except Exception:  # not a formula, not subtractable, too deep, out of memory: the rule says unequal
            found = False
        for timer in TIMERS:
            signal.setitimer(timer, 0)
        print(json.dumps(found), flush=True)


def _equal(gold: str, predicted: str) -> bool:
    from sympy import simplify
    from sympy.parsing.latex import parse_latex

    return bool(simplify(parse_latex(gold) - parse_latex(predicted)) == 0)


if __name__ == "__main__":
    _main()
