"""Adapters as peft writes them, made here with numpy and the safetensors package, and what they make of a base."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from families import write_json
from safetensors.numpy import save_file

PREFIX = "base_model.model."
PROJECTIONS = ("q_proj", "v_proj", "down_proj")


def config(**changes) -> dict:
    """adapter_config.json, with the keys of peft that decide something and some that do not."""
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 10,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "target_modules": list(PROJECTIONS),
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "lora_dropout": 0.05,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/base",
        "qalora_group_size": 16,
        **changes,
    }


def factors(base: Mapping[str, np.ndarray], targets=PROJECTIONS, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of an adapter of the base's linears, and of embeddings if they are among the targets."""
    generator, found = np.random.default_rng(seed), {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets:
            continue
        rows, columns = weight.shape
        if "embed" in module:
            rows, columns, lora = columns, rows, "lora_embedding_{}"
        else:
            lora = "lora_{}.weight"
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            found[f"{PREFIX}{module}.{lora.format(letter)}"] = generator.normal(0, 0.1, shape).astype(np.float32)
    return found


def write_adapter(directory: Path, tensors: Mapping[str, np.ndarray], **changes) -> Path:
    """An adapter's directory."""
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "adapter_model.safetensors", {"format": "pt"})
    write_json(directory / "adapter_config.json", config(**changes))
    return directory


def put_onto(base: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], scale: float = 2.5) -> dict:
    """The base with an adapter, by numpy: the product and the sum in float32, rounded once to the base's dtype."""
    merged = dict(base)
    for name, b in tensors.items():
        module = name.removeprefix(PREFIX)
        if ".lora_B" in name:
            product = b @ tensors[name.replace("lora_B", "lora_A")]
        elif ".lora_embedding_B" in name:
            product = (b @ tensors[name.replace("_B", "_A")]).T
        else:
            continue
        weight = f"{module.partition('.lora_')[0]}.weight"
        merged[weight] = (base[weight].astype(np.float32) + np.float32(scale) * product).astype(base[weight].dtype)
    return merged
