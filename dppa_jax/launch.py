"""The program: `dppa_jax JOB --FLAG=VALUE ...`, `dppa_jax RECIPE.yaml OUTPUT`, or `python -m dppa_jax.launch`.

This module has what is the same for all jobs: the command line, logging, signals, errors, and the start of processes.
"""

import logging as python_logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags, logging

from dppa_jax.architecture.rules import nearest
from dppa_jax.config.option import choose
from dppa_jax.config.run import StartConfig
from dppa_jax.flags import BY_NAME, KINDS, Values, first_screen, make, read_flags, usage
from dppa_jax.jobs import JOBS
from dppa_jax.runtime.files import PACKAGE
from dppa_jax.runtime.reading import printable, read_text
from dppa_jax.runtime.signals import end_on_signals
from dppa_jax.runtime.streams import LogFormatter, open_streams

FLAGS = flags.FLAGS
RECIPES = (".yaml", ".yml")  # how the names of recipes end


# ---- the command line


class Word(NamedTuple):
    """A word of the command line, or a line of a flagfile with the place where it stands: "FILE:LINE: "."""

    text: str
    place: str = ""


def arguments(given: Sequence[str]) -> list[str]:
    """Return the flags that a command line stands for: a first word that is no flag is the job, or a recipe.

    >>> arguments(["plan", "--flagfile=merge.cfg"])
    ['--flagfile=merge.cfg', '--job=plan']
    >>> arguments(["merge.yaml", "merged", "--seed=1"])
    ['--recipe=merge.yaml', '--output=merged', '--seed=1']
    """
    if given and given[0].endswith(RECIPES) and not given[0].startswith("-"):
        outputs = [f"--output={word}" for word in given[1:2] if not word.startswith("-")]
        return [f"--recipe={given[0]}", *outputs, *given[1 + len(outputs) :]]
    if given and not given[0].startswith("-"):
        return [*given[1:], f"--job={given[0]}"]  # at the end, as it also counts where a flagfile has another job
    return list(given)


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags that follow the program's name, and return the name; end the process where one is wrong."""
    try:
        words = list(_with_flagfiles(map(Word, argv[1:])))
        _check_characters(words)
        try:
            name, *others = FLAGS([argv[0], *(word.text for word in words)])
        except (flags.Error, ValueError) as error:
            flag, message = _explained(error)
            raise ValueError(f"{_place(flag, words)}{message}") from None
        if others:
            message = f"unexpected argument {others[0]!r}; every input is a flag.{nearest(others[0], BY_NAME)}"
            raise ValueError(f"{_place(others[0], words)}{message}")
    except (ValueError, OSError) as error:
        sys.exit(_told(error))
    return [name]


def _with_flagfiles(words: Iterable[Word], inside: tuple[str, ...] = ()) -> Iterator[Word]:
    """Put the lines of a flagfile in the place of the flag that names it.

    Args:
      inside: the flagfiles that the words stand in.
    """
    words = iter(words)
    for word in words:
        flag, equals, file = word.text.partition("=")
        if flag not in ("--flagfile", "-flagfile"):
            yield word
            continue
        file = os.path.expanduser(file if equals else next(words, Word("")).text).strip()
        if not file:
            continue  # as absl does: a script may have none
        if (real := os.path.realpath(file)) in inside:
            raise ValueError(f"{word.place}{word.text}: the file includes itself; remove the line.")
        try:
            lines = read_text(file, fix="A flagfile has a flag in each line; save it as UTF-8.").split("\n")
        except OSError as error:
            raise ValueError(f"{word.place}--flagfile={file}: {error.strerror}; give a file of flags.") from None
        numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
        flagged = (Word(line, f"{file}:{number}: ") for number, line in numbered if line)
        yield from _with_flagfiles((line for line in flagged if not line.text.startswith(("#", "//"))), (*inside, real))


