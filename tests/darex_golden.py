"""Models of golden/darex in float64: two blocks whose outputs pruning changes, and single linears with their inputs."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dppa_jax.delta.q_rules import Moments

LINEARS = ("plain", "aligned", "mixed", "large", "tiny", "wide")


def read_linears(golden: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The delta of each linear, and its inputs at 64 tokens."""
    stored = load_file(golden / "darex/q_analytic/linears.safetensors")
    return {name: (stored[f"{name}.delta"].astype(float), stored[f"{name}.inputs"].astype(float)) for name in LINEARS}


def read_cases(golden: Path) -> dict[float, dict]:
    """What was measured of the two blocks, by rate."""
    found = json.loads((golden / "darex/output_change/stack.json").read_text())
    return {case["p"]: case for case in found["cases"]}


def moments_of(delta: np.ndarray, inputs: np.ndarray) -> Moments:
    products = delta * inputs.mean(axis=0)
    change = float(np.square(inputs @ delta.T).sum())
    separate = float((np.square(inputs).sum(axis=0) * np.square(delta).sum(axis=0)).sum())
    return Moments(products.sum(axis=1), np.square(products).sum(axis=1), change, separate)


class Stack:
    """Two blocks h + down(silu(gate n) · up n) with n = rms_norm(h), a norm and a head: the reference's model."""

    def __init__(self, golden: Path):
        stored = load_file(golden / "darex/output_change/stack.safetensors")
        self.stored = {name: array if array.dtype == bool else array.astype(float) for name, array in stored.items()}
        self.expert = self.outputs(None)

    def outputs(self, mask: str | None, q: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        stored = self.stored

        def linear(name: str) -> np.ndarray:
            kept = 1.0 if mask is None else stored[f"mask.{mask}.{name}"] / q
            return stored[f"base.{name}"] + kept * stored[f"delta.{name}"]

        def norm(h: np.ndarray, weight: str) -> np.ndarray:
            return h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-6) * stored[weight]

        h = stored["x"]
        for layer in ("layers.0", "layers.1"):
            n = norm(h, f"{layer}.norm")
            gate = n @ linear(f"{layer}.gate_proj").T
            h = h + (gate / (1 + np.exp(-gate)) * (n @ linear(f"{layer}.up_proj").T)) @ linear(f"{layer}.down_proj").T
        h = norm(h, "norm")
        return h, h @ stored["lm_head"].T

    def top(self, p: float, q: float, seed: int) -> float:
        wanted, (_, logits) = self.expert[1], self.outputs(f"{p}.{seed}", q)
        places = np.argsort(-wanted, axis=-1)[..., :5]
        return float(np.square(np.take_along_axis(logits - wanted, places, axis=-1)).mean())

    def hidden(self, p: float, q: float) -> float:
        """Of four masks, the one farthest from their mean is left out."""
        each = np.array([abs(self.outputs(f"{p}.{seed}", q)[0] - self.expert[0]).mean() for seed in range(4)])
        return float(np.delete(each, abs(each - each.mean()).argmax()).mean())
