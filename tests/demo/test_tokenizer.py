"""The demo tokenizer loads where tokenizer.json does, and gives every text of the family back."""

from itertools import islice

import pytest
from transformers import AutoTokenizer

from dppa_jax.demo.family import model_config
from dppa_jax.demo.text import GENERATORS, held_out, stream
from dppa_jax.demo.tokenizer import Encoder, save_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("task", GENERATORS)
def test_every_text_survives_a_round_trip(tokenizer, task):
    for sample in [*islice(stream(task, "train", "round trip"), 500), *held_out(task, "test", 200)]:
        for text in (f"{sample.prompt} {sample.answer}", sample.plain):
            tokens = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in tokens, text
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_a_text_begins_with_bos_and_ends_without_eos(tokenizer):
    tokens = tokenizer("What is 347 plus 5? Sum:")["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in tokens


def test_numbers_are_split_into_digits(tokenizer):
    assert tokenizer.tokenize("347 plus 5")[-5:] == ["▁3", "4", "7", "▁plus", "▁5"]


def test_an_answer_alone_decodes_without_its_space(tokenizer):
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("Sum:", "Sum: 352"))
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode([*whole[len(prompt) :], tokenizer.eos_token_id], skip_special_tokens=True) == "352"


def test_special_tokens_are_those_of_the_model(tokenizer):
    config = model_config(tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, (tokenizer.eos_token_id,))
    assert tokenizer.pad_token_id is not None
    assert config.vocab_size == max(tokenizer.get_vocab().values()) + 1
    assert 100 < config.vocab_size < 1000


def test_training_encodes_as_transformers_does(directory, tokenizer):
    encoder = Encoder(directory)
    texts = ["", *(sample.plain for task in GENERATORS for sample in islice(stream(task, "train", "as"), 50))]
    assert encoder(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert len(encoder) == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(encoder, name) == getattr(tokenizer, name)
