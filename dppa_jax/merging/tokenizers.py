"""Compare the tokenizers of base and experts, and the output's tokenizer with the rows that the merge has.

Rows of the embeddings are matched by token (`vocabulary`), as far as tokenizer.json names the tokens. Files of equal
bytes are not parsed, nor are the formats of slow tokenizers (tokenizer.model, vocab.json).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
from absl import logging

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.architecture.table import vocabulary_size
from dppa_jax.checkpoint.inside import AGAIN, MAX_COPIED, inside
from dppa_jax.checkpoint.tokenizer import VOCABULARIES
from dppa_jax.runtime.reading import printable, read_bytes, read_json, read_text

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # of tokenizer_config.json
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOLD = 3  # tokens that a warning names


class AddedToken(msgspec.Struct):
    """A token that was added to the vocabulary, and how texts are searched for it; the fields of tokenizer.json."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class _Model(msgspec.Struct):
    """Ids by token; of a unigram model, tokens and scores in the order of the ids."""

    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _TokenizerFile(msgspec.Struct):
    """What we read of tokenizer.json; msgspec passes over the rest, which is most of it, without making objects."""

    model: _Model
    added_tokens: list[AddedToken] = []


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer files of a model's directory, read when asked for.

    Attributes:
      name: of the model, as messages call it.
      config: the content of its config.json.
    """

    name: str
    directory: Path
    config: Mapping

    @property
    def exists(self) -> bool:
        """Is there a tokenizer?"""
        return any(map(self._file, VOCABULARIES))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token's id, from tokenizer.json and tokenizer_config.json; empty where the first is not there.

        As in transformers, a special token that has no id gets the next one.

        Raises:
          CheckpointError: a file is damaged.
        """
        return self._ordinary | {token: added.id for token, added in self.added.items()}

    @cached_property
    def added(self) -> dict[str, AddedToken]:
        """The tokens that were added to the vocabulary of the model, which are found in texts before it is used."""
        if not self.path:
            return {}
        found = {token.content: token for token in self._content.added_tokens}
        ids = self._ordinary | {token.content: token.id for token in found.values()}
        for token in filter(None, map(self.special, SPECIAL)):
            if token not in ids:
                ids[token] = max(ids.values(), default=-1) + 1
                found[token] = AddedToken(ids[token], token, special=True)
        return found

    @cached_property
    def _ordinary(self) -> dict[str, int]:
        """The ids of the entries of the model's vocabulary, to which tokens are added."""
        vocabulary = self._content.model.vocab
        return vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}

    @cached_property
    def path(self) -> Path | None:
        """The path of tokenizer.json, if it is there."""
        return self._file("tokenizer.json")

    @cached_property
    def _content(self) -> _TokenizerFile:
        """The content of tokenizer.json; nothing where it is not there."""
        if not self.path:
            return _TokenizerFile(_Model())
        try:
            content = read_bytes(self.path, MAX_COPIED, AGAIN, CheckpointError)
            return msgspec.json.decode(content, type=_TokenizerFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointError(f"{self.path} is not a tokenizer: {printable(str(error))}. {AGAIN}") from None

    def special(self, key: str) -> str | None:
        """Return a special token, as tokenizer_config.json names it."""
        token = self.settings.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        return token if isinstance(token, str) else None

    @cached_property
    def settings(self) -> dict:
        """The content of tokenizer_config.json."""
        return self._json("tokenizer_config.json")

    @property
    def added_file(self) -> dict:
        """The content of added_tokens.json, which slow tokenizers have; nothing where it is not there."""
        return self._json("added_tokens.json")

    @cached_property
    def generation(self) -> dict:
        """The content of generation_config.json."""
        return self._json("generation_config.json")

    @property
    def has_template(self) -> bool:
        """Has it a chat template?"""
        return "chat_template" in self.settings or any(map(self._file, TEMPLATES))

    @property
    def template(self) -> str:
        """The chat template; "" where there is none, or several with names."""
        if path := self._file("chat_template.jinja"):
            return read_text(path, fix=AGAIN, error=CheckpointError)
        said = self.settings.get("chat_template") or self._json("chat_template.json").get("chat_template")
        return said if isinstance(said, str) else ""

    def differs(self, other: "Tokenizer") -> str:
        """Return the name of the tokenizer's file where both have it, with other bytes; else the empty string."""
        for name in VOCABULARIES:
            if self._file(name) and other._file(name):
                return "" if self._digest(name) == other._digest(name) else name
        return ""

    def names_alike(self, other: "Tokenizer") -> bool:
        """Do the files, as far as they are read here, name the same tokens? Where one names none, so it seems."""
        if not (self.path and other.path):
            return True
        return not self.differs(other) and all(self.special(key) == other.special(key) for key in SPECIAL)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    def _digest(self, name: str) -> str:
        """Hash a file that is there, once."""
        if name not in self._digests:
            content = read_bytes(self._file(name), MAX_COPIED, AGAIN)
            self._digests[name] = hashlib.sha256(content).hexdigest()
        return self._digests[name]

    def _json(self, name: str) -> dict:
        """Return the content of a JSON file; nothing where it is not there."""
        path = self._file(name)
        return read_json(path, fix=AGAIN, error=CheckpointError) if path else {}

    def _file(self, name: str) -> Path | None:
        """Return the path of a file, if it is there; refuse one that leads out of the directory."""
        path = inside(self.directory, name)
        return path if path.is_file() else None


def check_tokenizers(models: Mapping[str, Tokenizer], chosen: str, rows: int = 0) -> None:
    """Refuse a chosen tokenizer that is not there; warn of tokens whose ids mean something else in another model.

    Args:
      models: the base, by the name "base", and the experts. The merge has the base's config.json and rows.
      chosen: the name of the model whose tokenizer, chat template and generation_config.json the merge gets.
      rows: of the merge's vocabulary tensors; the base's if it is not given.

    Raises:
      CheckpointError: the chosen model is an expert without tokenizer files, or they are damaged.
    """
    base, output = models["base"], models[chosen]
    if not output.exists:
        said = f"{output.directory} has no tokenizer files ({', '.join(VOCABULARIES)})"
        if output is not base:
            raise CheckpointError(f"--tokenizer={chosen}: {said}. Put them there, or take another model's tokenizer.")
        logging.warning("the base in %s, so the merge has no tokenizer; --tokenizer=NAME takes an expert's", said)
    rows = rows or vocabulary_size(base.config) or 0
    for said in _warnings_of_output(base, output, rows) if rows else ():
        logging.warning("--tokenizer=%s: %s", chosen, said)
    ends = _ends(base.config, output.generation)
    for expert in (model for model in models.values() if model is not base):
        try:
            for said in _warnings_of_expert(base, expert, output, ends):
                logging.warning("expert %r: %s", expert.name, said)
        except (ValueError, OSError) as error:
            if expert is output:
                raise
            logging.warning("expert %r: its tokenizer cannot be compared: %s", expert.name, error)


def _warnings_of_output(base: Tokenizer, output: Tokenizer, rows: int) -> Iterable[str]:
    """Yield what is wrong with the tokenizer and the special tokens that the merge gets, which has so many rows."""
    highest = max(output.ids.values(), default=(vocabulary_size(output.config) or rows) - 1)
    if highest >= rows:
        token = next((f" ({token!r})" for token, id in output.ids.items() if id == highest), "")
        yield f"its tokens have ids up to {highest}{token}, the merged model has only the rows 0 to {rows - 1}"
    for file, content in (("config.json of the base", base.config), ("generation_config.json", output.generation)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if beyond := [id for id in _ids(content.get(key)) if id >= rows]:
                yield f"{file} says {key} {beyond[0]}, the merged model has only the rows 0 to {rows - 1}"
    ends, token = _ends(base.config, output.generation), output.special("eos_token")
    end = output.ids.get(token)
    if end is not None and ends and end not in ends:
        yield f"its texts end with {token!r} ({end}), those of the merge with {_listed(ends)} by config.json"
    if "auto_map" in output.settings:
        yield f"tokenizer_config.json names code (auto_map), which is not copied; it is in {output.directory}"


def _warnings_of_expert(base: Tokenizer, expert: Tokenizer, output: Tokenizer, ends: set[int]) -> Iterable[str]:
    """Yield how the tokenizer of an expert differs from the base's, and its end of text from the merge's (`ends`)."""
    if file := base.differs(expert):
        moved = _moved(base.ids, expert.ids)
        if moved:
            some = ", ".join(f"{token!r} {ours} → {theirs}" for token, ours, theirs in moved[:TOLD])
            yield (
                f"{len(moved)} of the {len(base.ids)} tokens of the base have other ids in its tokenizer: {some}"
                f"{', …' if len(moved) > TOLD else ''}; their rows are matched by token. Is it a fine-tune of this "
                f"base?"
            )
        elif not (base.ids and expert.ids):
            yield f"its {file} is not the base's; tokens with other ids would be merged all the same"
    theirs = _ends(expert.config, expert.generation)
    if ends and theirs - ends:
        yield (
            f"its texts end with token {_listed(theirs)}, those of the merge with {_listed(ends)}; "
            f"--tokenizer={expert.name} takes its tokenizer and generation_config.json"
        )
    if expert.has_template and not output.has_template:
        yield f"its chat template is not copied, and the merge has none; --tokenizer={expert.name} takes it"


def _moved(ours: Mapping[str, int], theirs: Mapping[str, int]) -> list[tuple[str, int, int | str]]:
    """Return each token of ours that has another id in theirs, or whose id belongs to another token there."""
    names = {id: token for token, id in theirs.items()}
    moved = [
        (token, id, theirs[token] if token in theirs else f"{names[id]!r}")
        for token, id in ours.items()
        if (theirs[token] != id if token in theirs else id in names)
    ]
    return sorted(moved, key=lambda entry: entry[1])


def _ends(config: Mapping, generation: Mapping) -> set[int]:
    """Return the ids of the tokens by which a model's texts end."""
    return {*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}


def _ids(value: object) -> list[int]:
    """Return the ids that config.json gives as a number or a list of numbers."""
    return [id for id in (value if isinstance(value, list) else [value]) if type(id) is int]


def _listed(ids: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ids)))
