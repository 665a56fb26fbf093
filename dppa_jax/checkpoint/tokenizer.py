"""The tokenizer that lies beside a model's weights, read by transformers."""

import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it tells that it did not find PyTorch


def load_tokenizer(directory: Path | str):
    """Return the transformers tokenizer of a model's directory."""
    from transformers import AutoTokenizer  # takes seconds, which are saved where no text is read

    return AutoTokenizer.from_pretrained(directory)
