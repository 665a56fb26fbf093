"""python -m dppa_jax.launch: flags in, one job out. The only place that reads flags."""

import ctypes
import logging as python_logging
import math
import os
import shlex
import sys
from collections.abc import Mapping

from absl import app, flags, logging

from dppa_jax.flags import GROUPS, JOBS, usage
from dppa_jax.interrupts import end_on_signals

FLAGS = flags.FLAGS

VALIDATION_SHARE = 0.2  # of a task's items, in jobs that search
UNSET = -1.0


def main(argv: list[str]) -> None:
    from dppa_jax.checkpoint.names import nearest
    from dppa_jax.config import choose

    try:
        if len(argv) > 1:
            given = argv[1]
            raise ValueError(f"unexpected argument {given!r}; every input is a flag.{nearest(given, resolved_flags())}")
        _run(choose("--job", FLAGS.job, JOBS))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was unfinished has been removed")
    except (ValueError, OSError) as error:
        if FLAGS.verbosity > 0:
            raise
        sys.exit(f"error: {error}")


def _run(job: str) -> None:
    _keep_compilations()
    _keep_memory()
    if FLAGS.evaluator == "vllm":  # JAX would take most of a GPU's memory, which vLLM needs
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if job == "benchmark" and FLAGS.peer == "restart":
        from dppa_jax.search.benchmark import run_restart_benchmark

        run_restart_benchmark(job_config())
        return
    if job == "benchmark":
        from dppa_jax.benchmark import run_benchmark

        run_benchmark(FLAGS.shape, FLAGS.workdir, FLAGS.peer, FLAGS.peer_python, FLAGS.repeats)
        return
    if job == "evaluate":
        from dppa_jax.experiments import run_evaluate

        run_evaluate(models(), evaluation(), FLAGS.workdir, FLAGS.seed, command(), FLAGS.tokenizer)
        return
    config = job_config()
    if job == "plan":
        from dppa_jax.jobs import run_plan

        run_plan(config)
    elif job == "inspect":
        from dppa_jax.inspect import run_inspect

        run_inspect(config)
    elif job == "report":
        from dppa_jax.report.sweep import run_report

        run_report(config, sweep())
    elif job == "search":
        from dppa_jax.experiments import run_search

        run_search(config)
    elif config.search or config.evaluation.tasks:
        from dppa_jax.experiments import run_merge

        run_merge(config)
    else:  # without what evaluation and reports need, a second of imports
        from dppa_jax.jobs import run_merge

        run_merge(config)


def job_config():
    """The flags as a JobConfig; every value is checked here, before a weight is read."""
    from dppa_jax.config import MergeConfig, choose, per_expert
    from dppa_jax.jobs import JobConfig

    experts = _experts(FLAGS.expert)
    if not FLAGS.base:
        raise ValueError("--base is empty: give the model that the experts were fine-tuned from.")
    names = tuple(experts)
    merge = MergeConfig(
        experts=names,
        method=FLAGS.method,
        score=FLAGS.score or None,
        allocate=FLAGS.allocate or None,
        scale=FLAGS.scale or None,
        combine=FLAGS.combine or None,
        rate=FLAGS.rate,
        partitions=_numbers("--partitions", FLAGS.partitions),
        factors=_factors(names),
        coefficients=per_expert("--coefficient", FLAGS.coefficient, names, float),
        q={} if FLAGS.job == "report" else per_expert("--q", FLAGS.q, names, float),
        max_fluctuation=FLAGS.max_fluctuation,
        significance_multiple=FLAGS.significance_multiple,
        dpa_combine=FLAGS.dpa_combine,
        seed=FLAGS.seed,
        delta_dtype=FLAGS.delta_dtype,
        output_dtype=FLAGS.output_dtype or None,
        tensor_rates=_rules("--tensor_rate", FLAGS.tensor_rate),
        tensor_coefficients=_rules("--tensor_coefficient", FLAGS.tensor_coefficient),
        allow_nonfinite=FLAGS.allow_nonfinite,
    )
    choose("--tokenizer", FLAGS.tokenizer, ("base", *names))
    choose("--residency", FLAGS.residency, ("auto", "resident", "streamed"))
    return JobConfig(
        merge=merge,
        base=FLAGS.base,
        experts=experts,
        output=FLAGS.output,
        workdir=FLAGS.workdir,
        save_delta=FLAGS.save_delta,
        tokenizer=FLAGS.tokenizer,
        mesh=FLAGS.mesh,
        block_layers=FLAGS.block_layers,
        residency=FLAGS.residency,
        device_memory=int(FLAGS.device_memory * 1e9),
        max_shard_size=FLAGS.max_shard_size,
        overwrite=FLAGS.overwrite,
        allow_other_base=FLAGS.allow_other_base,
        calibration=FLAGS.calibration,
        evaluation=evaluation(),
        search=factor_search(),
        flags=resolved_flags(),
        command=command(),
    )


