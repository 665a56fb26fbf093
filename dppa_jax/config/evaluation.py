"""TODO."""

from dataclasses import dataclass, field
from typing import Literal

from dppa_jax.config.option import choose

Split = Literal["train", "validation", "test"]


CHOICES = ("hidden", "listed")


WRAPPERS = ("none", "llama2_chat", "chat_template")


LETTER_CASES = ("ignore", "match")


LABELS = ("exclusive", "any")


@dataclass(frozen=True)
class TaskOptions:
    """What is open about items, prompts and scoring; printed with the results by `Task.describe`.

    Attributes:
      data_dir: of JSON lines, {task}.jsonl or {task}_test.jsonl and, if there is one, {task}_validation.jsonl; empty
        for the data sets of the hub.
      choices: whether the prompt lists what the answer is one of; as in AdaptLLM's templates, it does not. Of the
        finance and law tasks, as all below.
      wrapper: of the prompt: "none"; "llama2_chat", the template and system prompt of LLaMA-2-Chat as the model cards
        of finance-chat and law-chat give them; "chat_template", the tokenizer's own, with one message of the user.
      letter_case: whether a label in other letter case is the same label.
      labels: "exclusive", where a response with a wrong label is wrong, or "any", where a right one is enough.
      validation_share: of a task's questions, taken out of "test" for a task without a file of validation items.
      split_seed: of that choice.
      limit: of the items of a split, the first ones; None for all.
      max_new_tokens: of a response, in place of the task's own limit.
      max_length: of prompt and response together, in tokens.

    Raises:
      ValueError: names the flag.
    """

    data_dir: str = ""
    choices: str = "hidden"
    wrapper: str = "none"
    letter_case: str = "ignore"
    labels: str = "exclusive"
    validation_share: float = 0.0
    split_seed: int = 0
    limit: int | None = None
    max_new_tokens: int | None = None
    max_length: int = 2048

    def __post_init__(self):
        choose("--prompt_choices", self.choices, CHOICES)
        choose("--prompt_wrapper", self.wrapper, WRAPPERS)
        choose("--letter_case", self.letter_case, LETTER_CASES)
        choose("--labels", self.labels, LABELS)
        if not 0.0 <= self.validation_share < 1.0:
            raise ValueError(f"--validation_share={self.validation_share}: it must be 0 or more, and less than 1.")
        for flag, value, least in (
            ("limit", self.limit, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_length", self.max_length, 2),
        ):
            if value is not None and value < least:
                raise ValueError(f"--{flag}={value}: it must be {least} or more.")


EVALUATORS = ("jax", "vllm")


@dataclass(frozen=True)
class EvaluationConfig:
    """Which tasks, by which evaluator; `options` says how items, prompts and verdicts are made."""

    tasks: tuple[str, ...] = ()
    evaluator: str = "jax"
    options: TaskOptions = field(default_factory=TaskOptions)
    batch_size: int = 256
    dtype: str = "auto"
    vllm_python: str = ""
    vllm_timeout: float = 1800.0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    resume: bool = True  # take responses that an earlier run has kept

    def __post_init__(self):
        choose("--evaluator", self.evaluator, EVALUATORS)
        choose("--evaluate_dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        positive = {"--batch_size": self.batch_size, "--tensor_parallel_size": self.tensor_parallel_size}
        positive |= {"--vllm_timeout": self.vllm_timeout, "--gpu_memory_utilization": self.gpu_memory_utilization}
        for flag, value in positive.items():
            if value <= 0:
                raise ValueError(f"{flag}={value:g}: it must be above 0.")
