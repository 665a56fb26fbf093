"""The table of tasks: their items, prompts, token ids and verdicts under every option."""

import copy
import json
import logging

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.demo.text import TASKS as DEMO_TASKS
from dppa_jax.demo.tokenizer import save_tokenizer
from dppa_jax.evaluate.tasks import TASKS, Item, Task, by_domain

DEMO = [name for names in DEMO_TASKS.values() for name in names]
MATH = ("gsm8k", "math")
CHOICE = ("fiqa_sa", "fpb", "scotus", "unfair_tos")
DEFAULT = TaskOptions()
SENTENCE = Item("s", "Sony grew.\nQuestion: what is the sentiment?\nAnswer:", ("positive",), ("negative", "positive"))
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} [reply]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return directory


@pytest.fixture
def tokenizer(tokenizer_directory):
    """One that begins every sequence with <s>, as LLaMA's does."""
    return AutoTokenizer.from_pretrained(tokenizer_directory)


@pytest.fixture
def questions(tmp_path):
    """Ten questions of gsm8k, as options that read them."""
    rows = [{"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(10)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda **options: TaskOptions(data_dir=str(tmp_path), **options)


# --- the table


def test_the_tasks_of_the_paper_and_of_the_demo_are_found_by_domain():
    found = by_domain(TASKS)
    assert {domain: [task.name for task in tasks] for domain, tasks in found.items()} == {
        "math": ["gsm8k", "math", "addition", "comparison"],
        "finance": ["fiqa_sa", "fpb", "sentiment", "trend"],
        "law": ["scotus", "unfair_tos", "clause_type", "governing_law"],
        **{name: [name] for name in ("cola", "sst2", "mrpc", "stsb")},
    }
    assert list(by_domain(["trend", "comparison"])) == ["finance", "math"]


def test_an_unknown_task_is_named_with_the_nearest_there_is():
    with pytest.raises(ValueError, match=r"--evaluate=gsm8: not one of gsm8k, math, .*gsm8k"):
        by_domain(["gsm8"])


@pytest.mark.parametrize("name", DEMO)
def test_demo_items_are_answered_by_their_own_answers_alone(name):
    task = TASKS[name]
    items = task.items(DEFAULT)
    assert len(items) == len({item.id for item in items}) == 200
    assert all(task.correct(DEFAULT, f" {item.answers[0]}", item) for item in items)
    assert not any(task.correct(DEFAULT, "no idea", item) for item in items)


@pytest.mark.parametrize("name", DEMO)
def test_demo_validation_items_are_others_than_test_items(name):
    test, validation = (TASKS[name].items(DEFAULT, split) for split in ("test", "validation"))
    assert not {item.prompt for item in test} & {item.prompt for item in validation}
    assert not {item.id for item in test} & {item.id for item in validation}


@pytest.mark.parametrize("name", [*MATH, *CHOICE])
def test_items_of_the_paper_are_answered_by_their_own_answers_alone(shared, name):
    task, options = TASKS[name], TaskOptions(data_dir=str(shared / "data"), limit=60)
    items = task.items(options)
    assert len(items) == 60
    marker = "#### " if name in MATH else " "
    assert all(task.correct(options, f"I think\n{marker}{item.answers[0]}", item) for item in items)
    assert not any(task.correct(options, response, item) for item in items for response in ("", "no idea"))


# --- splits


def test_the_limit_takes_the_first_items_of_a_split(questions):
    whole = TASKS["gsm8k"].items(questions(validation_share=0.3), "validation")
    assert len(whole) == 3
    assert TASKS["gsm8k"].items(questions(validation_share=0.3, limit=2), "validation") == whole[:2]


def test_a_share_set_aside_is_taken_out_of_the_test_items(questions):
    options = questions(validation_share=0.3, split_seed=5)
    test, validation = (TASKS["gsm8k"].items(options, split) for split in ("test", "validation"))
    assert sorted(item.id for item in (*test, *validation)) == [f"q{i}" for i in range(10)]
    assert (len(test), len(validation)) == (7, 3)
    assert len(TASKS["gsm8k"].items(questions())) == 10


def test_another_seed_sets_other_items_aside(questions):
    chosen = {TASKS["gsm8k"].items(questions(validation_share=0.3, split_seed=s), "validation") for s in range(6)}
    assert len(chosen) > 1


def test_a_file_of_validation_items_is_used_in_place_of_a_share(questions, tmp_path):
    row = {"id": "v", "question": "What is 90 + 1?", "answer": "91"}
    (tmp_path / "gsm8k_validation.jsonl").write_text(json.dumps(row))
    options = questions(validation_share=0.5)
    assert [item.id for item in TASKS["gsm8k"].items(options, "validation")] == ["v"]
    assert len(TASKS["gsm8k"].items(options)) == 10


def test_validation_items_that_there_are_not_are_an_error(questions):
    with pytest.raises(ValueError, match=r"'gsm8k' has no validation items: .*--validation_share"):
        TASKS["gsm8k"].items(questions(), "validation")


def test_a_share_that_takes_every_item_is_an_error(questions):
    with pytest.raises(ValueError, match=r"--validation_share=0.99: leaves 'gsm8k' without test items"):
        TASKS["gsm8k"].items(questions(validation_share=0.99))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"choices": "shown"}, "--prompt_choices=shown: not one of hidden, listed"),
        ({"wrapper": "llama2chat"}, "--prompt_wrapper=llama2chat: .*llama2_chat"),
        ({"letter_case": "lower"}, "--letter_case=lower"),
        ({"labels": "all"}, "--labels=all"),
        ({"validation_share": 1.0}, "--validation_share=1.0"),
        ({"validation_share": -0.1}, "--validation_share=-0.1"),
        ({"limit": 0}, "--limit=0"),
        ({"max_new_tokens": 0}, "--max_new_tokens=0"),
        ({"max_length": 1}, "--max_length=1"),
    ],
)
def test_an_option_that_cannot_be_names_its_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        TaskOptions(**options)


