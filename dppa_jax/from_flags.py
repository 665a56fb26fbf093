"""The flags as the configs of jobs; every value is checked here, before a weight is read."""

import shlex
from collections.abc import Mapping

from absl import flags

from dppa_jax.flags import GROUPS, read_experts, read_numbers, read_rates, read_rules

FLAGS = flags.FLAGS

VALIDATION_SHARE = 0.2  # of a task's items, in jobs that search
UNSET = -1.0


def job_config():
    """Those of jobs that merge, or look at what would be merged."""
    from dppa_jax.config.merge import MergeConfig
    from dppa_jax.config.option import choose, per_expert
    from dppa_jax.config.run import JobConfig

    experts = read_experts(FLAGS.expert)
    if not FLAGS.base:
        raise ValueError("--base is empty: give the model that the experts were fine-tuned from.")
    names = tuple(experts)
    merge = MergeConfig(
        experts=names,
        score=FLAGS.score or None,
        allocate=FLAGS.allocate or None,
        scale=FLAGS.scale or None,
        combine=FLAGS.combine or None,
        partitions=read_numbers("--partitions", FLAGS.partitions),
        factors={} if searches() else _factors(names),
        coefficients=_coefficients(names),
        q={} if FLAGS.job == "report" else per_expert("--q", FLAGS.q, names, float),
        output_dtype=FLAGS.output_dtype or None,
        tensor_rates=read_rules("--tensor_rate", FLAGS.tensor_rate),
        tensor_coefficients=read_rules("--tensor_coefficient", FLAGS.tensor_coefficient),
        **_same("method", "rate", "max_fluctuation", "significance_multiple", "dpa_combine", "seed", "delta_dtype"),
        **_same("allow_nonfinite"),
    )
    choose("--tokenizer", FLAGS.tokenizer, ("base", *names))
    choose("--residency", FLAGS.residency, ("auto", "resident", "streamed"))
    return JobConfig(
        merge=merge,
        experts=experts,
        device_memory=int(FLAGS.device_memory * 1e9),
        evaluation=evaluation(),
        search=factor_search(),
        adamerging=adamerging(_granularity()) if _granularity() else None,
        flags=resolved_flags(),
        command=command(),
        **_same("base", "output", "workdir", "save_delta", "tokenizer", "mesh", "block_layers", "residency"),
        **_same("num_processes", "max_shard_size", "overwrite", "resume", "allow_other_base", "calibration"),
    )


def _same(*names: str, prefix: str = "") -> dict:
    """Fields of a config that have the names of flags, but for the flags' prefix."""
    return {name: FLAGS[prefix + name].value for name in names}


def models() -> dict[str, str]:
    """What --job=evaluate evaluates: the base, the experts and, where it exists, the merge."""
    named = {"base": FLAGS.base, **read_experts(FLAGS.expert), "merge": FLAGS.output}
    found = {name: where for name, where in named.items() if where}
    if not found:
        raise ValueError("--job=evaluate: give a model: --base=WHERE, --expert=NAME=WHERE or --output=DIR, or several.")
    return found


def evaluation():
    """How models are evaluated."""
    from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
    from dppa_jax.evaluate.tasks import by_domain

    by_domain(FLAGS.evaluate)
    share = FLAGS.validation_share
    if share == UNSET:
        splits = [FLAGS.search_split] * searches() + [FLAGS.adamerging_split] * adamerges()
        share = VALIDATION_SHARE if "validation" in splits else 0.0
    options = TaskOptions(
        choices=FLAGS.prompt_choices,
        wrapper=FLAGS.prompt_wrapper,
        validation_share=share,
        limit=FLAGS.limit or None,
        max_new_tokens=FLAGS.max_new_tokens or None,
        **_same("data_dir", "letter_case", "labels", "split_seed", "max_length"),
    )
    return EvaluationConfig(
        tasks=tuple(FLAGS.evaluate),
        options=options,
        dtype=FLAGS.evaluate_dtype,
        **_same("evaluator", "batch_size", "vllm_python", "vllm_timeout", "tensor_parallel_size"),
        **_same("gpu_memory_utilization", "resume"),
    )


def finetune_config():
    """The flags of --job=finetune."""
    from dppa_jax.config.finetune import AdamW, FinetuneConfig

    return FinetuneConfig(
        data=tuple(FLAGS.train_data),
        eval_data=tuple(FLAGS.eval_data),
        steps=FLAGS.train_steps,
        batch_size=FLAGS.train_batch_size,
        length=FLAGS.train_length,
        dtype=FLAGS.train_dtype,
        optimizer=AdamW(beta2=0.999, weight_decay=FLAGS.weight_decay, max_gradient_norm=FLAGS.max_gradient_norm),
        held_out=evaluation(),
        flags=resolved_flags(),
        command=command(),
        **_same("base", "output", "epochs", "learning_rate", "accumulate", "warmup", "remat", "pack", "seed", "mesh"),
        **_same("checkpoint_every", "eval_every", "workdir", "output_dtype", "max_shard_size", "overwrite", "resume"),
    )


