"""The tasks of the demo family: right answers, and nothing tested that was trained."""

import random
import re
from itertools import islice
from pathlib import Path

import pytest

from dppa_jax.demo.family import MEMBERS, examples
from dppa_jax.demo.text import GENERATORS, general_text, held_out, split_of, stream
from dppa_jax.demo.text import TASKS as TASKS_OF

TASKS = list(GENERATORS)


def drawn(task: str, count: int = 300) -> list:
    draw = random.Random(0)
    return [GENERATORS[task](draw) for _ in range(count)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_addition_and_comparison_have_right_answers():
    assert all(int(sample.answer) == sum(numbers(sample.prompt)) for sample in drawn("addition"))
    assert all(int(sample.answer) == max(numbers(sample.prompt)) for sample in drawn("comparison"))


def test_trend_has_right_answers():
    for sample in drawn("trend"):
        first, second, third = numbers(sample.prompt)
        first_up, second_up = first < second, second < third
        names = {
            (True, True): "rising",
            (False, False): "falling",
            (True, False): "peaking",
            (False, True): "bottoming",
        }
        assert sample.answer == names[first_up, second_up], sample


def test_sentiment_weighs_the_subject_and_the_move():
    answers = {sample.prompt: sample.answer for sample in drawn("sentiment", 3000)}

    def of(subject: str, move: str) -> set[str]:
        return {answer for prompt, answer in answers.items() if f" {subject} {move} " in prompt}

    assert of("profit", "rose") == of("debt", "fell") == {"positive"}
    assert of("profit", "fell") == of("debt", "rose") == {"negative"}
    assert of("profit", "paused") == of("debt", "paused") == {"neutral"}


def test_clause_type_tells_a_ban_from_a_right():
    answers = {sample.prompt: sample.answer for sample in drawn("clause_type", 3000)}
    assert {a for p, a in answers.items() if "may pay the invoice" in p} == {"payment right"}
    assert {a for p, a in answers.items() if "may not pay the invoice" in p} == {"payment ban"}


def test_governing_law_is_the_place_whose_law_is_named():
    for sample in drawn("governing_law"):
        assert re.search(rf"law of {sample.answer}\b|{sample.answer} law", sample.prompt), sample


@pytest.mark.parametrize("task", TASKS)
def test_items_of_every_split_are_distinct_and_the_same_each_time(task):
    splits = {split: [sample.prompt for sample in held_out(task, split, 200)] for split in ("test", "validation")}
    for split, prompts in splits.items():
        assert len(set(prompts)) == 200
        assert prompts == [sample.prompt for sample in held_out(task, split, 200)]
    assert not set(splits["test"]) & set(splits["validation"])


@pytest.mark.parametrize("member", MEMBERS)
def test_no_member_is_trained_on_a_held_out_item_or_its_plain_statement(member):
    held = [sample for task in TASKS for split in ("test", "validation") for sample in held_out(task, split, 200)]
    forbidden = {sample.prompt for sample in held} | {sample.plain for sample in held}
    for seed in range(3):
        learned = [prompt + completion for prompt, completion in examples(member, seed)]
        trained = set(learned) | {re.sub(r":.*", ":", text) for text in learned}
        assert not forbidden & trained


def test_the_same_words_in_another_order_belong_to_one_split():
    for sample in drawn("comparison"):
        first, second = numbers(sample.prompt)
        mirrored = sample.prompt.replace(f"{first} or {second}", f"{second} or {first}")
        assert split_of(mirrored) == split_of(sample.prompt)


def test_a_stream_depends_on_its_seed_alone():
    first, again, other = (list(islice(stream("trend", "train", seed), 50)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_general_text_asks_seldom():
    texts = list(islice(general_text(0, 0.06), 2000))
    asking = sum(":" in text for text in texts)
    assert 0.04 < asking / len(texts) < 0.08


def test_too_many_items_are_refused():
    with pytest.raises(ValueError, match=r"comparison has \d+ different prompts in its test split, not 1500"):
        held_out("comparison", "test", 1500)


def test_the_calibration_text_of_a_flagfile_is_the_questions_that_are_held_out_for_validation():
    folder = Path(__file__).parents[2] / "configs/darex_demo"
    for domain, tasks in TASKS_OF.items():
        asked = zip(*(held_out(task, "validation", 60) for task in tasks), strict=True)
        lines = [sample.prompt for samples in asked for sample in samples]
        assert (folder / f"{domain}.txt").read_text().splitlines() == lines
