"""The choices on each axis of a merge, and which of them mean nothing together and are refused."""

from collections.abc import Mapping
from typing import Any

from dppa_jax.config.conventions import OURS
from dppa_jax.config.numbers import each_number
from dppa_jax.delta.presets import COMPARISONS

A_RATE = {  # the bounds of an option
    "within": (0, 1),
    "message": "--{flag}: rate {value} is outside [0, 1]; it is the share that is removed, 1 − density.",
}


def axis(name: str) -> Mapping[str, Any]:
    """Return the table of the choices on an axis: score, allocate, scale or combine, or of --ties or --divide."""
    from dppa_jax.delta.allocate import ALLOCATIONS  # here, as some of them import JAX, which --help does without
    from dppa_jax.delta.combine import COMBINATIONS
    from dppa_jax.delta.scale import SCALES
    from dppa_jax.delta.score import SCORES
    from dppa_jax.delta.stepwise import DIVISORS, STEPS
    from dppa_jax.delta.tied import TIES

    tables = {"score": SCORES, "allocate": ALLOCATIONS, "scale": SCALES, "combine": COMBINATIONS, "ties": TIES}
    return {**tables, "divide": dict.fromkeys(DIVISORS), "steps": STEPS}[name]


def check_score(merge: Any) -> None:
    """Refuse a scale, ways to rank and an allocation that mean nothing for the score or for what is pruned.

    Args:
      merge: a `MergeConfig` whose choices are made.
    """
    score, only_linears = axis("score")[merge.score] if merge.score else None, merge.prune == OURS["prune"]
    if merge.is_surveyed and not only_linears:
        raise ValueError(
            f"--prune={merge.prune}: --allocate={merge.allocate} spreads the rate over the linears of layers; give "
            f"--allocate=uniform, or leave --prune out."
        )
    if score and not score.rescaled and merge.scale != "none":
        raise ValueError(
            f"--scale={merge.scale}: --score={merge.score} drops whole outputs, and the error of those that are "
            f"kept only grows when they are rescaled; give --scale=none."
        )
    if merge.compares_rows:
        _check_comparison(merge, score)
    if merge.ranks_units and merge.ties != "auto":
        raise ValueError(
            f"--ties={merge.ties}: with --score={merge.score} the first of equal heads or neurons go; leave it out."
        )
    if merge.drops_units and not only_linears:
        raise ValueError(
            f"--prune={merge.prune}: --score={merge.score} drops heads and neurons, which only linears have; leave "
            f"--prune out."
        )
    if merge.drops_units and axis("allocate")[merge.allocate].by_linear:
        raise ValueError(
            f"--allocate={merge.allocate}: linears of a layer get rates of their own, and --score={merge.score} drops "
            f"heads and neurons from all of them alike; give --allocate=uniform or owl."
        )


def _check_comparison(merge: Any, score: Any) -> None:
    """Refuse --compare=row where nothing is compared, and what is to be said of ties elsewhere."""
    if score.random:
        raise ValueError(f"--compare=row: --score={merge.score} is random and ranks nothing; leave it out.")
    if score.whole:
        raise ValueError(f"--compare=row: --score={merge.score} drops what it drops as a whole; leave it out.")
    if merge.ties != "auto":
        raise ValueError(f"--ties={merge.ties}: with --compare=row the first ones of equal score go; leave it out.")


def check_rates(merge: Any) -> None:
    """Refuse rates of single experts and tensors that are none, or that nothing asks for, and sums without steps.

    Args:
      merge: a `MergeConfig` whose choices are made.
    """
    given = [(f"tensor_rate {pattern}", value) for pattern, value in merge.tensor_rates]
    given += [(flag.removeprefix("--"), value) for flag, value in each_number("--expert_rate", merge.expert_rates)]
    for flag, value in given:
        if merge.score is None:
            raise ValueError(
                f"--{flag.split()[0]}: --method={merge.method} prunes nothing; give a method with a score."
            )
        if not 0.0 <= value <= 1.0:
            raise ValueError(A_RATE["message"].format(flag=flag, value=value))
    if axis("scale")[merge.scale].takes_factors and merge.expert_rates:
        raise ValueError("--expert_rate: the experts have --partitions in common; give --rate, or another --scale.")
    if merge.is_stepwise and merge.combine not in axis("steps"):
        raise ValueError(f"--divide, --lambda, --arithmetic, --compatible: not with --combine={merge.combine}.")


def check_lora_factors(merge: Any) -> None:
    """Refuse --lora_factors beside all but random numbers of single elements, and one weight for what they keep.

    Args:
      merge: a `MergeConfig` whose choices are made.
    """
    score, scale = axis("score")[merge.score] if merge.score else None, axis("scale")[merge.scale]
    if not score or not score.random or score.draws or score.gain:
        raise ValueError(f"--lora_factors: only --score=random (dare, darex_q) prunes factors, not {merge.score!r}.")
    if scale.takes_factors or scale.parameters or scale.keeps_norm:
        raise ValueError(f"--lora_factors: --scale={merge.scale} weighs no factors; give none, dare or q.")
    differ = merge.tensor_rates or merge.expert_rates or merge.is_surveyed
    if differ or any(isinstance(q, Mapping) for q in merge.q.values()):
        raise ValueError(
            "--lora_factors: the factors of all linears have one rate and one q; leave --tensor_rate, "
            "--expert_rate and --allocate out, and give --q as a number."
        )
    if merge.prune != OURS["prune"]:
        raise ValueError(f"--prune={merge.prune}: only linears have factors to prune; leave --prune or --lora_factors.")


def check_combination(merge: Any) -> None:
    """Refuse experts, coefficients and pruning that a combination has no use for."""
    facts, (least, most) = merge.combination, merge.combination.experts
    if len(merge.experts) < least or (most is not None and len(merge.experts) > most):
        raise ValueError(
            f"--combine={merge.combine}: needs {'exactly' if least == most else 'at least'} {least} experts beside "
            f"the base, and there are {len(merge.experts)}: {', '.join(merge.experts)}."
        )
    if "base" in merge.coefficients and not facts.weighs_base:
        raise ValueError(f"--coefficient=base: --combine={merge.combine} has none for the base; leave it out.")
    if not facts.prunes and merge.score:
        raise ValueError(f"--combine={merge.combine}: nothing is pruned before it; leave --score out.")
    if facts.whole and COMPARISONS[merge.compare] and not facts.whole.gram:
        raise ValueError(f"--compare={merge.compare}: --combine={merge.combine} compares nothing; leave it out.")
