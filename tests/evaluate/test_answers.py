"""How responses are judged, against published verdicts and case by case."""

import json
import os
import random
import subprocess
import sys
import time

import psutil
import pytest

from dppa_jax.evaluate import answers
from dppa_jax.evaluate.equivalence import equivalent
from dppa_jax.evaluate.splits import without_marks

CHOICES = ("negative", "neutral", "positive")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def contains(response: str, *right: str, choices=CHOICES, ignore_case: bool = True, exclusive: bool = True) -> bool:
    return answers.contains(response, right, choices, ignore_case=ignore_case, exclusive=exclusive)


# --- math


def test_every_published_verdict_of_abel_on_gsm8k_is_reproduced(shared):
    rows = lines(shared / "data" / "abel_gsm8k_responses.jsonl")
    verdicts = [answers.math(row["response"], [row["gold"]]) for row in rows]
    assert verdicts == [row["result"] for row in rows]
    assert (sum(verdicts), len(verdicts)) == (788, 1319)


def test_every_published_prediction_of_abel_on_gsm8k_is_reproduced(shared):
    rows = lines(shared / "data" / "abel_gsm8k_responses.jsonl")
    assert [answers.final_answer(row["response"]) for row in rows] == [row["pred"] for row in rows]


def test_every_answer_of_math_is_right_as_itself(shared):
    golds = [row["answer"] for row in lines(shared / "data" / "math_test.jsonl")]
    on_one_line = [gold for gold in golds if "\n" not in gold]  # the marker's line ends with the answer
    assert len(on_one_line) == 4999
    assert [gold for gold in on_one_line if not answers.math(f"Thus it is #### {gold}", [gold])] == []


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("First.\n#### 12", "12"),
        ("#### 12\n", "12"),
        ("#### 12</s>", "12"),
        ("#### 12\nSo the answer is 12.", ""),  # the marker is not on the last line
        ("#### 12\n\n", ""),
        ("#### 11\nNo.\n#### 12", "12"),
        ("#### 12\nQuestion:\nWhat is 3 + 4?\n#### 7", "12"),
        ("#### 12\n\nQuestion:\nWhat is 3 + 4?\n#### 7", ""),  # the empty line is the last one
        ("#### 12 Question: what is 3 + 4? #### 7", "12"),
        ("The answer is 12", ""),
        ("####12", ""),
        ("", ""),
    ],
)
def test_the_answer_follows_the_last_marker_before_another_question(response, wanted):
    assert answers.final_answer(response) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("x + y = 7", "7"),
        ("70,000", "70000"),
        ("-70,000", "-70,000"),
        ("\\$18", "18"),
        ("$18$ dollars", "18"),
        ("a total of $\\frac{3}{4}$ of it", "\\frac{3}{4}"),
        ("12 square feet", "12"),
        ("12\\text{ cm}^2", "12"),
        ("90^\\circ", "90"),
        ("\\boxed{\\text{blue}}", "blue"),
        ("\\textbf{(A)}", "(A)"),
        ("\\frac34", "\\frac{3}{4}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("1{,}000", "1000"),
        ("40\\%", "40%"),
    ],
)
def test_equal_answers_get_one_form(answer, wanted):
    assert answers.normalize(answer) == wanted


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ("0.5", "\\frac{1}{2}"),
        ("\\dfrac{3}{4}", "\\frac{3}{4}"),
        ("18.00", "18"),
        ("\\frac{2}{4}", "\\frac12"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\pi \\cdot 4", "4\\pi"),
        ("5 units", "5"),
    ],
)
def test_equal_formulas_are_equal_answers(predicted, gold):
    assert answers.math(f"#### {predicted}", [gold])
    assert answers.math(f"#### {gold}", [predicted])


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [("0.3333", "\\frac{1}{3}"), ("x+1", "x-1"), ("18.01", "18"), ("\\frac{", "1"), ("\\text{blue}", "3"), ("", "0")],
)
def test_unequal_formulas_and_what_is_no_formula_are_wrong(predicted, gold):
    assert not answers.math(f"#### {predicted}", [gold])


def test_any_of_several_answers_is_right():
    assert answers.math("#### 0.5", ["2", "\\frac{1}{2}"])


def test_sympy_is_not_asked_about_numbers_and_equal_texts(monkeypatch):
    monkeypatch.setattr(answers, "equivalent", lambda *pair: pytest.fail(f"asked about {pair}"))
    assert answers.math("#### 18.0", ["18"])
    assert answers.math("#### \\text{blue}", ["blue"])
    assert not answers.math("#### 19", ["18"])
    assert not answers.math("I do not know.", ["\\frac{1}{2}"])


