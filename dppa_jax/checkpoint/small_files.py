"""The small files beside the weights of an output: copied as bytes from a model, or written whole."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dppa_jax.checkpoint.inside import MAX_COPIED, companions, records
from dppa_jax.checkpoint.output import sync
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.reading import read_bytes


def copies(files: Iterable[Path], directory: Path | str) -> dict[str, bytes]:
    """Read files of a model's directory; return their contents by their places in it."""
    return {str(file.relative_to(directory)): read_bytes(file, MAX_COPIED) for file in files}


def beside(model: Any) -> dict[str, bytes]:
    """Read what belongs beside the weights of a model when they are written anew, by name.

    Of a model that is made of others these are no records, as none are about the whole. An adapter has no generation
    config, so that of its base is taken.
    """
    files = companions(model.directory)
    if not (directories := getattr(model, "directories", ())):
        return copies([*files, *records(model.directory)], model.directory)
    other = directories[min(1, len(directories) - 1)]
    generation = [file for file in companions(other) if file.name.startswith("generation_config")]
    return copies(generation, other) | copies(files, model.directory)


def write_small_files(directory: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files below a directory and flush them to the disk: the final name means complete, without power, too."""
    for name, content in contents.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        write_whole(file, content)
        sync(file)
        if file.parent != directory:
            sync(file.parent)
