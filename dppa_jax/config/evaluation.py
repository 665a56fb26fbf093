"""How models are evaluated: which tasks, by which evaluator, how items are asked and judged."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dppa_jax.config.option import check, option

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class TaskOptions:
    """What is open about items, prompts and scoring; `Task.describe` prints it with the results.

    Attributes:
      data_dir: directory of JSON lines, {task}.jsonl or {task}_test.jsonl and, if there is one,
        {task}_validation.jsonl; empty for the data sets of the hub.
      choices: whether the prompt of a finance or law task lists what the answer is one of; AdaptLLM's templates do
        not. `wrapper`, `letter_case` and `labels` concern these tasks, too.
      wrapper: what surrounds a prompt: "none"; "llama2_chat", the template and system prompt of LLaMA-2-Chat as the
        model cards of finance-chat and law-chat give them; "chat_template", the tokenizer's own, with one message of
        the user.
      letter_case: whether a label in other letter case is the same label.
      labels: "exclusive", where a response with a wrong label is wrong, or "any", where a right one is enough.
      validation_share: the share of a task's questions that is taken out of "test" where the task has no file of
        validation items.
      split_seed: decides which questions these are.
      limit: items of a split, the first ones; None for all.
      max_new_tokens: length of a response, in place of the task's own limit.
      max_length: tokens of prompt and response together.

    Raises:
      ValueError: a value is not allowed; the message names the flag.
    """

    HELP_GROUP: ClassVar[str] = "evaluation"

    data_dir: str = option("", "directory of TASK.jsonl files; default: the hub's datasets", kind="path")
    limit: int | None = option(None, "items per task, the first ones; 0: all", least=1)
    choices: str = option(
        "hidden",
        "whether prompts of finance and law list the options",
        flag="prompt_choices",
        choices=("hidden", "listed"),
    )
    wrapper: str = option(
        "none",
        "finance, law: chat template around the prompt; chat_template: the tokenizer's own",
        flag="prompt_wrapper",
        choices=("none", "llama2_chat", "chat_template"),
    )
    letter_case: str = option("ignore", "finance, law: letter case of labels in responses", choices=("ignore", "match"))
    labels: str = option(
        "exclusive",
        "finance, law: exclusive needs a right label and no wrong one; any needs a right one",
        choices=("exclusive", "any"),
    )
    validation_share: float = option(
        0.0,
        "share of a task's items that is set aside for searches; -1: 0.2 in jobs that search",
        group="search of factors",
        least=0,
        below=1,
        flag_default=-1.0,
    )
    split_seed: int = option(0, "decides which items are set aside", group="search of factors")
    max_new_tokens: int | None = option(None, "tokens of a response; 0: the task's own limit, 2048", least=1)
    max_length: int = option(2048, "tokens of prompt and response together", least=2)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class EvaluationConfig:
    """Which tasks are asked, and what answers them; `options` says how items, prompts and verdicts are made."""

    HELP_GROUP: ClassVar[str] = "evaluation"

    tasks: tuple[str, ...] = option(
        (), "tasks, of the domains that experts are named after: gsm8k,math,…", flag="evaluate"
    )
    evaluator: str = option("jax", "what generates: jax, in this process, or vllm", choices=("jax", "vllm"))
    options: TaskOptions = field(default_factory=TaskOptions)
    batch_size: int = option(256, "prompts decoded together", above=0)
    dtype: str = option(
        "auto",
        "dtype of the models; auto: their own, float32 for jax on a CPU",
        flag="evaluate_dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    vllm_python: str = option("", "interpreter of an environment with vLLM; default: this one", kind="path")
    vllm_timeout: float = option(
        1800.0, "vllm: seconds without a response after which it is started again", above=0, infinite=True
    )
    tensor_parallel_size: int = option(1, "vllm: devices", above=0)
    gpu_memory_utilization: float = option(0.9, "vllm: share of a GPU's memory", above=0)
    resume: bool = option(True, "go on from what a run of the same inputs and flags left behind", group="work")

    def __post_init__(self):
        check(self)
