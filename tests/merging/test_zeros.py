"""Zeros in place of weights, as an unfinished download leaves them; and zeros that sound models have."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from families import Q_PROJ, edit_tensors, llama_config
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.architecture.specs import CheckpointError, Role, tensor_specs
from dppa_jax.merging.rows import Matrix, RowRange
from dppa_jax.merging.zeros import AT_THE_END, check_zeros

FAST = "--method=task_arithmetic"
CONFIG = llama_config(attention_bias=True, num_hidden_layers=2)
SPECS = tensor_specs(CONFIG)
EMBEDDINGS, NORM, BIAS = (
    "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
)  # fmt: skip


class Downloaded:
    """A model whose tensors lie in a file, or in none."""

    config, specs = CONFIG, SPECS

    def __init__(self, file: str | None = "file"):
        self.tensors = {name: SimpleNamespace(file=file) for name in SPECS}

    def read_rows(self, name, start, stop, out) -> None:
        raise AssertionError("what was read is given")


def is_refused(name: str, zeros: list[set[int]], dtype=np.float32, file: str | None = "file") -> bool:
    """Are a base and its experts refused that have zeros in these rows of a tensor?"""
    spec = SPECS[name]
    arrays = [np.ones((spec.rows, spec.columns), dtype) for _ in zeros]
    for array, rows in zip(arrays, zeros, strict=True):
        array[list(rows)] = 0
        array[:, 0] = 0  # an element alone says nothing
    matrix = Matrix((RowRange(name, 0, spec.rows),), spec.columns)
    sources = [Downloaded(file and f"{file}{i}") for i in range(len(zeros))]
    try:
        check_zeros(sources, matrix, arrays)
    except CheckpointError:
        return True
    return False


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([Q_PROJ, NORM, BIAS, EMBEDDINGS]),
    st.lists(st.sets(st.integers(0, 63), max_size=4) | st.just(set(range(64))), min_size=2, max_size=3),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_rows_that_only_one_model_has_as_zeros(name, zeros, dtype):
    spec = SPECS[name]
    base, *experts = ({row for row in rows if row < spec.rows} for rows in zeros)
    wanted = False
    for expert in experts:
        for alone, is_base in ((expert - base, False), (base - expert, True)):
            if spec.role is Role.VOCABULARY:
                wanted |= len([row for row in alone if row < spec.rows * (1 - 1 / AT_THE_END)]) > 1
            elif spec.role is Role.LINEAR or not is_base:
                wanted |= bool(alone)
    assert is_refused(name, [base, *experts], dtype) == wanted
    assert not is_refused(name, [base, *experts], dtype, file=None)  # a model in memory was not downloaded


def test_a_row_of_a_chunk_or_of_a_stack_is_named_by_its_place_in_the_tensor():
    arrays = [np.ones((64, 32), np.float32) for _ in range(2)]
    arrays[1][40:44] = 0
    stacked = Matrix((RowRange(Q_PROJ, 0, 32), RowRange("model.layers.1.self_attn.q_proj.weight", 0, 32)), 32)
    with pytest.raises(
        CheckpointError, match=r"^law: 4 rows of model.layers.1.self_attn.q_proj.weight .* is row 8; in base "
    ):
        check_zeros([Downloaded("base"), Downloaded("law")], stacked, arrays)
    chunk = Matrix((RowRange("lm_head.weight", 10, 30),), 32)
    with pytest.raises(CheckpointError, match=r"4 rows of lm_head.weight are zeros, the first is row 12;"):
        check_zeros([Downloaded(), Downloaded()], chunk, [arrays[0][:20], arrays[1][38:58]])


def test_rows_that_float16_holds_as_zeros_are_no_zeros():
    base = np.full((32, 32), 1e-9, ml_dtypes.bfloat16)
    matrix = Matrix((RowRange(Q_PROJ, 0, 32),), 32)
    check_zeros([Downloaded(), Downloaded()], matrix, [base, base.astype(np.float16)])


@pytest.mark.parametrize(("model", "method"), [("base", "task_arithmetic"), ("law", "dppa")])
def test_a_file_that_ends_in_zeros_is_refused(merge, model, method):
    file = merge.root / model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: -len(content) // 4] + bytes(len(content) // 4))
    message = merge.refusal(f"--method={method}")
    assert f"{file}: " in message
    assert "are zeros, the first is row" in message
    assert "Download it again; --allow_other_base merges it" in message
    assert (merge(f"--method={method}", "--allow_other_base") / "config.json").is_file()


def test_a_family_with_sound_zeros_is_merged(merge):
    """Padding, unused and added tokens that are 0 in one model alone."""
    for model, rows in (("base", [0, 60, 61]), ("law", [0, 1, 62, 63])):

        def change(tensors, rows=rows):
            for name in (EMBEDDINGS, "lm_head.weight"):
                tensors[name] = tensors[name].copy()
                tensors[name][rows] = 0

        edit_tensors(merge.root / model / "model.safetensors", change)
    assert merge.warnings(FAST) == []
