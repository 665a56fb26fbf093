"""What a merge will cost, from config.json files alone: memory, bytes, passes, block size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import psutil

from dppa_jax.blocks import make_blocks
from dppa_jax.checkpoint.names import CheckpointError, tensor_specs
from dppa_jax.config import MergeConfig
from dppa_jax.delta.allocate import ALLOCATIONS

DEVICE_SHARE = 0.8  # of a device's memory that weights may take; the rest is for folds, samples and the allocator
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Plan:
    parameters: int
    models: int  # base and experts
    mesh: tuple[int, int]
    block_layers: int
    blocks: int
    resident: bool
    passes: int  # over the inputs
    bytes_read: int
    bytes_written: int
    device_bytes: int  # peak, per device
    device_memory: int  # of one device
    host_bytes: int  # peak of this program's buffers, per process; on a CPU they are the devices' memory

    def lines(self) -> list[tuple[str, str]]:
        """What `--job=plan` prints."""
        layer, row = self.mesh
        return [
            ("models", f"base + {self.models - 1} experts of {self.parameters / 1e9:.3f} B parameters"),
            ("mesh", f"layer={layer}, row={row}: {layer * row} devices"),
            ("blocks", f"{self.blocks}, of {self.block_layers} layers"),
            ("residency", "read once, kept on the devices" if self.resident else f"streamed, {self.passes} passes"),
            ("read", gigabytes(self.bytes_read)),
            ("written", gigabytes(self.bytes_written)),
            ("peak per device", self._peak()),
            ("peak host buffers", gigabytes(self.host_bytes)),
        ]

    def _peak(self) -> str:
        peak = f"{gigabytes(self.device_bytes)} of {gigabytes(self.device_memory)}"
        fits = self.device_bytes <= self.device_memory
        return peak if fits else f"{peak}: too much; give more devices, or fewer --block_layers"


def make_plan(
    configs: Sequence[Mapping],
    config: MergeConfig,
    mesh: tuple[int, int],
    block_layers: int,
    residency: str,
    device_memory: int,
    platform: str,
) -> Plan:
    """Plan for base and experts given by their config.json dicts, base first.

    Residency "auto" keeps everything on the devices when it fits, except on a CPU: there the operating system's page
    cache already makes the second read a copy in memory. `block_layers` 0 takes one layer per index of the mesh's layer
    axis on a CPU, and as many as fit on an accelerator.
    """
    devices = mesh[0] * mesh[1]
    layers = configs[0]["num_hidden_layers"]
    specs = tensor_specs(configs[0])
    sizes = [ITEMSIZE[dtype_name(c)] for c in configs]
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    surveyed = sum(math.prod(spec.shape) for spec in specs.values() if spec.layer is not None)
    output_size = ITEMSIZE[config.output_dtype] if config.output_dtype else sizes[0]
    layer_elements = max(block.elements for block in make_blocks(specs, 1))
    # In flight per layer of a block: base and experts, twice for reading ahead, and the rows being merged and written.
    in_flight = layer_elements * (2 * sum(sizes) + 2 * output_size)
    kept = parameters * sum(sizes) / devices
    fits = kept + in_flight * mesh[0] / devices < DEVICE_SHARE * device_memory
    resident = fits and platform != "cpu" if residency == "auto" else residency == "resident"
    if not block_layers:
        block_layers = mesh[0]
        if platform != "cpu":
            room = DEVICE_SHARE * device_memory - (kept if resident else 0)
            block_layers = max(mesh[0], int(room * devices / in_flight) // mesh[0] * mesh[0])
    block_layers = min(block_layers, layers)
    survey = bool(config.score and ALLOCATIONS[config.allocate].outliers)
    passes = 1 + survey
    inputs = parameters * sum(sizes)
    again = surveyed * sum(sizes) if survey and not resident else 0
    buffers = block_layers * layer_elements * 2 * sum(sizes)
    return Plan(
        parameters=parameters,
        models=len(configs),
        mesh=mesh,
        block_layers=block_layers,
        blocks=len(make_blocks(specs, block_layers)),
        resident=resident,
        passes=passes,
        bytes_read=inputs + again,
        bytes_written=parameters * output_size,
        device_bytes=int((kept if resident else 0) + block_layers * in_flight / devices),
        device_memory=device_memory,
        host_bytes=int(inputs if resident and platform == "cpu" else buffers),
    )


def device_memory(given: int = 0) -> tuple[int, str]:
    """Bytes of one local device, and the platform; a CPU's devices share half of what is free."""
    device = jax.local_devices()[0]
    if given:
        return given, device.platform
    if device.platform == "cpu":
        return psutil.virtual_memory().available // 2 // jax.local_device_count(), "cpu"
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 16 * 10**9), device.platform


def dtype_name(config: Mapping) -> str:
    """The weights' dtype as config.json says; float32 when it does not."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ITEMSIZE:
        raise CheckpointError(f"config.json: dtype {name!r} cannot be merged; it must be {', '.join(ITEMSIZE)}.")
    return name


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
