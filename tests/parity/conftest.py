from collections.abc import Callable

import numpy as np
import pytest
from families import write_model
from golden import DTYPES, load_json
from safetensors.numpy import load_file

from dppa_jax.checkpoint import SafetensorsDirectory


@pytest.fixture(scope="session")
def open_model(golden) -> Callable[[str, str], SafetensorsDirectory]:
    """(fp32 or bf16, base or expert0 …) to an open checkpoint of the golden family."""
    return lambda family, name: SafetensorsDirectory(golden / "family" / family / name)


@pytest.fixture(scope="session")
def offset_as_expert(golden, tmp_path_factory) -> Callable[[str], tuple[SafetensorsDirectory, SafetensorsDirectory]]:
    """fp32 or bf16 to (base, expert) whose delta is expert0's offset file: the base is zero, the expert that file.

    The authors prune the file that their first step wrote, in a dtype of their choice; so does the engine here.
    """
    made = {}

    def make(family: str):
        if family not in made:
            root = tmp_path_factory.mktemp(f"offset-{family}")
            offset = load_file(golden / "offset" / family / "expert0.safetensors")
            config = load_json(golden / "family" / family / "base" / "config.json")
            zeros = {name: np.zeros(array.shape, DTYPES[family]) for name, array in offset.items()}
            for name, tensors in (("base", zeros), ("expert", offset)):
                write_model(root / name, config, tensors, tokenizer=False)
            made[family] = SafetensorsDirectory(root / "base"), SafetensorsDirectory(root / "expert")
        return made[family]

    return make
