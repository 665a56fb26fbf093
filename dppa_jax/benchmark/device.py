"""--job=benchmark --device=gpu: time a merge's arithmetic on weights made on the device, and a merge from disk.

The stages of a merge (survey, thresholds, apply) run over all layers and dense tensors of a shape. Their work on the
host is timed as well; reading and writing are not. All layers share the weights of `RESIDENT` layers in turn. A layer
of 7 B with three experts is 1.6 GB, thirty times what a GPU's cache holds, so no layer is read from the cache.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from rich.table import Table

from dppa_jax.architecture.specs import TensorSpec, linears_of, tensor_specs
from dppa_jax.benchmark.families import EXPERTS, SHAPES, model_config, parameters
from dppa_jax.checkpoint import DTYPE_BY_NAME
from dppa_jax.config.benchmark import BenchmarkConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.option import choose
from dppa_jax.merging.blocks import Block, make_blocks
from dppa_jax.merging.bounds import Pruner
from dppa_jax.merging.elementwise import elementwise_of
from dppa_jax.merging.kernels import Kernels
from dppa_jax.merging.merger import SEARCHES, check_finite, merge_matrix
from dppa_jax.merging.rows import DeviceMatrix, Matrix
from dppa_jax.merging.stream import Stream
from dppa_jax.merging.survey import survey
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.mesh import ROWS, make_mesh, padded_rows
from dppa_jax.runtime.progress import console, stage

RESIDENT = 4  # layers on the device
COPIED = 1 << 30  # bytes of the copy that measures bandwidth; on a CPU an eighth of it
COPIES = 10
FROM_DISK = "1.1b"  # the largest shape that is merged from disk
GOAL_SHARE, GOAL_SECONDS = 0.7, 2.0
PEAKS = {  # memory bandwidth in bytes a second, as the maker states it, by JAX's name of the device
    "NVIDIA A100-PCIE-40GB": 1.555e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA H200 NVL": 4.8e12,
}


@dataclass(frozen=True)
class Timing:
    """The fastest run of one stage: its seconds, and the bytes of weights that it read and wrote."""

    seconds: float
    moved_bytes: int

    @property
    def speed(self) -> float:
        """Bytes a second."""
        return self.moved_bytes / self.seconds


class Tallied(Kernels):
    """Kernels that count the bytes of the matrices they read and write, and keep the arguments of each merge."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.moved: list[int] = []  # bytes of each call; several threads append
        self.merges: list[tuple] = []

    def row_sums(self, term, base, expert, *per_row):
        self.moved.append(base.nbytes + expert.nbytes)
        return super().row_sums(term, base, expert, *per_row)

    def counts(self, base, expert, inputs, bounds):
        self.moved.append(base.nbytes + expert.nbytes)
        return super().counts(base, expert, inputs, bounds)

    def nonfinite(self, x):
        self.moved.append(x.nbytes)
        return super().nonfinite(x)

    def merge(self, output_dtype, base, experts, *tables):
        merged = super().merge(output_dtype, base, experts, *tables)
        self.moved.append(base.nbytes + sum(expert.nbytes for expert in experts) + merged.nbytes)
        self.merges.append((output_dtype, base, experts, *tables))
        return merged


@dataclass(frozen=True)
class _Shapes:
    """A model that has shapes and dtypes, but no weights to read."""

    config: dict
    specs: Mapping[str, TensorSpec]
    tensors: Mapping

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        raise AssertionError(f"{name} is on the devices and is not read")


