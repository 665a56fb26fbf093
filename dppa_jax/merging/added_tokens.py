"""Add tokens to a tokenizer, for a merge that has tokens of several models (`--vocabulary=union`)."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.inside import AGAIN, MAX_COPIED
from dppa_jax.merging.tokenizers import AddedToken, Tokenizer
from dppa_jax.runtime.reading import printable, read_bytes

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # how texts are searched for an added token


def with_tokens(chosen: Tokenizer, tokens: Iterable[AddedToken]) -> tuple[dict[str, int], dict[str, str]]:
    """Add tokens to a tokenizer; return their ids, and the files that change, by name.

    The library of tokenizers gives the ids, and every id is looked at again in what it would read from the files.

    Raises:
      CheckpointError: the library cannot read the tokenizer, or gives a token another id than the files say.
    """
    tokens = list(tokens)
    own = [token for token in chosen.added.values() if token.id >= 0]
    text = read_bytes(chosen.path, MAX_COPIED, AGAIN, CheckpointError).decode("utf-8", "replace")
    backend = _loaded(chosen, text)
    known = backend.get_vocab(with_added_tokens=True)
    unknown = sorted((token for token in own if token.content not in known), key=lambda token: token.id)
    backend.add_tokens([_token_of(token) for token in (*unknown, *tokens)])
    text = backend.to_str(pretty=True) + "\n"
    found = _loaded(chosen, text).get_vocab(with_added_tokens=True)
    ids = {token.content: found.get(token.content, -1) for token in tokens}
    _check_ids(chosen, found, ids)
    return ids, {"tokenizer.json": text, **_beside(chosen, tokens, ids)}


def _check_ids(chosen: Tokenizer, found: Mapping[str, int], ids: Mapping[str, int]) -> None:
    """Refuse ids that are not those of the files, and new ones that belong to another token."""
    wrong = [token for token, id in chosen.ids.items() if found.get(token) != id]
    taken = set(chosen.ids.values())
    if wrong := wrong or [token for token, id in ids.items() if id in taken or id < 0]:
        said = chosen.ids.get(wrong[0], "one of its own")
        raise CheckpointError(
            f"{chosen.path}: tokens cannot be added, as the tokenizers library gives {wrong[0]!r} the id "
            f"{found.get(wrong[0])}, where the file says {said}; are there gaps between its ids? Save the tokenizer "
            f"again with transformers, or merge with --vocabulary=base."
        )


def _beside(chosen: Tokenizer, tokens: Iterable[AddedToken], ids: Mapping[str, int]) -> dict[str, str]:
    """Return the other files that list the added tokens, where they do."""
    files = {}
    if isinstance(listed := chosen.settings.get("added_tokens_decoder"), Mapping):
        more = {
            str(ids[token.content]): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
            for token in tokens
        }
        files["tokenizer_config.json"] = chosen.settings | {"added_tokens_decoder": {**listed, **more}}
    if listed := chosen.added_file:
        files["added_tokens.json"] = {**listed, **ids}
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()}


def _token_of(token: AddedToken) -> Any:
    """Return a token as the tokenizers library has it."""
    import tokenizers

    return tokenizers.AddedToken(token.content, **{flag: getattr(token, flag) for flag in FLAGS})


def _loaded(chosen: Tokenizer, text: str) -> Any:
    """Return the library's tokenizer of a tokenizer.json.

    Raises:
      CheckpointError: the library cannot read it.
    """
    import tokenizers  # a fifth of a second, for few merges

    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library panics on some files
        reason = printable((str(error).strip() or "no message").splitlines()[0])[:300]
        raise CheckpointError(
            f"{chosen.path}: the tokenizers library cannot read it ({type(error).__name__}: {reason}). {AGAIN}"
        ) from error
