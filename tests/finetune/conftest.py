import numpy as np
import pytest
from training import SMALL

from dppa_jax.finetune.data import Rows


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Random rows for the model `SMALL`, each learned from a place of its own on."""
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (16, 12)).astype(np.int32)
    return Rows(tokens, np.arange(12) >= np.random.default_rng(1).integers(1, 9, 16)[:, None])
