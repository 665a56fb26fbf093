"""The table of tasks: where the items of each come from, how they are asked, and how a response is judged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from absl import logging

from dppa_jax.checkpoint.tokenizer import encode as encode_texts
from dppa_jax.checkpoint.tokenizer import encode_whole
from dppa_jax.config.evaluation import Split, TaskOptions
from dppa_jax.config.option import choose
from dppa_jax.demo import text
from dppa_jax.evaluate import answers, classes
from dppa_jax.evaluate.classes import Metric
from dppa_jax.evaluate.paper_tasks import DATASETS
from dppa_jax.evaluate.scores import Score
from dppa_jax.evaluate.sources import Item, read, set_aside
from dppa_jax.evaluate.templates import in_chat_template

SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Kind:
    """How all tasks of one kind ask and judge.

    Attributes:
      ask: makes the prompt of an item, before any wrapper.
      judge: says whether a response answers an item.
      prompt, scoring: say in words how items are asked and judged under the options.
      wrapped: whether `--prompt_wrapper` applies.
      classifies: whether an encoder answers, with a class or a number, where a decoder would generate text.
    """

    ask: Callable[[TaskOptions, Item], str]
    judge: Callable[[TaskOptions, str, Item], bool]
    prompt: Callable[[TaskOptions], str]
    scoring: Callable[[TaskOptions], str]
    wrapped: bool = False
    classifies: bool = False


EXACT = Kind(
    ask=lambda options, item: item.prompt,
    judge=lambda options, response, item: answers.exact(response, item.answers),
    prompt=lambda options: "as it is",
    scoring=lambda options: "exact",
)

MATH = Kind(
    ask=lambda options, item: f"Question:\n{item.prompt}\nAnswer:\nLet's think step by step.\n",
    judge=lambda options, response, item: answers.math(response, item.answers),
    prompt=lambda options: "Abel's",
    scoring=lambda options: "Abel's: text after the last ####, equal as text or to sympy",
)


def list_choices(options: TaskOptions, item: Item) -> str:
    """Return the prompt of an item; `--prompt_choices=listed` puts the choices above its last line."""
    if options.choices == "hidden":
        return item.prompt
    question, _, cue = item.prompt.rpartition("\n")
    return "\n".join([question, "Options:", *(f"- {choice}" for choice in item.choices), cue])


def contains_label(options: TaskOptions, response: str, item: Item) -> bool:
    """Return whether a response contains a right label, as `--labels` and `--letter_case` say."""
    return answers.contains(
        response,
        item.answers,
        item.choices,
        ignore_case=options.letter_case == "ignore",
        exclusive=options.labels == "exclusive",
    )


CHOICE = Kind(
    ask=list_choices,
    judge=contains_label,
    prompt=lambda options: f"AdaptLLM's, choices {options.choices}, wrapper {options.wrapper}",
    scoring=lambda options: f"contains the label, labels {options.labels}, letter case {options.letter_case}",
    wrapped=True,
)


CLASS = Kind(
    ask=lambda options, item: item.prompt,
    judge=lambda options, response, item: classes.is_class(response, item.answers),
    prompt=lambda options: "the text itself",
    scoring=lambda options: "the class with the largest logit",
    classifies=True,
)
NUMBER = replace(
    CLASS,
    judge=lambda options, response, item: classes.is_near(response, item.answers),
    scoring=lambda options: "the number that is predicted",
)


@dataclass(frozen=True)
class Task:
    """A set of questions with answers that a program can judge.

    Attributes:
      name: in `--evaluate`.
      domain: the name of the expert that it measures.
      load: reads all items of its splits.
      kind: how it asks and judges.
      max_new_tokens: where a response is cut off, if `--max_new_tokens` does not say it.
      metric: what is measured in place of the share of right answers, if it is not that.
    """

    name: str
    domain: str
    load: Callable[[TaskOptions], Mapping[str, Sequence[Item]]]
    kind: Kind = EXACT
    max_new_tokens: int = 2048
    metric: Metric | None = None

    def items(self, options: TaskOptions, split: Split = "test") -> tuple[Item, ...]:
        """Read the items of a split, or the first `--limit` of them; every call reads anew.

        Raises:
          ValueError: an item is bad, named with its file and line; or there is no validation split.
          OSError: there is no file, or no network.
        """
        choose("the split", split, SPLITS)
        splits = self.load(options)
        if split not in splits:
            raise ValueError(
                f"the task {self.name!r} has no validation items: set a share of its items aside with "
                f"--validation_share=0.2, or put {self.name}_validation.jsonl into --data_dir."
            )
        items = [item._replace(prompt=self.kind.ask(options, item)) for item in splits[split][: options.limit]]
        return tuple(items)

    def correct(self, options: TaskOptions, response: str, item: Item) -> bool:
        """Return whether a response is right; an empty one never is."""
        return self.kind.judge(options, response, item)

    def prompt_variant(self, options: TaskOptions) -> str:
        """Say how the items are asked, as far as options decide it."""
        return self.kind.prompt(options)

    def scoring_variant(self, options: TaskOptions) -> str:
        """Say how responses are judged, as far as options decide it."""
        return self.kind.scoring(options)

    def score(self, verdicts: Sequence[bool], responses: Sequence[str], items: Sequence[Item]) -> Score:
        """Return the score of responses to all items, of which the verdicts are known."""
        measured = ()
        if self.metric:
            right = [item.answers[0] for item in items]
            measured = self.metric(right, list(map(classes.answered, responses, right)))
        return Score(sum(verdicts), len(verdicts), *measured)

    def describe(self, options: TaskOptions) -> dict[str, str]:
        """Say what is printed with the results: how the items of this task are asked and judged."""
        limit = options.max_new_tokens or self.max_new_tokens
        return {
            "prompt": self.prompt_variant(options),
            "scoring": self.scoring_variant(options) + (f"; {self.metric.words}" if self.metric else ""),
            "tokens": f"at most {limit} new, {options.max_length} with the prompt",
        }

    def encode(self, options: TaskOptions, items: Sequence[Item], tokenizer: Any) -> list[list[int]]:
        """Return the items' prompts as token ids, wrapped where `--prompt_wrapper` applies.

        Each begins as the tokenizer begins a text, and none ends with what it puts after one; see `encode_texts`. In a
        chat template, a prompt has the tokens that the template writes and no others. A prompt that leaves no room for
        an answer in `--max_length` becomes empty: it is not asked, and its response "" is never right. The number of
        such prompts is logged.

        Raises:
          ValueError: with `--prompt_wrapper=chat_template`, the tokenizer has no template, or one that does not render.
        """
        wrapper = options.wrapper if self.kind.wrapped else "none"
        texts = WRAP[wrapper]([item.prompt for item in items], tokenizer) if items else []
        prompts = encode_texts(tokenizer, texts, begin=wrapper != "chat_template")
        prompts = [prompt if len(prompt) < options.max_length else [] for prompt in prompts]
        if [] in prompts:
            logging.warning(
                "%s: %d of %d prompts leave no room for an answer in --max_length=%d tokens and count as wrong",
                self.name,
                prompts.count([]),
                len(items),
                options.max_length,
            )
        return prompts

    def encode_texts(
        self, options: TaskOptions, items: Sequence[Item], tokenizer: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Return what an encoder reads of the items: token ids and types; longer texts are cut at `--max_length`."""
        length = min(options.max_length, tokenizer.model_max_length)
        return encode_whole(tokenizer, [item.texts for item in items], length) if items else []

    def budget(self, options: TaskOptions, prompt: Sequence[int]) -> int:
        """Return how many new tokens an answer may have: the task's limit, or what `--max_length` leaves."""
        return min(options.max_new_tokens or self.max_new_tokens, options.max_length - len(prompt)) if prompt else 0