class DeviceStream(Stream):
    """A stream of one-layer blocks and dense tensors that are on the devices from the beginning.

    Weights are bfloat16. The base is normal noise; an expert is the base plus Student-t deltas with 4 degrees of
    freedom. Each matrix of an expert has a scale of its own.
    """

    def __init__(self, config: dict, experts: Sequence[str], mesh: Mesh):
        specs = tensor_specs(config)
        tensors = {
            name: SimpleNamespace(dtype=DTYPE_BY_NAME["bfloat16"], shape=spec.shape) for name, spec in specs.items()
        }
        source = _Shapes(config, specs, tensors)
        super().__init__(source, [source] * len(experts), make_blocks(specs, 1), mesh, resident=True)
        sharding = NamedSharding(mesh, ROWS)
        self._random = jax.jit(_random_weights, static_argnums=0, out_shardings=sharding)
        self._kept = dict(self._made(len(experts)))

    def _made(self, experts: int) -> Iterator[tuple[Block, list[DeviceMatrix]]]:
        made: dict[tuple[Matrix, ...], list[DeviceMatrix]] = {}
        layers = [block for block in self.blocks if block.layers]
        for i, block in enumerate(self.blocks):
            twin = layers[i % RESIDENT] if block.layers and i >= RESIDENT else block
            if twin is block:
                made[block.matrices] = [self._weights(m, i, j, experts) for j, m in enumerate(block.matrices)]
            weights = zip(block.matrices, made[twin.matrices], strict=True)
            yield block, [DeviceMatrix(matrix, x.base, x.experts) for matrix, x in weights]

    def _weights(self, matrix: Matrix, block: int, number: int, experts: int) -> DeviceMatrix:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0, impl="rbg"), block), number)
        shape = padded_rows(self.mesh, matrix.rows), matrix.columns
        scales = np.random.default_rng([block, number]).uniform(0.0005, 0.002, experts).astype(np.float32)
        base, *tuned = jax.block_until_ready(self._random(shape, key, scales))
        return DeviceMatrix(matrix, base, tuple(tuned))


def _random_weights(shape: tuple[int, int], key: jax.Array, scales: jax.Array) -> list[jax.Array]:
    """Return a matrix of the base, and one of an expert for each scale."""
    keys = jax.random.split(key, 1 + 3 * scales.shape[0])
    base = (0.02 * jax.random.normal(keys[0], shape)).astype(jnp.bfloat16)
    models = [base]
    for scale, (normal, first, second) in zip(scales, keys[1:].reshape(-1, 3), strict=True):
        halved = (jax.random.exponential(first, shape) + jax.random.exponential(second, shape)) / 2
        delta = scale * jax.random.normal(normal, shape) * jax.lax.rsqrt(halved)
        models.append((base.astype(jnp.float32) + delta).astype(jnp.bfloat16))
    return models


def run_device_benchmark(config: BenchmarkConfig) -> dict:
    """Time a merge from disk and the arithmetic of a merge; print both.

    Write the numbers to WORKDIR/benchmark/device-DEVICE-SHAPE.json.

    Raises:
      ValueError: JAX has no such device; nothing has been made then.
    """
    (shape,), device = config.shape, config.device
    choose("--shape", shape, SHAPES)
    use(device)
    from_disk = _from_disk(config)
    mesh = make_mesh("layer=1,row=1")
    timings = time_compute(model_config(shape), mesh, config.repeats)
    kind = mesh.devices.flat[0].device_kind
    result = {
        "device": kind,
        "shape": shape,
        "peak_bandwidth": PEAKS.get(kind),
        "copy_bandwidth": copy_bandwidth(mesh),
        "stages": {name: asdict(timing) for name, timing in timings.items()},
        "from_disk": from_disk,
    }
    write_whole(
        Path(config.workdir) / "benchmark" / f"device-{device}-{shape}.json", json.dumps(result, indent=1) + "\n"
    )
    _print(result, timings)
    return result


def use(device: str) -> None:
    """Make JAX use this kind of device, here and in processes that are started from here."""
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda", "cpu": "cpu"}[device]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to the merge from disk
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    try:
        platform = jax.devices()[0].platform
    except RuntimeError as error:
        raise ValueError(
            f"--device={device}: JAX finds none here ({str(error).splitlines()[0]}). For NVIDIA GPUs install "
            f"'jax[cuda12]', or 'jax[cuda13]'; --device=cpu runs the same on this machine's processor."
        ) from error
    if platform != device:
        raise ValueError(f"--device={device}: JAX has already begun with {platform}.")


def time_compute(config: dict, mesh: Mesh, repeats: int) -> dict[str, Timing]:
    """Time each stage of DPPA at 80 % with two partitions, after a run that compiles.

    The stage "apply" is the merging kernel alone; it repeats the merges of the stage before it.
    """
    factors = dict.fromkeys(EXPERTS, (1.8, 1.3))
    merge = MergeConfig(EXPERTS, "dppa", rate=0.8, factors=factors, coefficients=dict.fromkeys(EXPERTS, 0.3))
    stream = DeviceStream(config, EXPERTS, mesh)
    kernels = Tallied(mesh, elementwise_of(merge)[0])
    best: dict[str, Timing] = {}
    for _ in range(1 + repeats):
        for name, run in _stages(stream, kernels, merge):
            kernels.moved.clear()
            begin = time.perf_counter()
            run()
            timing = Timing(time.perf_counter() - begin, sum(kernels.moved))
            if name in best:
                logging.info("%s: %.3f s", name, timing.seconds)
            best[name] = min(best.get(name, timing), timing, key=lambda timing: timing.seconds)
    return best


