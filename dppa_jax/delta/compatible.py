"""How other programs compute the methods that they share with this one: a table of conventions, by program.

A convention is the value that an option has where `--compatible` names the program and the option is not given. So each
can be had, or left, on its own. This module does not import JAX: `--help` is made from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Conventions:
    """What a program does.

    Attributes:
      source: the program and its release.
      divide: of each method that both have, what its sum is divided by: `--divide`.
      scales: by our scale of a method, the program's: `--scale`.
      ties: which elements that tie are kept, and how many: `--ties`.
      arithmetic: the dtype in which every step is rounded: `--arithmetic`.
      prune: which tensors are pruned: `--prune`.
    """

    source: str
    divide: Mapping[str, str]
    scales: Mapping[str, str] = field(default_factory=dict)
    ties: str = "auto"
    arithmetic: str = "float32"
    prune: str = "linears"


COMPATIBLE = {
    "mergekit": Conventions(
        "mergekit 0.1.5",
        divide={
            "task_arithmetic": "none",
            "ties": "weights",
            "dare": "none",
            "dare_ties": "none",
            "della": "weights",
            "della_linear": "none",
            "breadcrumbs": "none",
            "breadcrumbs_ties": "none",
        },
        scales={"dare": "l1"},
        ties="floor",
        arithmetic="inputs",
        prune="all",
    ),
}
