"""--job=inspect: the numbers of its tables, against numpy on the whole delta."""

import json

import numpy as np
import pytest
from command import launch
from families import LINEARS, write_family
from safetensors.numpy import load_file

EXPERTS = ("math", "law")
LAYERS = 3
MULTIPLE = 2  # these deltas are normal: none is five times the mean


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """inspect.json, what was printed is not looked at, and the deltas."""
    root = write_family(tmp_path_factory.mktemp("inspect"), EXPERTS)
    experts = [f"--expert={name}={root / name}" for name in EXPERTS]
    flags = (
        "--method=dppa",
        "--rate=0.8",
        f"--significance_multiple={MULTIPLE}",
        f"--workdir={root}",
        "--mesh=layer=1,row=1",
    )
    launch("--job=inspect", f"--base={root / 'base'}", *experts, *flags)
    base = {name: array.astype(np.float32) for name, array in load_file(root / "base" / "model.safetensors").items()}
    deltas = {}
    for name in EXPERTS:
        expert = load_file(root / name / "model.safetensors")
        deltas[name] = {tensor: expert[tensor].astype(np.float32) - base[tensor] for tensor in base}
    return json.loads((root / "inspect.json").read_text()), base, deltas


@pytest.mark.parametrize("name", EXPERTS)
def test_extremes_are_exact_and_deciles_are_the_quantiles_of_the_whole_delta(inspected, name):
    found, _, deltas = inspected
    whole = np.concatenate([delta.ravel() for delta in deltas[name].values()])
    assert found[name]["min"] == whole.min()
    assert found[name]["max"] == whole.max()
    expected = np.quantile(whole, np.arange(1, 10) / 10)
    np.testing.assert_allclose(found[name]["deciles"], expected, atol=0.02 * whole.std())


@pytest.mark.parametrize("name", EXPERTS)
def test_norms_of_every_layer_and_linear(inspected, name):
    found, base, deltas = inspected
    assert len(found[name]["norm"]) == LAYERS * len(LINEARS)
    for tensor, found_norm in found[name]["norm"].items():
        norm = np.linalg.norm(deltas[name][tensor].astype(np.float64))
        assert found_norm == pytest.approx(norm, rel=1e-5)
        share = found[name]["relative_norm"][tensor]
        assert share == pytest.approx(norm / np.linalg.norm(base[tensor].astype(np.float64)), rel=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
def test_mean_size_and_norm_of_all_linears_together(inspected, name):
    found, base, deltas = inspected
    whole = np.concatenate([deltas[name][tensor].ravel() for tensor in found[name]["norm"]]).astype(np.float64)
    of_base = np.concatenate([base[tensor].ravel() for tensor in found[name]["norm"]]).astype(np.float64)
    assert found[name]["mean_size"] == pytest.approx(abs(whole).mean(), rel=1e-6)
    share = np.linalg.norm(whole) / np.linalg.norm(of_base)
    assert found[name]["whole_relative_norm"] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("name", EXPERTS)
def test_significance_is_the_sum_of_outlying_magnitudes(inspected, name):
    found, _, deltas = inspected
    assert len(found[name]["linear_significance"]) == LAYERS * len(LINEARS)
    for tensor, significance in found[name]["linear_significance"].items():
        size = np.abs(deltas[name][tensor])
        outliers = size[size > np.float32(MULTIPLE) * size.mean(dtype=np.float64).astype(np.float32)]
        assert outliers.size
        assert significance == pytest.approx(outliers.sum(dtype=np.float64), rel=1e-6)


def test_rates_of_every_partition_average_near_the_nominal_rate(inspected):
    found, _, _ = inspected
    for name in EXPERTS:
        for nominal in ("0.9", "0.8"):
            rates = list(found[name]["rates"][nominal].values())
            assert abs(np.mean(rates) - float(nominal)) < 0.08
            assert len(set(rates)) > 1


def test_models_may_be_anywhere_under_the_working_directory(tmp_path, monkeypatch):
    root = write_family(tmp_path / "models", ("math",))
    monkeypatch.chdir(tmp_path)
    launch("--job=inspect", "--base=models/base", "--expert=math=models/math", "--mesh=layer=1,row=1")
    found = json.loads((tmp_path / "runs" / "inspect.json").read_text())["math"]
    assert found["rates"] == {}, "without --method there is no rate to show"
    assert root.is_dir()
