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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import lax
from jaxtyping import Array, Float

from dppa_jax.architecture.rules import check_patterns, first_match
from dppa_jax.architecture.specs import TensorSpec
from dppa_jax.config.merge import Coefficient, MergeConfig
from dppa_jax.config.search import AdaMergingConfig
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.tasks import Task
from dppa_jax.merging.activations import norms_of_experts
from dppa_jax.merging.kernels import ZERO
from dppa_jax.model.generate import check_prompts
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest, sources_digest, write_whole
from dppa_jax.runtime.progress import steps as progress_of
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.entropy import Batch, row_entropies
from dppa_jax.search.mixture import Mixture, check_combine
from dppa_jax.search.prompts import Prompt, draw, prompts_of

OUTSIDE = "outside the layers"
SAVE_SECONDS = 20  # at most so much work is lost
LOG_STEPS = 50

CODE = sources_digest("search/adamerging.py", "search/entropy.py", "search/mixture.py", "search/prompts.py")
FORWARD = sources_digest("model/decoder.py", "model/generate.py")


@dataclass
class AdaMerged:
    """What AdaMerging found.

    Attributes:
      coefficients: per expert, a number, or one for every tensor; what `MergeConfig.coefficients` takes.
      entropies: (steps,) of the coefficients that each step began with, on its batch, in nats, domains added up.
      domain_entropies: (steps, domains).
      history: (steps, groups, experts) coefficients that each step began with.
      groups: names of what shares a coefficient: "all", "layer 3", a tensor's name.
      final: (groups, experts), after the last step.
      peak_bytes: arguments and temporary arrays of the compiled step, per device; 0 where nothing was left to do.
      model_bytes: of base and experts, per device.
      stopped_early: by `patience`.
    """

    experts: tuple[str, ...]
    domains: tuple[str, ...]
    groups: tuple[str, ...]
    granularity: str
    coefficients: dict[str, Coefficient]
    entropies: np.ndarray
    domain_entropies: np.ndarray
    history: np.ndarray
    final: np.ndarray
    peak_bytes: int = 0
    model_bytes: int = 0
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        return len(self.entropies)

    def in_words(self) -> str:
        found = []
        for name, values in zip(self.experts, self.final.T, strict=True):
            spread = f" ({values.min():.3g} to {values.max():.3g})" if len(values) > 1 else ""
            found.append(f"{name} {values.mean():.4g}{spread}")
        tenth = max(1, self.steps // 10)
        first, last = self.entropies[:tenth].mean(), self.entropies[-tenth:].mean()
        ended = ", ended early" if self.stopped_early else ""
        return f"{', '.join(found)}; entropy {first:.4f} to {last:.4f} nats in {self.steps} steps{ended}"

    def as_dict(self) -> dict:
        """As JSON can say it."""
        arrays = ("entropies", "domain_entropies", "history", "final")
        return {name: _short(value) if name in arrays else value for name, value in vars(self).items()}


@dataclass
class _State:
    """What a step changes: raw coefficients and Adam's moments, (groups, experts), and the records so far."""

    raw: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    entropies: list = field(default_factory=list)
    domain_entropies: list = field(default_factory=list)
    history: list = field(default_factory=list)
    stopped_early: bool = False
    peak_bytes: int = 0
    model_bytes: int = 0


def adamerge(
    candidates: Candidates,
    domains: Mapping[str, Sequence[Task]],
    merge: MergeConfig,
    given: AdaMergingConfig,
    workdir: Path,
    report: Callable[[int, float], None] = lambda step, entropy: None,
) -> AdaMerged:
    """The coefficients of the merge that `merge` describes, by the prompts of these domains.

    `workdir`/coefficients.json holds them with all that a further run needs to go on from where this one was ended; a
    run of other inputs or options, or with `candidates.job.resume` false, begins anew. `report` is called after each
    step with how many are done and the entropy. Several processes take each step together.

    Raises:
      ValueError: `combine` is not "sum"; a domain without prompts; an entropy that is not finite.
    """
    check_combine(merge)
    merge = replace(merge, coefficients=dict.fromkeys(merge.experts, given.start))
    specs = candidates.base.specs
    check_patterns(merge.tensor_coefficients, specs, "--tensor_coefficient")
    asked, budgets = _questions(candidates, domains, given)
    fingerprint = digest([CODE, FORWARD, candidates.fingerprint(merge), asdict(given), asked, budgets])
    file = workdir / "coefficients.json"
    workdir.mkdir(parents=True, exist_ok=True)
    groups, of_tensor = groups_of(given.granularity, specs)
    shape = (len(groups), len(merge.experts))
    kept = lambda: _read(file if candidates.job.resume else None, fingerprint, shape, given.start)  # noqa: E731
    state, finished = processes.of_first("coefficients", kept)
    if not finished:
        prompts = _prompts(candidates, asked, budgets, merge, given, workdir, fingerprint)
        experts = {name: candidates.experts[name] for name in merge.experts}
        norms = norms_of_experts(candidates.job, experts) if merge.is_calibrated else None
        mixture = Mixture(candidates.base, experts, merge, candidates.mesh, norms)
        step = Step(mixture, of_tensor, fixed_coefficients(merge, specs), given.learning_rate)

        def save(done: bool) -> None:
            if processes.index() == 0:
                _write(file, fingerprint, state, groups, of_tensor, merge, mixture.names, done)

        try:
            _descend(step, prompts, given, state, save, report)
        except BaseException:
            save(False)
            raise
        save(True)
    final = clip(state.raw)
    found = AdaMerged(
        experts=merge.experts,
        domains=tuple(domains),
        groups=groups,
        granularity=given.granularity,
        coefficients=named_coefficients(final, groups, of_tensor, merge.experts, tuple(specs)),
        entropies=np.array(state.entropies),
        domain_entropies=np.array(state.domain_entropies),
        history=np.array(state.history),
        final=final,
        peak_bytes=state.peak_bytes,
        model_bytes=state.model_bytes,
        stopped_early=state.stopped_early,
    )
    logging.info("AdaMerging: %s", found.in_words())
    return found


def _descend(step: "Step", prompts, given: AdaMergingConfig, state: _State, save, report) -> None:
    saved = time.monotonic()
    many = [min(given.batch_size, len(of_domain)) for of_domain in prompts.values()]
    state.model_bytes = step.mixture.model_bytes
    with progress_of("AdaMerging", given.steps, "steps") as advance:
        advance(len(state.entropies))
        while len(state.entropies) < given.steps and not state.stopped_early:
            done = len(state.entropies)
            batch = draw(prompts, done, given.batch_size, given.seed)
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
            state.stopped_early = settled(state.entropies, given.patience, given.min_delta)
            if done % LOG_STEPS == 0:
                _log(step, done, entropy, state)
            if time.monotonic() > saved + SAVE_SECONDS:
                save(False)
                saved = time.monotonic()
            report(done + 1, entropy)
            advance()


def _log(step: "Step", done: int, entropy: float, state: _State) -> None:
    if done == 0:
        logging.info(
            "AdaMerging: a step takes %.3f GB per device, base and experts alone %.3f GB (%.2f times)",
            *(state.peak_bytes / 1e9, state.model_bytes / 1e9, state.peak_bytes / state.model_bytes),
        )
    values = clip(state.raw).mean(axis=0)
    logging.info("AdaMerging, step %d: entropy %.4f, mean coefficients %s", done + 1, entropy, values.round(4))


class Step:
    """One step of Adam; compiled once for each width of batches.

    Args:
      of_tensor: the group of every tensor of `mixture.names`.
      fixed: (tensors,) coefficients of all experts that `--tensor_coefficient` rules decide, NaN elsewhere.
    """

    def __init__(self, mixture: Mixture, of_tensor: np.ndarray, fixed: np.ndarray, learning_rate: float):
        self.mixture, self.learning_rate, self.peak_bytes = mixture, np.float32(learning_rate), 0
        self._constants = np.asarray(of_tensor, np.int32), np.asarray(fixed, np.float32)
        self._compiled: dict[tuple, Callable] = {}

    def __call__(
        self, raw: np.ndarray, mean: np.ndarray, square: np.ndarray, done: int, batch: Batch
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Σ weight · entropy of the batch's rows, and raw coefficients and moments after the step."""
        adam = optax.ScaleByAdamState(np.int32(done), mean, square)
        arguments = (self.learning_rate, raw, adam, self._constants, self.mixture.tree, batch, ZERO)
        shape = batch.tokens.shape, batch.chosen.shape
        if shape not in self._compiled:  # by a Step of the same models and shapes in this process, it is not done again
            compiled = self._compiled[shape] = _step.lower(self.mixture.arithmetic, *arguments).compile()
            self.peak_bytes = max(self.peak_bytes, sum(memory(compiled)))
        rows, raw, adam = jax.device_get(self._compiled[shape](*arguments))
        return rows, (raw, adam.mu, adam.nu)

    def gradient(self, raw: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Σ weight · entropy of the batch's rows, and the derivative of their sum by every raw coefficient."""
        arguments = raw, self._constants, self.mixture.tree, batch, ZERO
        return jax.device_get(_gradient(self.mixture.arithmetic, *arguments))

    def entropies(self, raw: np.ndarray, batch: Batch) -> np.ndarray:
        """Σ weight · entropy of the batch's rows."""
        arguments = raw, self._constants, self.mixture.tree, batch, ZERO
        return jax.device_get(_entropies(self.mixture.arithmetic, *arguments))


@partial(jax.jit, static_argnums=0)
def _step(arithmetic, learning_rate, raw, adam, constants, tree, batch, zero):
    rows, gradient = _gradient(arithmetic, raw, constants, tree, batch, zero)
    update, adam = optax.scale_by_adam().update(gradient, adam)
    return arithmetic.everywhere((rows, raw - learning_rate * update, adam))


@partial(jax.jit, static_argnums=0)
def _gradient(arithmetic, raw, constants, tree, batch, zero):
    def total(raw):
        rows = _entropies(arithmetic, raw, constants, tree, batch, zero)
        return rows.sum(), rows

    (_, rows), gradient = jax.value_and_grad(total, has_aux=True)(raw)
    return arithmetic.everywhere((rows, gradient))


@partial(jax.jit, static_argnums=0)
def _entropies(arithmetic, raw, constants, tree, batch, zero):
    return arithmetic.everywhere(row_entropies(arithmetic, tree, coefficients_of(raw, *constants), batch, zero))


def coefficients_of(raw: Float[Array, "groups experts"], of_tensor: Array, fixed: Array) -> Array:
    """(tensors, experts): clipped, and the gradient passed inside [0, 1] and at its bounds, as torch.clamp does."""
    inside = (raw >= 0) & (raw <= 1)
    clipped = jnp.where(inside, raw, lax.stop_gradient(jnp.clip(raw, 0, 1)))
    return jnp.where(jnp.isnan(fixed)[:, None], clipped[of_tensor], fixed[:, None])


def clip(raw: np.ndarray) -> np.ndarray:
    return np.clip(raw, 0.0, 1.0)


def memory(compiled) -> tuple[int, int]:
    """Bytes of arguments and of temporary arrays, per device."""
    found = compiled.memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


def settled(entropies: Sequence[float], patience: int, min_delta: float) -> bool:
    """Is the mean of the last `patience` entropies not lower by `min_delta` than that of those before them?

    >>> settled([3.0, 2.0, 1.0, 1.0], 2, 0.1), settled([1.0, 1.0, 1.0, 0.95], 2, 0.1)
    (False, True)
    """
    if not patience or len(entropies) < 2 * patience:
        return False
    before, last = entropies[-2 * patience : -patience], entropies[-patience:]
    return float(np.mean(before)) - float(np.mean(last)) < min_delta


def groups_of(granularity: str, specs: Mapping[str, TensorSpec]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the groups that share a coefficient, and the group of every tensor."""
    if granularity == "task":
        return ("all",), np.zeros(len(specs), np.int32)
    if granularity == "linear":
        return tuple(specs), np.arange(len(specs), dtype=np.int32)
    layers = 1 + max(spec.layer for spec in specs.values() if spec.layer is not None)
    of_tensor = [layers if spec.layer is None else spec.layer for spec in specs.values()]
    return (*(f"layer {i}" for i in range(layers)), OUTSIDE), np.array(of_tensor, np.int32)


def fixed_coefficients(merge: MergeConfig, specs: Mapping[str, TensorSpec]) -> np.ndarray:
    """What `--tensor_coefficient` rules decide for all experts, NaN where they are silent."""
    found = (first_match(merge.tensor_coefficients, name) for name in specs)
    return np.array([math.nan if value is None else value for value in found], np.float32)


def named_coefficients(
    final: np.ndarray, groups: Sequence[str], of_tensor: np.ndarray, experts: Sequence[str], tensors: Sequence[str]
) -> dict[str, Coefficient]:
    """As `MergeConfig.coefficients` takes them."""
    found = _short(final)
    if len(groups) == 1:
        return {name: found[0][k] for k, name in enumerate(experts)}
    return {
        name: {tensor: found[group][k] for tensor, group in zip(tensors, of_tensor, strict=True)}
        for k, name in enumerate(experts)
    }


def _questions(candidates: Candidates, domains: Mapping[str, Sequence[Task]], given: AdaMergingConfig):
    """Prompts, and how many new tokens they may have, by domain."""
    options = replace(candidates.evaluation.options, limit=given.limit)
    asked, budgets = {}, {}
    for domain, tasks in domains.items():
        found = [q for task in tasks for q in candidates.evaluation.questions(task, given.split, options) if q.prompt]
        if not found:
            raise ValueError(f"AdaMerging: the domain {domain!r} has no {given.split} prompts; raise --max_length?")
        asked[domain] = [q.prompt for q in found]
        budgets[domain] = [min(q.budget, given.new_tokens) for q in found]
        check_prompts(asked[domain], candidates.base.config["vocab_size"])
    return asked, budgets


def _prompts(
    candidates: Candidates, asked, budgets, merge: MergeConfig, given: AdaMergingConfig, workdir: Path, fingerprint: str
) -> dict[str, list[Prompt]]:
    if given.positions != "generated":
        return {domain: prompts_of(prompts, given.positions) for domain, prompts in asked.items()}
    file = workdir / "continuations.json"
    read = lambda: json.loads(file.read_text()) if candidates.job.resume and file.is_file() else {}  # noqa: E731
    kept = processes.of_first("continuations", read)
    if kept.get("fingerprint") != fingerprint:
        weights = candidates.made(candidates.merger(merge), candidates.fingerprint(merge))

        def generate() -> dict:
            evaluator = JaxEvaluator(max_length=candidates.evaluation.options.max_length)
            evaluator.use(weights)
            answers = {domain: evaluator.generate(asked[domain], budgets[domain]) for domain in asked}
            evaluator.close()
            found = {"fingerprint": fingerprint, "answers": answers}
            write_whole(file, json.dumps(found) + "\n")
            return found

        kept = processes.of_first("answers", generate)
    return {domain: prompts_of(asked[domain], "generated", kept["answers"][domain]) for domain in asked}


def _read(file: Path | None, fingerprint: str, shape: tuple[int, int], start: float) -> tuple[_State, bool]:
    """The state of an earlier run of the same inputs and options, and whether it came to its end; else the start."""
    try:
        found = json.loads(file.read_text()) if file else {}
    except (OSError, ValueError):
        found = {}
    if found.get("fingerprint") == fingerprint:
        kept = found["state"]
        arrays = {name: np.array(kept.pop(name), np.float32) for name in ("raw", "mean", "square")}
        history = [np.array(one, np.float32) for one in kept.pop("history")]
        logging.info("AdaMerging goes on after step %d, from %s", len(history), file)
        return _State(**arrays, history=history, **kept), found["finished"]
    zeros = np.zeros(shape, np.float32)
    return _State(zeros + np.float32(start), zeros, zeros), False


def _write(
    file: Path, fingerprint: str, state: _State, groups, of_tensor, merge: MergeConfig, names, done: bool
) -> None:
    arrays = ("raw", "mean", "square", "history")
    kept = {name: _short(np.array(v)) if name in arrays else v for name, v in vars(state).items()}
    content = {
        "coefficients": named_coefficients(clip(state.raw), groups, of_tensor, merge.experts, names),
        "finished": done,
        "groups": groups,
        "fingerprint": fingerprint,
        "state": kept,
    }
    write_whole(file, json.dumps(content) + "\n")


def _short(array: np.ndarray) -> list:
    """Nested lists of the shortest decimals that round to the same float32 numbers; float64 numbers as they are."""
    if array.dtype != np.float32:
        return array.tolist()
    return np.vectorize(lambda x: float(str(x)), otypes=[object])(array).tolist() if array.size else array.tolist()
