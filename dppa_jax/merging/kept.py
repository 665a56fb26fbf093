"""Say how much of a delta is kept where many of its elements tie at the thresholds."""

import numpy as np
from absl import logging

from dppa_jax.delta.tied import FAR
from dppa_jax.merging.bounds import Pruner


def tell_of_ties(pruner: Pruner) -> None:
    """Warn of each expert of which far more or less is kept than was asked; tell of one that only has many ties.

    Where a linear's threshold is zero the elements that tie are no change at all: it counts as kept as asked.
    """
    config, asked = pruner.config, 1.0 - pruner.rates
    sized = pruner.thresholds > 0
    means = (
        np.average(table, axis=2, weights=pruner.linears.numel)
        for table in (asked, np.where(sized, pruner.densities, asked), np.where(sized, pruner.tied, 0))
    )
    for name, asked, kept, tied in zip(config.experts, *means, strict=True):  # of each partition
        gaps = np.divide(abs(kept - asked), asked, out=np.zeros_like(asked), where=asked > 0)
        p = int(gaps.argmax())
        place = f" at rate {config.rates[p]:g}" if len(gaps) > 1 else ""
        if gaps[p] > FAR:
            logging.warning(
                "expert %r: %.1f %% kept in place of %.3g %%%s, as %.3g %% of its deltas tie at the threshold; "
                "--ties=exact keeps what was asked",
                *(name, 100 * kept[p], 100 * asked[p], place, 100 * tied[p]),
            )
        elif tied[p] > FAR * asked[p] > 0:
            logging.info(
                "expert %r: %.3g %% kept%s, and %.3g %% of its deltas tie at the threshold",
                *(name, 100 * kept[p], place, 100 * tied[p]),
            )
