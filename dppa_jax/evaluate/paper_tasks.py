"""The data sets, templates and labels of the six tasks of the paper."""

import re
from collections.abc import Mapping
from typing import Any

from dppa_jax.evaluate.sources import Dataset, Item

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
# A revision of the finance tasks. Newer ones put worked examples before each question; the paper asks without any.
WITHOUT_EXAMPLES = "51466157bea8775e5660e5421918b5c14fd56dd5"


def from_gsm8k(row: Mapping[str, Any], number: int) -> Item:
    """Make an item of a row of GSM8K; the answer follows `####` in the solution."""
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return Item(f"gsm8k-test-{number:05d}", row["question"], (answer,))


def from_math(row: Mapping[str, Any], number: int) -> Item:
    r"""Make an item of a row of MATH; the answer is what the last `\boxed` in the solution holds."""
    return Item(f"math-test-{number:05d}", row["problem"], (last_boxed(row["solution"]),))


def from_adaptllm(row: Mapping[str, Any], number: int) -> Item:
    """Make an item of a row of AdaptLLM's tasks, which gives the right options as a number or a list of numbers."""
    gold = row["gold_index"] if isinstance(row["gold_index"], list) else [row["gold_index"]]
    choices = tuple(row["options"])
    return Item(f"adaptllm-{number:05d}", row["input"], tuple(choices[index] for index in gold), choices)


def last_boxed(solution: str) -> str:
    r"""Return what the last `\boxed` (or `\fbox`) holds, up to the brace that closes it.

    >>> last_boxed(r"first \boxed{1}, so $x = \boxed{\frac{1}{2}}$."), last_boxed(r"thus $\boxed 7$")
    ('\\frac{1}{2}', '7')

    Raises:
      ValueError: the solution has none, or does not close it.
    """
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if boxes:
        rest = solution[boxes[-1].end() :]
        if not rest.startswith("{"):
            return re.split(r"[\s$]", rest)[0]
        depth = 0
        for position, sign in enumerate(rest):
            depth += {"{": 1, "}": -1}.get(sign, 0)
            if depth == 0:
                return rest[1:position]
    raise ValueError(f"the solution {solution[:200]!r} has no \\boxed{{}} answer, which a row of MATH must have.")


DATASETS = {
    "gsm8k": Dataset("openai/gsm8k", from_gsm8k, name="main"),
    "math": Dataset("DigitalLearningGmbH/MATH-lighteval", from_math, name="default"),
    # Templates of Cheng et al. 2023 (arXiv 2309.09530), table 11.
    "fiqa_sa": Dataset(
        "AdaptLLM/finance-tasks",
        from_adaptllm,
        file="FiQA_SA/test.json",
        revision=WITHOUT_EXAMPLES,
        template="{text}\nQuestion: what is the sentiment on {target}?\nAnswer:",
        labels=SENTIMENTS,
    ),
    "fpb": Dataset(
        "AdaptLLM/finance-tasks",
        from_adaptllm,
        file="FPB/test.json",
        revision=WITHOUT_EXAMPLES,
        template="{text}\nQuestion: what is the sentiment?\nAnswer:",
        labels=SENTIMENTS,
    ),
    "scotus": Dataset(
        "AdaptLLM/law-tasks",
        from_adaptllm,
        file="scotus/test.json",
        template='Given the following opinion from the Supreme Court of USA (SCOTUS): "{text}"\n'
        "The relevant issue area is:",
        labels=ISSUE_AREAS,
    ),
    "unfair_tos": Dataset(
        "AdaptLLM/law-tasks",
        from_adaptllm,
        file="unfair_tos/test.json",
        template='Given the following sentence from an online Term of Services: "{text}"\n'
        "The sentence is unfair with respect to:",
        labels=UNFAIR_TERMS,
        no_label="None",
    ),
}
