import pytest
from training import random_rows

from dppa_jax.finetune.data import Rows


@pytest.fixture(scope="module")
def rows() -> Rows:
    """What the model `SMALL` learns."""
    return random_rows()