@pytest.mark.parametrize(
    "monster",
    [
        "9^{9^{9^{9}}}",
        "(" * 900 + "1" + ")" * 900,
        "\\int " * 40 + "x",
        "\\frac{" * 190 + "1" + "}{2}" * 190,
        "7" * 2001,
    ],
    ids=["tower", "brackets", "integrals", "fractions", "long"],
)
def test_no_formula_keeps_the_scorer(monster):
    started = time.monotonic()
    assert not equivalent("7", monster, seconds=1.0)
    assert time.monotonic() - started < 30  # twelve times the limit by the clock, and a start of sympy
    assert equivalent("\\frac{4}{2}", "2"), "the scorer goes on"


@pytest.mark.parametrize(
    "part", ["\\text{", "\\overline{", "\\boxed{", "#### ", "$", "a$", "<<", "}", "frac", "Question"]
)
@pytest.mark.parametrize("end", ["", "\n\n", "}", "$"])
def test_no_response_takes_long_to_judge(part, end):
    hostile = part * (100_000 // len(part)) + end
    started = time.process_time()
    assert not answers.math(f"#### {hostile}", ["7"])
    answers.math(hostile, [hostile])
    without_marks(hostile)
    assert time.process_time() - started < 2


def scorer() -> psutil.Process:
    """The process in which sympy runs."""
    assert equivalent("\\frac{6}{2}", f"{random.random()} + 3") is False  # a pair that has not been asked before
    (found,) = [c for c in psutil.Process().children() if c.cmdline()[-1] == "equal"]
    return found


def test_the_scorer_goes_on_when_its_process_is_killed():
    scorer().kill()
    assert equivalent("\\frac{8}{2}", "4")


def test_an_interrupt_of_the_terminal_does_not_reach_the_scorer():
    assert os.getpgid(scorer().pid) != os.getpgrp()


def test_a_parser_that_is_not_installed_is_an_error_and_not_a_wrong_answer(tmp_path):
    (tmp_path / "antlr4.py").write_text("raise ImportError('not here')")
    program = "from dppa_jax.evaluate.equivalence import equivalent; equivalent('x', 'y')"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert "ChildProcessError: the math scorer does not start" in run.stderr
    assert "pip install sympy antlr4-python3-runtime==4.11" in run.stderr


# --- labels


def test_a_response_with_the_right_label_is_right():
    assert contains(" The sentiment is neutral.", "neutral")
    assert not contains(" The sentiment is neutral.", "positive")
    assert not contains("", "neutral")


def test_letter_case_is_ignored_or_matched():
    assert contains("NEUTRAL", "neutral")
    assert not contains("NEUTRAL", "neutral", ignore_case=False)
    assert contains("neutral", "neutral", ignore_case=False)


def test_a_wrong_label_beside_the_right_one_is_wrong_unless_any_will_do():
    assert not contains("neutral or positive", "neutral")
    assert contains("neutral or positive", "neutral", exclusive=False)
    assert contains("neutral, very neutral", "neutral")


def test_all_of_the_response_counts():
    assert not contains("neutral\n\nQuestion: what is the sentiment?\nAnswer: positive", "neutral")


def test_any_right_label_is_enough_and_none_of_them_is_wrong():
    choices = ("Choice of law", "Jurisdiction", "Arbitration")
    right = ("Choice of law", "Jurisdiction")
    assert contains("jurisdiction", *right, choices=choices)
    assert contains("choice of law and jurisdiction", *right, choices=choices)
    assert not contains("jurisdiction and arbitration", *right, choices=choices)


@pytest.mark.parametrize("response", ["It reads neutrally.", "neutralised", "unneutral", "neutral_one"])
def test_a_label_inside_a_word_is_not_that_label(response):
    assert not contains(response, "neutral")


def test_a_label_inside_a_longer_label_is_not_that_label():
    choices = ("service", "terms of service")
    assert contains("the terms of service", "terms of service", choices=choices)
    assert not contains("the terms of service", "service", choices=choices)
    assert contains("the service", "service", choices=choices)


def test_signs_of_a_label_are_taken_literally():
    assert contains("(a.b)", "a.b", choices=("a.b", "c"))
    assert not contains("(axb)", "a.b", choices=("a.b", "c"))


# --- exact


def test_an_exact_answer_is_the_whole_response():
    assert answers.exact(" payment right\n", ("payment right",))
    assert not answers.exact("payment right or duty", ("payment right",))
    assert not answers.exact("", ("payment right",))
