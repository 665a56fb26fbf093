"""--q=reference: the q of every row, and how many q were tried, as the authors' code finds them in float16."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dppa_jax.delta.q_rules import GAMMA, Q_RULES, Moments, bound_rows, reference_rows

CASES = [f"{made}_A_p{p}_eta{eta}" for made in ("real", "synth") for p, eta in ((0.9, 0.1), (0.9, 1.0), (0.99, 0.45))]


def with_bias(products: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The authors take a bias as one more column, whose input is 1."""
    bias = products.get(name.removesuffix("weight") + "bias")
    return products[name] if bias is None else np.concatenate([products[name], bias[:, None]], axis=1)


@pytest.mark.parametrize("case", CASES)
def test_every_q_is_that_of_the_authors_code(case, golden):
    found = json.loads((golden / f"darex_q/{case}.json").read_text())
    products = load_file(golden / f"darex_q/{case.split('_p')[0]}.c.safetensors")
    assert found["prob"] == 1 - GAMMA
    for name, wanted in found["q"].items():
        c = with_bias(products, name)
        rows, steps = reference_rows(c, found["p"], found["eta"])
        np.testing.assert_allclose(rows, wanted["rows"], rtol=0, atol=1e-7, err_msg=name)
        assert steps == wanted["steps"], name
        q = Q_RULES["reference"].q(Moments(np.zeros(len(c)), np.zeros(len(c)), products=c), found["p"], found["eta"])
        assert q == pytest.approx(wanted["q"], abs=1e-7), name


def test_differs_from_the_bound_on_the_same_products(golden):
    """The means of golden/darex/q_analytic/existing_sets.json: the bound of ours, to 1e-9."""
    sets = json.loads((golden / "darex/q_analytic/existing_sets.json").read_text())
    column = sets["columns"].index("bound mean")
    for name, linears in sets["sets"].items():
        products = load_file(golden / f"darex_q/{name}.c.safetensors")
        for linear, rows in linears.items():
            if not linear.endswith("weight"):
                continue
            c = with_bias(products, linear).astype(np.float64)
            for row in rows:
                q = bound_rows(c.sum(axis=1), np.square(c).sum(axis=1), row[0], row[1]).mean()
                assert q == pytest.approx(row[column], abs=1e-9), (linear, row)
