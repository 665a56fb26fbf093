"""DELLA: keep probabilities by rank, and kept elements divided by them. Deep et al. 2024, arXiv 2406.11617."""

import numpy as np
import pytest
from support import from_linears, merge_to_arrays

from dppa_jax.config.merge import MergeConfig

ROWS, COLUMNS, SEEDS = 384, 48, 5
SHAPES = {"hidden_size": COLUMNS, "intermediate_size": ROWS, "num_attention_heads": 1, "num_key_value_heads": 1}


def deltas_of_seeds(rate: float, window: float) -> tuple[np.ndarray, np.ndarray]:
    """The dense up_proj of an expert, and what is left of it with every seed."""
    generator = np.random.default_rng(0)
    shapes = [(COLUMNS, COLUMNS)] * 4 + [(ROWS, COLUMNS)] * 2 + [(COLUMNS, ROWS)]
    base, expert, names = from_linears([generator.standard_t(4, shape) for shape in shapes], np.float32, **SHAPES)
    up = next(name for name in names if "up_proj" in name)
    config = {"method": "della_linear", "rate": rate, "method_options": {"della_window": window}}
    pruned = [
        merge_to_arrays(base, {"e": expert}, MergeConfig(("e",), seed=seed, **config), deltas=True).deltas["e"][up]
        for seed in range(SEEDS)
    ]
    return expert.tensors[up], np.stack(pruned)


@pytest.mark.parametrize(("rate", "window"), [(0.7, 0.4), pytest.param(0.9, 0.1, marks=pytest.mark.slow), (0.95, 0.5)])
def test_keep_probabilities_grow_with_the_rank_and_kept_elements_are_divided_by_them(rate, window):
    """A window that would leave [0, 1] is narrowed to it: 0.95 ± 0.25 becomes 0.95 ± 0.05."""
    dense, pruned = deltas_of_seeds(rate, window)
    rank = np.argsort(np.argsort(abs(dense), axis=1), axis=1)
    half = min(window / 2, rate, 1 - rate)
    probability = 1 - rate + half * (2 * rank / (COLUMNS - 1) - 1)
    kept = pruned != 0
    assert len({of_seed.tobytes() for of_seed in kept}) == SEEDS
    np.testing.assert_allclose(np.where(kept, pruned * probability, dense), np.broadcast_to(dense, pruned.shape), 1e-4)
    for r in range(COLUMNS):  # SEEDS times ROWS draws of each rank
        p = probability[rank == r][0]
        deviation = np.sqrt(max(p * (1 - p), 1e-9) / (SEEDS * ROWS))
        assert abs(kept[:, rank == r].mean() - p) < 5 * deviation + 1e-9, r


def test_a_window_of_0_is_dare():
    dense, pruned = deltas_of_seeds(0.8, 0.0)
    kept = pruned != 0
    np.testing.assert_allclose(pruned[kept], np.broadcast_to(dense, pruned.shape)[kept] / 0.2, 1e-6)
    assert kept.mean() == pytest.approx(0.2, abs=0.01)
