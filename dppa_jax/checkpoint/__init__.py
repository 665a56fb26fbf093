"""Checkpoints: where models come from and where they go. See README.md in this folder."""

from dppa_jax.architecture.specs import CheckpointError, TensorSpec, tensor_specs
from dppa_jax.checkpoint.dtypes import DTYPE_BY_NAME
from dppa_jax.checkpoint.lora import Adapted, Thinned
from dppa_jax.checkpoint.matched import Matched, Part
from dppa_jax.checkpoint.orbax import OrbaxDirectory, is_orbax
from dppa_jax.checkpoint.safetensors import SafetensorsDirectory, read_config
from dppa_jax.checkpoint.safetensors_writer import SafetensorsWriter
from dppa_jax.checkpoint.spliced import Spliced
from dppa_jax.checkpoint.stacked import save_tree

__all__ = [
    "DTYPE_BY_NAME",
    "Adapted",
    "Checkpoint",
    "CheckpointError",
    "Matched",
    "OrbaxDirectory",
    "SafetensorsDirectory",
    "SafetensorsWriter",
    "Spliced",
    "TensorSpec",
    "is_orbax",
    "read_config",
    "save_tree",
    "tensor_specs",
]

# an open checkpoint, whatever its format
Checkpoint = SafetensorsDirectory | OrbaxDirectory | Adapted | Thinned | Spliced | Part | Matched