def models() -> dict[str, str]:
    """What --job=evaluate evaluates: the base, the experts and, where it exists, the merge."""
    named = {"base": FLAGS.base, **_experts(FLAGS.expert), "merge": FLAGS.output}
    found = {name: where for name, where in named.items() if where}
    if not found:
        raise ValueError("--job=evaluate: give a model: --base=WHERE, --expert=NAME=WHERE or --output=DIR, or several.")
    return found


def evaluation():
    """How models are evaluated."""
    from dppa_jax.evaluate.evaluation import EvaluationConfig
    from dppa_jax.evaluate.tasks import TaskOptions

    share = FLAGS.validation_share
    if share == UNSET:
        share = VALIDATION_SHARE if searches() and FLAGS.search_split == "validation" else 0.0
    options = TaskOptions(
        data_dir=FLAGS.data_dir,
        choices=FLAGS.prompt_choices,
        wrapper=FLAGS.prompt_wrapper,
        letter_case=FLAGS.letter_case,
        labels=FLAGS.labels,
        validation_share=share,
        split_seed=FLAGS.split_seed,
        limit=FLAGS.limit or None,
        max_new_tokens=FLAGS.max_new_tokens or None,
        max_length=FLAGS.max_length,
    )
    return EvaluationConfig(
        tasks=tuple(FLAGS.evaluate),
        evaluator=FLAGS.evaluator,
        options=options,
        batch_size=FLAGS.batch_size,
        dtype=FLAGS.evaluate_dtype,
        vllm_python=FLAGS.vllm_python,
        vllm_timeout=FLAGS.vllm_timeout,
        tensor_parallel_size=FLAGS.tensor_parallel_size,
        gpu_memory_utilization=FLAGS.gpu_memory_utilization,
    )


def searches() -> bool:
    """Is there a search? A --factors after that of a flagfile counts."""
    return FLAGS.job == "search" or FLAGS.factors[-1:] == ["search"]


def factor_search():
    """How factors are searched; None where they are given."""
    from dppa_jax.search.factors import FactorSearch

    if not searches():
        return None
    bounds = _numbers("--search_bounds", FLAGS.search_bounds)
    if len(bounds) not in (0, 2):
        raise ValueError(f"--search_bounds={','.join(FLAGS.search_bounds)}: give LOWEST,HIGHEST, for example 0,4.")
    return FactorSearch(
        rule=FLAGS.search_rule,
        methods=tuple(int(method) for method in _numbers("--search_methods", FLAGS.search_methods)),
        start=_numbers("--search_start", FLAGS.search_start),
        step=_numbers("--search_step", FLAGS.search_step),
        lower=bounds[:1],
        upper=bounds[1:],
        max_evaluations=FLAGS.search_evaluations,
        split=FLAGS.search_split,
        limit=FLAGS.search_limit or None,
    )


