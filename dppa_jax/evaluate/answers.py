"""Whether a response answers an item: one function per way of judging."""

import re
from collections.abc import Sequence
from decimal import Decimal

from dppa_jax.evaluate.equivalence import equivalent

# Lewkowycz et al. 2022, appendix D: what is replaced, then what is removed, in this order.
REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
    ("\\%", "%"),  # not in the appendix; Abel's published predictions have it
)
# fmt: off
REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)
# fmt: on
REWRITTEN = (
    (r"(.*?)\$(.*?)\$(.*)", r"$\2$"),  # the formula alone, of a sentence with one
    (r"\\text\{(.*?)\}", r"\1"),
    (r"\\textbf\{(.*?)\}", r"\1"),
    (r"\\overline\{(.*?)\}", r"\1"),
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"),  # \frac12
    (r"sqrt([^{])", r"sqrt{\1}"),  # \sqrt2
)
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def exact(response: str, answers: Sequence[str]) -> bool:
    """The response, apart from the white space around it, is one of the answers.

    >>> exact(" 59", ["59"]), exact("59 apples", ["59"])
    (True, False)
    """
    return response.strip() in answers


def math(response: str, answers: Sequence[str]) -> bool:
    r"""The answer after the last `####` equals one of the answers, as text or, both read as LaTeX, as a formula.

    Source: the published evaluation of Abel. What follows `Question` in the response is another question that the
    model has put to itself and is cut off; both sides are put in the form of `normalize`. `equivalence` says which
    formulas are equal.

    >>> math("She has 3 + 4 = 7 dollars.\n#### $7.00", ["7"])
    True
    """
    predicted = final_answer(response)
    golds = [normalize(answer) for answer in answers]
    return predicted in golds or any(_equal(gold, predicted) for gold in golds)


def final_answer(response: str) -> str:
    r"""The answer that a response to a math question ends with, normalised; empty when it does not say `#### `.

    The marker must be on the last line, which may have an end of line and the end-of-sequence token's text behind it.

    >>> final_answer("so it is #### 1,200 dollars</s>"), final_answer("#### 7\n\nThat was it.")
    ('1200', '')
    """
    found = re.findall(r"#### (.*)$", response.split("Question")[0])
    return normalize(found[-1].removesuffix("</s>")) if found else ""


def normalize(answer: str) -> str:
    r"""An answer in the one form that equal answers are meant to share.

    The text after the last `=`, without articles, blanks, units and LaTeX wrappers, fractions and roots with braces,
    and no comma between digits.

    Source: Lewkowycz et al. 2022, appendix D.

    >>> normalize(r"x = \boxed{\frac12} cm"), normalize("$1,000,000$ dollars"), normalize(r"50^\circ")
    ('\\frac{1}{2}', '1000000', '50')
    """
    answer = answer.split("=")[-1]
    for text, other in REPLACED:
        answer = answer.replace(text, other)
    for text in REMOVED:
        answer = answer.replace(text, "")
    for pattern, other in REWRITTEN:
        answer = re.sub(pattern, other, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


def contains(
    response: str, answers: Sequence[str], choices: Sequence[str], *, ignore_case: bool, exclusive: bool
) -> bool:
    """The response contains one of the answers and, with `exclusive`, no other choice.

    All of the response counts, what follows the answer included. A choice is contained where it stands as words of its
    own, not inside a word ("neutral" in "neutrally") nor inside a longer choice ("service" in "terms of service").

    Source: Zhu et al. 2024, section 4.1: "correct when the predicted sentence contains the correct choice". Differs
    from it with `exclusive`, without which a response that lists all choices is always right; and in asking for words.

    >>> choices = ("negative", "neutral", "positive")
    >>> judge = lambda response: contains(response, ["neutral"], choices, ignore_case=True, exclusive=True)
    >>> judge(" Neutral."), judge("It reads neutrally."), judge("neutral or positive")
    (True, False, False)
    """
    found = contained(response, (*answers, *choices), ignore_case)
    right = {_folded(answer, ignore_case) for answer in answers}
    return bool(found & right) and not (exclusive and found - right)


def contained(response: str, choices: Sequence[str], ignore_case: bool) -> set[str]:
    """The choices that the response contains; in lower case when case is ignored.

    >>> sorted(contained("Unions, not the Union", ["Unions", "Union", "Privacy"], ignore_case=True))
    ['union', 'unions']
    """
    longest_first = sorted(set(choices), key=len, reverse=True)
    pattern = r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"
    found = re.findall(pattern, response, re.IGNORECASE if ignore_case else 0)
    return {_folded(choice, ignore_case) for choice in found}


def _equal(gold: str, predicted: str) -> bool:
    if not predicted:
        return False
    if NUMBER.fullmatch(gold) and NUMBER.fullmatch(predicted):
        return Decimal(gold) == Decimal(predicted)  # what sympy would say, without starting it
    return equivalent(gold, predicted)


def _folded(choice: str, ignore_case: bool) -> str:
    return choice.lower() if ignore_case else choice
