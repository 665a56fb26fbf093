"""Searches of DAREx's q: the authors' walk visit by visit, the parabola, and the change of outputs."""

import json
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.config.q import QConfig
from dppa_jax.merging.activations import PADDING
from dppa_jax.search.output_change import OutputChange
from dppa_jax.search.q import Q_SEARCHES, darex_walk, search_q
from dppa_jax.where import load_tree

RATES = (0.9, 0.95, 0.99)
STEP = 0.05  # of the reference's walks


@pytest.fixture(scope="module")
def change(golden) -> "Stack":
    return Stack(load_file(golden / "darex/output_change/stack.safetensors"))


@pytest.fixture(scope="module")
def cases(golden) -> dict[float, dict]:
    found = json.loads((golden / "darex/output_change/stack.json").read_text())
    return {case["p"]: case for case in found["cases"]}


class Stack:
    """Two blocks h + down(silu(gate n) · up n) with n = rms_norm(h), a norm and a head: the reference's model."""

    def __init__(self, stored: dict[str, np.ndarray]):
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


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_3_the_walk_visits_what_the_authors_visits(kind, p, cases, change):
    wanted = cases[p]["walk_encoder_l1" if kind == "encoder" else "walk_decoder_top5_seed0"]
    visited = []

    def score(q: float) -> float:
        visited.append((q, -change.hidden(p, q) if kind == "encoder" else -change.top(p, q, 0)))
        return visited[-1][1]

    low = cases[p]["walk_encoder_l1"]["visited"][0][0]
    answer = darex_walk(score, low, 1.0, STEP, low + STEP / 10 if kind == "encoder" else 0.0)
    np.testing.assert_allclose(visited, wanted["visited"], rtol=0, atol=1e-9)
    assert answer == pytest.approx(wanted["answer"], abs=1e-9)


def test_3_the_top_of_a_parabola_is_found_within_a_fine_step():
    score = lambda q: 0.8 - (q - 0.237) ** 2  # noqa: E731
    found = search_q(score, 0.1, QConfig("auto", rule="darex", walk=(1.0, STEP)))
    assert abs(found.q - 0.237) <= STEP / 10
    assert abs(search_q(score, 0.1, QConfig("auto")).q / 0.237 - 1) < 0.06  # a point of its grid


SCORES = ["rising", "falling", "flat", "almost flat"]


@pytest.mark.parametrize("rule", Q_SEARCHES)
@pytest.mark.parametrize("score", [lambda q: q, lambda q: -q, lambda q: 0.0, lambda q: -1e-300], ids=SCORES)
def test_no_rule_leaves_what_q_may_be_and_the_answer_was_scored(rule: str, score: Callable[[float], float]):
    for density in (0.2, 0.01, 0.5):
        found = search_q(score, density, QConfig("auto", rule=rule))
        assert all(density <= visit.q <= 1 for visit in found.visits)
        assert found.q in [visit.q for visit in found.visits]
        assert len(found.visits) == len({visit.q for visit in found.visits}) <= 40


def test_4_the_default_ends_near_the_least_change(cases, change):
    """At rate 0.99, within 10 % of the least mean of four masks on a grid of 0.001."""
    mean = lambda q: np.mean([change.top(0.99, q, seed) for seed in range(4)])  # noqa: E731
    least = cases[0.99]["dense_argmin"]["top5_value"]
    assert mean(cases[0.99]["dense_argmin"]["top5_mse_mean_of_4"]) == pytest.approx(least, rel=1e-9)
    found = search_q(lambda q: -mean(q), 1 - 0.99, QConfig("auto"))
    assert -found.score <= 1.1 * least
    assert len(found.visits) <= 12


@pytest.fixture(scope="module")
def family(golden) -> dict:
    """The project's family in float32: the expert, tokens, and pruned(p, q) with the reference's masks."""
    facts = json.loads((golden / "darex/output_change/family.json").read_text())
    masks = load_file(golden / "darex/output_change/family_masks.safetensors")
    base, expert = (SafetensorsDirectory(golden / "family/fp32" / name) for name in ("base", facts["expert"]))
    config, tree = load_tree(expert.directory)
    kept = lambda p, name, size: np.unpackbits(masks[f"mask.{p}.{name}"])[:size]  # noqa: E731

    def pruned(p: float, q: float) -> Model:
        layers = jax.tree.map(lambda array: np.array(array), tree)
        for name in facts["linears"]:
            start, end = base.read(name), expert.read(name)
            _, _, layer, block, linear, _ = name.split(".")
            mask = kept(p, name, end.size).reshape(end.shape)
            layers["layers"][block][linear][int(layer)] = start + mask * (end - start) / np.float32(q)
        return Model(config, layers)

    return {"facts": facts, "tokens": masks["tokens"], "expert": Model(config, tree), "pruned": pruned}


def test_4_the_change_is_that_of_the_reference(family):
    change = {kind: OutputChange(family["expert"], family["tokens"], kind) for kind in ("top_logits", "hidden")}
    (case,) = (one for one in family["facts"]["cases"] if one["p"] == 0.99)
    for row in case["table"]:
        model = family["pruned"](0.99, row["q"])
        assert change["top_logits"](model) == pytest.approx(row["top5_mse"], rel=1e-5), row
        assert change["hidden"](model) == pytest.approx(row["hidden_l1"], rel=1e-5), row
    assert change["top_logits"](family["expert"]) == 0


def test_4_padding_does_not_change_it(family):
    tokens, model = family["tokens"], family["pruned"](0.9, 0.3)
    plain = OutputChange(family["expert"], tokens, "top_logits")(model)
    padded = np.pad(tokens, ((0, 0), (0, 7)), constant_values=3)
    counted = np.arange(padded.shape[1])[None] < np.full((len(tokens), 1), tokens.shape[1])
    assert OutputChange(family["expert"], padded, "top_logits", counted)(model) == pytest.approx(plain, rel=1e-6)
    marked = np.where(counted, padded, PADDING)
    assert OutputChange(family["expert"], marked, "top_logits")(model) == pytest.approx(plain, rel=1e-6)
    assert OutputChange(family["expert"], padded, "top_logits")(model) != pytest.approx(plain, rel=1e-3)


def test_batches_do_not_change_it(family, monkeypatch):
    whole = OutputChange(family["expert"], family["tokens"], "top_logits")(family["pruned"](0.9, 0.3))
    monkeypatch.setattr("dppa_jax.search.output_change.LOGITS", 3 * family["tokens"].shape[1] * 512)
    parts = OutputChange(family["expert"], family["tokens"], "top_logits")
    assert len(parts._expert) == 3
    assert parts(family["pruned"](0.9, 0.3)) == pytest.approx(whole, rel=1e-6)


def test_rate_0_needs_no_search_and_rate_1_has_no_q():
    assert search_q(lambda q: 1.0, 1.0, QConfig("auto")).q == 1.0
    with pytest.raises(ValueError, match="nothing is kept"):
        search_q(lambda q: 1.0, 0.0, QConfig("auto"))
    with pytest.raises(ValueError, match="--q_walk"):
        replace(QConfig("auto"), walk=(0.1,))
