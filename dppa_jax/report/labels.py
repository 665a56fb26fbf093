"""Write methods, domains and rates as tables and figures do."""

LABELS = {
    "task_arithmetic": "Task arithmetic",
    "magnitude": "Magnitude",
    "owl": "OWL",
    "dp": "DP",
    "dppa": "DPPA",
    "dare": "DARE",
    "dare_dpa": "DARE+DPA",
    "darex_q": "DAREx-q",
    "ties": "TIES",
    "dare_ties": "DARE+TIES",
    "adamerging": "AdaMerging",
    "adamerging_layerwise": "AdaMerging by layer",
    "adamerging_linearwise": "AdaMerging by tensor",
}


def label(name: str) -> str:
    """Return how tables and figures write a method or a domain; without a label, its name with a capital.

    >>> label("dare_dpa"), label("math")
    ('DARE+DPA', 'Math')
    """
    return LABELS.get(name, name[:1].upper() + name[1:])


def percent(rate: float) -> str:
    """Return a share in percent.

    >>> percent(0.1 + 0.2)
    '30 %'
    """
    return f"{100 * rate:g} %"
