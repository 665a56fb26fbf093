"""Ranks within rows: in a graph and on the host."""

import jax
import numpy as np
import pytest

from dppa_jax.delta.ranks import PIECE, host_ranks, ranks


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 257), (PIECE // 300 + 2, 300), (2, PIECE + 1)])
def test_ranks_of_the_host_are_those_of_a_graph(rows, columns):
    generator = np.random.default_rng(rows)
    deltas = abs(generator.standard_normal((rows, columns)).astype(np.float16)).astype(np.float32)  # many tie
    deltas[:, ::7] = 0
    deltas[0, -1] = np.nan
    keys = deltas.view(np.uint32)
    found = host_ranks(keys)
    assert found.tolist() == np.asarray(jax.jit(ranks)(keys)).tolist()
    assert found.tolist() == np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1).tolist()
