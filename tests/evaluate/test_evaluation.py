"""What is asked, what is remembered, and what a crash leaves."""

import json
import re

import pytest
from command import launch
from transformers import AutoTokenizer

from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
from dppa_jax.demo.tokenizer import save_tokenizer
from dppa_jax.evaluate.evaluation import Evaluation
from dppa_jax.evaluate.scores import Score
from dppa_jax.evaluate.tasks import TASKS

TEN = 10


class Parrot:
    """Answers every prompt with the same words, and remembers what it was asked and given."""

    def __init__(self, tokenizer, response: str, fail_after: int | None = None, **decoding):
        self.decoding, self.batch_size = {"evaluator": "parrot", **decoding}, 2
        self.answer = tokenizer(response, add_special_tokens=False)["input_ids"]
        self.asked, self.budgets, self.used, self.fail_after = [], [], [], fail_after

    def use(self, weights) -> None:
        self.used.append(weights)

    def generate(self, prompts, max_new_tokens):
        if self.fail_after is not None and len(self.asked) + len(prompts) > self.fail_after:
            raise RuntimeError("the evaluator died")
        self.asked += [list(prompt) for prompt in prompts]
        self.budgets += list(max_new_tokens)
        return [self.answer for _ in prompts]

    def close(self) -> None:
        pass


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture
def fpb(tmp_path):
    """Options over ten rows, all of them positive."""
    rows = [
        {"id": f"r{i}", "question": f"Profit rose {i} €.\nQuestion: what is the sentiment?", "answer": "positive"}
        | {"choices": ["negative", "neutral", "positive"]}
        for i in range(TEN)
    ]
    (tmp_path / "fpb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskOptions(data_dir=str(tmp_path))


@pytest.fixture
def evaluate(tokenizer, fpb, tmp_path):
    """(scores of fpb, the parrot) of one evaluation in a process of its own, as far as files go."""

    def evaluate(response: str, weights="weights", options=fpb, task="fpb", **settings):
        parrot = Parrot(tokenizer, response, **settings)
        evaluation = Evaluation(parrot, tokenizer, options, tmp_path / "responses")
        return evaluation.scores("model", weights, lambda: tmp_path / weights, [TASKS[task]])[task], parrot

    return evaluate


def test_responses_are_judged_and_kept_with_their_prompts(evaluate, tmp_path):
    score, parrot = evaluate("positive")
    assert score == Score(TEN, TEN)
    assert evaluate("negative", weights="other")[0] == Score(0, TEN)
    assert parrot.used == [tmp_path / "weights"]
    (file,) = (tmp_path / "responses" / "weights").glob("fpb-*.jsonl")
    about, *lines = map(json.loads, file.read_text().splitlines())
    assert about["weights"] == "weights"
    assert about["decoding"] == {"evaluator": "parrot"}
    assert {line["id"] for line in lines} == {f"r{i}" for i in range(TEN)}
    assert all(line["response"] == "positive" and "sentiment?" in line["prompt"] for line in lines)
    assert [line["correct"] for line in lines if "correct" in line] == [True] * TEN


def test_what_is_known_is_not_asked_again_and_its_weights_are_not_made(evaluate):
    evaluate("positive")
    score, parrot = evaluate("negative")
    assert score == Score(TEN, TEN)
    assert not parrot.asked
    assert not parrot.used


def test_other_tokens_are_another_question_though_the_text_is_the_same(evaluate, fpb, tokenizer):
    options = TaskOptions(data_dir=fpb.data_dir, wrapper="chat_template")
    for i, template in enumerate(("{{ messages[0]['content'] }}", "ask: {{ messages[0]['content'] }}")):
        tokenizer.chat_template = template
        _, parrot = evaluate("positive", options=options)
        assert len(parrot.asked) == TEN, i


def test_other_choices_judge_a_response_again(evaluate, fpb, tmp_path):
    assert evaluate("positive revenue")[0].correct == TEN
    file = tmp_path / "fpb.jsonl"
    file.write_text(file.read_text().replace('["negative"', '["revenue"'))
    score, parrot = evaluate("")
    assert score.correct == 0
    assert not parrot.asked


@pytest.mark.parametrize("change", ["weights", "decoding", "prompt", "tokens"])
def test_all_that_decides_a_response_makes_it_another_one(evaluate, fpb, change):
    evaluate("positive")
    other = {
        "weights": {"weights": "another"},
        "decoding": {"dtype": "bfloat16"},
        "prompt": {"options": TaskOptions(data_dir=fpb.data_dir, choices="listed")},
        "tokens": {"options": TaskOptions(data_dir=fpb.data_dir, max_new_tokens=5)},
    }[change]
    score, parrot = evaluate("negative", **other)
    assert score == Score(0, TEN)
    assert len(parrot.asked) == TEN


def test_other_scoring_judges_the_responses_that_are_there(evaluate, fpb):
    assert evaluate("Profit is positive and negative")[0].correct == 0
    score, parrot = evaluate("", options=TaskOptions(data_dir=fpb.data_dir, labels="any"))
    assert score.correct == TEN
    assert not parrot.asked
    assert evaluate("", options=fpb)[0].correct == 0


def test_an_interrupted_evaluation_goes_on_where_it_was(evaluate, tmp_path):
    with pytest.raises(RuntimeError, match="the evaluator died"):
        evaluate("positive", fail_after=4)
    (file,) = (tmp_path / "responses").rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])  # and the last line was cut short, as by a kill
    score, parrot = evaluate("negative")
    assert len(parrot.asked) == TEN - 3
    assert score == Score(3, TEN)
    assert evaluate("neutral")[0] == Score(3, TEN)


