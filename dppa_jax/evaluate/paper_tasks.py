"""The six tasks of the paper: their data sets, templates and labels."""

import re
from collections.abc import Mapping
from typing import Any

from dppa_jax.evaluate.sources import Item, Source

SENTIMENTS = ("negative", "neutral", "positive")
ISSUE_AREAS = (
    "Criminal Procedure",
    "Civil Rights",
    "First Amendment",
    "Due Process",
    "Privacy",
    "Attorneys",
    "Unions",
    "Economic Activity",
    "Judicial Power",
    "Federalism",
    "Interstate Relations",
    "Federal Taxation",
    "Miscellaneous",
)
UNFAIR_TERMS = (
    "Limitation of liability",
    "Unilateral termination",
    "Unilateral change",
    "Content removal",
    "Contract by using",
    "Choice of law",
    "Jurisdiction",
    "Arbitration",
    "None",
)
# The newer files of the finance tasks put worked examples before each question; the paper asks without any.
WITHOUT_EXAMPLES = "51466157bea8775e5660e5421918b5c14fd56dd5"


def from_gsm8k(row: Mapping[str, Any], number: int) -> Item:
    """The answer is what follows `####` in the solution."""
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return Item(f"gsm8k-test-{number:05d}", row["question"], (answer,))


def from_math(row: Mapping[str, Any], number: int) -> Item:
    r"""The answer is what the last `\boxed` in the solution holds."""
    return Item(f"math-test-{number:05d}", row["problem"], (last_boxed(row["solution"]),))


def from_adaptllm(row: Mapping[str, Any], number: int) -> Item:
    """The right options are named by their places: one number, or a list of them, which may be empty."""
    gold = row["gold_index"] if isinstance(row["gold_index"], list) else [row["gold_index"]]
    choices = tuple(row["options"])
    return Item(f"adaptllm-{number:05d}", row["input"], tuple(choices[index] for index in gold), choices)


def last_boxed(solution: str) -> str:
    r"""What the last `\boxed` (or `\fbox`) holds, up to the brace that closes it.

    >>> last_boxed(r"first \boxed{1}, so $x = \boxed{\frac{1}{2}}$."), last_boxed(r"thus $\boxed 7$")
    ('\\frac{1}{2}', '7')

    Raises:
      ValueError: there is none, or it is not closed.
    """
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if found:
        rest = solution[found[-1].end() :]
        if not rest.startswith("{"):
            return re.split(r"[\s$]", rest)[0]
        depth = 0
        for position, sign in enumerate(rest):
            depth += {"{": 1, "}": -1}.get(sign, 0)
            if depth == 0:
                return rest[1:position]
    raise ValueError(f"no \\boxed{{}} answer in the solution {solution!r}.")


SOURCES = {
    "gsm8k": Source("openai/gsm8k", from_gsm8k, name="main"),
    "math": Source("DigitalLearningGmbH/MATH-lighteval", from_math, name="default"),
    # Templates of Cheng et al. 2023 (arXiv 2309.09530), table 11.
    "fiqa_sa": Source(
        "AdaptLLM/finance-tasks",
        from_adaptllm,
        file="FiQA_SA/test.json",
        revision=WITHOUT_EXAMPLES,
        template="{text}\nQuestion: what is the sentiment on {target}?\nAnswer:",
        labels=SENTIMENTS,
    ),
    "fpb": Source(
        "AdaptLLM/finance-tasks",
        from_adaptllm,
        file="FPB/test.json",
        revision=WITHOUT_EXAMPLES,
        template="{text}\nQuestion: what is the sentiment?\nAnswer:",
        labels=SENTIMENTS,
    ),
    "scotus": Source(
        "AdaptLLM/law-tasks",
        from_adaptllm,
        file="scotus/test.json",
        template='Given the following opinion from the Supreme Court of USA (SCOTUS): "{text}"\n'
        "The relevant issue area is:",
        labels=ISSUE_AREAS,
    ),
    "unfair_tos": Source(
        "AdaptLLM/law-tasks",
        from_adaptllm,
        file="unfair_tos/test.json",
        template='Given the following sentence from an online Term of Services: "{text}"\n'
        "The sentence is unfair with respect to:",
        labels=UNFAIR_TERMS,
        no_label="None",
    ),
}
