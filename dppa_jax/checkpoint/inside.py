"""The files of a model's directory: each file that is read or copied from it passes `inside`, which lets none lead out.

Whoever offers a model for download decides what its files are called and, in an archive or a git repository, where its
links lead. A link to a private file of the person who merges would be copied into the merge.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.runtime.reading import open_regular, printable

COPIED = (  # beside the weights, verbatim; patterns of `Path.glob`
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
RECORDS = ("README.md", "recipe.json", "finetune.json", "coefficients.json")  # they tell how the weights were made
MAX_COPIED = 100_000_000  # bytes of such a file; the largest tokenizers have a third of it
AGAIN = "Download it again."


def inside(directory: Path, name: str, named_by: Path | None = None) -> Path:
    """Return directory/name, and refuse a path or a link that leads outside.

    In the hub's cache, a model's files are links into the folder `blobs` of the same model. These are allowed, and so
    are links from a directory elsewhere into that cache, which a user makes to save space.

    Args:
      named_by: the file of the model that names this one, if one does. Its author chose the name, so a link of that
        name into the hub's cache is no choice of the user.

    Raises:
      CheckpointError: the file is outside, or the name cannot be that of a file.
    """
    if "\0" in name or not _encodable(name):
        raise CheckpointError(f"{named_by or directory} names a file {name!r:.99}; no file can be called so. {AGAIN}")
    path = directory / name
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if root.parent.name == "snapshots":
        allowed = target.is_relative_to(root.parent.parent / "blobs")
    else:
        allowed = cached and not named_by
    if allowed or target.is_relative_to(root):
        return path
    what = f"{named_by} names a file" if named_by else f"{path} leads"
    snapshot = f", or give {target.parent.parent}/snapshots/REVISION as the model" if cached else ""
    raise CheckpointError(
        f"{what} outside the directory: {printable(repr(name))} is {printable(str(target))}. Copy the file into "
        f"{directory}{snapshot}."
    )


def readable(directory: Path, name: str, named_by: Path | None = None) -> Path:
    """Return directory/name, a file inside that may be read; see `inside`.

    Raises:
      CheckpointError: it is outside, no file, or may not be read.
    """
    path = inside(directory, name, named_by)
    try:
        os.close(open_regular(path, CheckpointError))
    except PermissionError:
        raise CheckpointError(f"{path} may not be read by you; change its mode, or read a copy of it.") from None
    except FileNotFoundError:
        what = f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path} {what}; download it again, or give a whole model directory.") from None
    return path


def companions(directory: Path) -> list[Path]:
    """Return the files that are copied verbatim beside the weights: tokenizer, templates, generation config, licence.

    Each may be read. One may lie in a folder of the directory.

    Raises:
      CheckpointError: a file leads outside the directory, is too large, or may not be read.
    """
    return _present(directory, COPIED)


def records(directory: Path) -> list[Path]:
    """Return the files that tell how the weights were made; see `companions`."""
    return _present(directory, RECORDS)


def _present(directory: Path, patterns: Sequence[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        if "*" in pattern:
            found += [path for path in sorted(directory.glob(pattern)) if not path.is_dir()]
        elif os.path.lexists(directory / pattern):
            found.append(directory / pattern)
    for path in found:
        size = readable(directory, str(path.relative_to(directory))).stat().st_size
        if size > MAX_COPIED:
            raise CheckpointError(f"{path}: {size} bytes, and such a file has at most {MAX_COPIED}. Take it away.")
    return found


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
