"""Decide whether two formulas in LaTeX are equal, by sympy in a child process with limits."""

from functools import lru_cache

from absl import logging

from dppa_jax.evaluate.limited import LimitedChild

SECONDS = 5.0  # of processor time for a pair; an answer of MATH takes a hundredth of a second
LONGEST = 2000  # characters of a formula; the longest answer of MATH has 81

_SCORER = LimitedChild("equal", "the math scorer", "run `pip install sympy antlr4-python3-runtime==4.11.*`.")


def equivalent(gold: str, predicted: str, seconds: float = SECONDS) -> bool:
    """Return whether the difference of two LaTeX formulas simplifies to 0.

    The answer is also False where the parser does not read a formula, and where a pair takes more than `seconds` of
    processor time, twelve times that by the clock, or too much memory, or has more than `LONGEST` characters. The
    parser stops at the first sign that it cannot place. So "5,6" equals "5", as it does in every evaluation that uses
    this parser.

    Raises:
      ChildProcessError: sympy or its parser cannot be loaded.
    """
    return max(len(gold), len(predicted)) <= LONGEST and _asked(gold, predicted, seconds)


@lru_cache(maxsize=1 << 16)  # the candidates of a search give the same few wrong answers
def _asked(gold: str, predicted: str, seconds: float) -> bool:
    equal = _SCORER.ask([gold, predicted], seconds, bool)
    if equal is None:
        logging.warning(
            "%.100r against %.100r: sympy took more than %g s, or too much memory; they count as unequal",
            *(gold, predicted, seconds),
        )
    return bool(equal)
