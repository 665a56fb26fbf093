"""Tasks of encoders: texts, or pairs of them, that have a class or a number, and GLUE's metrics of the answers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dppa_jax.evaluate.sources import Dataset, Item, labelled_item
from dppa_jax.finetune.labelled import Labelled

RESAMPLES, LEVEL = 999, 0.95
NEAR = 0.5  # how far a number may be from the right one to count as right; GLUE's metric does not ask
GLUE = "nyu-mll/glue"


class Metric(NamedTuple):
    """What GLUE measures of a task, in place of the share of right answers.

    Attributes:
      measure: from the right answers and the model's to a number of at most 1.
      words: its name.
    """

    measure: Callable[[np.ndarray, np.ndarray], float]
    words: str

    def __call__(self, right: Sequence[str], given: Sequence[str]) -> tuple[float, tuple[float, float]]:
        """Return the metric and its 95 % interval by the percentiles of 999 resamplings of the items.

        Where a metric is not defined, as of answers that are all alike, it is 0.
        """
        right, given = (np.array(answers) for answers in (right, given))
        of = lambda items: float(np.nan_to_num(self.measure(right[items], given[items])))  # noqa: E731
        items = np.arange(len(right))
        if len(items) < 2:
            return of(items), (of(items), of(items))
        with warnings.catch_warnings():  # of resamplings that are all alike
            warnings.simplefilter("ignore")
            return of(items), self._interval(of, items)

    def _interval(self, of: Callable[[np.ndarray], float], items: np.ndarray) -> tuple[float, float]:
        """Resample the items, and measure each time."""
        from scipy.stats import bootstrap  # takes half a second, which a merge should not cost

        interval = bootstrap(
            (items,), of, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", vectorized=False,
            random_state=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        return float(interval.low), float(interval.high)


def _matthews(right: np.ndarray, given: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef  # takes a second, which a merge should not cost

    return matthews_corrcoef(right, given)


def _accuracy_and_f1(right: np.ndarray, given: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score, f1_score

    return (accuracy_score(right, given) + f1_score(right, given, pos_label="1", zero_division=0)) / 2


def _correlations(right: np.ndarray, given: np.ndarray) -> float:
    from scipy.stats import pearsonr, spearmanr

    numbers = right.astype(float), given.astype(float)
    if any(np.ptp(each) == 0 for each in numbers):
        return 0.0
    return (pearsonr(*numbers).statistic + spearmanr(*numbers).statistic) / 2


MATTHEWS = Metric(_matthews, "Matthews' correlation")
ACCURACY_F1 = Metric(_accuracy_and_f1, "mean of accuracy and F1")
CORRELATIONS = Metric(_correlations, "mean of Pearson's and Spearman's correlation")


def answered(response: str, answer: str) -> str:
    """Return the class of a response, "1 positive", by its number or its name, as the right answer has it.

    >>> answered("1 positive", "0"), answered("1 positive", "neutral"), answered("0.3", "0.5")
    ('1', 'positive', '0.3')
    """
    number, _, name = response.partition(" ")
    return name if name and not answer.isdigit() else number


def is_class(response: str, answers: Sequence[str]) -> bool:
    """Return whether a response has the right class."""
    return answered(response, answers[0]) == answers[0]


def is_near(response: str, answers: Sequence[str]) -> bool:
    """Return whether the number of a response is within NEAR of the right one."""
    return abs(float(response) - float(answers[0])) <= NEAR


def from_glue(row: Mapping[str, Any], number: int) -> Item:
    """Make an item of a row of GLUE on the hub."""
    texts = (row["sentence"],) if "sentence" in row else (row["sentence1"], row["sentence2"])
    return labelled_item(Labelled(texts, row["label"], str(row.get("idx", number))))


@cache
def dataset_of(name: str) -> Dataset:
    """Return the data set of a task of GLUE, or of a file of one's own.

    The labels of GLUE's test splits are not public, so that the validation split on the hub is what is scored.
    """
    if name in SETS:
        return Dataset(GLUE, from_glue, name=name, split="validation", labelled=True)
    return Dataset("", from_glue, labelled=True)


SETS = ("cola", "sst2", "mrpc", "stsb")
