"""The child process of `limited`: it computes what strangers wrote, within limits on time and memory.

It is run as a script, with the name of a piece of `WORK`. It reads questions as JSON lines, seconds before arguments,
and answers each with a JSON value on a line. It needs only what the work itself imports.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

READY = "ready"
CLOCK_FACTOR = 12  # a question may take this many times its seconds by the clock, on a machine with other work
TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
MOST_TEXT = 50_000_000  # characters that chat templates may write for the prompts of a task


def equal(gold: str, predicted: str) -> bool:
    """Return whether two LaTeX formulas are equal, by sympy; False for what it cannot read or subtract."""
    from sympy import simplify
    from sympy.parsing.latex import parse_latex

    try:
        return bool(simplify(parse_latex(gold) - parse_latex(predicted)) == 0)
    except ImportError:
        raise
    except Exception:  # not a formula, not subtractable, too deep, out of memory: the rule says unequal
        return False


def render(template: str, variables: Mapping[str, str], prompts: Sequence[str]) -> dict[str, str | list[str]]:
    """Return {"texts": each prompt in a chat template}, or {"error": why the template does not render}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, written = [], 0
    try:
        for prompt in prompts:
            chat = [{"role": "user", "content": prompt}]
            (text,), _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **variables)
            written += len(text)
            if written > MOST_TEXT:
                return {"error": f"it writes more than {MOST_TEXT} characters"}
            texts.append(text)
    except Exception as error:  # the template is a program, which may raise anything
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"texts": texts}


WORK = {  # by name: the function, a question that loads what it needs, and the memory that a question may take
    "equal": (equal, ("1", "1"), 2 << 30),
    "render": (render, ("{{ messages[0].content }}", {}, ["text"]), 1 << 30),
}


def main() -> None:
    """Answer questions from stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    work, first, memory = WORK[sys.argv[1]]
    try:
        work(*first)  # before the first question's time begins
    except ImportError as error:
        print(str(error).replace("\n", " "), file=answers, flush=True)
        return
    memory += _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        seconds, *question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # either timer ends the process: no handler is set
        signal.setitimer(signal.ITIMER_REAL, CLOCK_FACTOR * seconds)
        answer = json.dumps(work(*question))
        for timer in TIMERS:
            signal.setitimer(timer, 0)
        print(answer, file=answers, flush=True)


def _address_space() -> int:
    """Return the bytes of address space that this process has; 0 where the system does not say it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main()
