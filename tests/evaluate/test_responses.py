"""The file of responses: what a killed run left goes on, and what others put into it is a message or passed over."""

import json
import os

import pytest
from hostile import ODD, damaged, other_form
from hypothesis import given, settings

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.responses import Question, ResponseLog
from dppa_jax.evaluate.tasks import TASKS, Item

KEY = {"weights": "w", "task": "fpb"}
QUESTION = Question(TASKS["fpb"], Item("a", "Sales rose.", ("positive",), ("positive", "negative")), [1, 2], 9, "d1")
OTHER = QUESTION._replace(item=QUESTION.item._replace(id="b"), digest="d2")
OPTIONS = TaskOptions()


@pytest.fixture
def file(tmp_path):
    """A file with one response and its verdict."""
    path = tmp_path / "responses" / "fpb.jsonl"
    log = ResponseLog(path, KEY)
    log.add(QUESTION, "positive")
    assert log.verdict(QUESTION, OPTIONS)
    log.close()
    return path


def test_a_line_that_was_cut_off_goes_and_the_next_begins_a_line(file):
    whole = file.read_bytes()
    with file.open("ab") as out:
        out.write(b'{"id": "b", "tok')
    log = ResponseLog(file, KEY)
    assert log.has(QUESTION)
    assert not log.has(OTHER)
    log.add(OTHER, "negative")
    log.close()
    assert file.read_bytes().startswith(whole + b'{"id": "b", "tokens": "d2"')
    assert ResponseLog(file, KEY).has(OTHER)


def test_a_last_line_without_its_end_counts(file):
    file.write_bytes(file.read_bytes()[:-1])
    log = ResponseLog(file, KEY)
    log.add(OTHER, "negative")
    log.close()
    assert all(json.loads(line) for line in file.read_text().splitlines())
    assert ResponseLog(file, KEY).has(QUESTION)


@pytest.mark.parametrize(
    "line", [line for line in ODD if line] + [b"[]", b'{"id": 1, "tokens": "d2", "response": "x"}']
)
def test_a_line_that_is_no_response_is_passed_over_with_its_number(file, caplog, line):
    file.write_bytes(file.read_bytes() + line + b"\n")
    log = ResponseLog(file, KEY)
    assert log.has(QUESTION)
    assert not log.has(OTHER)
    assert f"{file}: line 4 is no response, and passed over; so are 0 more" in caplog.text


def test_a_verdict_that_is_no_truth_value_is_not_believed(file):
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines).replace('"correct": true', '"correct": "yes"') + "\n")
    log = ResponseLog(file, KEY)
    assert log.verdict(QUESTION, OPTIONS) is True


def test_neither_a_pipe_nor_a_link_nor_an_endless_file_is_followed(file, tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("the last line has no end")
    file.unlink()
    file.symlink_to(notes)
    with pytest.raises(OSError, match=r"fpb\.jsonl"):
        ResponseLog(file, KEY).add(QUESTION, "x")
    assert notes.read_text() == "the last line has no end"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"fpb\.jsonl is a pipe"):
        ResponseLog(file, KEY)
    file.unlink()
    file.touch()
    os.truncate(file, 3 << 30)
    with pytest.raises(ValueError, match=r"fpb\.jsonl: 3221225472 bytes"):
        ResponseLog(file, KEY)


LINE = {
    "id": "a",
    "tokens": "d1",
    "prompt": "p",
    "answers": ["x"],
    "response": "positive",
    "scoring": "s",
    "correct": True,
}
GOOD = b"".join(json.dumps(line).encode() + b"\n" for line in (KEY, LINE, {**LINE, "id": "b", "tokens": "d2"}))


@settings(max_examples=150, deadline=None)
@given(content=damaged(GOOD) | other_form(LINE).map(lambda line: GOOD + line + b"\n"))
def test_any_content_leaves_responses_that_can_be_judged_and_added_to(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("log") / "fpb.jsonl"
    file.write_bytes(content)
    log = ResponseLog(file, KEY)
    for question in (QUESTION, OTHER):
        if not log.has(question):
            log.add(question, "negative")
        assert log.verdict(question, OPTIONS) in (True, False)
    log.close()
    again = ResponseLog(file, KEY)
    assert again.has(QUESTION)
    assert again.has(OTHER)
