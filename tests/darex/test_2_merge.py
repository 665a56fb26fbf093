"""Merges with a q of one number and of each linear."""

import json

import numpy as np
import pytest
from command import Merge
from support import assert_same_bits, linear_names, make_family, merge_to_arrays, random_norms

from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import read_q

EXPERTS = ("math", "law")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models():
    return make_family(EXPERTS, "float32")


def deltas(models, method: str, **options) -> dict[str, np.ndarray]:
    """The pruned delta of the first expert, by tensor."""
    config = MergeConfig(EXPERTS, method, **{"rate": 0.9} | options)
    norms = random_norms(models[0], EXPERTS)
    return merge_to_arrays(*models, config, deltas=True, norms=norms).deltas["math"]


def dense(models) -> dict[str, np.ndarray]:
    base, experts = models
    return {name: experts["math"].tensors[name] - array for name, array in base.tensors.items()}


def test_2_what_is_kept_is_the_delta_times_1_over_q(models):
    found, whole = deltas(models, "darex_q", q=dict.fromkeys(EXPERTS, 0.25)), dense(models)
    for name in linear_names(models[0].config):
        kept = found[name] != 0
        np.testing.assert_array_equal(found[name][kept], (whole[name] * np.float32(4))[kept])
        assert 0.05 < kept.mean() < 0.15


def test_2_q_of_the_density_is_dare_bit_for_bit(models):
    assert_same_bits(deltas(models, "darex_q", q=dict.fromkeys(EXPERTS, 1 - 0.9)), deltas(models, "dare"))


def test_2_q_per_linear_changes_that_linear_alone(models, tmp_path):
    linears = linear_names(models[0].config)
    of_linear = dict.fromkeys(linears, 0.2) | {UP: 0.5}
    (tmp_path / "q.json").write_text(json.dumps({"q": {"math": of_linear, "law": 0.2}}))
    plain = deltas(models, "darex_q", q=dict.fromkeys(EXPERTS, 0.2))
    found = deltas(models, "darex_q", q=read_q(tmp_path / "q.json", EXPERTS))
    kept = plain[UP] != 0
    np.testing.assert_array_equal(found[UP][kept], (dense(models)[UP] * np.float32(2))[kept])
    assert_same_bits({n: found[n] for n in found if n != UP}, {n: plain[n] for n in plain if n != UP})


def test_q_of_a_linear_that_is_missing_or_unknown_is_refused(models):
    linears = linear_names(models[0].config)
    for given, message in (
        (dict.fromkeys(linears[1:], 0.2), f"--q of 'math': none for the linear {linears[0]}"),
        (dict.fromkeys([*linears, "model.norm.weight"], 0.2), "has no linear model.norm.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            deltas(models, "darex_q", q={"math": given, "law": 0.2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"q": {"math": 0.2}}', "no q of the expert 'law'"),
        ('{"q": {"math": true, "law": 1}}', "got `bool`.*Give --q a file"),
        ('{"coefficients": {}}', "missing required field `q`"),
    ],
)
def test_a_bad_file_of_q_is_refused(text, message, tmp_path):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_q(tmp_path / "q.json", EXPERTS)


def test_q_below_the_density_is_warned_of(merge: Merge):
    flags = ("--method=darex_q", "--rate=0.9", "--q=0.2", "--q=law=0.05")
    (told,) = [said for said in merge.warnings(*flags) if "--q of" in said]
    assert told.startswith("--q of 'law': 0.05 is below the density 0.1")
    assert not [said for said in merge.warnings("--method=darex_q", "--q=0.1", "--overwrite") if "--q of" in said]
