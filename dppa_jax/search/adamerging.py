"""AdaMerging: the coefficients of a merge whose next-token distributions on unlabelled prompts have least entropy.

    λ* = argmin Σ_domains mean over positions of H(p_λ(next token)),    by Adam on raw λ, clipped to [0, 1] where used

Source: Yang et al. 2024, and the authors' repository EnnengYang/AdaMerging, commit cea1165: Adam with learning rate
1e-3 and no schedule, start 0.3; the clip is in the forward pass alone and passes the gradient inside and at the
bounds; losses of the data sets are added up.
Differs from the authors' code:
- a language model has a distribution at each position, of which those that `positions` names count, in place of one
  classification head per data set;
- one batch of every domain in each step, where theirs adds up two of every data set;
- prompts come from the validation split, not from the test items that are reported, and none comes again before all
  have come (theirs are drawn anew in each step);
- "layer" is a decoder layer; what they call layer-wise, a coefficient for every tensor, is "linear" here;
- experts may be pruned and amplified, as the merge says. AdaMerging++ (TIES first) is left out.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import numpy as np
from absl import logging

from dppa_jax.architecture.rules import check_patterns
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.search import AdaMergingConfig
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.tasks import Task
from dppa_jax.model.generate import check_prompts
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest, sources_digest, write_whole
from dppa_jax.runtime.progress import steps as progress_of
from dppa_jax.runtime.reading import read_kept
from dppa_jax.search.adamerging_state import AdaMerged, State, read_state, write_state
from dppa_jax.search.adamerging_step import Step
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.coefficients import clip, fixed_coefficients, groups_of
from dppa_jax.search.mixture import Mixture, check_combine
from dppa_jax.search.prompts import Prompt, draw, prompts_of

SAVE_SECONDS = 20  # at most so much work is lost
LOG_STEPS = 50

FILES = ("adamerging", "adamerging_step", "adamerging_state", "coefficients", "entropy", "mixture", "prompts")
CODE = sources_digest(*(f"search/{name}.py" for name in FILES))
FORWARD = sources_digest("model/*.py")


def adamerge(
    candidates: Candidates,
    domains: Mapping[str, Sequence[Task]],
    merge: MergeConfig,
    options: AdaMergingConfig,
    workdir: Path,
    report: Callable[[int, float], None] = lambda step, entropy: None,
) -> AdaMerged:
    """Find the coefficients of the merge that `merge` describes, by the prompts of these domains.

    `workdir`/coefficients.json holds them with all that a further run needs to go on from where this one was ended; a
    run of other inputs or options, or with `candidates.job.resume` false, begins anew. `report` is called after each
    step with how many are done and the entropy. Several processes take each step together.

    Raises:
      ValueError: `combine` is not "sum"; a domain without prompts; an entropy that is not finite.
    """
    check_combine(merge)
    merge = replace(merge, coefficients=dict.fromkeys(merge.experts, options.start))
    specs = candidates.base.specs
    check_patterns(merge.tensor_coefficients, specs, "--tensor_coefficient")
    asked, budgets = _questions(candidates, domains, options)
    fingerprint = digest([CODE, FORWARD, candidates.fingerprint(merge), asdict(options), asked, budgets])
    file = workdir / "coefficients.json"
    workdir.mkdir(parents=True, exist_ok=True)
    groups = groups_of(options.granularity, specs)
    shape = (len(groups.names), len(merge.experts))
    kept = lambda: read_state(file if candidates.job.resume else None, fingerprint, shape, options.start)  # noqa: E731
    state, finished = processes.of_first("coefficients", kept, tuple[State, bool])

    def save(finished: bool) -> None:
        if processes.index() == 0:
            write_state(file, fingerprint, state, groups, merge.experts, finished)

    if not finished:
        prompts = _prompts(candidates, asked, budgets, merge, options, workdir, fingerprint)
        opened = candidates.opened
        mixture = Mixture(opened.base, opened.chosen(merge), merge, opened.mesh, opened.norms(merge))
        step = Step(mixture, groups.of_tensor, fixed_coefficients(merge, specs), options.learning_rate)
        try:
            _descend(step, prompts, options, state, save, report)
        except BaseException:
            save(False)
            raise
        save(True)
    merged = AdaMerged.of_state(state, merge.experts, tuple(domains), options.granularity, groups)
    logging.info("AdaMerging: %s", merged.in_words())
    return merged


def _descend(step: "Step", prompts, options: AdaMergingConfig, state: State, save, report) -> None:
    saved = time.monotonic()
    many = [min(options.batch_size, len(of_domain)) for of_domain in prompts.values()]
    state.model_bytes = step.mixture.model_bytes
    with progress_of("AdaMerging", options.steps, "steps") as advance:
        advance(len(state.entropies))
        while len(state.entropies) < options.steps and not state.stopped_early:
            done = len(state.entropies)
            batch = draw(prompts, done, options.batch_size, options.seed)
            rows, new = step(state.raw, state.mean, state.square, done, batch)
            by_domain = [float(part.sum()) for part in np.split(rows.astype(np.float64), np.cumsum(many)[:-1])]
            entropy = sum(by_domain)
            if not math.isfinite(entropy):
                raise ValueError(
                    f"AdaMerging: the entropy of step {done} is {entropy}; a checkpoint that holds NaN or Inf, or "
                    f"factors that let the merge overflow?"
                )
            state.history.append(clip(state.raw))
            state.entropies.append(entropy)
            state.domain_entropies.append(by_domain)
            state.raw, state.mean, state.square = new
            state.peak_bytes = max(state.peak_bytes, step.peak_bytes)
            state.stopped_early = settled(state.entropies, options.patience, options.min_delta)
            if done % LOG_STEPS == 0:
                _log(step, done, entropy, state)
            if time.monotonic() > saved + SAVE_SECONDS:
                save(False)
                saved = time.monotonic()
            report(done + 1, entropy)
            advance()


def _log(step: "Step", done: int, entropy: float, state: State) -> None:
    if done == 0:
        logging.info(
            "AdaMerging: a step takes %.3f GB per device, base and experts alone %.3f GB (%.2f times)",
            *(state.peak_bytes / 1e9, state.model_bytes / 1e9, state.peak_bytes / state.model_bytes),
        )
    values = clip(state.raw).mean(axis=0)
    logging.info("AdaMerging, step %d: entropy %.4f, mean coefficients %s", done + 1, entropy, values.round(4))


def settled(entropies: Sequence[float], patience: int, min_delta: float) -> bool:
    """Is the mean of the last `patience` entropies not lower by `min_delta` than that of those before them?

    >>> settled([3.0, 2.0, 1.0, 1.0], 2, 0.1), settled([1.0, 1.0, 1.0, 0.95], 2, 0.1)
    (False, True)
    """
    if not patience or len(entropies) < 2 * patience:
        return False
    before, last = entropies[-2 * patience : -patience], entropies[-patience:]
    return float(np.mean(before)) - float(np.mean(last)) < min_delta


def _questions(candidates: Candidates, domains: Mapping[str, Sequence[Task]], options: AdaMergingConfig):
    """Prompts, and how many new tokens they may have, by domain."""
    tasks_as = replace(candidates.evaluation.options, limit=options.limit)
    asked, budgets = {}, {}
    for domain, tasks in domains.items():
        found = [
            q for task in tasks for q in candidates.evaluation.questions(task, options.split, tasks_as) if q.prompt
        ]
        if not found:
            raise ValueError(f"AdaMerging: the domain {domain!r} has no {options.split} prompts; raise --max_length?")
        asked[domain] = [q.prompt for q in found]
        budgets[domain] = [min(q.budget, options.new_tokens) for q in found]
        check_prompts(asked[domain], candidates.base.config["vocab_size"])
    return asked, budgets


def _prompts(
    candidates: Candidates,
    asked,
    budgets,
    merge: MergeConfig,
    options: AdaMergingConfig,
    workdir: Path,
    fingerprint: str,
) -> dict[str, list[Prompt]]:
    if options.positions != "generated":
        return {domain: prompts_of(prompts, options.positions) for domain, prompts in asked.items()}
    file = workdir / "continuations.json"
    read = lambda: read_continuations(file, fingerprint, asked) if candidates.job.resume else None  # noqa: E731
    answers = processes.of_first("continuations", read)
    if answers is None:
        weights = candidates.made(candidates.opened.merger(merge), candidates.fingerprint(merge))

        def generate() -> dict[str, list[list[int]]]:
            evaluator = JaxEvaluator(max_length=candidates.evaluation.options.max_length)
            evaluator.use(weights)
            answers = {domain: evaluator.generate(asked[domain], budgets[domain]) for domain in asked}
            evaluator.close()
            write_whole(file, json.dumps({"fingerprint": fingerprint, "answers": answers}) + "\n")
            return answers

        answers = processes.of_first("answers", generate)
    return {domain: prompts_of(asked[domain], "generated", answers[domain]) for domain in asked}


class Continuations(msgspec.Struct):
    """What continuations.json holds: token ids of the answers, by domain, in the order of the prompts."""

    fingerprint: str = ""
    answers: dict[str, list[list[int]]] = {}


def read_continuations(
    file: Path, fingerprint: str, asked: Mapping[str, Sequence]
) -> dict[str, list[list[int]]] | None:
    """Return the answers that an earlier run of the same inputs and options has left; None where there are none."""
    kept = read_kept(file, Continuations)
    if kept is None or kept.fingerprint != fingerprint:
        return None
    counts = [{domain: len(of_domain) for domain, of_domain in each.items()} for each in (kept.answers, asked)]
    return kept.answers if counts[0] == counts[1] else None