def _factors(names: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    from dppa_jax.config import per_expert

    if searches():
        return {}
    given = [text for text in FLAGS.factors if text != "search"]
    return per_expert("--factors", given, names, lambda text: _numbers("--factors", text.split(",")))


def sweep():
    """The flags of --job=report."""
    from dppa_jax.report.sweep import Sweep

    if len(FLAGS.factors) > 1:
        raise ValueError("--job=report: give --factors once, for all experts, or --factors=search.")
    for name in ("score", "allocate", "scale", "combine", "partitions"):
        if FLAGS[name].value:
            raise ValueError(f"--{name}: --job=report compares --methods as they are; leave it out.")
    from dppa_jax.config import per_expert

    return Sweep(
        q=per_expert("--q", FLAGS.q, tuple(_experts(FLAGS.expert)), float),
        methods=tuple(FLAGS.methods),
        merge_methods=tuple(FLAGS.merge_methods),
        rates=_rates(FLAGS.rates) or (FLAGS.rate,),
        factors=_numbers("--factors", FLAGS.factors[0].split(",")) if FLAGS.factors and not searches() else (),
        seeds=tuple(int(seed) for seed in _numbers("--seeds", FLAGS.seeds)),
    )


def _rates(given: list[str]) -> tuple[float, ...]:
    """Numbers, or FIRST:LAST:STEP with both ends.

    >>> _rates(["0.7:0.9:0.1", "0.95"]), _rates(["0.5:1:0.2"])
    ((0.7, 0.8, 0.9, 0.95), (0.5, 0.7, 0.9))
    """
    found = []
    for text in given:
        numbers = _numbers("--rates", text.split(":"))
        if len(numbers) == 1:
            found += numbers
        elif len(numbers) == 3 and numbers[2] > 0 and numbers[0] <= numbers[1]:
            first, last, step = numbers
            found += [round(first + i * step, 10) for i in range(math.floor((last - first) / step + 1e-9) + 1)]
        else:
            raise ValueError(f"--rates={text}: give rates, or FIRST:LAST:STEP such as 0.1:0.9:0.1.")
    return tuple(found)


def resolved_flags() -> Mapping:
    return {name: FLAGS[name].value for group in GROUPS.values() for name, *_ in group}


def command() -> str:
    """The command line that says the same without a flagfile: every flag that differs from its default."""
    words = ["python", "-m", "dppa_jax.launch"]
    for name, value in resolved_flags().items():
        if value == FLAGS[name].default:
            continue
        if isinstance(FLAGS[name], flags.MultiFlag):
            words += [f"--{name}={one}" for one in value]
        else:
            words.append(f"--{name}={','.join(value) if isinstance(value, list) else value}")
    return shlex.join(words)


def _experts(given: list[str]) -> dict[str, str]:
    experts = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not equals or not name or not where:
            raise ValueError(f"--expert={text}: give NAME=WHERE, for example --expert=math=GAIR/Abel-7B-001.")
        if name in experts:
            raise ValueError(f"--expert: the name {name!r} is given twice; names must differ.")
        experts[name] = where
    return experts


def _rules(flag: str, given: list[str]) -> tuple[tuple[str, float], ...]:
    rules = []
    for text in given:
        pattern, equals, value = text.rpartition("=")
        if not equals:
            raise ValueError(f"{flag}={text}: give REGEX=NUMBER, for example {flag}=mlp.down_proj=0.5.")
        rules.append((pattern, *_numbers(flag, [value])))
    return tuple(rules)


def _numbers(flag: str, given: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in given)
    except ValueError as error:
        raise ValueError(f"{flag}: {str(error).rsplit(':', 1)[-1].strip()} is not a number.") from None


def _keep_compilations() -> None:
    """A merge compiles some forty small functions, 3 s of a run that may take 10: keep them between runs."""
    import jax

    from dppa_jax.cache import cache_directory

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


def run() -> None:
    if asked := {"-h", "--help", "--helpshort"} & set(sys.argv[1:]):
        print(usage(short="--help" not in asked))
        return
    end_on_signals()
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)  # it tells of every platform it does not find
    logging.set_stderrthreshold("info")
    app.run(main)


if __name__ == "__main__":
    run()
