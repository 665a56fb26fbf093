"""The program: `dppa_jax JOB --FLAG=VALUE ...`, or `python -m dppa_jax.launch`. Flags in, one job out.

This module has what is the same for all jobs: the first word, logging, signals, errors, and the start of processes.
"""

import logging as python_logging
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from dppa_jax.config.option import choose
from dppa_jax.config.run import StartConfig
from dppa_jax.flags import BY_NAME, Values, first_screen, make, read_flags, usage
from dppa_jax.jobs import JOBS
from dppa_jax.runtime.files import PACKAGE
from dppa_jax.runtime.signals import end_on_signals

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    """Do the job that the parsed flags ask for; `argv` holds the program's name and what is no flag."""
    from dppa_jax.architecture.rules import nearest
    from dppa_jax.runtime import processes

    try:
        if len(argv) > 1:
            given = argv[1]
            raise ValueError(f"unexpected argument {given!r}; every input is a flag.{nearest(given, BY_NAME)}")
        _run(read_flags())
    except KeyboardInterrupt:
        processes.fail("interrupted", ended=True)
        sys.exit("interrupted; the same command goes on from there")
    except (ValueError, OSError, processes.ProcessFailedError) as error:
        processes.fail(str(error))
        if FLAGS.verbosity > 0:
            raise
        sys.exit(f"error: {error}")
    except SystemExit as error:
        processes.fail(f"ended with status {error.code}", ended=True)
        raise
    except BaseException as error:
        processes.fail(f"{type(error).__name__}: {error}")
        raise


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


def arguments(given: Sequence[str]) -> list[str]:
    """Return the flags that a command line stands for: a first word that is no flag is the job.

    >>> arguments(["plan", "--flagfile=merge.cfg"])
    ['--flagfile=merge.cfg', '--job=plan']
    """
    if given and not given[0].startswith("-"):
        return [*given[1:], f"--job={given[0]}"]  # at the end, as it also counts where a flagfile has another job
    return list(given)


def run() -> None:
    """Run the program on the arguments of this process."""
    given, jobs = sys.argv[1:], {name: job.help for name, job in JOBS.items()}
    if not given:
        print(first_screen(jobs))
        return
    if asked := {"-h", "--helpshort", "--help", "--helpfull"} & set(given):
        print(usage(asked <= {"-h", "--helpshort"}, jobs))
        return
    end_on_signals()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    logging.get_absl_handler().addFilter(_worth_telling)
    app.run(main, [sys.argv[0], *arguments(given)])


if __name__ == "__main__":
    run()
