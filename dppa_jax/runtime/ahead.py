"""Imports that take seconds, made while other work goes on."""

import threading
from importlib import import_module


def import_ahead(*modules: str) -> None:
    """Begin to import modules, one after another, in a thread; whoever needs one of them meanwhile waits as usual."""

    def import_all() -> None:
        for module in modules:
            import_module(module)

    threading.Thread(target=import_all, name="import ahead", daemon=True).start()
