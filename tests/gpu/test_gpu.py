"""On an NVIDIA GPU: the bits of a CPU, for every preset and score, and the benchmark with its goals.

    pip install -e '.[test]' 'jax[cuda12]' && pytest tests/gpu -m gpu -s

needs nothing else; without a GPU everything here is skipped. The benchmark alone:

    python -m dppa_jax.launch --job=benchmark --device=gpu --shape=7b --repeats=5
"""

import json
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import pytest
from command import launch
from support import (
    AWKWARD,
    MemorySink,
    MemorySource,
    assert_same_bits,
    experts_of,
    given_out,
    make_family,
    random_grams,
    random_norms,
)

from dppa_jax.checkpoint.protocol import Source
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS, ties
from dppa_jax.delta.presets import METHODS
from dppa_jax.merging.merger import Layout, merge_checkpoints
from dppa_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.gpu

LAYERS = 2
TWO, THREE = ("math", "law"), ("math", "law", "finance")
PARTITIONS = {"rate": 0.8, "partitions": (0.9, 0.8)}
CHOICES = {
    **{name: {"method": name, "rate": 0.8} for name in METHODS},
    "dppa": {"method": "dppa", **PARTITIONS, "factors": {"math": (1.8, 1.3), "law": (1.1, -0.4)}},
    "dare_dpa": {"method": "dare_dpa", **PARTITIONS, "factors": {"math": (1.8, 1.3)}},
    **{score: {"method": "magnitude", "score": score, "rate": 0.8} for score in ("wanda", "row", "column")},
    "dp_reference": {"method": "dppa", "allocate": "dp_reference", "dpa_combine": "max", **PARTITIONS},
    "bfloat16 deltas": {"method": "dppa", "delta_dtype": "bfloat16", **PARTITIONS},
    "ties told apart": {"method": "dppa", "delta_dtype": "bfloat16", "ties": "exact", **PARTITIONS},
    "float16 deltas": {"method": "dare", "delta_dtype": "float16", "rate": 0.8},
}
DIVIDES = [name for name, axes in CHOICES.items() if METHODS[axes["method"]].combine == "ties"]
FIXED = [name for name, axes in CHOICES.items() if COMBINATIONS[METHODS[axes["method"]].combine].experts[1]]
"""TIES divides by how many experts agree: on NVIDIA GPUs XLA does it by div.full, within 2 ulp, by 1 and 2 exactly."""


@pytest.fixture(scope="module")
def gpu() -> jax.Device:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"NO GPU: nothing of this file has run ({str(error).splitlines()[0]})")


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_merge_has_the_bits_of_a_cpu(choice, dtype, gpu):
    """Merged tensors, saved deltas, rates, thresholds; with two experts, for TIES' division."""
    base, experts = family(dtype, TWO)
    config = configure(choice, TWO)
    (wanted, tables), (found, others) = (merged(base, experts, config, device) for device in (cpu(), gpu))
    for what, tensors in wanted.items():
        assert_same_bits(found[what], tensors, what)
    for name, table in tables.items():
        np.testing.assert_array_equal(others[name], table, name)


@pytest.mark.parametrize("choice", sorted(CHOICES.keys() - {*DIVIDES, *FIXED}))
def test_three_experts_have_the_bits_of_a_cpu(choice, gpu):
    base, experts = family("bfloat16", THREE)
    config = configure(choice, THREE)
    (wanted, _), (found, _) = (merged(base, experts, config, device) for device in (cpu(), gpu))
    assert_same_bits(found["merged"], wanted["merged"], choice)


@pytest.mark.parametrize("choice", DIVIDES)
def test_ties_of_three_experts_differs_by_its_division_alone(choice, gpu):
    """And by no more than 2 ulp of the mean; in bfloat16 a tie of rounding may fall to the other side."""
    base, experts = family("bfloat16", THREE)
    config = configure(choice, THREE, output_dtype="float32")
    (wanted, _), (found, _) = (merged(base, experts, config, device) for device in (cpu(), gpu))
    for name, array in wanted["merged"].items():
        start = base.tensors[name].astype(np.float32)
        ulp = np.spacing(np.maximum(abs(array - start), abs(array)))
        assert (abs(found["merged"][name] - array) <= 2 * ulp).all(), name


