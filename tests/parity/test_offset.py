"""The first step of the authors' code, get_offset: the delta itself, bit for bit, in the models' dtype."""

import pytest
from golden import DTYPES, EMBEDDINGS
from safetensors.numpy import load_file
from support import assert_same_bits, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.compatible import check_compatible

OFFSETS = ("bf16/expert0", "fp32/expert0")


@pytest.mark.parametrize("case", OFFSETS)
def test_delta_equals_the_authors_offset_bit_for_bit(case, golden, open_model):
    family, name = case.split("/")
    config = MergeConfig((name,), method="task_arithmetic", delta_dtype=DTYPES[family].name)
    merge = merge_to_arrays(open_model(family, "base"), {name: open_model(family, name)}, config, deltas=True)
    assert_same_bits(merge.deltas[name], load_file(golden / "offset" / f"{case}.safetensors"), case)


def test_every_golden_offset_is_compared(golden):
    files = (golden / "offset").rglob("*.safetensors")
    assert {f"{file.parent.name}/{file.stem}" for file in files} == set(OFFSETS)


def test_differs_from_the_authors_added_vocabulary_is_dropped_where_they_keep_it_as_it_is(open_model, caplog):
    """Their offset of an expert with more rows than the base has those rows, raw; we drop them with a warning.

    Their choice makes the merged model larger than the base, with rows to which no other expert's delta can be added.
    """
    base, expert = open_model("fp32", "base"), open_model("fp32", "expert2")
    assert expert.specs[EMBEDDINGS].rows == base.specs[EMBEDDINGS].rows + 1
    config = MergeConfig(("expert2",), method="task_arithmetic")
    merge = merge_to_arrays(base, {"expert2": expert}, config, deltas=True)
    assert merge.tensors[EMBEDDINGS].shape == merge.deltas["expert2"][EMBEDDINGS].shape == base.specs[EMBEDDINGS].shape
    check_compatible(base, {"expert2": expert})  # of which a merge in memory, as above, tells nothing
    assert "1 rows of model.embed_tokens.weight" in caplog.text
