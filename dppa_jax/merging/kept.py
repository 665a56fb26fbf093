"""Say how much of a delta is kept where ties at the thresholds make it far from what was asked."""

import numpy as np
from absl import logging

from dppa_jax.merging.bounds import Pruner

FAR = 0.25  # of the density that was asked for


def warn_of_ties(pruner: Pruner) -> None:
    """Warn of each expert of which far more or less is kept than was asked.

    Where a linear's threshold is zero the elements that tie are no change at all: it counts as kept as asked.
    """
    config, asked = pruner.config, 1.0 - pruner.rates
    sized = pruner.thresholds > 0
    means = (
        np.average(table, axis=2, weights=pruner.linears.numel)
        for table in (asked, np.where(sized, pruner.densities, asked), np.where(sized, pruner.tied, 0))
    )
    for name, of_partitions in zip(config.experts, np.stack(list(means), axis=2), strict=True):
        gaps = [abs(kept - wanted) / wanted if wanted else 0 for wanted, kept, _ in of_partitions]
        p = int(np.argmax(gaps))
        if gaps[p] > FAR:
            wanted, kept, tied = 100 * of_partitions[p]
            logging.warning(
                "expert %r: %.1f %% kept in place of %.3g %%%s, as %.3g %% of its deltas tie at the threshold; "
                "--ties=exact keeps what was asked",
                *(name, kept, wanted, f" at rate {config.rates[p]:g}" if len(gaps) > 1 else "", tied),
            )
