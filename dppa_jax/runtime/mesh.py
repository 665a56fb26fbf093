"""The mesh of devices, and how matrices are spread over it: by rows, which are never split.

A block of B layers of one linear is a matrix of B·out rows. Both mesh axes divide its rows, `layer` being the outer
one: when B is a multiple of the size of `layer`, each device holds rows of its own layers. Every kernel works row by
row, so its bits do not depend on the mesh.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("layer", "row")
ROWS = PartitionSpec(AXES)
REPLICATED = PartitionSpec()
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}  # XLA's default is 256 also where registers have 512 bits


class PerTensor(NamedTuple):
    """Values that all rows of a tensor share."""

    values: jax.Array  # (tensors, columns), whole on every device
    tensor: jax.Array  # (rows,), the tensor that each row belongs to


def mesh_shape(text: str, devices: int | None = None, axes: tuple[str, str] = AXES) -> tuple[int, int]:
    """Parse a --mesh flag into the sizes of its two axes, (layer, row). Empty text puts all `devices` on the second.

    >>> mesh_shape("layer=2,row=4")
    (2, 4)
    >>> mesh_shape("", 8)
    (1, 8)

    Raises:
      ValueError: the text is not of the form `layer=N,row=M`.
    """
    if not text:
        return 1, devices or 1
    sizes = dict.fromkeys(axes, 1)
    first, second = axes
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if not match or match[1] not in axes or int(match[2]) < 1:
            raise ValueError(
                f"--mesh={text}: {part!r} is not {first}=N or {second}=N; for example --mesh={first}=2,{second}=4."
            )
        sizes[match[1]] = int(match[2])
    return sizes[first], sizes[second]


def make_mesh(text: str = "", axes: tuple[str, str] = AXES, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of a --mesh flag from the first of these devices, by default the devices of this process.

    Raises:
      ValueError: the mesh needs more devices than there are, or leaves a process without one.
    """
    devices = jax.local_devices() if devices is None else devices
    shape = mesh_shape(text, len(devices), axes)
    size = int(np.prod(shape))
    if size > len(devices):
        raise ValueError(
            f"--mesh={text} asks for {size} devices, but there are {len(devices)}; choose sizes whose product is at "
            f"most {len(devices)}."
        )
    if left := {device.process_index for device in devices} - {device.process_index for device in devices[:size]}:
        raise ValueError(
            f"--mesh={text} leaves process {min(left)} without a device; choose sizes whose product is {len(devices)}, "
            f"the number of all devices."
        )
    return Mesh(np.array(devices[:size]).reshape(shape), axes)


def across_processes(mesh: Mesh) -> Mesh:
    """Extend the mesh of this process over the devices of all processes, which follow each other on the first axis."""
    processes = sorted({device.process_index for device in jax.devices()})
    own = [[d for d in jax.devices() if d.process_index == process][: mesh.size] for process in processes]
    if len(own) == 1:
        return mesh
    return Mesh(np.array(own).reshape(len(own) * mesh.devices.shape[0], -1), mesh.axis_names)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put a host array that every process has onto the devices; each process copies the slices of its own devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def padded_rows(mesh: Mesh, rows: int) -> int:
    """Return how many rows to allocate so that every device gets the same number; added rows are zero and ignored."""
    return -(-rows // mesh.size) * mesh.size


def put_rows(mesh: Mesh, array: np.ndarray | jax.Array) -> jax.Array:
    """Put an array whose first axis is rows onto the mesh, padded. A CPU takes an aligned buffer without a copy."""
    padding = padded_rows(mesh, array.shape[0]) - array.shape[0]
    if padding:
        array = np.concatenate([array, np.zeros((padding, *array.shape[1:]), array.dtype)])
    return jax.device_put(array, NamedSharding(mesh, ROWS))


@cache  # a function that two kernels share is compiled once
def over_rows(
    mesh: Mesh, function: Callable, replicated: tuple[int, ...] = (), donated: tuple[int, ...] = ()
) -> Callable:
    """Compile a function that works on arrays row by row; each device runs it on its own rows.

    Args:
      mesh: the devices.
      function: takes and returns arrays whose first axis is rows.
      replicated: positions of the arguments that are whole on every device.
      donated: positions of those in whose memory the result may be written, after which they are gone.
    """

    def lifted(*arguments):
        specs = tuple(REPLICATED if i in replicated else _row_specs(x) for i, x in enumerate(arguments))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ROWS)(*arguments)

    platform = mesh.devices.flat[0].platform
    options = WIDE_VECTORS if platform == "cpu" else None
    return jax.jit(lifted, donate_argnums=donated, compiler_options=options)


def _row_specs(tree):
    """Return how an argument is sharded: by rows, but for the values of a `PerTensor`, which every device has."""

    def spec(x):
        return PerTensor(REPLICATED, ROWS) if isinstance(x, PerTensor) else ROWS

    return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, PerTensor))