# The system prompt of LLaMA-2-Chat, with the blanks and line ends that the model cards have.
SYSTEM_PROMPT = """
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your \
answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure \
that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information.
"""
WRAP: dict[str, Callable[[Sequence[str], Any], Sequence[str]]] = {
    "none": lambda prompts, tokenizer: prompts,
    "llama2_chat": lambda prompts, tokenizer: [
        f"[INST] <<SYS>>{SYSTEM_PROMPT}<</SYS>>\n\n{prompt} [/INST]" for prompt in prompts
    ],
    "chat_template": lambda prompts, tokenizer: in_chat_template(tokenizer, prompts),
}


DEMO_ITEMS = 200  # in each split
DEMO_ANSWER_TOKENS = 4  # the longest right answer has three, including the token that ends it


@cache
def demo_items(name: str, split: Split) -> tuple[Item, ...]:
    """Return the items of a task of the demo family."""
    samples = text.held_out(name, split, DEMO_ITEMS)
    return tuple(Item(f"{name}-{split}-{i:03d}", sample.prompt, (sample.answer,)) for i, sample in enumerate(samples))


def from_demo(name: str, options: TaskOptions) -> dict[str, tuple[Item, ...]]:
    """Return the splits of a task of the demo family, which no option changes."""
    return {split: demo_items(name, split) for split in SPLITS}


