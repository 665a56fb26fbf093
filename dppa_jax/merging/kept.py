"""Say how much of a delta is kept where many of its elements tie, and where what is kept is amplified too much."""

import numpy as np
from absl import logging

from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.tied import FAR
from dppa_jax.merging.bounds import Pruner


def tell_of_q(pruner: Pruner) -> None:
    """Warn of each expert of which some linear is divided by a q below its density: see `warn_of_q`."""
    config = pruner.config
    if not SCALES[config.scale].takes_q:
        return
    for name, weights, rates in zip(config.experts, pruner.weights[:, 0], pruner.rates[:, 0], strict=True):
        worst = int((weights * (1.0 - rates)).argmax())  # (1−p)/q
        if weights[worst] > 0:
            warn_of_q(name, 1.0 / weights[worst], 1.0 - rates[worst], pruner.linears.names[worst])


def warn_of_q(expert: str, q: float, density: float, what: str) -> None:
    """Warn of a q below the density 1−p of `what`: then not even DARE is as large.

    Such a q has more bias and more variance than q = 1−p.
    """
    if density > q * (1.0 + 1e-9):
        logging.warning(
            "--q of %r: %.4g is below the density %.4g of %s, so that what is kept is amplified more than by DARE; "
            "q lies between the density and 1",
            *(expert, q, density, what),
        )


def tell_of_ties(pruner: Pruner) -> None:
    """Warn of each expert of which far more or less is kept than was asked; tell of one that only has many ties.

    Where a linear's threshold is zero the elements that tie are no change at all: it counts as kept as asked. Where
    nothing is counted, as with random scores, nothing ties.
    """
    config, asked = pruner.config, 1.0 - pruner.rates
    if not config.is_counted:
        return
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
