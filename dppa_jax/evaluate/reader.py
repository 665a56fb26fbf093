"""How each model reads its questions and ends its answers: with its own tokenizer, and its own end tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from absl import logging

from dppa_jax.checkpoint.tokenizer import has_tokenizer, load_tokenizer, tokenizer_digest
from dppa_jax.model.generate import end_tokens
from dppa_jax.runtime.files import digest


@dataclass(frozen=True)
class Reader:
    """How a model reads and ends.

    Attributes:
      tokenizer: of transformers.
      end: the ids that end an answer.
    """

    tokenizer: Any
    end: tuple[int, ...] = ()

    @cached_property
    def vocabulary(self) -> str:
        """A digest of the tokens and their ids, by which an answer is read."""
        return digest(self.tokenizer.get_vocab())[:16]


class Readers:
    """The readers of a job's models. Models with equal tokenizer files share a tokenizer, which is read once.

    Args:
      tokenizer: of the models that have none.
      shared: all models are asked with that tokenizer, as `--tokenizer` says.
    """

    def __init__(self, tokenizer: Any, shared: bool = False):
        self.default, self.shared = Reader(tokenizer), shared
        self._tokenizers = {tokenizer_digest(Path(tokenizer.name_or_path)): tokenizer}
        self._readers: dict[tuple, Reader] = {}

    def of(self, name: str, config: Mapping, directory: Path | None) -> Reader:
        """Return how a model reads and ends, and say once where that differs from the first model.

        Args:
          name: of the model, for messages.
          config: the content of its config.json.
          directory: of its tokenizer files and its generation config.

        Raises:
          CheckpointError: the tokenizer cannot be read.
        """
        key = name, directory
        if key not in self._readers:
            reader = Reader(self._tokenizer(name, directory), end_tokens(config, directory))
            self._readers[key] = reader
            (first_name, _), first = next(iter(self._readers.items()))
            if different := difference(reader, first, first_name):
                logging.warning("%s is asked with its own %s", name, different)
        return self._readers[key]

    def _tokenizer(self, name: str, directory: Path | None) -> Any:
        default = self.default.tokenizer
        if self.shared or directory is None:
            return default
        if not has_tokenizer(directory):
            logging.warning(
                "%s: %s has no tokenizer; it is asked with that of %s", name, directory, default.name_or_path
            )
            return default
        key = tokenizer_digest(directory)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(directory)
        return self._tokenizers[key]


def difference(reader: Reader, other: Reader, name: str) -> str:
    """Say in a few words in what a reader differs from another one, which is that of the model `name`."""
    if reader.vocabulary != other.vocabulary:
        own, theirs = reader.tokenizer.get_vocab(), other.tokenizer.get_vocab()
        token = min(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
        return f"tokenizer: the id of {token!r} is {own.get(token)}, and {theirs.get(token)} in that of {name}"
    if reader.end != other.end:
        return f"end of answers: {listed(reader.end)}, and {listed(other.end)} in {name}"
    return ""


def listed(tokens: tuple[int, ...]) -> str:
    """Name token ids."""
    return " or ".join(map(str, tokens)) or "none"