# --- prompts


def test_the_math_prompt_is_abels_whatever_the_options(questions):
    prompt = "Question:\nWhat is 0 + 1?\nAnswer:\nLet's think step by step.\n"
    assert TASKS["gsm8k"].items(questions())[0].prompt == prompt
    assert TASKS["gsm8k"].items(questions(choices="listed", wrapper="llama2_chat"))[0].prompt == prompt


@pytest.mark.parametrize("name", CHOICE)
def test_listed_choices_stand_above_the_last_line_of_the_prompt(shared, name):
    hidden, listed = (
        TASKS[name].items(TaskOptions(data_dir=str(shared / "data"), limit=1, choices=choices))[0]
        for choices in ("hidden", "listed")
    )
    head, _, cue = hidden.prompt.rpartition("\n")
    choices = "".join(f"- {choice}\n" for choice in hidden.choices)
    assert listed.prompt == f"{head}\nOptions:\n{choices}{cue}"
    assert "Options:" not in hidden.prompt


def test_what_is_open_is_described():
    options = TaskOptions(choices="listed", wrapper="llama2_chat", letter_case="match", labels="any", max_new_tokens=8)
    assert TASKS["fpb"].describe(options) == {
        "prompt": "AdaptLLM's, choices listed, wrapper llama2_chat",
        "scoring": "contains the label, labels any, letter case match",
        "tokens": "at most 8 new, 2048 with the prompt",
    }
    assert TASKS["gsm8k"].describe(options)["tokens"] == "at most 8 new, 2048 with the prompt"
    assert TASKS["gsm8k"].describe(DEFAULT)["tokens"] == "at most 2048 new, 2048 with the prompt"
    assert TASKS["gsm8k"].prompt_variant(options) == TASKS["gsm8k"].prompt_variant(DEFAULT)


@pytest.mark.parametrize("change", [{"choices": "listed"}, {"wrapper": "llama2_chat"}, {"wrapper": "chat_template"}])
def test_options_of_the_prompt_change_the_prompt_variant_alone(change):
    task, changed = TASKS["scotus"], TaskOptions(**change)
    assert task.prompt_variant(changed) != task.prompt_variant(DEFAULT)
    assert task.scoring_variant(changed) == task.scoring_variant(DEFAULT)


@pytest.mark.parametrize("change", [{"letter_case": "match"}, {"labels": "any"}])
def test_options_of_the_scoring_change_the_scoring_variant_alone(change):
    task, changed = TASKS["scotus"], TaskOptions(**change)
    assert task.prompt_variant(changed) == task.prompt_variant(DEFAULT)
    assert task.scoring_variant(changed) != task.scoring_variant(DEFAULT)


def test_the_scoring_options_reach_the_verdict():
    verdict = lambda response, **options: TASKS["fpb"].correct(TaskOptions(**options), response, SENTENCE)  # noqa: E731
    assert verdict("Positive")
    assert not verdict("Positive", letter_case="match")
    assert not verdict("positive, not negative")
    assert verdict("positive, not negative", labels="any")


# --- token ids


def ending_tokenizer(tokenizer):
    """The same tokenizer, which also puts </s> after each text, as many fine-tuned models have it."""
    ending = copy.deepcopy(tokenizer)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    ending.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> $B", tokens)
    return ending


def encode(tokenizer, item: Item = SENTENCE, task: str = "fpb", **options) -> list[int]:
    return TASKS[task].encode(TaskOptions(**options), [item], tokenizer)[0]


def test_a_plain_prompt_is_what_the_tokenizer_makes_of_it(tokenizer):
    assert encode(tokenizer) == tokenizer(SENTENCE.prompt)["input_ids"]


