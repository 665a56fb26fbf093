"""The table of tasks, and what the in-process evaluation does with it."""

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from dppa_jax.demo.family import model_config
from dppa_jax.demo.tokenizer import save_tokenizer
from dppa_jax.evaluate import answers
from dppa_jax.evaluate.local import evaluate
from dppa_jax.evaluate.tasks import TASKS, Item, Task, by_domain
from dppa_jax.finetune import Example, TrainConfig, encode, train
from dppa_jax.model import generate, init_tree
from dppa_jax.model.generate import decode

SAID = {"Sum:": "12", "Larger:": "34", "Trend:": "rising"}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """Config, tree and tokenizer of a model that has learned SAID by heart."""
    directory = tmp_path_factory.mktemp("parrot")
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = model_config(tokenizer)
    rows = encode([Example(prompt, f" {answer}") for prompt, answer in SAID.items()], tokenizer, 8)
    tree = init_tree(config, jax.random.key(0), stddev=0.08)
    tree, _ = train(config, tree, rows, TrainConfig(steps=40, learning_rate=5e-3, batch_size=3))
    return config, tree, tokenizer


def task_of(name: str, answered: dict[str, str], max_new_tokens: int = 4) -> Task:
    items = tuple(Item(prompt, (answer,)) for prompt, answer in answered.items())
    return Task(name, "none", lambda split: items, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_items_whose_own_answers_are_right(name):
    task = TASKS[name]
    items = task.items("test")
    assert len(items) == 200
    assert task.accuracy([f" {item.answers[0]}" for item in items], items) == 1
    assert task.accuracy(["no idea" for _ in items], items) == 0


def test_accuracy_is_the_share_answered_right():
    task = task_of("half", {})
    items = [Item("a", ("1",)), Item("b", ("2",)), Item("c", ("3", "three")), Item("d", ("4",))]
    assert task.accuracy(["1", "1", "three", "5"], items) == 0.5


def test_validation_items_are_others_than_test_items():
    for task in TASKS.values():
        assert not set(task.items("test")) & set(task.items("validation"))


def test_an_exact_answer_is_the_whole_response():
    assert answers.exact(" payment right\n", ("payment right",))
    assert not answers.exact("payment right or duty", ("payment right",))
    assert not answers.exact("", ("payment right",))


def test_tasks_are_found_by_domain():
    found = by_domain(["comparison", "addition", "trend"])
    assert {domain: [task.name for task in tasks] for domain, tasks in found.items()} == {
        "math": ["comparison", "addition"],
        "finance": ["trend"],
    }


def test_an_unknown_task_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="no task is called 'adition'; there are addition, comparison"):
        by_domain(["adition"])


def test_evaluation_gives_the_responses_in_the_order_of_the_items(parrot):
    wrong_once = dict(SAID) | {"Trend:": "falling"}
    tasks = [task_of("known", SAID), task_of("mixed", dict(reversed(wrong_once.items())))]
    results = evaluate(*parrot, tasks)
    assert list(results) == ["known", "mixed"]
    assert results["known"].accuracy == 1
    assert [response.strip() for response in results["known"].responses] == list(SAID.values())
    assert results["mixed"].accuracy == pytest.approx(2 / 3)
    assert [response.strip() for response in results["mixed"].responses] == list(reversed(SAID.values()))


def test_a_task_keeps_its_own_limit_of_new_tokens(parrot):
    results = evaluate(*parrot, [task_of("short", SAID, max_new_tokens=1), task_of("long", SAID, max_new_tokens=4)])
    assert [response.strip() for response in results["short"].responses] == ["1", "3", "rising"]
    assert results["long"].accuracy == 1


def test_the_limit_takes_the_first_items(parrot):
    results = evaluate(*parrot, [task_of("known", SAID)], limit=2)
    assert len(results["known"].responses) == 2


def test_evaluation_says_what_generation_says(parrot):
    config, tree, tokenizer = parrot
    prompts = [item.prompt for item in TASKS["sentiment"].items("test", 20)]
    tokens = generate((config, tree), tokenizer(prompts)["input_ids"], 4)
    responses = evaluate(config, tree, tokenizer, [TASKS["sentiment"]], limit=20)["sentiment"].responses
    assert responses == tokenizer.batch_decode(tokens, skip_special_tokens=True)


def test_other_weights_need_no_other_compilation(parrot):
    config, tree, tokenizer = parrot
    evaluate(config, tree, tokenizer, [task_of("known", SAID)])
    compiled = decode._cache_size()
    other = jax.tree.map(lambda array: np.asarray(array) * 0.5, tree)
    results = evaluate(config, other, tokenizer, [task_of("known", SAID)])
    assert decode._cache_size() == compiled
    assert set(results) == {"known"}
