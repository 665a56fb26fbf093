"""mergekit, the peer, which lives in an environment of its own: merges of it to compare with."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

VARIABLE = "DPPA_JAX_MERGEKIT_PYTHON"
MERGE_ALL = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for output, recipe in json.load(open(sys.argv[1])).items():
    run_merge(MergeConfiguration.model_validate(recipe), output, MergeOptions(quiet=True, copy_tokenizer=False))
"""


def mergekit_python() -> str:
    """The interpreter named by the environment; skips the test if there is none."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"mergekit is not tested: {VARIABLE} does not name the Python of an environment that has it")
    return python


def mergekit_merges(recipes: Mapping[str, Mapping], directory: Path) -> dict[str, dict[str, np.ndarray]]:
    """Merge by recipes, each what its YAML says as a dict, in one process: the tensors of each by the recipe's name."""
    python = mergekit_python()
    outputs = {name: directory / f"mergekit-{name}" for name in recipes}
    file = directory / "mergekit.json"
    file.write_text(json.dumps({str(outputs[name]): recipe for name, recipe in recipes.items()}))
    command = [python, "-c", MERGE_ALL, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: tensors_of(output) for name, output in outputs.items()}


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory of safetensors."""
    return {name: array for file in sorted(directory.glob("*.safetensors")) for name, array in load_file(file).items()}