def from_dataset(name: str, options: TaskOptions) -> dict[str, tuple[Item, ...]]:
    """Read the splits of a task of the paper."""
    return split_off(name, read(name, DATASETS[name], options.data_dir), options)


def split_off(name: str, items: dict[str, tuple[Item, ...]], options: TaskOptions) -> dict[str, tuple[Item, ...]]:
    """Return the splits; where there are no validation items, `--validation_share` of the items are set aside."""
    if "validation" in items or not options.validation_share:
        return items
    splits = set_aside(items["test"], options.validation_share, f"{name} {options.split_seed}")
    if not splits["test"]:
        raise ValueError(
            f"--validation_share={options.validation_share}: leaves {name!r} without test items; give a smaller share."
        )
    return splits


def of_classes(name: str, kind: Kind = CLASS, metric: Metric | None = None) -> Task:
    """Return a task of an encoder, whose expert has its name; `classify:NAME` is one of NAME.jsonl in --data_dir."""
    own = name.rpartition(":")[2]
    return Task(name, own, partial(from_labels, name), kind, max_new_tokens=1, metric=metric)


def from_labels(name: str, options: TaskOptions) -> dict[str, tuple[Item, ...]]:
    """Read the splits of a task of an encoder."""
    return split_off(name, read(name, classes.dataset_of(name), options.data_dir), options)


TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", "math", partial(from_dataset, "gsm8k"), MATH),
        Task("math", "math", partial(from_dataset, "math"), MATH),
        Task("fiqa_sa", "finance", partial(from_dataset, "fiqa_sa"), CHOICE),
        Task("fpb", "finance", partial(from_dataset, "fpb"), CHOICE),
        Task("scotus", "law", partial(from_dataset, "scotus"), CHOICE),
        Task("unfair_tos", "law", partial(from_dataset, "unfair_tos"), CHOICE),
        of_classes("cola", metric=classes.MATTHEWS),
        of_classes("sst2"),
        of_classes("mrpc", metric=classes.ACCURACY_F1),
        of_classes("stsb", NUMBER, classes.CORRELATIONS),
        *(
            Task(name, domain, partial(from_demo, name), max_new_tokens=DEMO_ANSWER_TOKENS)
            for domain, names in text.TASKS.items()
            for name in names
        ),
    )
}


OWN = "classify:"  # before the name of a file of texts with labels


@cache
def task_of(name: str) -> Task:
    """Return the task of a name in `--evaluate`.

    Raises:
      ValueError: there is no such task.
    """
    if name.startswith(OWN) and name != OWN:
        return of_classes(name)
    return TASKS[choose("--evaluate", name, [*TASKS, f"{OWN}NAME"])]


def by_domain(names: Iterable[str]) -> dict[str, list[Task]]:
    """Return the tasks of these names by their domains, in the order of the names.

    >>> {domain: [task.name for task in tasks] for domain, tasks in by_domain(["addition", "trend"]).items()}
    {'math': ['addition'], 'finance': ['trend']}

    Raises:
      ValueError: there is no such task, or a name is there twice.
    """
    domains: dict[str, list[Task]] = {}
    for name in names:
        task = task_of(name)
        if task in domains.setdefault(task.domain, []):
            raise ValueError(f"--evaluate: {name} is given twice; name each task once.")
        domains[task.domain].append(task)
    return domains


def every_task(names: Iterable[str]) -> list[Task]:
    """Return the tasks of these names, domain after domain."""
    return [task for tasks in by_domain(names).values() for task in tasks]