def _check_characters(words: Iterable[Word]) -> None:
    """Refuse control characters: no file or model has one in its name on purpose."""
    for text, place in words:
        if found := re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text):
            shown = printable(text, keep="")
            raise ValueError(f"{place}{shown}: holds the control character {found[0]!a}; leave it out.")


def _explained(error: Exception) -> tuple[str, str]:
    """Return the flag with its value that absl does not take, and what is wrong with it and what to do."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return error.flagvalue, f"{error.flagvalue}: no such flag.{nearest(error.flagname, BY_NAME)}"
    if isinstance(error, flags.IllegalFlagValueError):
        flag = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
        said = BY_NAME.get(flag.split("=")[0].lstrip("-"))
        return flag, f"{flag}: " + (f"give {KINDS[said.kind].takes}." if said else str(error.__context__))
    return "", str(error)


def _place(text: str, words: Iterable[Word]) -> str:
    """Return the file and line of a flag; nothing for one of the command line."""
    return next((word.place for word in words if word.text.lstrip("-") == text.lstrip("-")), "")


# ---- the process


def main(argv: Sequence[str]) -> None:
    """Do the job that the parsed flags ask for; `argv` holds the program's name."""
    from dppa_jax.runtime import processes

    try:
        _run(read_flags())
    except KeyboardInterrupt:
        processes.fail("interrupted", ended=True)
        sys.exit("interrupted; the same command goes on from there")
    except (ValueError, OSError, processes.ProcessFailedError) as error:
        processes.fail(str(error))
        if FLAGS.verbosity > 0:
            raise
        sys.exit(_told(error))
    except SystemExit as error:
        processes.fail(f"ended with status {error.code}", ended=True)
        raise
    except BaseException as error:
        processes.fail(f"{type(error).__name__}: {error}")
        raise


def _told(error: Exception) -> str:
    """Say an error as the process ends with it."""
    return f"error: {printable(str(error))}"


def _run(values: Values) -> None:
    from dppa_jax.runtime import start

    job = JOBS[choose("--job", values["job"], JOBS)]
    for replaced in (text for text in FLAGS.expert if text not in values["expert"]):
        logging.info("--expert=%s is replaced by a later one of that name", replaced)
    start.keep_compilations()
    start.keep_memory()
    _start_processes(make(StartConfig, values))
    if values["evaluator"] == "vllm":
        start.leave_memory_to_vllm()
    job.run(job.config(values))


def _start_processes(start: StartConfig) -> None:
    """Join the other processes, where there are some."""
    from dppa_jax.runtime import processes

    if start.coordinator and not JOBS[start.job].several:
        several = ", ".join(name for name, one in JOBS.items() if one.several)
        raise ValueError(f"--job={start.job} takes one process: leave out --coordinator. Several can do {several}.")
    if start.coordinator:
        processes.start(start.coordinator, start.num_processes, start.process_id)
    elif start.job != "plan" and (start.num_processes or start.process_id != -1):
        raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT, the first process's address.")


def _worth_telling(record: python_logging.LogRecord) -> bool:
    """Return whether a log line is a warning or ours: Orbax tells of every object it makes, matplotlib of its fonts."""
    return record.levelno >= python_logging.WARNING or Path(record.pathname).is_relative_to(PACKAGE)


def run() -> None:
    """Run the program on the arguments of this process."""
    open_streams()
    given, jobs = sys.argv[1:], {name: job.help for name, job in JOBS.items()}
    if not given:
        print(first_screen(jobs))
        return
    if asked := {"-h", "--helpshort", "--help", "--helpfull"} & set(given):
        print(usage(asked <= {"-h", "--helpshort"}, jobs))
        return
    end_on_signals()
    logging.set_verbosity(logging.INFO)
    FLAGS.set_default("logtostderr", True)  # to the stderr of the moment: above a bar, where one is shown
    logging.get_absl_handler().addFilter(_worth_telling)
    logging.get_absl_handler().setFormatter(LogFormatter())
    app.run(main, [sys.argv[0], *arguments(given)], flags_parser=parse)


if __name__ == "__main__":
    run()
