"""What is learned from: rows of tokens that keep examples apart, in an order that a seed and a step decide."""

import copy

import hypothesis
import jax
import numpy as np
import pytest
from hostile import damaged, other_form, read_or_message
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dppa_jax.demo.tokenizer import save_tokenizer
from dppa_jax.finetune.data import Example, Rows, batches, encode, encode_packed, read_examples
from dppa_jax.finetune.train import loss_sums
from dppa_jax.model import DecoderConfig, forward, init_tree

LENGTH = 40
EXAMPLES = [Example(f"What is {n} plus {n * 7}? Sum:", f" {n * 8}") for n in range(1, 60)] + [
    Example("", f"Nokia said its profit rose to {n} in May.") for n in range(20)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def config(tokenizer) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


@pytest.fixture(scope="module")
def tree(config) -> dict:
    return init_tree(config, jax.random.key(0), stddev=0.3)


@pytest.fixture(scope="module")
def packed(tokenizer) -> Rows:
    return encode_packed(EXAMPLES, tokenizer, LENGTH, seed=1)


def pieces(rows: Rows) -> list[tuple[int, int, int]]:
    """(row, start, stop) of the examples in packed rows."""
    found = []
    for row, (positions, learned) in enumerate(zip(rows.positions, rows.learned, strict=True)):
        starts = [at for at in np.flatnonzero(positions == 0) if at + 1 < LENGTH and positions[at + 1] == 1]
        for start, stop in zip(starts, [*starts[1:], LENGTH], strict=True):
            found.append((row, int(start), int(start + 1 + np.flatnonzero(learned[start + 1 : stop])[-1] + 1)))
    return found


# ---- packing


def test_packed_rows_hold_every_example_once_and_whole(tokenizer, packed):
    alone = encode(EXAMPLES, tokenizer, LENGTH)
    ends = [np.flatnonzero(learned)[-1] + 1 for learned in alone.learned]
    wanted = sorted((t[:end].tolist(), seen[:end].tolist()) for t, seen, end in zip(*alone[:2], ends, strict=True))
    found = [(packed.tokens[row, a:b].tolist(), packed.learned[row, a:b].tolist()) for row, a, b in pieces(packed)]
    assert sorted(found) == wanted
    assert packed.count < len(EXAMPLES) / 1.5
    for row, a, b in pieces(packed):
        assert packed.positions[row, a:b].tolist() == list(range(b - a))


def test_packed_examples_have_the_loss_that_they_have_alone(config, tree, tokenizer, packed):
    alone = [float(total) for total, _ in per_row(config, tree, encode(EXAMPLES, tokenizer, LENGTH))]
    found = []
    for row, start, stop in pieces(packed):
        inside = (np.arange(LENGTH) >= start) & (np.arange(LENGTH) < stop)
        one = packed.take(np.array([row]))
        found.append(float(loss_sums(config, tree, one._replace(learned=one.learned & inside))[0]))
    np.testing.assert_allclose(sorted(found), sorted(alone), rtol=1e-5)


def per_row(config, tree, rows: Rows) -> list:
    return [loss_sums(config, tree, rows.take(np.array([row]))) for row in range(rows.count)]


def test_a_packed_token_never_sees_its_neighbour(config, tree, packed):
    row, start, stop = next(piece for piece in pieces(packed) if piece[1] > 0)
    one = packed.take(np.array([row]))
    disturbed = one.tokens.copy()
    outside = np.r_[0:start, stop:LENGTH]
    disturbed[0, outside] = (disturbed[0, outside] + 1) % config.vocab_size
    before, after = (np.asarray(forward(config, tree, tokens, one.positions)) for tokens in (one.tokens, disturbed))
    np.testing.assert_array_equal(after[0, start:stop], before[0, start:stop])
    assert not np.array_equal(after[0, :start], before[0, :start])


def test_what_begins_a_packed_text_is_not_learned_from_the_text_before(packed):
    assert not packed.learned[packed.positions == 0].any()


def test_a_seed_decides_the_packing(tokenizer, packed):
    again, other = (encode_packed(EXAMPLES, tokenizer, LENGTH, seed) for seed in (1, 2))
    np.testing.assert_array_equal(again.tokens, packed.tokens)
    assert not np.array_equal(other.tokens, packed.tokens)


# ---- the order


@pytest.mark.parametrize("batch_size", [3, 10, 25])
def test_every_example_is_used_once_before_any_is_used_again(batch_size):
    used = np.concatenate(list(batches(10, batch_size, 40, seed=0)))
    assert len(used) == 40 * batch_size
    for start in range(0, len(used) - 9, 10):
        assert sorted(used[start : start + 10]) == list(range(10))


def test_a_later_start_goes_on_with_the_same_batches_and_a_seed_decides_them():
    whole = list(batches(10, 3, 12, seed=5))
    np.testing.assert_array_equal(list(batches(10, 3, 12, seed=5, start=7)), whole[7:])
    assert not np.array_equal(list(batches(10, 3, 12, seed=6)), whole)


def test_every_pass_has_an_order_of_its_own():
    used = np.concatenate(list(batches(50, 10, 10, seed=0)))
    assert used[:50].tolist() != used[50:].tolist()


# ---- rows and files


def test_a_row_is_bos_prompt_completion_eos_and_padding(tokenizer):
    rows = encode([Example("What is 347 plus 5? Sum:", " 352")], tokenizer, 18)
    prompt = tokenizer("What is 347 plus 5? Sum:")["input_ids"]
    whole = [*tokenizer("What is 347 plus 5? Sum: 352")["input_ids"], tokenizer.eos_token_id]
    assert rows.tokens[0].tolist() == whole + [tokenizer.pad_token_id] * (18 - len(whole))
    assert np.flatnonzero(rows.learned[0]).tolist() == list(range(len(prompt), len(whole)))


def test_without_a_prompt_everything_but_bos_is_learned(tokenizer):
    rows = encode([Example("", "Nokia said its profit rose in May.")], tokenizer, 16)
    length = len(tokenizer("Nokia said its profit rose in May.")["input_ids"]) + 1
    assert np.flatnonzero(rows.learned[0]).tolist() == list(range(1, length))


def test_a_long_example_is_cut_with_a_warning(tokenizer, caplog):
    with caplog.at_level("WARNING"):
        rows = encode([Example("What is 347 plus 5? Sum:", " 352"), Example("Sum:", " 3")], tokenizer, 13)
    assert rows.tokens.shape == (2, 13)
    assert rows.tokens[0, -1] != tokenizer.eos_token_id
    assert "1 of 2 examples are longer than 13 tokens" in caplog.text


def test_json_lines_are_read(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"id": 7, "completion": "d", "prompt": ""}\n')
    assert read_examples(path) == [Example("a", "b"), Example("", "d")]


def test_a_row_has_one_begin_and_one_end_whatever_tokenizer_and_file_write(tokenizer):
    plain = encode([Example("What is 347 plus 5? Sum:", " 352")], tokenizer, 18)
    ending = copy.deepcopy(tokenizer)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    ending.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> $B", tokens)
    for given in (Example("What is 347 plus 5? Sum:", " 352"), Example("<s>What is 347 plus 5? Sum:", " 352</s>")):
        rows = encode([given], ending, 18)
        np.testing.assert_array_equal(rows.tokens, plain.tokens)
        np.testing.assert_array_equal(rows.learned, plain.learned)


GOOD = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(content=damaged(GOOD) | other_form({"prompt": "a", "completion": "b"}))
def test_any_file_is_examples_or_a_message_with_its_name(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("data") / "examples.jsonl"
    file.write_bytes(content)
    for example in read_or_message(lambda: read_examples(file), file) or ():
        assert "".join(example).encode() is not None  # no half of a character


@pytest.mark.parametrize("line", ['{"prompt": "a"}', "not json", "[1, 2]"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"examples\.jsonl:2.* A line has the form"):
        read_examples(path)


def test_a_file_of_other_bytes_than_utf8_is_named(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "b"}')
    with pytest.raises(ValueError, match=r"examples\.jsonl:1: not UTF-8"):
        read_examples(path)


def test_a_file_without_examples_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no examples"):
        read_examples(tmp_path / "empty.jsonl")
