"""How much of an expert's ability a pruned or merged model keeps."""

import math
from collections.abc import Sequence


def task_ratio(accuracy: float, expert_accuracy: float) -> float:
    """The accuracy on a task as a multiple of the dense expert's; NaN where the expert solves nothing.

    Source: Zhu et al. 2024, eq. 7.

    >>> round(task_ratio(0.343442, 0.5981), 4)
    0.5742
    """
    return accuracy / expert_accuracy if expert_accuracy else math.nan


def domain_ratio(accuracies: Sequence[float], expert_accuracies: Sequence[float]) -> float:
    """The geometric mean of the task ratios of a domain's tasks: accuracies and the expert's, in the same order.

    Source: Zhu et al. 2024, eq. 8, which the text does not spell out as a geometric mean; the published tables do. For
    GSM8K and MATH at 90 % magnitude pruning they give 53.41, cut off after the second digit:

    >>> ratio = domain_ratio([0.343442, 0.0646], [0.5981, 0.13])
    >>> math.floor(1e4 * ratio) / 100
    53.41
    """
    ratios = [task_ratio(*pair) for pair in zip(accuracies, expert_accuracies, strict=True)]
    return math.prod(ratios) ** (1 / len(ratios))
