"""Put prompts into a tokenizer's chat template, in a child process with limits: a template is a stranger's program."""

from collections.abc import Sequence
from typing import Any

from dppa_jax.evaluate.limited import LimitedChild
from dppa_jax.runtime.reading import printable

SECONDS = 10.0  # of processor time for all prompts of a task; five thousand take half a second
ADVICE = "Correct the template, or give --prompt_wrapper=none or llama2_chat."

_RENDERER = LimitedChild("render", "the renderer of chat templates", "run `pip install transformers jinja2`.")


def in_chat_template(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Return each prompt as the only message of a user, in the tokenizer's template, up to where the model answers.

    Raises:
      ValueError: there is no template, it does not render, writes nothing, or takes more than `SECONDS` or too much
        memory; names the model's directory.
    """
    where = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(
            f"--prompt_wrapper=chat_template: the tokenizer of {where} has no chat template; give llama2_chat or none."
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none of them is the default
        raise ValueError(f"{where}: its chat template cannot be chosen: {printable(str(error))} {ADVICE}") from None
    question = [template, dict(tokenizer.special_tokens_map), list(prompts)]
    answer = _RENDERER.ask(question, SECONDS, dict[str, str | list[str]])
    if answer is None:
        raise ValueError(f"{where}: its chat template takes more than {SECONDS:g} s, or too much memory. {ADVICE}")
    if "error" in answer:
        raise ValueError(f"{where}: its chat template does not render: {printable(answer['error'])}. {ADVICE}")
    if "" in answer["texts"]:
        raise ValueError(f"{where}: its chat template writes nothing for the prompt of a user. {ADVICE}")
    return answer["texts"]