def test_the_llama2_wrapper_is_that_of_the_model_cards(tokenizer):
    seen = []
    spy = lambda texts, **options: seen.append(texts[0]) or tokenizer(texts, **options)  # noqa: E731
    spy.bos_token, spy.chat_template = tokenizer.bos_token, None
    encode(spy, wrapper="llama2_chat")
    assert seen[0].startswith(
        "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as help"
    )
    assert "while being safe.  Your answers should not include any harmful" in seen[0]
    assert seen[0].endswith(f"please don't share false information.\n<</SYS>>\n\n{SENTENCE.prompt} [/INST]")


@pytest.mark.parametrize("wrapper", ["none", "llama2_chat", "chat_template"])
@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE], ids=["without bos", "with bos"]
)
def test_a_sequence_begins_once_or_as_the_template_says(tokenizer, wrapper, template):
    tokenizer.chat_template = template
    tokens = encode(tokenizer, wrapper=wrapper)
    begins = wrapper != "chat_template" or template.startswith("{{ bos_token }}")
    assert tokens.count(tokenizer.bos_token_id) == begins
    assert (tokens[0] == tokenizer.bos_token_id) == begins


@pytest.mark.parametrize("wrapper", ["none", "llama2_chat", "chat_template"])
def test_a_prompt_does_not_end_with_what_the_tokenizer_puts_after_a_text(tokenizer, wrapper):
    tokenizer.chat_template = CHAT_TEMPLATE
    wanted = encode(tokenizer, wrapper=wrapper)
    ending = ending_tokenizer(tokenizer)
    assert ending("w")["input_ids"][-1] == ending.eos_token_id
    assert encode(ending, wrapper=wrapper) == wanted
    assert encode(ending, SENTENCE._replace(prompt="<s>" + SENTENCE.prompt)) == encode(ending)


def test_the_chat_template_has_one_message_and_asks_for_the_reply(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    wanted = tokenizer(f"[user] {SENTENCE.prompt} [reply]", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, wrapper="chat_template") == wanted


def test_a_tokenizer_without_a_chat_template_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=rf"--prompt_wrapper=chat_template: .*{tokenizer.name_or_path} has no chat"):
        encode(tokenizer, wrapper="chat_template")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{% set a = 'x' * 2000000000 %}{{ a }}", "does not render: MemoryError"),
        ("{% for a in range(99) %}{{ 'x' * 999999 }}{% endfor %}", "writes more than"),
        ("{{ raise_exception('no \x1b[2J') }}", r"does not render: TemplateError: no \\x1b\[2J\. Correct the template"),
        ("{{ messages[0].content.x.y }}", "does not render: UndefinedError"),
        ("{% if %}", "does not render: TemplateSyntaxError"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "does not render: SecurityError"),
        ("{{ 1 / 0 }}", "does not render: ZeroDivisionError"),
        ("{# nothing #}", "writes nothing"),
        ({"tool": "x", "rag": "y"}, "cannot be chosen"),
    ],
)
def test_a_template_that_does_not_render_is_named_with_its_directory(tokenizer, template, said, monkeypatch):
    monkeypatch.setattr("dppa_jax.evaluate.templates.SECONDS", 1.0)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"{tokenizer.name_or_path}: its chat template .*{said}"):
        encode(tokenizer, wrapper="chat_template")


@pytest.mark.parametrize("task", ["gsm8k", "addition"])
def test_the_wrapper_is_for_the_finance_and_law_tasks(tokenizer, task):
    assert encode(tokenizer, task=task, wrapper="chat_template") == tokenizer(SENTENCE.prompt)["input_ids"]


def test_a_prompt_without_room_for_an_answer_is_not_asked_and_wrong(tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    task, short = TASKS["fpb"], SENTENCE._replace(prompt="Sony grew.")
    length = len(encode(tokenizer))
    options = TaskOptions(max_length=length)
    found = task.encode(options, [SENTENCE, short], tokenizer)
    assert found == [[], tokenizer("Sony grew.")["input_ids"]]
    assert f"fpb: 1 of 2 prompts leave no room for an answer in --max_length={length} tokens" in caplog.text
    assert not task.correct(options, "", SENTENCE)
    assert encode(tokenizer, max_length=length + 1), "room for one token"


def test_an_answer_may_be_as_long_as_the_task_and_the_whole_allow(tokenizer):
    prompt = encode(tokenizer)
    room = 2048 - len(prompt)
    assert TASKS["fpb"].budget(DEFAULT, prompt) == room
    assert TASKS["fpb"].budget(TaskOptions(max_new_tokens=5), prompt) == 5
    assert TASKS["fpb"].budget(TaskOptions(max_new_tokens=5, max_length=len(prompt) + 3), prompt) == 3
    assert TASKS["addition"].budget(DEFAULT, prompt) == 4
    assert TASKS["fpb"].budget(DEFAULT, []) == 0


def test_a_task_of_ones_own_is_judged_exactly_by_default():
    own = Task("own", "none", lambda options: {"test": [Item("a", "1 + 1 =", ("2",))]}, max_new_tokens=3)
    (item,) = own.items(DEFAULT)
    assert own.correct(DEFAULT, "2", item)
    assert own.budget(DEFAULT, [1]) == 3
