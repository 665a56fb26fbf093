"""AdaMerging against PyTorch: transformers' LLaMA on merged weights, autograd for coefficients, torch.optim.Adam."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
import torch
from golden import EXPERTS
from support import ONE_DEVICE, merge_to_arrays
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from dppa_jax.config.merge import MergeConfig
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.search.adamerging_step import Step
from dppa_jax.search.coefficients import fixed_coefficients, groups_of
from dppa_jax.search.mixture import Mixture
from dppa_jax.search.prompts import draw, prompts_of

FACTORS = {"expert0": (1.8, 1.3), "expert1": (2.2, 0.6), "expert2": (1.0, 0.0)}
MERGES = {
    "unpruned": {"method": "task_arithmetic"},
    "dppa": {"method": "dppa", "partitions": (0.9, 0.8), "rate": 0.8, "factors": FACTORS},
    "dare": {"method": "dare", "rate": 0.9, "seed": 3},
}
POSITIONS = {"math": "all", "law": "last"}
LEARNING_RATE = 1e-2  # ten times the usual one: some coefficients leave [0, 1] within 20 steps


@dataclass
class Oracle:
    """Merged weights are formed whole, from the deltas that a merge with --save_delta writes."""

    model: LlamaForCausalLM
    base: dict[str, torch.Tensor]
    deltas: dict[str, dict[str, torch.Tensor]]

    def entropy(self, coefficients: dict[str, torch.Tensor], domains: dict) -> torch.Tensor:
        """`coefficients`: by tensor, one for each expert."""
        merged = {
            name: base
            + sum(c * self.deltas[expert][name] for c, expert in zip(coefficients[name], EXPERTS, strict=True))
            for name, base in self.base.items()
        }
        total = 0.0
        for prompts in domains.values():
            found = []
            for prompt in prompts:
                logits = functional_call(self.model, merged, (torch.tensor([prompt.tokens]),)).logits[0, prompt.first :]
                logs = torch.log_softmax(logits, dim=-1)
                found.append(-(logs.exp() * logs).sum(dim=-1))
            total = total + torch.cat(found).mean()
        return total


def group(granularity: str, name: str) -> str:
    if granularity == "task":
        return "all"
    if granularity == "linear":
        return name
    return name.split(".")[2] if ".layers." in name else "outside"


@pytest.fixture(scope="module", params=MERGES)
def case(request, open_model):
    """(oracle, mixture, merge) of the golden family in float32."""
    base, experts = open_model("fp32", "base"), {name: open_model("fp32", name) for name in EXPERTS}
    merge = MergeConfig(EXPERTS, **MERGES[request.param])
    written = merge_to_arrays(base, experts, merge, deltas=True).deltas
    model = LlamaForCausalLM(LlamaConfig(**base.config, attn_implementation="eager")).eval()
    tensors = lambda arrays: {name: torch.tensor(np.array(array)) for name, array in arrays.items()}  # noqa: E731
    weights = {name: base.read(name) for name in base.specs}
    oracle = Oracle(model, tensors(weights), {name: tensors(arrays) for name, arrays in written.items()})
    return oracle, Mixture(base, experts, merge, make_mesh(ONE_DEVICE)), merge, base.specs


@pytest.fixture(scope="module")
def domains() -> dict:
    """Prompts of many lengths, of one domain at all positions, of the other at the last one."""
    generator = np.random.default_rng(4)
    return {
        domain: prompts_of([generator.integers(3, 512, n).tolist() for n in (5, 19, 12, 30)], positions)
        for domain, positions in POSITIONS.items()
    }


def start(granularity: str, specs, first: float | None) -> np.ndarray:
    shape = len(groups_of(granularity, specs)[0]), len(EXPERTS)
    values = np.random.default_rng(7).uniform(0.05, 0.95, shape) if first is None else np.full(shape, first)
    return values.astype(np.float32)


def by_tensor(raw: torch.Tensor, granularity: str, specs) -> dict[str, torch.Tensor]:
    """Clamped coefficients of every tensor; of "layer", those of what is outside the layers are the last row."""
    order = list(dict.fromkeys(group(granularity, name) for name in specs))
    if granularity == "layer":
        order = [*(name for name in order if name != "outside"), "outside"]
    return {name: torch.clamp(raw, 0, 1)[order.index(group(granularity, name))] for name in specs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "granularity"),
    [("unpruned", "layer"), ("dppa", "task"), ("dppa", "layer"), ("dppa", "linear"), ("dare", "linear")],
    indirect=["case"],
)
def test_entropy_and_gradient_of_every_coefficient(case, domains, granularity):
    oracle, mixture, merge, specs = case
    values = start(granularity, specs, None)
    raw = torch.tensor(values, requires_grad=True)
    wanted = oracle.entropy(by_tensor(raw, granularity, specs), domains)
    wanted.backward()
    with jax.default_matmul_precision("highest"):
        step = Step(mixture, groups_of(granularity, specs)[1], fixed_coefficients(merge, specs), LEARNING_RATE)
        rows, gradient = step.gradient(values, draw(domains, 0, 4, seed=0))
    assert rows.sum() == pytest.approx(wanted.item(), rel=1e-5)
    # Of the largest, as well: where a derivative is near zero, what it is the small sum of is rounded.
    largest = np.abs(raw.grad.numpy()).max()
    np.testing.assert_allclose(gradient, raw.grad.numpy(), rtol=1e-5, atol=5e-6 * largest)


@pytest.mark.slow
def test_twenty_steps_of_adam(case, domains):
    oracle, mixture, merge, specs = case
    granularity = {"task_arithmetic": "task", "dppa": "layer", "dare": "linear"}[merge.method]
    values = start(granularity, specs, 0.05)
    raw = torch.tensor(values, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=LEARNING_RATE)
    state = values, np.zeros_like(values), np.zeros_like(values)
    with jax.default_matmul_precision("highest"):
        step = Step(mixture, groups_of(granularity, specs)[1], fixed_coefficients(merge, specs), LEARNING_RATE)
        for done in range(20):
            adam.zero_grad()
            oracle.entropy(by_tensor(raw, granularity, specs), domains).backward()
            adam.step()
            _, state = step(*state, done, draw(domains, done, 4, seed=0))
            np.testing.assert_allclose(state[0], raw.detach().numpy(), rtol=0, atol=1e-4)
    assert np.abs(state[0] - values).max() > 0.1
