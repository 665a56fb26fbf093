"""The random score: as many kept as the rate says, in every tensor and dtype, and no two masks that are alike."""

import numpy as np
import pytest
from families import DTYPES
from support import MemorySource, linear_names, merge_to_arrays

from dppa_jax.checkpoint import tensor_specs
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.score import random, row_words

SIGMAS = 5
LAGS = 6.5  # the largest of 10⁵ independent correlations stays below this many sigma
SHAPE = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}


def masks(rate: float, dtype: str = "bfloat16", experts=("math",), seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """What DARE keeps of every linear of each expert: their deltas are 1 everywhere."""
    config = {"model_type": "llama", "vocab_size": 8, "dtype": dtype, **SHAPE}
    shapes = {name: spec.shape for name, spec in tensor_specs(config).items()}
    base, tuned = ({name: np.full(shape, v, DTYPES[dtype]) for name, shape in shapes.items()} for v in (0, 1))
    merged = MergeConfig(tuple(experts), method="dare", rate=rate, seed=seed, delta_dtype=dtype)
    source = MemorySource(config, base)
    deltas = merge_to_arrays(source, dict.fromkeys(experts, MemorySource(config, tuned)), merged, deltas=True).deltas
    return {expert: {name: deltas[expert][name] != 0 for name in linear_names(config)} for expert in experts}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks of one shape, in sigma of independent ones."""
    a, b = (x - x.mean() for x in (a.astype(np.float64), b.astype(np.float64)))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) * np.sqrt(a.size))


def correlations_at_all_shifts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`correlation` of a with b, shifted around by any number of rows and columns."""
    fa, fb = (np.fft.rfft2(x.astype(np.float64) - x.mean()) for x in (a, b))
    return np.fft.irfft2(fa * fb.conj(), a.shape) / (a.std() * b.std() * np.sqrt(a.size))


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[] if dtype == "bfloat16" else pytest.mark.slow) for dtype in DTYPES]
)
def test_kept_share_of_every_tensor_is_the_density_within_5_sigma(dtype, rate):
    for of_expert in masks(rate, dtype, ("math", "law")).values():
        for name, mask in of_expert.items():
            sigma = np.sqrt(mask.size * rate * (1 - rate))
            assert abs(mask.sum() - mask.size * (1 - rate)) < SIGMAS * sigma, name


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_kept_share_of_every_row_and_column_is_the_density(rate):
    for name, mask in masks(rate)["math"].items():
        for axis in (0, 1):
            n = mask.shape[axis]
            z = (mask.sum(axis=axis) - n * (1 - rate)) / np.sqrt(n * rate * (1 - rate))
            assert abs(z).max() < SIGMAS + 1, (name, axis)
            assert abs(z.std() - 1) < SIGMAS / np.sqrt(2 * z.size), (name, axis)


def test_the_mask_is_the_same_in_every_dtype():
    """It depends on seed, names and indices, not on the numbers: an expert can be exported again in another dtype."""
    wanted, *others = (masks(0.9, dtype)["math"] for dtype in DTYPES)
    for other in others:
        for name, mask in wanted.items():
            np.testing.assert_array_equal(other[name], mask, err_msg=name)


@pytest.mark.parametrize("rate", [pytest.param(0.5, marks=pytest.mark.slow), 0.9])
def test_experts_tensors_and_seeds_are_independent_of_each_other(rate):
    found = masks(rate, experts=("math", "law", "mat"))
    found |= {f"seed {seed}": masks(rate, seed=seed)["math"] for seed in (1, 2**31)}
    square = [name for name in found["math"] if "q_proj" in name or "o_proj" in name]
    chosen = {(who, name): found[who][name] for who in found for name in square}
    keys = list(chosen)
    for i, one in enumerate(keys):
        for other in keys[:i]:
            assert abs(correlation(chosen[one], chosen[other])) < SIGMAS, (one, other)


