"""How much pruning changes an expert's outputs: the reference's numbers, padding, batches, and where a search ends."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from darex_golden import Stack, read_cases
from safetensors.numpy import load_file
from support import ONE_DEVICE

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import QConfig
from dppa_jax.merging.activations import PADDING
from dppa_jax.merging.in_memory import merged_model
from dppa_jax.merging.merger import Layout, Merger
from dppa_jax.model import forward, model_config
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.search.output_change import OutputChange, last_positions
from dppa_jax.search.q import search_q
from dppa_jax.where import load_tree


def test_4_the_default_ends_near_the_least_change(golden):
    """At rate 0.99, within 10 % of the least mean of four masks on a grid of 0.001."""
    cases, stack = read_cases(golden), Stack(golden)
    mean = lambda q: np.mean([stack.top(0.99, q, seed) for seed in range(4)])  # noqa: E731
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


def test_4_nothing_removed_and_nothing_rescaled_is_exactly_no_change(family, golden):
    base, expert = (SafetensorsDirectory(golden / "family/fp32" / name) for name in ("base", family["facts"]["expert"]))
    made = []
    for options in ({"method": "task_arithmetic"}, {"method": "darex_q", "rate": 0.0, "q": {"math": 1.0}}):
        merger = Merger(base, {"math": expert}, MergeConfig(("math",), **options), make_mesh(ONE_DEVICE), Layout(1))
        made.append(merged_model(merger, None))
    dense, pruned = made
    assert OutputChange(dense, family["tokens"], "top_logits")(pruned) == 0
    assert OutputChange(dense, family["tokens"], "hidden")(pruned) == 0


def test_4_last_positions_alone_may_count(family):
    """Half of the rows are cut to five tokens."""
    tokens, model = family["tokens"].copy(), family["pruned"](0.9, 0.3)
    tokens[::2, 5:] = PADDING
    lengths, to_jax = (tokens != PADDING).sum(axis=1), partial(jax.tree.map, jnp.asarray)
    found = OutputChange(family["expert"], tokens, "top_logits", last_positions(tokens))(model)
    changes = []
    for row, length in zip(tokens, lengths, strict=True):
        models = family["expert"], model
        logits = [forward(model_config(one.config), to_jax(one.tree), row[None, :length]) for one in models]
        expert, pruned = (np.asarray(one)[0, -1] for one in logits)
        largest = np.argsort(expert)[-5:]
        changes.append(np.square(pruned[largest] - expert[largest]).mean())
    assert found == pytest.approx(np.mean(changes), rel=1e-5)
    assert found != pytest.approx(OutputChange(family["expert"], tokens, "top_logits")(model), rel=0.05)


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
