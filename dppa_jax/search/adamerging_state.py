"""What AdaMerging keeps between steps and between runs, and what it found."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from absl import logging

from dppa_jax.config.numbers import Coefficient
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.reading import read_kept
from dppa_jax.search.coefficients import Groups, clip, named_coefficients, short_floats


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

    @classmethod
    def of_state(
        cls, state: "State", experts: tuple[str, ...], domains: tuple[str, ...], granularity: str, tensors: Groups
    ) -> "AdaMerged":
        """Read the result off the state after the last step."""
        return cls(
            experts=experts,
            domains=domains,
            groups=tensors.names,
            granularity=granularity,
            coefficients=named_coefficients(clip(state.raw), tensors, experts),
            entropies=np.array(state.entropies),
            domain_entropies=np.array(state.domain_entropies),
            history=np.array(state.history),
            final=clip(state.raw),
            peak_bytes=state.peak_bytes,
            model_bytes=state.model_bytes,
            stopped_early=state.stopped_early,
        )

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.entropies)

    def in_words(self) -> str:
        """Return coefficients and entropies in a line."""
        found = []
        for name, values in zip(self.experts, self.final.T, strict=True):
            spread = f" ({values.min():.3g} to {values.max():.3g})" if len(values) > 1 else ""
            found.append(f"{name} {values.mean():.4g}{spread}")
        tenth = max(1, self.steps // 10)
        first, last = self.entropies[:tenth].mean(), self.entropies[-tenth:].mean()
        ended = ", ended early" if self.stopped_early else ""
        return f"{', '.join(found)}; entropy {first:.4f} to {last:.4f} nats in {self.steps} steps{ended}"

    def as_dict(self) -> dict:
        """Return what was found as JSON can say it."""
        arrays = ("entropies", "domain_entropies", "history", "final")
        return {name: short_floats(value) if name in arrays else value for name, value in vars(self).items()}


@dataclass
class State:
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


class KeptState(msgspec.Struct):
    """The state in a file; arrays are (groups, experts)."""

    raw: list[list[float]]
    mean: list[list[float]]
    square: list[list[float]]
    entropies: list[float]
    domain_entropies: list[list[float]]
    history: list[list[list[float]]]
    stopped_early: bool
    peak_bytes: int
    model_bytes: int


class StateFile(msgspec.Struct):
    """What a further run reads of coefficients.json."""

    fingerprint: str = ""
    finished: bool = False
    state: KeptState | None = None


def read_state(file: Path | None, fingerprint: str, shape: tuple[int, int], start: float) -> tuple[State, bool]:
    """Read the state of an earlier run of the same inputs and options, and whether it had finished; else the start."""
    content = read_kept(file, StateFile) if file else None
    zeros = np.zeros(shape, np.float32)
    fresh = State(zeros + np.float32(start), zeros, zeros), False
    if content is None or content.fingerprint != fingerprint or content.state is None:
        return fresh
    kept = msgspec.structs.asdict(content.state)
    try:
        arrays = {name: np.array(kept.pop(name), np.float32).reshape(shape) for name in ("raw", "mean", "square")}
        history = [np.array(step, np.float32).reshape(shape) for step in kept.pop("history")]
    except ValueError:
        logging.warning("%s: its arrays are not %d by %d; AdaMerging begins anew", file, *shape)
        return fresh
    logging.info("AdaMerging goes on after step %d, from %s", len(history), file)
    return State(**arrays, history=history, **kept), content.finished


def write_state(
    file: Path, fingerprint: str, state: State, groups: Groups, experts: tuple[str, ...], finished: bool
) -> None:
    """Keep the state, and the coefficients as `--coefficient=FILE` takes them."""
    arrays = ("raw", "mean", "square", "history")
    kept = {name: short_floats(np.array(v)) if name in arrays else v for name, v in vars(state).items()}
    content = {
        "coefficients": named_coefficients(clip(state.raw), groups, experts),
        "finished": finished,
        "groups": groups.names,
        "fingerprint": fingerprint,
        "state": kept,
    }
    write_whole(file, json.dumps(content) + "\n")
