"""Write methods, domains and rates as tables and figures do."""

import re

LABELS = {
    "task_arithmetic": "Task arithmetic",
    "magnitude": "Magnitude",
    "owl": "OWL",
    "dp": "DP",
    "dppa": "DPPA",
    "dare": "DARE",
    "dare_dpa": "DARE+DPA",
    "darex_q": "DAREx-q",
    "darex_q_columns": "DAREx-q, columns",
    "magnitude_q": "Magnitude with q",
    "wanda": "WANDA",
    "wanda_q": "WANDA with q",
    "ties": "TIES",
    "regmean": "RegMean",
    "dare_ties": "DARE+TIES",
    "adamr": "AdamR",
    "adamerging": "AdaMerging",
    "adamerging_layerwise": "AdaMerging by layer",
    "adamerging_linearwise": "AdaMerging by tensor",
}


def label(name: str) -> str:
    """Return how tables and figures write a method or an expert; without a label, its name with a capital.

    What stands after it, a score or a way to find q after a method and the training after a domain, follows a comma.

    >>> label("dare_dpa"), label("math"), label("darex_q/random_column+auto"), label("law.adamr")
    ('DARE+DPA', 'Math', 'DAREx-q, random_column, auto', 'Law, AdamR')
    """
    first, *others = re.split(r"[/+.]", name)
    return ", ".join([LABELS.get(first, first[:1].upper() + first[1:]), *(LABELS.get(one, one) for one in others)])


def percent(rate: float) -> str:
    """Return a share in percent.

    >>> percent(0.1 + 0.2)
    '30 %'
    """
    return f"{100 * rate:g} %"
