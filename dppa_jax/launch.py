"""python -m dppa_jax.launch: flags in, one job out. No other module but from_flags reads flags."""

import ctypes
import logging as python_logging
import os
import sys
from pathlib import Path

from absl import app, flags, logging

from dppa_jax.flags import JOBS, usage
from dppa_jax.from_flags import (
    command,
    convert_config,
    evaluation,
    finetune_config,
    job_config,
    models,
    resolved_flags,
    sweep,
)
from dppa_jax.runtime.files import PACKAGE
from dppa_jax.runtime.signals import end_on_signals

FLAGS = flags.FLAGS

SEVERAL_PROCESSES = ("merge", "search", "finetune", "convert")


def main(argv: list[str]) -> None:
    from dppa_jax.architecture.rules import nearest
    from dppa_jax.config.option import choose
    from dppa_jax.runtime import processes

    try:
        if len(argv) > 1:
            given = argv[1]
            raise ValueError(f"unexpected argument {given!r}; every input is a flag.{nearest(given, resolved_flags())}")
        _run(choose("--job", FLAGS.job, JOBS))
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


def _run(job: str) -> None:
    taken = resolved_flags()["expert"]
    for replaced in (text for text in FLAGS.expert if text not in taken):
        logging.info("--expert=%s is replaced by a later one of that name", replaced)
    _keep_compilations()
    _keep_memory()
    _check_output(job)
    _start_processes(job)
    if FLAGS.evaluator == "vllm":  # JAX would take most of a GPU's memory, which vLLM needs
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if job == "benchmark":
        _benchmark()
        return
    if job == "evaluate":
        from dppa_jax.jobs.evaluate import run_evaluate

        run_evaluate(models(), evaluation(), FLAGS.workdir, FLAGS.seed, command(), FLAGS.tokenizer)
        return
    if job == "finetune":
        from dppa_jax.jobs.finetune import run_finetune

        run_finetune(finetune_config())
        return
    if job == "convert":
        from dppa_jax.jobs.convert import run_convert

        run_convert(convert_config())
        return
    if job == "validate":
        from dppa_jax.jobs.validate import run_validate

        if not run_validate(
            FLAGS.output, FLAGS.reference, FLAGS.base, FLAGS.workdir, FLAGS.tolerance_ulp, FLAGS.seed
        ).passed:
            sys.exit(f"--output is not within --tolerance_ulp={FLAGS.tolerance_ulp:g} of --reference")
        return
    config = job_config()
    if job == "plan":
        from dppa_jax.jobs.plan import run_plan

        run_plan(config)
    elif job == "inspect":
        from dppa_jax.jobs.inspect import run_inspect

        run_inspect(config)
    elif job == "report":
        from dppa_jax.jobs.report import run_report

        run_report(config, sweep())
    elif job == "search":
        from dppa_jax.jobs.search import run_search

        run_search(config)
    elif config.search or config.adamerging or config.evaluation.tasks:
        from dppa_jax.jobs.evaluated_merge import run_evaluated_merge

        run_evaluated_merge(config)
    else:  # without what evaluation and reports need, a second of imports
        from dppa_jax.jobs.merge import run_merge

        run_merge(config)


def _check_output(job: str) -> None:
    if FLAGS.output.startswith("orbax:") and job not in ("convert", "evaluate", "validate"):
        raise ValueError(
            f"--output={FLAGS.output}: --job={job} writes a Hugging Face directory; give --output=DIR, and then "
            f"--job=convert --base=DIR --output={FLAGS.output}."
        )


def _benchmark() -> None:
    kinds = {"--peer": FLAGS.peer, "--device": FLAGS.device, "--scaling": FLAGS.scaling}
    if len(given := [flag for flag, value in kinds.items() if value]) > 1:
        raise ValueError(f"--job=benchmark: {' and '.join(given)} are benchmarks of their own; give one of them.")
    if (FLAGS.device or FLAGS.scaling) and len(FLAGS.shape) > 1:
        raise ValueError(f"--shape={','.join(FLAGS.shape)}: give one shape with {given[0]}.")
    if FLAGS.peer == "restart":
        from dppa_jax.benchmark.restart import run_restart_benchmark

        run_restart_benchmark(job_config())
    elif FLAGS.scaling:
        from dppa_jax.benchmark.scaling import run_scaling

        run_scaling(*FLAGS.shape, FLAGS.workdir)
    elif FLAGS.device:
        from dppa_jax.benchmark.device import run_device_benchmark

        run_device_benchmark(*FLAGS.shape, FLAGS.device, FLAGS.workdir, FLAGS.repeats)
    else:
        from dppa_jax.benchmark.merges import run_benchmark

        peer = (FLAGS.peer, FLAGS.peer_python)
        run_benchmark(FLAGS.shape, FLAGS.workdir, *peer, FLAGS.repeats, FLAGS.methods)


def _start_processes(job: str) -> None:
    from dppa_jax.runtime import processes

    if FLAGS.coordinator and job not in SEVERAL_PROCESSES:
        several = ", ".join(SEVERAL_PROCESSES)
        raise ValueError(f"--job={job} takes one process: leave out --coordinator. Several can do {several}.")
    if FLAGS.coordinator:
        processes.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    elif job != "plan" and (FLAGS.num_processes or FLAGS.process_id != -1):
        raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT, the first process's address.")


def _keep_compilations() -> None:
    """A merge compiles some forty small functions, 3 s of a run that may take 10: keep them between runs.

    They are kept in $JAX_COMPILATION_CACHE_DIR where that is set.
    """
    import jax

    from dppa_jax.runtime.files import cache_directory

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _keep_memory() -> None:
    """Have glibc keep what XLA on a CPU frees: a merge asks for the same arrays again and again, and fresh pages cost.

    mallopt(3): no mmap for large arrays, no trimming, one arena. A quarter of a merge's system time.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)


def _worth_telling(record: python_logging.LogRecord) -> bool:
    """Return whether a log line is a warning or ours: Orbax tells of every object it makes, matplotlib of its fonts."""
    return record.levelno >= python_logging.WARNING or Path(record.pathname).is_relative_to(PACKAGE)


def run() -> None:
    if asked := {"-h", "--help", "--helpshort"} & set(sys.argv[1:]):
        print(usage(short="--help" not in asked))
        return
    end_on_signals()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    logging.get_absl_handler().addFilter(_worth_telling)
    app.run(main)


if __name__ == "__main__":
    run()
