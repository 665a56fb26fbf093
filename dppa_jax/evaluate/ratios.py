"""Task ratios and domain ratios: how much of an expert's ability a pruned or merged model keeps."""

import math
from collections.abc import Sequence


def task_ratio(accuracy: float, expert_accuracy: float) -> float:
    """Divide the accuracy on a task by that of the dense expert; NaN where the expert solves nothing.

    Source: Zhu et al. 2024, eq. 7.

    >>> round(task_ratio(0.343442, 0.5981), 4)
    0.5742
    """
    return accuracy / expert_accuracy if expert_accuracy else math.nan


def domain_ratio(accuracies: Sequence[float], expert_accuracies: Sequence[float]) -> float:
    """Return the geometric mean of the task ratios of a domain's tasks.

    Args:
      accuracies: one for each task.
      expert_accuracies: those of the dense expert, in the same order.

    A correlation, which some tasks have in place of an accuracy, counts as 0 where it is negative.

    Source: Zhu et al. 2024, eq. 8. The text does not say that the mean is geometric, but the published tables do: for
    GSM8K and MATH at 90 % magnitude pruning they give 53.41, cut off after the second digit:

    >>> ratio = domain_ratio([0.343442, 0.0646], [0.5981, 0.13])
    >>> math.floor(1e4 * ratio) / 100
    53.41
    """
    ratios = [task_ratio(*pair) for pair in zip(accuracies, expert_accuracies, strict=True)]
    return math.prod(0.0 if ratio < 0 else ratio for ratio in ratios) ** (1 / len(ratios))
