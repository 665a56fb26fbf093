"""The dtypes that weights may have."""

from collections.abc import Iterable

import ml_dtypes
import numpy as np

DTYPE_BY_NAME = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the dtype that all of them are; where they differ, float32, which holds the values of every other."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else np.dtype(np.float32)
