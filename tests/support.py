"""Merges in memory: checkpoints as dicts of arrays in, dicts of arrays out, through the real pipeline."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from families import DTYPES, llama_config

from dppa_jax.checkpoint import tensor_specs
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.delta.presets import METHODS
from dppa_jax.merging.merger import Layout, Outcome, merge_checkpoints
from dppa_jax.runtime.mesh import make_mesh

ONE_DEVICE = "layer=1,row=1"
AWKWARD = {
    "hidden_size": 70,
    "intermediate_size": 203,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "head_dim": 29,
    "vocab_size": 101,
}
"""Rows and columns that neither 8 devices nor folds of 8 and 64 divide: linears 203×70, 29×70 and 70×203."""


class MemorySource:
    """A checkpoint of arrays: what `merge_checkpoints` asks of a base or an expert."""

    def __init__(self, config: Mapping, tensors: Mapping[str, np.ndarray]):
        self.config, self.tensors, self.specs = dict(config), dict(tensors), tensor_specs(config)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        out[...] = np.atleast_2d(self.tensors[name])[start:stop].reshape(out.shape)


class MemorySink:
    """Collects the rows that a merge writes and insists that each is written once."""

    def __init__(self):
        self.rows: dict[str, dict[int, np.ndarray]] = {}

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        pieces = self.rows.setdefault(name, {})
        assert start not in pieces, f"{name}: row {start} is written twice"
        pieces[start] = np.array(rows)

    def arrays(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        whole = {}
        for name, pieces in self.rows.items():
            starts = sorted(pieces)
            assert starts[0] == 0, f"{name}: the first rows are missing"
            for start, following in pairwise(starts):
                assert start + len(pieces[start]) == following, f"{name}: rows are missing or overlap"
            whole[name] = np.concatenate([pieces[start] for start in starts]).reshape(shapes[name])
        return whole


@dataclass(frozen=True)
class Merge:
    tensors: dict[str, np.ndarray]
    deltas: dict[str, dict[str, np.ndarray]]  # by expert; empty unless asked for
    outcome: Outcome


def merge_to_arrays(
    base: Source,
    experts: Mapping[str, Source],
    config: MergeConfig,
    mesh: str = ONE_DEVICE,
    layout: Layout | None = None,
    deltas: bool = False,
    norms: Mapping | None = None,
    input_grams: Mapping | None = None,
) -> Merge:
    """`merge_checkpoints` with every tensor of the output, and of the saved deltas, as an array."""
    sink, delta_sinks = MemorySink(), {name: MemorySink() for name in experts} if deltas else None
    layout = layout or Layout(base.config["num_hidden_layers"])
    seen = {"norms": norms, "input_grams": input_grams}
    outcome = merge_checkpoints(base, experts, config, sink, make_mesh(mesh), layout, delta_sinks, quiet=True, **seen)
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    found = {name: s.arrays(shapes) for name, s in (delta_sinks or {}).items()}
    return Merge(sink.arrays(shapes), found, outcome)


def make_family(
    experts: tuple[str, ...] = ("math", "law"), dtype: str = "bfloat16", seed: int = 0, **changes
) -> tuple[MemorySource, dict[str, MemorySource]]:
    """A base and experts with heavy-tailed deltas whose sizes differ by tensor, so that rates fluctuate."""
    config = llama_config(dtype=dtype, **changes)
    generator = np.random.default_rng(seed)
    base = {
        name: (generator.normal(0, 0.2, spec.shape) + (len(spec.shape) == 1)).astype(DTYPES[dtype])
        for name, spec in tensor_specs(config).items()
    }
    return MemorySource(config, base), {
        name: MemorySource(config, heavy_tailed(base, np.random.default_rng([seed, i + 1])))
        for i, name in enumerate(experts)
    }


def coarse_family(experts: tuple[str, ...], **changes) -> tuple[MemorySource, dict[str, MemorySource]]:
    """A base of zeros and experts with deltas of some ten distinct sizes, in float32: ties at every threshold."""
    base, tuned = make_family(experts, "float32", **changes)
    zeros = {name: np.zeros_like(array) for name, array in base.tensors.items()}

    def rounded(expert: MemorySource) -> MemorySource:
        deltas = {name: np.rint((array - base.tensors[name]) * 100) / 64 for name, array in expert.tensors.items()}
        return MemorySource(base.config, {name: delta.astype(np.float32) for name, delta in deltas.items()})

    return MemorySource(base.config, zeros), {name: rounded(expert) for name, expert in tuned.items()}


def heavy_tailed(base: Mapping[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    tuned = {}
    for name, array in base.items():
        size = 0.01 * generator.uniform(0.5, 2.0)
        noise = generator.standard_t(generator.choice([2.5, 4.0, 8.0]), array.shape)
        tuned[name] = (array.astype(np.float32) + size * noise).astype(array.dtype)
    return tuned


def from_linears(matrices: list[np.ndarray], dtype, **changes) -> tuple[MemorySource, MemorySource, list[str]]:
    """(base, expert, names of the linears): one decoder layer over a base of zeros, so that these are the deltas."""
    config = llama_config(num_hidden_layers=1, dtype=np.dtype(dtype).name, **changes)
    specs = tensor_specs(config)
    zeros = {name: np.zeros(spec.shape, dtype) for name, spec in specs.items()}
    linears = [name for name, spec in specs.items() if spec.linear is not None]
    given = {n: m.astype(dtype).reshape(zeros[n].shape) for n, m in zip(linears, matrices, strict=True)}
    return MemorySource(config, zeros), MemorySource(config, zeros | given), linears


def experts_of(method: str, experts: tuple[str, ...]) -> tuple[str, ...]:
    """As many of the experts as a preset takes."""
    return experts[: COMBINATIONS[METHODS[method].combine].experts[1]]


def random_norms(base: Source, experts: Iterable[str], seed: int = 5) -> dict[str, dict[str, np.ndarray]]:
    """Activation norms for calibrated scores: other ones for every expert, tensor and column."""
    generator = np.random.default_rng(seed)
    linears = [spec for spec in base.specs.values() if spec.linear is not None]
    return {
        expert: {spec.name: generator.lognormal(0, 1, spec.columns).astype(np.float32) for spec in linears}
        for expert in experts
    }


def random_grams(base: Source, experts: Iterable[str], seed: int = 6) -> dict[str, dict[str, np.ndarray]]:
    """Mean products of the inputs of linears, which are correlated: other ones for every expert and tensor."""
    generator = np.random.default_rng(seed)

    def gram(columns: int) -> np.ndarray:
        inputs = generator.normal(size=(2 * columns, columns)) @ generator.normal(size=(columns, columns))
        return (inputs.T @ inputs / len(inputs)).astype(np.float32)

    linears = [spec for spec in base.specs.values() if spec.linear is not None]
    return {expert: {spec.name: gram(spec.columns) for spec in linears} for expert in experts}


def given_out(grams: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Callable[[str], np.ndarray]]:
    """As a merge takes them."""
    return {expert: own.__getitem__ for expert, own in grams.items()}


def linear_names(config: Mapping) -> list[str]:
    """In the order of the outcome's tables: layers, then linears."""
    return [name for name, spec in tensor_specs(config).items() if spec.linear is not None]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Also of zeros' signs, and of dtypes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_bits(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], what: str = "") -> None:
    assert found.keys() == wanted.keys()
    different = [
        f"{name}: {int((found[name] != wanted[name]).sum())} of {wanted[name].size} values ({found[name].dtype})"
        for name in wanted
        if not same_bits(found[name], wanted[name])
    ]
    assert not different, f"{what}: " + "; ".join(different)
