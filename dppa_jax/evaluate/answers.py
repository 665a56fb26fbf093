"""Whether a response answers an item: one function per way of judging."""

from collections.abc import Sequence


def exact(response: str, answers: Sequence[str]) -> bool:
    """The response, apart from the white space around it, is one of the answers.

    >>> exact(" 59", ["59"]), exact("59 apples", ["59"])
    (True, False)
    """
    return response.strip() in answers
