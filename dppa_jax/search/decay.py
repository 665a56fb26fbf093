"""Search the largest weight decay of AdamR whose expert is still good enough. Every decay tried is a whole training.

That the decay is chosen so, the largest one that the dense score allows, is ours. The paper chooses it for each data
set and target rate, and how is not known here.
"""

import math
from collections.abc import Callable

START = 0.01
LADDER = math.sqrt(10)  # between two decays of the first pass
RUNGS = 4  # of the first pass, up or down, beside the start
HALVINGS = 2  # of the last step of the ladder, in its logarithm


def largest_within(is_within: Callable[[float], bool], start: float = START) -> float:
    """Return the largest decay that is within the tolerance, or 0 where none is.

    From the start the decay rises along a ladder until one is not within the tolerance, or falls until one is. The
    last step of the ladder is then halved twice, so the answer is below a decay that is not within, by a third at most.
    It is assumed that more decay costs more.

    >>> largest_within(lambda decay: decay < 0.05), largest_within(lambda decay: False)
    (0.043, 0.0)
    """
    rising = is_within(start)
    low, high = (start, math.inf) if rising else (0.0, start)
    for rung in range(1, RUNGS + 1):
        decay = _rounded(start * LADDER ** (rung if rising else -rung))
        good = is_within(decay)
        low, high = (decay, high) if good else (low, decay)
        if good != rising:
            break
    else:
        return low
    for _ in range(HALVINGS):
        decay = _rounded(math.sqrt(low * high))
        low, high = (decay, high) if is_within(decay) else (low, decay)
    return low


def _rounded(decay: float) -> float:
    """Round to two digits, as a person would write it."""
    return float(f"{decay:.2g}")