@pytest.mark.parametrize("rate", [pytest.param(0.5, marks=pytest.mark.slow), 0.9])
def test_rows_and_columns_are_not_shifted_copies_of_one_another(rate):
    """Within a tensor at every shift, and between tensors, layers, experts and seeds."""
    found = masks(rate, experts=("math", "law"))
    again = masks(rate, seed=1)["math"]
    q, o, deeper = (f"model.layers.{name}_proj.weight" for name in ("0.self_attn.q", "0.self_attn.o", "1.self_attn.q"))
    one = found["math"][q]
    itself = correlations_at_all_shifts(one, one)
    assert itself[0, 0] == pytest.approx(np.sqrt(one.size))
    assert abs(itself.ravel()[1:]).max() < LAGS
    for other in (found["math"][o], found["math"][deeper], found["law"][q], again[q]):
        assert abs(correlations_at_all_shifts(one, other)).max() < LAGS


def test_masks_nest_over_the_rate():
    looser = masks(0.3)["math"]
    for rate in (0.5, 0.8, 0.9, 0.99, 0.999):
        tighter = masks(rate)["math"]
        for name, mask in tighter.items():
            assert not (mask & ~looser[name]).any(), (rate, name)
            assert mask.sum() < looser[name].sum()
        looser = tighter


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    """4 million keys of one tensor as wide and as tall as those of a large model."""
    columns = np.arange(2048, dtype=np.int32)[None]
    words = row_words(7, "law", "model.layers.3.mlp.up_proj.weight", 30_000, 32_048)
    return np.asarray(random(np.zeros((2048, 2048), np.float32), words, columns))


def test_keys_are_uniform_to_the_last_bit(keys):
    """All 32 bits are needed for a rate near 1: 0.99 must keep 1 % in every dtype, 0.9999 a ten-thousandth."""
    for bit in range(32):
        ones = int(((keys >> np.uint32(bit)) & 1).sum())
        assert abs(ones - keys.size / 2) < SIGMAS * np.sqrt(keys.size) / 2, bit
    bins = np.bincount((keys >> np.uint32(20)).ravel(), minlength=4096)
    chi_squared = ((bins - keys.size / 4096) ** 2).sum() / (keys.size / 4096)
    assert abs(chi_squared - 4095) < SIGMAS * np.sqrt(2 * 4095)


def test_neighbouring_keys_share_no_bits(keys):
    """XOR of neighbours in a row, in a column and on both diagonals has each of its bits set half the time."""
    inner = keys[1:, 1:-1]
    for other in (keys[1:, :-2], keys[:-1, 1:-1], keys[:-1, :-2], keys[:-1, 2:]):
        changed = inner ^ other
        for bit in range(32):
            ones = int(((changed >> np.uint32(bit)) & 1).sum())
            assert abs(ones - changed.size / 2) < SIGMAS * np.sqrt(changed.size) / 2, bit


def test_no_row_of_a_large_tensor_is_a_shifted_copy_of_another():
    """Of 16 million keys as many coincide as of random ones, N²/2³³; any stretch of a row seen again adds to them."""
    columns = np.arange(2048, dtype=np.int32)[None]
    words = row_words(0, "math", "model.embed_tokens.weight", 0, 8192)
    keys = np.sort(np.asarray(random(np.zeros((8192, 2048), np.float32), words, columns)), axis=None)
    repeated = int((keys[1:] == keys[:-1]).sum())
    expected = keys.size**2 / 2**33
    assert abs(repeated - expected) < SIGMAS * np.sqrt(expected) + keys.size**3 / 2**65


def test_keys_of_a_row_do_not_depend_on_where_its_chunk_starts():
    whole = row_words(0, "math", "t", 0, 100)
    chunks = [row_words(0, "math", "t", start, stop) for start, stop in ((0, 7), (7, 100))]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    assert len(np.unique(whole, axis=0)) == 100


def test_seed_expert_and_tensor_cannot_run_into_one_another():
    """('1', '2x') and ('12', 'x') are different keys: names are separated before they are hashed."""
    names = [(1, "2x", "t"), (12, "x", "t"), (1, "2", "xt"), (1, "2x", "t2"), (-1, "2x", "t")]
    assert len({row_words(*name, 0, 2).tobytes() for name in names}) == len(names)