def _stages(stream: DeviceStream, kernels: Tallied, merge: MergeConfig) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the name and the function of each stage, in the order of a merge."""
    source = stream.sources[0]
    linears = linears_of(source.specs)
    pruner = Pruner(kernels, merge, linears)
    pairs: list[tuple[DeviceMatrix, list[tuple]]] = []

    def surveying():
        with stage("survey", stream.pass_bytes(), quiet=True) as progress:
            pruner.allocate(survey(stream, linears, kernels, merge, progress))
        pruner.weigh(merge)

    def thresholds():
        with ThreadPoolExecutor(SEARCHES, "threshold") as searcher:
            for _, loaded in stream():
                futures = [
                    [searcher.submit(pruner.bounds_and_weights, x, e) for e in range(len(EXPERTS))] for x in loaded
                ]
                pairs.extend((x, [f.result() for f in each]) for x, each in zip(loaded, futures, strict=True))

    def applying():
        kernels.merges.clear()
        with ThreadPoolExecutor(SEARCHES, "check") as checker:
            checks = []
            for x, tables in pairs:
                merged = merge_matrix(x, tables, kernels, pruner, source, merge, None)
                checks.append(checker.submit(check_finite, x, merged, kernels, merge))
                while len(checks) > SEARCHES:
                    checks.pop(0).result()
            for check in checks:
                check.result()

    def apply():
        for arguments in kernels.merges[:]:
            last = kernels.merge(*arguments)
        jax.block_until_ready(last)  # a device computes in order, so the last result is the end

    yield "survey", surveying
    yield "thresholds", thresholds
    yield "tables, apply, check for NaN", applying
    yield "apply", apply


def copy_bandwidth(mesh: Mesh) -> float:
    """Return the bytes a second that are read and written when one is added to each number of a large array."""
    device = mesh.devices.flat[0]
    numbers = COPIED // (8 if device.platform == "cpu" else 1) // 4
    add = jax.jit(lambda x: x + np.uint32(1))
    array = add(jax.device_put(jnp.zeros(numbers, jnp.uint32), device)).block_until_ready()
    seconds = []
    for _ in range(COPIES):
        begin = time.perf_counter()
        add(array).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * array.nbytes / min(seconds)


def _from_disk(config: BenchmarkConfig) -> dict:
    """Time DPPA of the shape, or of FROM_DISK where that is smaller, from disk to disk."""
    from dppa_jax.benchmark.merges import run_merges

    smaller = min(*config.shape, FROM_DISK, key=lambda name: parameters(model_config(name)))
    runs = run_merges(replace(config, shape=(smaller,), device="", methods=("dppa",)))[smaller]
    return {"shape": smaller, **runs["dppa"]}


def _print(result: dict, timings: dict[str, Timing]) -> None:
    copy, peak = result["copy_bandwidth"], result["peak_bandwidth"]
    count, whole = parameters(model_config(result["shape"])), sum(t.seconds for n, t in timings.items() if n != "apply")
    title = f"{result['shape']}, {count / 1e9:.2f} B, base + {len(EXPERTS)} experts in bf16 on {result['device']}"
    stated = f"{peak / 1e12:.2f} TB/s stated, " if peak else ""
    table = Table("stage", "seconds", "GB of weights", "GB/s", "of a copy", "of the stated", title=title)
    for name, timing in timings.items():
        share = f"{timing.speed / peak:.0%}" if peak else "–"
        numbers = (f"{timing.seconds:.3f}", f"{timing.moved_bytes / 1e9:.1f}", f"{timing.speed / 1e9:.0f}")
        table.add_row(name, *numbers, f"{timing.speed / copy:.0%}", share)
    console().print(table)
    lines = [
        f"bandwidth: {stated}{copy / 1e12:.2f} TB/s in a copy; goal of apply, the kernel alone: {GOAL_SHARE:.0%}",
        f"the whole of DPPA without reading and writing: {whole:.2f} s; goal {GOAL_SECONDS:g} s for 7b on an H100",
        f"a merge of {result['from_disk']['shape']} from disk to disk: {result['from_disk']['seconds']:.1f} s",
    ]
    console().print("\n".join(lines))
