"""How fast this machine reads the inputs, merges, and writes the output: a few seconds of doing each."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import psutil
from jax.sharding import Mesh

from dppa_jax.architecture.specs import Role, TensorSpec, first_linear, layer_count, linears_of
from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.checkpoint.direct_file import DirectFile
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import Coefficient
from dppa_jax.merging.merger import Layout, merge_checkpoints
from dppa_jax.merging.stream import READERS

READ = 512 << 20  # bytes
WRITTEN = 256 << 20  # bytes
PIECE = 8 << 20  # bytes that are read or written at a time
MERGED = 64_000_000  # parameters of a layer at most: one of 7 B is halved in rows and columns
VALUES = 1 << 23  # random numbers, that the synthetic weights repeat


@dataclass(frozen=True)
class Speeds:
    read: float  # bytes a second, of the inputs: from the disk if memory cannot hold them, else as they are now
    write: float  # bytes a second, beside the output
    merge: float  # parameters a second, of all models on the devices of this process, copies of the inputs included
    start: float  # seconds: imports, and compiling or loading what was compiled before


def measure_speeds(sources: Sequence[Source], output: Path, config: MergeConfig, mesh: Mesh) -> Speeds:
    """Time reading these models, base first, merging layers like theirs, and writing where `output` will be."""
    started = time.time() - psutil.Process().create_time()
    dtype = sources[0].tensors[first_linear(sources[0].specs).name].dtype
    models = synthetic(sources[0].specs, dtype, config.experts)
    first, again = (_merge_seconds(models, config, mesh) for _ in range(2))  # only the first compiles
    parameters = sum(math.prod(spec.shape) for spec in models[0].specs.values())
    start = started + max(0.0, first - again)
    return Speeds(read_speed(sources), write_speed(output), parameters / again, start)


def read_speed(sources: Sequence[Source]) -> float:
    """Read pieces spread over all models; return bytes a second.

    What is more than memory holds comes from the disk whatever is in memory now: it goes before its turn comes again.
    """
    matrices = [(source, spec) for source in sources for spec in source.specs.values() if len(spec.shape) == 2]
    whole = sum(tensor.nbytes for source in sources for tensor in source.tensors.values())
    from_disk = whole > psutil.virtual_memory().available
    chosen = {int(i) for i in np.linspace(0, len(matrices) - 1, READ // PIECE)}

    def read(source: Source, spec) -> int:
        dtype = source.tensors[spec.name].dtype
        rows = min(spec.rows, max(1, PIECE // (spec.columns * dtype.itemsize)))
        out = np.empty((rows, spec.columns), dtype)
        if from_disk and isinstance(source, SafetensorsDirectory):
            source.evict_rows(spec.name, 0, rows)
        source.read_rows(spec.name, 0, rows, out)
        return out.nbytes

    begin = time.perf_counter()
    with ThreadPoolExecutor(READERS, "read") as readers:
        count = sum(readers.map(lambda i: read(*matrices[i]), sorted(chosen)))
    return count / (time.perf_counter() - begin)


def write_speed(output: Path) -> float:
    """Write a file without a name on the disk of `output`, which need not be there yet; return bytes a second."""
    existing = next(place for place in (output, *output.parents) if place.is_dir())
    piece = memoryview(np.random.default_rng(0).bytes(PIECE))
    with tempfile.NamedTemporaryFile(dir=existing, prefix=".dppa_jax-") as named:
        file = DirectFile(Path(named.name))  # and, when the block ends, without a name: a killed process leaves nothing
    try:
        begin = time.perf_counter()
        for position in range(0, WRITTEN, PIECE):
            file.write(piece, position)
        file.sync()
        return WRITTEN / (time.perf_counter() - begin)
    finally:
        file.close()


class _Synthetic:
    """A model of random numbers, in memory."""

    def __init__(self, specs: Mapping[str, TensorSpec], dtype: np.dtype, values: np.ndarray):
        self.config, self.specs = {}, specs
        self.tensors = {name: SimpleNamespace(dtype=dtype, shape=spec.shape) for name, spec in specs.items()}
        self._values = values.astype(dtype)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        flat = out.reshape(-1)
        for begin in range(0, flat.size, VALUES):
            flat[begin : begin + VALUES] = self._values[: flat.size - begin]


class _Nowhere:
    """A sink that keeps nothing."""

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        pass


def synthetic(specs: Mapping[str, TensorSpec], dtype: np.dtype, experts: Sequence[str]) -> list[_Synthetic]:
    """Make base and experts of one layer, with embeddings in proportion, like a model with these tensors."""
    shrunk = _one_layer(specs)
    random = np.random.default_rng(0)
    values = random.standard_normal(VALUES, np.float32) * np.float32(0.02)
    deltas = [random.standard_normal(VALUES, np.float32) * np.float32(0.001) for _ in experts]
    return [_Synthetic(shrunk, dtype, values), *(_Synthetic(shrunk, dtype, values + delta) for delta in deltas)]


def _one_layer(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of the first layer and those outside, divided in rows and columns until MERGED holds the layer.

    Whatever heads or neurons it has are one.
    """
    layers = layer_count(specs)
    part = math.ceil(math.sqrt(sum(math.prod(spec.shape) for spec in specs.values() if spec.layer == 0) / MERGED))
    shrunk = {}
    for name, spec in specs.items():
        if spec.layer in (None, 0):
            shape = [max(1, size // part) for size in spec.shape]
            if spec.role is Role.VOCABULARY:
                shape[0] = max(1, spec.shape[0] // layers // part)
            group = spec.group and spec.group._replace(units=1)
            shrunk[name] = replace(spec, shape=tuple(shape), group=group)
    return shrunk


def _of_all(numbers: Mapping[str, Coefficient]) -> dict[str, float]:
    """Return one number for each expert: its own, or the mean of those that it has by tensor."""
    return {name: fmean(own.values()) if isinstance(own, Mapping) else own for name, own in numbers.items()}


def _merge_seconds(models: Sequence[_Synthetic], config: MergeConfig, mesh: Mesh) -> float:
    """Time one merge; of what is said of single tensors the mean is taken, as this model has other tensors."""
    numbers = {"expert_rates": _of_all(config.expert_rates), "q": _of_all(config.q)}
    options = {name: _of_all(own) for name, own in config.tensor_options.items()}
    free = {"coefficients": {}, "tensor_rates": (), "tensor_coefficients": ()}  # cost nothing
    plain = replace(config, **numbers, **free, tensor_options=options)
    base, *experts = models
    named = dict(zip(config.experts, experts, strict=True))
    ones = {spec.name: np.ones(spec.columns, np.float32) for spec in linears_of(base.specs).specs}
    norms = dict.fromkeys(named, ones)
    grams = dict.fromkeys(named, lambda name: np.diag(ones[name]))
    begin = time.perf_counter()
    merge_checkpoints(base, named, plain, _Nowhere(), mesh, Layout(), norms=norms, quiet=True, input_grams=grams)
    return time.perf_counter() - begin
