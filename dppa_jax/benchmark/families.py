"""Make synthetic checkpoints for benchmarks: seeded, with heavy-tailed deltas, about as fast as a disk writes."""

import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging

from dppa_jax.architecture.specs import row_pieces
from dppa_jax.checkpoint import SafetensorsDirectory, SafetensorsWriter, TensorSpec, tensor_specs
from dppa_jax.checkpoint.safetensors_writer import total_bytes
from dppa_jax.config.option import choose
from dppa_jax.config.run import MAX_SHARD_SIZE

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "0.3b": (1024, 2816, 22, 16, 4),
    "1.1b": (2048, 5632, 22, 32, 4),
    "3b": (3200, 8640, 26, 32, 32),
    "7b": (4096, 11008, 32, 32, 32),
    "moe": (2048, 6144, 2, 32, 4),  # two layers of Qwen3-30B-A3B
}
MIXTURE = {  # what config.json says further of the last shape
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
VOCABULARY = 32000
EXPERTS = ("expert0", "expert1", "expert2")
NOISE = 1 << 22  # random numbers, drawn once: a billion of them would take minutes
CHUNK = NOISE // 2  # elements of a tensor that are filled at a time, from a random place in the noise
DTYPE = np.dtype(ml_dtypes.bfloat16)


def model_config(shape: str, layers: int = 0) -> dict:
    """Return the config.json of a shape; `layers`, if not 0, replaces its number of layers."""
    hidden, inner, own_layers, heads, kv_heads = SHAPES[choose("--shape", shape, SHAPES)]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers or own_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **(MIXTURE if shape == "moe" else {}),
    }


def parameters(config: Mapping) -> int:
    """Return the number of parameters of a model."""
    return total_bytes(_tensors(config)) // DTYPE.itemsize


def make_family(root: Path, config: Mapping, experts: Sequence[str]) -> dict[str, Path]:
    """Make root/base and root/NAME for every expert, unless they exist; return their directories by name.

    Raises:
      OSError: the disk has no room for the models and an output; nothing has been written then.
    """
    places = {name: root / name for name in ("base", *experts)}
    check_scratch(root, family_sizes(root, config, experts))
    for name, place in places.items():
        if not place.exists():
            make_model(place, config, name)
    return places


def family_sizes(root: Path, config: Mapping, experts: Sequence[str]) -> dict[Path, int]:
    """Return the bytes of every model of a family, by its directory."""
    return {root / name: parameters(config) * DTYPE.itemsize for name in ("base", *experts)}


def check_scratch(root: Path, sizes: Mapping[Path, int]) -> None:
    """Refuse a disk without room for the missing models and for an output as large as the largest model."""
    missing = [size for place, size in sizes.items() if not place.exists()]
    needed = sum(missing) + max(sizes.values())
    existing = next(place for place in (root, *root.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"--workdir: {existing} has {free / 1e9:.1f} GB free; the benchmark in {root} needs {needed / 1e9:.1f} GB, "
            f"for {len(missing)} models that are to be made ({sum(missing) / 1e9:.1f} GB), and an output. Make room, "
            f"give a --workdir on another disk, or a smaller --shape."
        )


def make_model(directory: Path, config: Mapping, name: str) -> Path:
    """Make a bfloat16 checkpoint: the base is normal noise, an expert is the base plus Student-t deltas.

    Each tensor has a scale of its own.
    """
    logging.info("making %s", directory)
    base = None if name == "base" else SafetensorsDirectory(directory.with_name("base"))
    with SafetensorsWriter(directory, _tensors(config), MAX_SHARD_SIZE) as writer:
        for i, spec in enumerate(tensor_specs(config).values()):
            generator = np.random.default_rng([i, *name.encode()])
            scale = np.float32(generator.uniform(0.0005, 0.002))
            for start, stop in row_pieces(spec.rows, spec.columns, CHUNK):
                writer.write_rows(spec.name, start, _rows(base, spec, start, stop, scale, generator))
        writer.commit(dict(config))
    if base:
        base.close()
    return directory


def _rows(
    base: SafetensorsDirectory | None,
    spec: TensorSpec,
    start: int,
    stop: int,
    scale: np.float32,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return rows start..stop of a tensor: of a base if `base` is None, otherwise of an expert of that base."""
    shape = stop - start, spec.columns
    size = shape[0] * shape[1]
    at = generator.integers(NOISE - size + 1)
    if base is None:
        return np.ones(shape, DTYPE) if len(spec.shape) == 1 else _weights()[at : at + size].reshape(shape)
    rows = np.empty(shape, DTYPE)
    base.read_rows(spec.name, start, stop, rows)
    return (rows.astype(np.float32) + _deltas()[at : at + size].reshape(shape) * scale).astype(DTYPE)


@cache
def _weights() -> np.ndarray:
    """Return normal numbers with standard deviation 0.02."""
    return (np.random.default_rng(0).standard_normal(NOISE, np.float32) * np.float32(0.02)).astype(DTYPE)


@cache
def _deltas() -> np.ndarray:
    """Return Student-t numbers, 4 degrees of freedom: normal / √(χ²/4)."""
    generator = np.random.default_rng(1)
    halved = generator.standard_gamma(2.0, NOISE, np.float32) / 2
    return generator.standard_normal(NOISE, np.float32) / np.sqrt(halved)


def _tensors(config: Mapping) -> dict:
    return {name: (spec.shape, DTYPE) for name, spec in tensor_specs(config).items()}
