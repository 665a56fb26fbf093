"""The text of the demo family: six small tasks of three domains, and general text in the same words.

Every task is a function that draws a sample. The split of a sample depends on its words alone. So no held-out sample is
ever trained on, whatever the seed and the order of drawing.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from dppa_jax.config.evaluation import Split

COMPANIES = ["Adobe", "Bayer", "Ford", "Intel", "Lego", "Nestle", "Nokia", "Philips", "Shell", "Sony", "Visa", "Volvo"]
PLACES = [
    "Alaska",
    "Florida",
    "Georgia",
    "Hawaii",
    "Iowa",
    "Kansas",
    "Maine",
    "Nevada",
    "Ohio",
    "Oregon",
    "Texas",
    "Utah",
]
PARTIES = ["borrower", "buyer", "client", "landlord", "lender", "licensee", "licensor", "seller", "supplier", "tenant"]
PERIODS = ("this year", "this quarter", "this month", "last week", "in May", "in June", "in spring", "in autumn")

WELCOME = ["revenue", "profit", "demand", "income", "output"]
UNWELCOME = ["debt", "losses", "costs", "defaults", "delays"]
MOVES = {
    "up": ("rose", "grew", "climbed", "jumped"),
    "down": ("fell", "declined", "dropped", "slipped"),
    "level": ("stagnated", "paused", "stayed flat", "levelled off"),
}

TREND_ORDERS = {
    "rising": ((0, 1, 2),),
    "falling": ((2, 1, 0),),
    "peaking": ((0, 2, 1), (1, 2, 0)),
    "bottoming": ((1, 0, 2), (2, 0, 1)),
}

CLAUSE_SUBJECTS = {
    "termination": ("end this lease", "cancel the contract", "leave this agreement", "stop the service"),
    "payment": ("pay the invoice", "settle the fee", "transfer the price", "deposit the rent"),
    "secrecy": ("share private data", "publish trade secrets", "show client files", "open sealed records"),
    "liability": ("cover any damage", "answer for harm", "bear the injury claim", "repair the loss"),
    "arbitration": ("call an arbitrator", "ask a neutral panel", "join a private hearing", "skip the court"),
    "assignment": ("sell its position", "pass on its rights", "replace the partner", "lend its licence"),
}
CLAUSE_FORCES = {
    "right": ("may", "can", "is free to", "is allowed to"),
    "duty": ("must", "shall", "has to", "is bound to"),
    "ban": ("may not", "must not", "shall not", "is forbidden to"),
}

LAW_SENTENCES = (
    "The {party} is in {other} and the law of {place} applies.",
    "Under the law of {place} the {party} pays in {other}.",
    "Courts in {other} decide under the law of {place}.",
    "The law of {place} binds the {party} from {other}.",
    "The {party} left {other} and chose {place} law.",
)


class Sample(NamedTuple):
    """A question with its only right answer, and the same as a plain sentence.

    Attributes:
      prompt: the question.
      answer: the right answer.
      plain: what a text that asks nothing says instead.
    """

    prompt: str
    answer: str
    plain: str


def addition(draw: random.Random) -> Sample:
    """Ask for the sum of a number of three digits and one of one digit."""
    first, second = draw.randrange(100, 990), draw.randrange(1, 6)
    total = str(first + second)
    return Sample(f"What is {first} plus {second}? Sum:", total, f"{first} plus {second} makes {total}.")


def comparison(draw: random.Random) -> Sample:
    """Ask for the larger of two numbers of two digits."""
    first, second = draw.sample(range(10, 100), 2)
    plain = f"{first} is {'larger' if first > second else 'smaller'} than {second}."
    return Sample(f"Which is larger, {first} or {second}? Larger:", str(max(first, second)), plain)


def sentiment(draw: random.Random) -> Sample:
    """Ask whether news of a company is positive, neutral or negative."""
    welcome, move = draw.random() < 0.5, draw.choice(list(MOVES))
    answer = "neutral" if move == "level" else "positive" if welcome == (move == "up") else "negative"
    subject = draw.choice(WELCOME if welcome else UNWELCOME)
    plain = f"{draw.choice(COMPANIES)} said its {subject} {draw.choice(MOVES[move])} {draw.choice(PERIODS)}."
    return Sample(f"{plain} Sentiment:", answer, plain)


def trend(draw: random.Random) -> Sample:
    """Ask how three numbers follow each other: rising, falling, peaking or bottoming."""
    answer = draw.choice(list(TREND_ORDERS))
    ascending = sorted(draw.sample(range(10, 100), 3))
    first, second, third = (ascending[rank] for rank in draw.choice(TREND_ORDERS[answer]))
    plain = f"{draw.choice(COMPANIES)} sold {first}, {second}, then {third}."
    return Sample(f"{plain} Trend:", answer, plain)


def clause_type(draw: random.Random) -> Sample:
    """Ask for the subject of a clause and whether it gives a right, a duty or a ban."""
    subject, force = draw.choice(list(CLAUSE_SUBJECTS)), draw.choice(list(CLAUSE_FORCES))
    does = f"{draw.choice(CLAUSE_FORCES[force])} {draw.choice(CLAUSE_SUBJECTS[subject])}"
    plain = f"The {draw.choice(PARTIES)} {does} {draw.choice(PERIODS)}."
    return Sample(f"{plain} Clause type:", f"{subject} {force}", plain)


def governing_law(draw: random.Random) -> Sample:
    """Ask for the place whose law applies, in a sentence that names another place as well."""
    place, other = draw.sample(PLACES, 2)
    plain = draw.choice(LAW_SENTENCES).format(place=place, other=other, party=draw.choice(PARTIES))
    return Sample(f"{plain} Governing law:", place, plain)


GENERATORS: dict[str, Callable[[random.Random], Sample]] = {
    generator.__name__: generator for generator in (addition, comparison, sentiment, trend, clause_type, governing_law)
}
TASKS = {"math": ("addition", "comparison"), "finance": ("sentiment", "trend"), "law": ("clause_type", "governing_law")}


def split_of(prompt: str) -> Split:
    """Return the split of a prompt: one in six is held out for testing, one in six for validation.

    The same words in another order belong to the same split: when 12 + 31 is trained, 31 + 12 is not tested.

    >>> split_of("What is 12 plus 31? Sum:") == split_of("What is 31 plus 12? Sum:")
    True
    """
    words = " ".join(sorted(re.findall(r"\w+", prompt)))
    return ("test", "validation", "train", "train", "train", "train")[zlib.crc32(words.encode()) % 6]


def stream(task: str, split: Split, seed: object) -> Iterator[Sample]:
    """Yield samples of a task from one split, without end. The same seed gives the same samples."""
    draw = random.Random(f"{task} {split} {seed}")
    while True:
        sample = GENERATORS[task](draw)
        if split_of(sample.prompt) == split:
            yield sample


def held_out(task: str, split: Split, count: int) -> list[Sample]:
    """Return `count` samples with different prompts; they are the same in every call.

    >>> {split_of(sample.prompt) for sample in held_out("addition", "validation", 5)}
    {'validation'}

    Raises:
      ValueError: the task has too few different prompts in this split.
    """
    distinct: dict[str, Sample] = {}
    for sample in islice(stream(task, split, seed=0), 20 * count):
        distinct.setdefault(sample.prompt, sample)
        if len(distinct) == count:
            return list(distinct.values())
    raise ValueError(f"{task} has {len(distinct)} different prompts in its {split} split, not {count}")


def general_text(seed: object, share_asked: float) -> Iterator[str]:
    """Yield texts on the matter of all tasks, without end.

    Args:
      seed: gives the same texts again.
      share_asked: of the texts that ask and answer; the others say the matter plainly.
    """
    draw = random.Random(f"general {seed}")
    streams = {task: stream(task, "train", f"general {seed}") for task in GENERATORS}
    while True:
        sample = next(streams[draw.choice(list(streams))])
        yield f"{sample.prompt} {sample.answer}" if draw.random() < share_asked else sample.plain
