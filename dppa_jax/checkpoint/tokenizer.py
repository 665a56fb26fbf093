"""The tokenizer that lies beside a model's weights, read by transformers, whose import takes seconds."""

import os
import threading
from pathlib import Path


def load_tokenizer(directory: Path | str):
    """Return the transformers tokenizer of a model's directory."""
    return _auto_tokenizer().from_pretrained(directory)


def import_ahead() -> None:
    """Begin the import of transformers in a thread, while other work goes on."""
    threading.Thread(target=_auto_tokenizer, name="import transformers", daemon=True).start()


def _auto_tokenizer():
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it tells that it did not find PyTorch
    from transformers import AutoTokenizer

    return AutoTokenizer