@pytest.mark.parametrize("experts", [2, 3])
def test_the_division_of_ties(experts, gpu):
    """What the tests above say of it, on the function itself: exact but where three agree."""
    deltas = np.random.default_rng(0).standard_normal((experts, 1 << 20)).astype(np.float32)
    on = lambda device: np.asarray(jax.jit(ties)([jax.device_put(d, device) for d in deltas]))  # noqa: E731
    wanted, found = on(cpu()), on(gpu)
    agree = abs(np.sign(deltas).sum(axis=0)) == 3
    np.testing.assert_array_equal(found[~agree], wanted[~agree])
    assert (abs(found - wanted) <= 2 * np.spacing(abs(wanted))).all()
    print(f"{experts} experts: {(found != wanted).sum()} of {found.size} means differ, {agree.sum()} are of three")


def test_the_benchmark_of_7b_reaches_its_goals(gpu, tmp_path):
    """Apply at 70 % of the bandwidth of a copy or more, all of DPPA's arithmetic in 2 s or less."""
    if gpu.memory_stats()["bytes_limit"] < 16e9:
        pytest.skip("a GPU of 16 GB or more is needed for layers of 7b")
    launch("--job=benchmark", "--device=gpu", "--shape=7b", "--repeats=3", f"--workdir={tmp_path}")
    result = json.loads((tmp_path / "benchmark" / "device-gpu-7b.json").read_text())
    stages = result["stages"]
    apply = stages["apply"]["moved_bytes"] / stages["apply"]["seconds"]
    assert apply >= 0.7 * result["copy_bandwidth"]
    assert sum(stage["seconds"] for name, stage in stages.items() if name != "apply") <= 2.0
    assert result["from_disk"]["shape"] == "1.1b"


def cpu() -> jax.Device:
    return jax.devices("cpu")[0]


def configure(choice: str, names: tuple[str, ...], **more) -> MergeConfig:
    axes = {"coefficients": {"math": 0.7}, **CHOICES[choice], **more}
    names = experts_of(axes["method"], names)
    if axes["method"] == "darex_q":
        axes["q"] = dict.fromkeys(names, 0.25)
    return MergeConfig(names, **axes)


def family(dtype: str, names: tuple[str, ...]) -> tuple[MemorySource, dict[str, MemorySource]]:
    """Of sizes that nothing divides; mixed: norms in float32, layers in bfloat16, the rest in float16."""
    base, experts = make_family(names, "float32" if dtype == "mixed" else dtype, num_hidden_layers=LAYERS, **AWKWARD)
    if dtype == "mixed":
        stored = lambda name: np.float32 if "norm" in name else ml_dtypes.bfloat16 if "layers" in name else np.float16  # noqa: E731
        base = MemorySource(base.config, {name: array.astype(stored(name)) for name, array in base.tensors.items()})
    return base, experts


def merged(
    base: Source, experts: Mapping[str, Source], config: MergeConfig, device: jax.Device
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Tensors of the merge and of every expert's delta, and the outcome's tables."""
    experts = {name: experts[name] for name in config.experts}
    sink, deltas = MemorySink(), {name: MemorySink() for name in experts}
    mesh = make_mesh("layer=1,row=1", devices=[device])
    with jax.default_device(device):
        seen = {"norms": random_norms(base, experts), "input_grams": given_out(random_grams(base, experts))}
        outcome = merge_checkpoints(base, experts, config, sink, mesh, Layout(), deltas, quiet=True, **seen)
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    tensors = {name: found.arrays(shapes) for name, found in {"merged": sink, **deltas}.items()}
    return tensors, {name: getattr(outcome, name) for name in ("rates", "thresholds", "densities", "weights")}
