"""A coefficient for every tensor: checked by name, and the same merge as rules that name each tensor."""

import json
import os

import hypothesis
import pytest
from hostile import damaged, other_form, read_or_message
from support import assert_same_bits, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import read_coefficients

EXPERTS = ("math", "law")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models():
    return make_family(EXPERTS)


@pytest.fixture
def by_tensor(models) -> dict[str, float]:
    return {name: 0.1 + i / 100 for i, name in enumerate(models[0].specs)}


def test_they_give_the_bits_of_rules_that_name_each_tensor(models, by_tensor):
    rules = tuple((f"^{name}$", value) for name, value in by_tensor.items())
    wanted = merge_to_arrays(*models, MergeConfig(EXPERTS, "dppa", rate=0.8, tensor_coefficients=rules))
    found = merge_to_arrays(
        *models, MergeConfig(EXPERTS, "dppa", rate=0.8, coefficients=dict.fromkeys(EXPERTS, by_tensor))
    )
    assert_same_bits(found.tensors, wanted.tensors)


def test_beside_one_number_for_another_expert_and_rules_win(models, by_tensor):
    config = MergeConfig(EXPERTS, "dare", coefficients={"math": by_tensor, "law": 0.5})
    level = MergeConfig(EXPERTS, "dare", coefficients={"math": dict.fromkeys(by_tensor, 0.2), "law": 0.5})
    plain = MergeConfig(EXPERTS, "dare", coefficients={"math": 0.2, "law": 0.5})
    assert_same_bits(merge_to_arrays(*models, level).tensors, merge_to_arrays(*models, plain).tensors)
    ruled = MergeConfig(EXPERTS, "dare", coefficients=config.coefficients, tensor_coefficients=((".", 0.3),))
    wanted = MergeConfig(EXPERTS, "dare", coefficients=dict.fromkeys(EXPERTS, 0.3))
    assert_same_bits(merge_to_arrays(*models, ruled).tensors, merge_to_arrays(*models, wanted).tensors)


def test_a_missing_or_unknown_tensor_is_refused_with_the_nearest_spelling(models, by_tensor):
    missing = {name: value for name, value in by_tensor.items() if name != UP}
    for given, message in (
        (missing, f"'law': none for the tensor {UP}"),
        ({**missing, UP.replace("up", "upp"): 0.3}, rf"has no tensor .*upp_proj.weight. Did you mean '{UP}'"),
        ({**by_tensor, UP.replace("1", "7"): 0.3}, "has no tensor model.layers.7"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_to_arrays(*models, MergeConfig(EXPERTS, "dppa", coefficients={"law": given}))


def test_a_value_must_be_a_finite_number(by_tensor):
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"law {UP}: {bad} is not a finite number"):
            MergeConfig(EXPERTS, "dppa", coefficients={"law": {**by_tensor, UP: bad}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON .nested too deep"),
        ("[1]", "Expected `object`, got `array`. Give --coefficient a file that AdaMerging wrote"),
        ("{}", "missing required field `coefficients`"),
        ('{"coefficients": {"math": true, "law": 1}}', "got `bool`"),
        ('{"coefficients": {"math": 1%s, "law": 1}}' % ("0" * 400), "found.json"),
        ('{"coefficients": {"math": 0.2}}', "no coefficient of the expert 'law'"),
        ('{"coefficients": {"math": 0.2, "low": 1}}', "Did you mean 'law'"),
        ('{"coefficients": {"math": "x", "law": 1}}', "Expected `float | object`, got `str`"),
        ('{"coefficients": {"math": 0.2, "law": 1}, "finished": false}', "has not finished"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    file = tmp_path / "found.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_coefficients(file, EXPERTS)


CONTENT = {"coefficients": {"math": 0.2, "law": {"model.norm.weight": 1}}, "finished": True, "groups": ["all"]}


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(content=damaged(json.dumps(CONTENT).encode()) | other_form(CONTENT))
def test_any_file_is_numbers_or_a_message_with_its_name(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("coefficients") / "found.json"
    file.write_bytes(content)
    found = read_or_message(lambda: read_coefficients(file, EXPERTS), file)
    assert found is None or [type(found[name]) in (float, dict) for name in EXPERTS] == [True, True]


def test_neither_a_pipe_nor_an_endless_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json is a pipe"):
        read_coefficients(tmp_path / "pipe.json", EXPERTS)
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 3 << 30)
    with pytest.raises(ValueError, match=r"large\.json: 3221225472 bytes"):
        read_coefficients(tmp_path / "large.json", EXPERTS)


def test_a_file_has_numbers_or_numbers_by_tensor(by_tensor, tmp_path):
    given = {"math": by_tensor, "law": 0.5}
    (tmp_path / "found.json").write_text(json.dumps({"coefficients": given}))
    assert read_coefficients(tmp_path / "found.json", EXPERTS) == given
