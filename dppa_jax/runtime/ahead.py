"""Imports that take seconds, made while other work goes on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def imported_ahead(*modules: str) -> Iterator[None]:
    """Import modules in a thread while the block runs; when it ends they are there.

    The block must not need them: transformers puts another module in its own place when its import ends, and who waits
    for that import in another thread is left with the first one.
    """
    with ThreadPoolExecutor(1) as pool:
        imports = [pool.submit(import_module, module) for module in modules]
        yield
        for one in imports:
            one.result()
