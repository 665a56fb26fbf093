"""The command line in this process: a merge of a small family, or what the program says when it refuses."""

import logging
from collections.abc import Callable
from pathlib import Path

import grain  # noqa: F401  defines flags, which flagsaver would take back
import pytest
from absl.testing import flagsaver


def launch(*given: str) -> None:
    """`python -m dppa_jax.launch GIVEN...`; a refusal is a SystemExit whose code is the message."""
    from dppa_jax import launch as program

    with flagsaver.flagsaver():
        program.main(program.parse(["dppa_jax.launch", *given]))


class Merge:
    """merge(*flags) merges root/math and root/law into root/out by DPPA; later flags override these."""

    def __init__(self, root: Path, run: Callable[..., None] = launch):
        self.root, self._run = root, run
        self.base, self.math, self.law = (root / name for name in ("base", "math", "law"))
        self.output = root / "out"

    def __call__(self, *given: str) -> Path:
        self._run(*self.flags(), *given)
        return self.output

    def flags(self) -> list[str]:
        models = [f"--base={self.base}", f"--expert=math={self.math}", f"--expert=law={self.law}"]
        return [*models, f"--output={self.output}", "--method=dppa"]

    def warnings(self, *given: str) -> list[str]:
        """What the merge warns of."""
        told, handler = [], logging.Handler(logging.WARNING)
        handler.emit = lambda record: told.append(record.getMessage())
        logging.getLogger("absl").addHandler(handler)
        try:
            self(*given)
        finally:
            logging.getLogger("absl").removeHandler(handler)
        return told

    def refusal(self, *given: str, of: list[str] | None = None) -> str:
        """The error message, of the whole command line `of` when given; nothing may have been written."""
        before = tree(self.root)
        message = self.failure(*given, of=of)
        assert tree(self.root) == before
        return message

    def failure(self, *given: str, of: list[str] | None = None) -> str:
        """The error message of a run that may leave an unfinished output."""
        with pytest.raises(SystemExit) as error:
            self._run(*(self.flags() if of is None else of), *given)
        message = error.value.code
        assert isinstance(message, str), f"not a message for a person: {message!r}"
        assert message.startswith("error: ")
        return message


def tree(root: Path) -> dict[str, bytes | str]:
    """Every file below a directory with its content, every link with where it leads."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = str(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(root))] = path.read_bytes()
        else:
            found[str(path.relative_to(root))] = "directory"
    return found