def test_items_that_changed_are_asked_again(evaluate, fpb, tmp_path):
    evaluate("positive")
    file = tmp_path / "fpb.jsonl"
    file.write_text(file.read_text().replace("rose 3", "fell 3"))
    _, parrot = evaluate("negative")
    assert len(parrot.asked) == 1


def test_a_limit_asks_the_first_items_and_a_higher_one_only_the_others(evaluate, fpb):
    assert evaluate("positive", options=TaskOptions(data_dir=fpb.data_dir, limit=4))[0] == Score(4, 4)
    score, parrot = evaluate("positive", options=TaskOptions(data_dir=fpb.data_dir, limit=6))
    assert score == Score(6, 6)
    assert len(parrot.asked) == 2


def test_prompts_without_room_for_an_answer_are_not_asked_and_are_wrong(evaluate, fpb, tokenizer):
    shortest = len(tokenizer("Profit rose 1 €.\nQuestion: what is the sentiment?\nAnswer:")["input_ids"])
    score, parrot = evaluate("positive", options=TaskOptions(data_dir=fpb.data_dir, max_length=shortest))
    assert score == Score(0, TEN)
    assert not parrot.asked
    _, parrot = evaluate("positive", options=TaskOptions(data_dir=fpb.data_dir, max_length=shortest + 3))
    assert parrot.budgets == [3] * TEN


def test_one_hand_over_serves_several_tasks_and_the_next_model_has_its_own(tokenizer, tmp_path):
    parrot = Parrot(tokenizer, "5")
    evaluation = Evaluation(parrot, tokenizer, TaskOptions(limit=3), tmp_path)
    tasks = [TASKS["addition"], TASKS["trend"]]
    for name in ("a", "a", "b"):
        evaluation.scores(name, name, lambda n=name: tmp_path / n, tasks)
    evaluation.scores("b", "b", lambda: tmp_path / "b", [TASKS["comparison"]])
    assert parrot.used == [tmp_path / "a", tmp_path / "b"]
    assert evaluation.costs["a"].responses == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"evaluator": "vlm"}, "--evaluator=vlm: not one of jax, vllm. Did you mean 'vllm'?"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"dtype": "fp16"}, "--evaluate_dtype=fp16"),
    ],
)
def test_wrong_settings_are_refused_with_the_flag(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        EvaluationConfig(**wrong)


@pytest.mark.parametrize("job", ["merge", "evaluate", "search", "finetune"])
def test_a_wrong_task_is_refused_with_the_nearest(job):
    with pytest.raises(SystemExit, match=r"--evaluate=gsm8: not one of .* Did you mean 'gsm8k'\?"):
        launch(f"--job={job}", "--evaluate=gsm8", "--base=b", "--expert=e=e", "--output=o", "--method=dare")