def convert_config():
    """The flags of --job=convert."""
    from dppa_jax.config.run import ConvertConfig

    return ConvertConfig(
        **_same("base", "output", "mesh", "output_dtype", "max_shard_size", "overwrite", "resume", "seed")
    )


def searches() -> bool:
    """Is there a search? Of a flagfile's --factors and those after it the last counts that is for all experts."""
    return FLAGS.job == "search" or [text for text in FLAGS.factors if "=" not in text][-1:] == ["search"]


def factor_search():
    """How factors are searched; None where they are given."""
    from dppa_jax.config.search import FactorSearch

    if not searches():
        return None
    bounds = read_numbers("--search_bounds", FLAGS.search_bounds)
    if len(bounds) not in (0, 2):
        raise ValueError(f"--search_bounds={','.join(FLAGS.search_bounds)}: give LOWEST,HIGHEST, for example 0,4.")
    return FactorSearch(
        rule=FLAGS.search_rule,
        methods=tuple(int(method) for method in read_numbers("--search_methods", FLAGS.search_methods)),
        start=read_numbers("--search_start", FLAGS.search_start),
        step=read_numbers("--search_step", FLAGS.search_step),
        lower=bounds[:1],
        upper=bounds[1:],
        max_evaluations=FLAGS.search_evaluations,
        split=FLAGS.search_split,
        limit=FLAGS.search_limit or None,
        given=_factors(tuple(read_experts(FLAGS.expert))),
    )


def adamerges() -> bool:
    """Are coefficients found by AdaMerging, those of the merge or of one in a report?"""
    return bool(_granularity()) or (FLAGS.job == "report" and any("+" in method for method in FLAGS.merge_methods))


def adamerging(granularity: str = "task"):
    """How AdaMerging finds coefficients."""
    from dppa_jax.config.search import AdaMergingConfig

    own = ("steps", "batch_size", "learning_rate", "start", "positions", "new_tokens", "split", "patience", "min_delta")
    return AdaMergingConfig(
        granularity=granularity,
        limit=FLAGS.adamerging_limit or None,
        seed=FLAGS.seed,
        **_same(*own, prefix="adamerging_"),
    )


def _granularity() -> str:
    """What shares a coefficient where AdaMerging finds them, else ""; a --coefficient after a flagfile's counts."""
    from dppa_jax.config.search import ADAMERGING

    return ADAMERGING.get(FLAGS.coefficient[-1], "") if FLAGS.coefficient else ""


def _coefficients(names: tuple[str, ...]) -> dict:
    from dppa_jax.config.merge import read_coefficients
    from dppa_jax.config.option import per_expert
    from dppa_jax.config.search import ADAMERGING

    if _granularity():
        return {}
    given = [text for text in FLAGS.coefficient if text not in ADAMERGING]
    if given and given[-1].endswith(".json"):
        return read_coefficients(given[-1], names)
    return per_expert("--coefficient", [text for text in given if not text.endswith(".json")], names, float)


def _factors(names: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Those that are given: of all experts or, beside a search, of some."""
    from dppa_jax.config.option import per_expert

    last = max((i for i, text in enumerate(FLAGS.factors) if text == "search"), default=-1)
    given = [text for text in FLAGS.factors[last + 1 :] if "=" in text or not searches()]
    return per_expert("--factors", given, names, lambda text: read_numbers("--factors", text.split(",")))


def sweep():
    """The flags of --job=report."""
    from dppa_jax.config.report import Sweep

    if len(FLAGS.factors) > 1 and not searches():
        raise ValueError("--job=report: give --factors once, for all experts, or --factors=search.")
    for name in ("score", "allocate", "scale", "combine", "partitions"):
        if FLAGS[name].value:
            raise ValueError(f"--{name}: --job=report compares --methods as they are; leave it out.")
    from dppa_jax.config.option import per_expert

    return Sweep(
        q=per_expert("--q", FLAGS.q, tuple(read_experts(FLAGS.expert)), float),
        methods=tuple(FLAGS.methods),
        merge_methods=tuple(FLAGS.merge_methods),
        rates=read_rates(FLAGS.rates) or (FLAGS.rate,),
        factors=read_numbers("--factors", FLAGS.factors[0].split(",")) if FLAGS.factors and not searches() else (),
        seeds=tuple(int(seed) for seed in read_numbers("--seeds", FLAGS.seeds)),
        adamerging=adamerging(),
    )


def resolved_flags() -> Mapping:
    found = {name: FLAGS[name].value for group in GROUPS.values() for name, *_ in group}
    return found | {"expert": [f"{name}={where}" for name, where in read_experts(FLAGS.expert).items()]}


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
