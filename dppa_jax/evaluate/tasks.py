"""The tasks, one row each: where the items come from and how a response is judged."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

from dppa_jax.demo import text
from dppa_jax.demo.text import Split
from dppa_jax.evaluate import answers


class Item(NamedTuple):
    prompt: str
    answers: tuple[str, ...]  # any of which is right


@dataclass(frozen=True)
class Task:
    """A set of questions with answers that a program can judge.

    Attributes:
      name: what `--evaluate` calls it.
      domain: of the expert that it measures.
      load: the items of a split; called again for every evaluation, so it should remember them.
      correct: judges a response by an item's answers.
      max_new_tokens: where a response is cut off.
    """

    name: str
    domain: str
    load: Callable[[Split], Sequence[Item]]
    correct: Callable[[str, Sequence[str]], bool] = answers.exact
    max_new_tokens: int = 2048

    def items(self, split: Split = "test", limit: int | None = None) -> Sequence[Item]:
        """The items of a split, or the first `limit` of them."""
        return self.load(split)[:limit]

    def accuracy(self, responses: Sequence[str], items: Sequence[Item]) -> float:
        """The share of the items that are answered correctly, in [0, 1]."""
        verdicts = [self.correct(response, item.answers) for response, item in zip(responses, items, strict=True)]
        return sum(verdicts) / len(verdicts)


DEMO_ITEMS = 200  # per split
DEMO_ANSWER_TOKENS = 4  # the longest right answer has three with the token that ends it


@cache
def demo_items(name: str, split: Split) -> tuple[Item, ...]:
    return tuple(Item(sample.prompt, (sample.answer,)) for sample in text.held_out(name, split, DEMO_ITEMS))


TASKS = {
    task.name: task
    for task in (
        *(
            Task(name, domain, partial(demo_items, name), max_new_tokens=DEMO_ANSWER_TOKENS)
            for domain, names in text.TASKS.items()
            for name in names
        ),
    )
}


def by_domain(names: Iterable[str]) -> dict[str, list[Task]]:
    """The tasks of the given names, by the domain they belong to, in the order given.

    >>> {domain: [task.name for task in tasks] for domain, tasks in by_domain(["addition", "trend"]).items()}
    {'math': ['addition'], 'finance': ['trend']}
    """
    found: dict[str, list[Task]] = {}
    for name in names:
        if name not in TASKS:
            raise ValueError(f"no task is called {name!r}; there are {', '.join(TASKS)}.")
        found.setdefault(TASKS[name].domain, []).append(TASKS[name])
    return found
