"""The tokenizer that lies beside a model's weights, read by transformers, and texts as its token ids."""

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.inside import MAX_COPIED, companions
from dppa_jax.runtime.files import digest
from dppa_jax.runtime.reading import printable, read_bytes

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it tells that it did not find PyTorch

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of them
OTHERS = ("generation_config", "LICENSE", "NOTICE", "USE_POLICY")  # how companions begin that are not a tokenizer's


def has_tokenizer(directory: Path) -> bool:
    """Return whether a tokenizer lies in a model's directory."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def tokenizer_digest(directory: Path) -> str:
    """Hash the tokenizer files of a directory, with the chat template; equal hashes mean equal tokenizers."""
    files = [file for file in companions(directory) if not file.name.startswith(OTHERS)]
    return digest([(file.name, hashlib.sha256(read_bytes(file, MAX_COPIED)).hexdigest()) for file in files])


def load_tokenizer(directory: Path) -> Any:
    """Return the transformers tokenizer of a model's directory. No code of the model is run.

    Raises:
      CheckpointError: there is none, a file of it leads out of the directory, or transformers cannot read it.
    """
    companions(directory)  # refuses what leads out of it, or is too large
    if not has_tokenizer(directory):
        raise CheckpointError(
            f"{directory} has no tokenizer, none of {', '.join(VOCABULARIES)}: copy the tokenizer files of the model "
            f"that it was made from there. To evaluate it, --tokenizer=NAME may name a model that has them."
        )
    whole = any((directory / name).is_file() for name in VOCABULARIES if name != "tokenizer.model")
    if not whole and find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{directory} has its tokenizer in tokenizer.model alone, which needs another library: "
            f"`pip install sentencepiece protobuf`, or put the tokenizer.json of the model there."
        )
    from transformers import AutoTokenizer  # takes seconds, which are saved where no text is read

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises many kinds, and its library of tokenizers panics
        reason = printable((str(error).strip() or "no message").splitlines()[0])[:300]
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {reason}). Copy the tokenizer files "
            f"of the model that it was made from there."
        ) from error


def encode(tokenizer: Any, texts: Sequence[str], begin: bool = True) -> list[list[int]]:
    """Return the token ids of texts, of which each is begun once and none is ended.

    A tokenizer may put tokens around a text: one that begins a sequence and, in many fine-tuned models, one that ends
    it. The model shall go on with the text, so what the tokenizer puts after a text is left out.

    Args:
      tokenizer: of transformers.
      texts: may begin with the token that begins a sequence; it is not put before them again then.
      begin: False for texts that have all that the model expects, as a chat template writes them.
    """
    bodies = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    if not begin:
        return bodies
    text, body = next((pair for pair in zip(texts, bodies, strict=True) if pair[1]), ("", []))
    first = _put_before(tokenizer, text, body)
    return [body if first and body[: len(first)] == first else [*first, *body] for body in bodies]


def encode_whole(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Return token ids and types of texts, or of pairs of texts, with all that the tokenizer puts around them.

    The type of a token is 1 in the second text of a pair, and 0 elsewhere. Where types are not among the inputs that
    the tokenizer has for its model (`model_input_names`), all are 0, as transformers then gives the model none.

    Args:
      tokenizer: of transformers.
      texts: all of one text, or all of two.
      max_length: longer ones are cut, of a pair the longer text first.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    typed = "token_type_ids" in tokenizer.model_input_names
    found = tokenizer(*columns, truncation=True, max_length=max_length, padding=False, return_token_type_ids=typed)
    types = found["token_type_ids"] if typed else [[0] * len(tokens) for tokens in found["input_ids"]]
    return list(zip(found["input_ids"], types, strict=True))


def _put_before(tokenizer: Any, text: str, body: list[int]) -> list[int]:
    """Return the tokens that a tokenizer puts before a text, whose own ones are `body`."""
    (whole,) = tokenizer([text])["input_ids"]
    if not body:
        return [token for token in whole[:1] if token == tokenizer.bos_token_id]
    return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(body)] == body), [])
