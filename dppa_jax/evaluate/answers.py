"""Judge whether a response answers an item: one function for each way of judging."""

import re
from collections.abc import Sequence
from decimal import Decimal

from dppa_jax.evaluate.equivalence import equivalent

# Lewkowycz et al. 2022, appendix D: first REPLACED, then REMOVED, each in this order.
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
# A model may open a wrapper a million times. Where one is not closed on its line, the second alternative takes the rest
# of the line, in which no later one is closed either; else each of them would look for its end.
FORMULA = re.compile(r"^.*?\$(.*?)\$.*", re.MULTILINE)  # a sentence with a formula becomes the formula
WRAPPERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\\text\{(?:(.*?)\}|.*)",
        r"\\textbf\{(?:(.*?)\}|.*)",
        r"\\overline\{(?:(.*?)\}|.*)",
        r"\\boxed\{(?:(.*)\}|.*)",
    )
)
BRACED = (
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),  # \frac12
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),  # \sqrt2
)
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def exact(response: str, answers: Sequence[str]) -> bool:
    """Return whether the response, without white space around it, is one of the answers.

    >>> exact(" 59", ["59"]), exact("59 apples", ["59"])
    (True, False)
    """
    return response.strip() in answers


def math(response: str, answers: Sequence[str]) -> bool:
    r"""Return whether what follows the last `####` equals one of the answers, as text or as a formula in LaTeX.

    Both sides are first put in the form of `normalize`. `equivalence` says which formulas are equal. The response ends
    before the word `Question`: what follows is another question, which the model has put to itself.

    Source: the published evaluation of Abel.

    >>> math("She has 3 + 4 = 7 dollars.\n#### $7.00", ["7"])
    True
    """
    predicted = final_answer(response)
    golds = [normalize(answer) for answer in answers]
    return predicted in golds or any(_equal(gold, predicted) for gold in golds)


def final_answer(response: str) -> str:
    r"""Return the normalised answer that a response to a math question ends with; empty when it says no `#### `.

    The marker must be on the last line, which may end with a line end and the text of the end-of-sequence token.

    >>> final_answer("so it is #### 1,200 dollars</s>"), final_answer("#### 7\n\nThat was it.")
    ('1200', '')
    """
    last_line = response.split("Question")[0].removesuffix("\n").rpartition("\n")[2]
    return normalize(last_line.partition("#### ")[2].removesuffix("</s>"))


def normalize(answer: str) -> str:
    r"""Return an answer in a form that equal answers share.

    It is the text after the last `=`, with braces in fractions and roots, and without articles, blanks, units, LaTeX
    wrappers, and commas between digits.

    Source: Lewkowycz et al. 2022, appendix D.

    >>> normalize(r"x = \boxed{\frac12} cm"), normalize("$1,000,000$ dollars"), normalize(r"50^\circ")
    ('\\frac{1}{2}', '1000000', '50')
    """
    answer = answer.split("=")[-1]
    for text, other in REPLACED:
        answer = answer.replace(text, other)
    for text in REMOVED:
        answer = answer.replace(text, "")
    answer = FORMULA.sub(r"$\1$", answer)
    for wrapper in WRAPPERS:
        answer = wrapper.sub(lambda found: found[0] if found[1] is None else found[1], answer)
    for pattern, other in BRACED:
        answer = pattern.sub(other, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


def contains(
    response: str, answers: Sequence[str], choices: Sequence[str], *, ignore_case: bool, exclusive: bool
) -> bool:
    """Return whether the response contains one of the answers and, with `exclusive`, no other choice.

    The whole response counts, and so does what follows the answer. A choice is contained where it stands as words of
    its own: not inside a word ("neutral" in "neutrally"), and not inside a longer choice ("service" in "terms of
    service").

    Source: Zhu et al. 2024, section 4.1: "correct when the predicted sentence contains the correct choice". Differs
    from it by `exclusive`, without which a response that lists all choices is always right, and by asking for words.

    >>> choices = ("negative", "neutral", "positive")
    >>> judge = lambda response: contains(response, ["neutral"], choices, ignore_case=True, exclusive=True)
    >>> judge(" Neutral."), judge("It reads neutrally."), judge("neutral or positive")
    (True, False, False)
    """
    named = contained(response, (*answers, *choices), ignore_case)
    right = {_folded(answer, ignore_case) for answer in answers}
    return bool(named & right) and not (exclusive and named - right)


def contained(response: str, choices: Sequence[str], ignore_case: bool) -> set[str]:
    """Return the choices that the response contains, in lower case when case is ignored.

    >>> sorted(contained("Unions, not the Union", ["Unions", "Union", "Privacy"], ignore_case=True))
    ['union', 'unions']
    """
    longest_first = sorted(set(choices), key=len, reverse=True)
    pattern = r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"
    named = re.findall(pattern, response, re.IGNORECASE if ignore_case else 0)
    return {_folded(choice, ignore_case) for choice in named}


def _equal(gold: str, predicted: str) -> bool:
    """Return whether two normalised answers are the same number or formula."""
    if not predicted:
        return False
    if NUMBER.fullmatch(gold) and NUMBER.fullmatch(predicted):
        return Decimal(gold) == Decimal(predicted)  # sympy would say the same, but must be started for it
    return equivalent(gold, predicted)


def _folded(choice: str, ignore_case: bool) -> str:
    """Return a choice in lower case when case is ignored."""
    return choice.lower() if ignore_case else choice
