"""python -m dppa_jax.launch: flags in, one job out. The only place that reads flags."""

import ctypes
import logging as python_logging
import shlex
import sys
from collections.abc import Mapping

from absl import app, flags, logging

from dppa_jax.interrupts import end_on_signals

FLAGS = flags.FLAGS
JOBS = ("merge", "plan", "inspect", "report", "benchmark")

# Groups of flags as --helpshort shows them: (name, kind, default, help).
GROUPS = {
    "work": (
        ("job", "string", "merge", f"what to do: {', '.join(JOBS)}"),
        ("workdir", "string", "runs", "scratch: benchmark models, reports"),
        ("overwrite", "bool", False, "replace what is in --output"),
    ),
    "models": (
        ("base", "string", "", "directory, hub id (owner/name[@revision]), or demo:base"),
        ("expert", "multi", [], "NAME=WHERE, repeated; demo:math, demo:finance, demo:law"),
        ("output", "string", "", "directory of the merged model"),
        ("output_dtype", "string", "", "float32, bfloat16 or float16; default: each base tensor's own"),
        ("max_shard_size", "int", 2_000_000_000, "bytes of a safetensors file"),
        ("save_delta", "string", "", "also write each expert's pruned and scaled delta to DIR/NAME"),
        ("tokenizer", "string", "base", "whose tokenizer and chat template to copy: base or an expert's name"),
    ),
    "method": (
        ("method", "string", "dppa", "preset; see the README's table"),
        ("score", "string", "", "override of the preset: magnitude, random, wanda, row, column"),
        ("allocate", "string", "", "override: uniform, owl, dp, dp_reference"),
        ("scale", "string", "", "override: none, dare, q, partition"),
        ("combine", "string", "", "override: sum, ties"),
        ("rate", "float", 0.9, "share of each delta that is removed, in [0, 1]"),
        ("partitions", "list", [], "DPA: rates, highest first, ending at --rate; default every 0.1 from 0.9"),
        ("factors", "multi", [], "DPA: one per partition, 1.8,1.3 or NAME=1.8,1.3 (repeat)"),
        ("coefficient", "multi", [], "of the experts in the merge: 0.7 or NAME=0.7 (repeat); default 1"),
        ("q", "multi", [], "DAREx-q: kept parameters are divided by it: 0.2 or NAME=0.2 (repeat)"),
        ("max_fluctuation", "float", 0.08, "DP: greatest change of a rate by a layer, and by a linear"),
        ("significance_multiple", "float", 5.0, "DP, OWL: |delta| above this times the mean is an outlier"),
        ("dpa_combine", "string", "highest", "factor of an element in several partitions: highest (rate) or max"),
        ("tensor_rate", "multi", [], "REGEX=RATE, first match wins; 0 keeps a linear dense"),
        ("tensor_coefficient", "multi", [], "REGEX=COEFFICIENT, first match wins"),
        ("calibration", "string", "", "text file for --score=wanda, a sample a line"),
        ("seed", "int", 0, "of random scores and of the demo family"),
        ("delta_dtype", "string", "float32", "the delta is formed in it; all after it is float32"),
        ("allow_nonfinite", "bool", False, "let a NaN or Inf delta count as 0"),
        ("allow_other_base", "bool", False, "merge experts whose delta is as large as the weights"),
    ),
    "devices": (
        ("mesh", "string", "", "layer=2,row=4; default: all local devices on row"),
        ("block_layers", "int", 0, "layers on the devices at a time; 0: from the memory there is"),
        ("residency", "string", "auto", "auto, resident (read once) or streamed"),
        ("device_memory", "float", 0.0, "GB of a device to plan for; 0: ask the device"),
    ),
    "report and benchmark": (
        ("evaluate", "list", [], "tasks to evaluate"),
        ("methods", "list", [], "report: methods of the table of single experts"),
        ("merge_methods", "list", [], "report: methods of the table of merges"),
        ("rates", "list", [], "report: rates of both tables"),
        ("seeds", "list", ["0"], "report: seeds, of the demo family and of random scores"),
        ("limit", "int", 0, "items per task; 0: all"),
        ("shape", "string", "0.3b", "benchmark: 0.3b, 1.1b, 3b or 7b"),
        ("peer", "string", "", "benchmark: mergekit, to run it alternately"),
        ("peer_python", "string", "", "benchmark: interpreter of an environment with mergekit; default: this one"),
        ("repeats", "int", 1, "benchmark: runs of each; the fastest counts"),
    ),
}

_DEFINE = {
    "string": flags.DEFINE_string,
    "bool": flags.DEFINE_boolean,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "list": flags.DEFINE_list,
    "multi": flags.DEFINE_multi_string,
}
for _group in GROUPS.values():
    for _name, _kind, _default, _help in _group:
        _DEFINE[_kind](_name, _default, _help)


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
    if job == "benchmark":
        from dppa_jax.benchmark import run_benchmark

        run_benchmark(FLAGS.shape, FLAGS.workdir, FLAGS.peer, FLAGS.peer_python, FLAGS.repeats)
        return
    config = job_config()
    from dppa_jax import jobs

    if job == "merge":
        jobs.run_merge(config)
    elif job == "plan":
        jobs.run_plan(config)
    elif job == "inspect":
        from dppa_jax.inspect import run_inspect

        run_inspect(config)
    else:
        from dppa_jax.report.sweep import run_report

        run_report(config, sweep())


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
        factors=per_expert("--factors", FLAGS.factors, names, lambda text: _numbers("--factors", text.split(","))),
        coefficients=per_expert("--coefficient", FLAGS.coefficient, names, float),
        q=per_expert("--q", FLAGS.q, names, float),
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
        flags=resolved_flags(),
        command=command(),
    )


def sweep():
    """The flags of --job=report."""
    from dppa_jax.report.sweep import Sweep

    if len(FLAGS.factors) > 1:
        raise ValueError("--job=report: give --factors once, for all experts.")
    return Sweep(
        tasks=tuple(FLAGS.evaluate),
        methods=tuple(FLAGS.methods),
        merge_methods=tuple(FLAGS.merge_methods),
        rates=_numbers("--rates", FLAGS.rates) or (FLAGS.rate,),
        factors=_numbers("--factors", FLAGS.factors[0].split(",")) if FLAGS.factors else (),
        seeds=tuple(int(seed) for seed in _numbers("--seeds", FLAGS.seeds)),
        limit=FLAGS.limit or None,
    )


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


def usage() -> str:
    """What --helpshort prints: every flag on a line, in groups."""
    lines = ["python -m dppa_jax.launch [--flagfile=FILE] [--FLAG=VALUE ...]"]
    for group, members in GROUPS.items():
        lines.append(f"\n{group}")
        lines += [f"  --{name:<22}{text}" for name, _, _, text in members]
    return "\n".join(lines)


def run() -> None:
    if {"-h", "--help", "--helpshort"} & set(sys.argv[1:]):
        print(usage())
        return
    end_on_signals()
    logging.set_verbosity(logging.INFO)
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)  # it tells of every platform it does not find
    logging.set_stderrthreshold("info")
    app.run(main)


if __name__ == "__main__":
    run()
