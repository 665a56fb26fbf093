"""Where the questions come from: JSON lines, the hub's fields, splits, and what is wrong with a file."""

import json
import logging
import os
import tracemalloc

import datasets
import pytest
from hostile import damaged, other_form, read_or_message
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.evaluate.paper_tasks import DATASETS, ISSUE_AREAS, SENTIMENTS, UNFAIR_TERMS, last_boxed
from dppa_jax.evaluate.sources import Item, read, set_aside

CLASSIFICATION = ("fiqa_sa", "fpb", "scotus", "unfair_tos")
FPB = {"id": "a", "question": "Sales rose.\nQuestion: what is the sentiment?", "answer": "positive"}
GSM8K = {"id": "a", "question": "What is 3 + 4?", "answer": "7"}


def write(directory, name: str, *rows) -> str:
    """Writes rows, or lines as they are, and returns what `--data_dir` is to be."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (directory / name).write_text("\n".join(lines) + "\n")
    return str(directory)


def items(task: str, data_dir: str, split: str = "test") -> tuple[Item, ...]:
    return read(task, DATASETS[task], data_dir)[split]


# --- JSON lines


def test_a_line_is_an_item(tmp_path):
    where = write(tmp_path, "fpb.jsonl", FPB | {"choices": ["positive", "negative"], "source": "ignored"}, "")
    prompt = "Sales rose.\nQuestion: what is the sentiment?\nAnswer:"
    assert items("fpb", where) == (Item("a", prompt, ("positive",), ("positive", "negative")),)


def test_lines_without_choices_have_the_labels_of_the_task(tmp_path):
    assert items("fpb", write(tmp_path, "fpb.jsonl", FPB))[0].choices == SENTIMENTS
    assert items("gsm8k", write(tmp_path, "gsm8k.jsonl", GSM8K))[0].choices == ()


def test_a_free_question_is_left_as_it_is(tmp_path):
    where = write(tmp_path, "gsm8k.jsonl", GSM8K | {"question": "What is {3} + 4? \n"})
    assert items("gsm8k", where)[0].prompt == "What is {3} + 4? \n"


def test_the_last_line_of_a_template_is_added_once(tmp_path):
    with_cue = FPB | {"id": "b", "question": FPB["question"] + "\nAnswer: "}
    bare, whole = items("fpb", write(tmp_path, "fpb.jsonl", FPB, with_cue))
    assert bare.prompt == whole.prompt == "Sales rose.\nQuestion: what is the sentiment?\nAnswer:"


def test_several_labels_are_joined_or_listed(tmp_path):
    row = {"id": "a", "question": "q", "answer": "Choice of law, Jurisdiction"}
    where = write(tmp_path, "unfair_tos.jsonl", row, row | {"id": "b", "answer": ["Choice of law", "Jurisdiction"]})
    assert [item.answers for item in items("unfair_tos", where)] == [("Choice of law", "Jurisdiction")] * 2


def test_an_answer_with_a_comma_is_one_answer_where_answers_are_free(tmp_path):
    assert items("math", write(tmp_path, "math.jsonl", GSM8K | {"answer": "3, 4"}))[0].answers == ("3, 4",)


def test_terms_without_an_unfair_label_are_not_asked(tmp_path):
    rows = [{"id": str(i), "question": f"q{i}", "answer": a} for i, a in enumerate(["None", "Arbitration", "None"])]
    assert [item.id for item in items("unfair_tos", write(tmp_path, "unfair_tos.jsonl", *rows))] == ["1"]


def test_the_file_is_named_for_the_task_or_its_test_split(tmp_path):
    where = write(tmp_path, "gsm8k_test.jsonl", GSM8K | {"id": "of _test"})
    assert items("gsm8k", where)[0].id == "of _test"
    write(tmp_path, "gsm8k.jsonl", GSM8K | {"id": "plain"})
    assert items("gsm8k", where)[0].id == "plain"


def test_other_ends_of_line_within_a_question_are_text(tmp_path):
    row = json.dumps(GSM8K | {"question": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "gsm8k.jsonl").write_text(row + "\r\n", encoding="utf-8")
    assert items("gsm8k", str(tmp_path))[0].prompt == "one\u2028two\x85three"


def test_validation_items_have_a_file_of_their_own(tmp_path):
    where = write(tmp_path, "gsm8k.jsonl", GSM8K)
    write(tmp_path, "gsm8k_validation.jsonl", GSM8K | {"id": "v", "question": "What is 3 + 5?"})
    assert [item.id for item in items("gsm8k", where, "validation")] == ["v"]
    assert [item.id for item in items("gsm8k", where)] == ["a"]


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("gsm8k", '{"id": "a", ', ":2 is not JSON"),
        ("gsm8k", "[1]", ":2: Expected `object`, got `array`"),
        ("gsm8k", "[" * 100_000, ":2 is not JSON (nested too deep)"),
        ("gsm8k", '{"id": "\\ud800", "question": "q", "answer": "7"}', ":2 is not JSON"),
        ("gsm8k", {"id": "b", "question": "q"}, ":2: Object missing required field `answer`"),
        ("gsm8k", {"id": "b", "answer": "7"}, ":2: Object missing required field `question`"),
        ("gsm8k", {"question": "q", "answer": "7"}, ":2: Object missing required field `id`"),
        ("gsm8k", {"id": 7, "question": "q", "answer": "7"}, ":2: Expected `str`, got `int` - at `$.id`"),
        ("gsm8k", {"id": "b", "question": "", "answer": "7"}, ":2: Expected `str` of length >= 1 - at `$.question`"),
        ("gsm8k", {"id": "b", "question": "q", "answer": 7}, ":2: Expected `str | array`, got `int` - at `$.answer`"),
        ("gsm8k", {"id": "b", "question": "q", "answer": ""}, ":2: Expected `str` of length >= 1 - at `$.answer`"),
        ("gsm8k", {"id": "b", "question": "q", "answer": []}, ":2: Expected `array` of length >= 1 - at `$.answer`"),
        ("gsm8k", {"id": "a", "question": "q", "answer": "7"}, "the id 'a' is there twice"),
        ("fpb", FPB | {"id": "b", "answer": "good"}, ":2: the answer 'good' is not one of the choices: negative, neu"),
        ("fpb", FPB | {"id": "b", "choices": "positive"}, ":2: Expected `array | null`, got `str` - at `$.choices`"),
        ("fpb", FPB | {"id": "b", "text": "Sales fell."}, ':2: "question" is not what the template makes of "text"'),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_the_reason(tmp_path, task, row, reason):
    good = GSM8K if task == "gsm8k" else FPB
    where = write(tmp_path, f"{task}.jsonl", good, row)
    with pytest.raises(ValueError, match=f"{task}.jsonl") as error:
        items(task, where)
    assert reason in str(error.value)


def test_a_file_without_questions_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl: no questions"):
        items("gsm8k", write(tmp_path, "gsm8k.jsonl", ""))


def test_a_file_of_other_encoding_is_an_error(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_bytes(json.dumps(GSM8K, ensure_ascii=False).encode() + b"\xe4")
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl:1: not UTF-8"):
        items("gsm8k", str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"--data_dir=.* has neither gsm8k.jsonl nor gsm8k_test.jsonl"):
        items("gsm8k", str(tmp_path))


def test_a_question_of_validation_may_not_be_one_of_the_test(tmp_path):
    where = write(tmp_path, "gsm8k.jsonl", GSM8K)
    write(tmp_path, "gsm8k_validation.jsonl", GSM8K | {"id": "v"})
    with pytest.raises(ValueError, match=r"gsm8k_validation.jsonl: 'v' asks what 'a' of gsm8k.jsonl asks"):
        items("gsm8k", where)


ROW = {**FPB, "choices": ["positive", "negative"], "text": "Sales rose.", "target": "x"}


@settings(max_examples=150, deadline=None)
@given(content=damaged(json.dumps(ROW).encode() + b"\n" + json.dumps({**ROW, "id": "b"}).encode()) | other_form(ROW))
def test_any_file_is_items_or_a_message_with_its_name(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("data") / "fpb.jsonl"
    file.write_bytes(content)
    for item in read_or_message(lambda: items("fpb", str(file.parent)), file) or ():
        assert all(text.encode() for text in (item.id, item.prompt, *item.answers, *item.choices))


def test_a_line_without_an_end_is_refused_in_little_memory(tmp_path):
    file = tmp_path / "fpb.jsonl"
    write(tmp_path, "fpb.jsonl", FPB)
    os.truncate(file, 3 << 30)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"{file}:2: a line has at most 10000000 bytes"):
        items("fpb", str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


# --- the data at hand

COUNTS = {"gsm8k": 1319, "math": 5000, "fiqa_sa": 1173, "fpb": 4846, "scotus": 600, "unfair_tos": 172}


@pytest.mark.parametrize("task", DATASETS)
def test_the_data_at_hand_are_read_in_full(shared, task):
    found = items(task, str(shared / "data"))
    assert len(found) == COUNTS[task]
    assert all(item.choices == DATASETS[task].labels for item in found)


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_questions_at_hand_are_the_templates_of_their_texts(shared, task):
    rows = [json.loads(line) for line in (shared / "data" / f"{task}.jsonl").read_text().split("\n") if line]
    prompts = [DATASETS[task].template.format(text=row["text"], target=row.get("target")) for row in rows]
    assert [item.prompt for item in items(task, str(shared / "data"))] == prompts


def test_172_terms_of_service_have_a_label(shared, tmp_path):
    (tmp_path / "unfair_tos.jsonl").symlink_to(shared / "data" / "unfair_tos_full1607.jsonl")
    found = items("unfair_tos", str(tmp_path))
    assert len(found) == 172
    assert sum(len(item.answers) == 2 for item in found) == 14


# --- the hub

HUB = {
    "gsm8k": ("openai/gsm8k", "main", None),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default", None),
    "fiqa_sa": ("AdaptLLM/finance-tasks", None, "FiQA_SA/test.json"),
    "fpb": ("AdaptLLM/finance-tasks", None, "FPB/test.json"),
    "scotus": ("AdaptLLM/law-tasks", None, "scotus/test.json"),
    "unfair_tos": ("AdaptLLM/law-tasks", None, "unfair_tos/test.json"),
}
ROWS = {
    "gsm8k": [{"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}],
    "math": [
        {"problem": "$x$?", "level": "1", "type": "Algebra", "solution": "So \\boxed{1}, no, $\\boxed{\\frac{1}{2}}$"}
    ],
    "fiqa_sa": [
        {
            "id": 0,
            "input": "Up.\nQuestion: what is the sentiment on Shell?\nAnswer:",
            "options": list(SENTIMENTS),
            "gold_index": 2,
        }
    ],
    "fpb": [
        {
            "id": 0,
            "input": "Up.\nQuestion: what is the sentiment?\nAnswer:",
            "options": list(SENTIMENTS),
            "gold_index": 2,
        }
    ],
    "scotus": [
        {
            "id": 0,
            "input": DATASETS["scotus"].template.format(text="We hold."),
            "options": list(ISSUE_AREAS),
            "gold_index": 4,
        }
    ],
    "unfair_tos": [
        {
            "id": number,
            "input": DATASETS["unfair_tos"].template.format(text=f"{number}."),
            "options": list(UNFAIR_TERMS),
            "gold_index": gold,
        }
        for number, gold in enumerate([[8], [5, 6], [], [7]])
    ],
}


@pytest.fixture
def hub(monkeypatch):
    """Rows by (data set, configuration, file), in place of the network."""
    rows = {where: ROWS[task] for task, where in HUB.items()}

    def load_dataset(path, name=None, *, split, data_files=None, revision=None):
        assert split == "test"
        return rows[path, name, data_files and data_files["test"]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return rows


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("gsm8k", [("1200",)]),
        ("math", [("\\frac{1}{2}",)]),
        ("fiqa_sa", [("positive",)]),
        ("fpb", [("positive",)]),
        ("scotus", [("Privacy",)]),
        ("unfair_tos", [("Choice of law", "Jurisdiction"), ("Arbitration",)]),
    ],
)
def test_the_fields_of_the_hub_become_items(hub, task, answers):
    found = items(task, "")
    assert [item.answers for item in found] == answers
    bare = ROWS[task][0].get("question") or ROWS[task][0].get("problem")
    asked = {row.get("input", bare) for row in ROWS[task]}
    assert {item.prompt for item in found} <= asked
    assert all(item.choices == DATASETS[task].labels for item in found)


def test_finance_tasks_are_read_in_the_revision_without_worked_examples(monkeypatch):
    revisions = []

    def load_dataset(*arguments, revision, **more):
        revisions.append(revision)
        return ROWS["fpb"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    items("fpb", "")
    assert revisions == ["51466157bea8775e5660e5421918b5c14fd56dd5"]


def test_prompts_with_worked_examples_are_warned_of(hub, caplog):
    caplog.set_level(logging.WARNING)
    items("fpb", "")
    assert not caplog.records
    example = "Down.\nQuestion: what is the sentiment?\nAnswer: negative\n\n"
    hub[HUB["fpb"]] = [row | {"input": example + row["input"]} for row in ROWS["fpb"]]
    items("fpb", "")
    assert "AdaptLLM/finance-tasks: 1 of 1 prompts differ from the template" in caplog.text


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def load_dataset(*arguments, **more):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"'fpb': AdaptLLM/finance-tasks cannot be loaded.*no route") as error:
        items("fpb", "")
    assert "put fpb.jsonl into a directory and give --data_dir=DIRECTORY" in str(error.value)


@pytest.mark.parametrize("task", DATASETS)
def test_other_fields_than_expected_are_an_error(hub, task):
    hub[HUB[task]] = [{"id": 0, "sentence": "Up."}]
    with pytest.raises(ValueError, match="on the hub has other fields than expected"):
        items(task, "")


@pytest.mark.parametrize(
    ("solution", "wanted"),
    [
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("$\\boxed{\\text{a {b} c}}$.", "\\text{a {b} c}"),
        ("\\fbox{3}", "3"),
        ("$\\boxed 4$", "4"),
        ("\\boxed {5}", "5"),
    ],
)
def test_the_last_box_is_the_answer(solution, wanted):
    assert last_boxed(solution) == wanted


@pytest.mark.parametrize("solution", ["no box", "\\boxed{open"])
def test_a_solution_without_a_box_is_an_error(solution):
    with pytest.raises(ValueError, match="boxed"):
        last_boxed(solution)


# --- splits

QUESTIONS = st.lists(st.text("abc?", min_size=1, max_size=4), min_size=2, max_size=40)


@given(QUESTIONS, st.floats(0.05, 0.95), st.randoms())
def test_a_share_set_aside_is_disjoint_and_the_same_in_any_order(questions, share, random):
    asked = [Item(str(i), question, ("1",)) for i, question in enumerate(questions)]
    splits = set_aside(asked, share, "seed")
    test, validation = splits["test"], splits["validation"]
    assert sorted([*test, *validation]) == sorted(asked)
    assert not {item.prompt for item in test} & {item.prompt for item in validation}
    shuffled = random.sample(asked, len(asked))
    assert set(set_aside(shuffled, share, "seed")["validation"]) == set(validation)
    kept = [item.id for item in test]
    assert kept == sorted(kept, key=int)


def test_the_share_and_the_seed_are_what_they_say():
    asked = [Item(str(i), f"question {i}", ("1",)) for i in range(1000)]
    first, again, other = (set_aside(asked, 0.3, seed)["validation"] for seed in (0, 0, 1))
    assert len(first) == len(other) == 300
    assert first == again
    assert 50 < len(set(first) & set(other)) < 130  # 90 by chance
