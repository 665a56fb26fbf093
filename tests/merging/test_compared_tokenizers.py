"""Tokenizers of base and experts: other ids, ids without a row, other ends of text, files that are not there."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from families import WORDS, edit_json, read_json, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.merging.tokenizers import Tokenizer, _moved, check_tokenizers

FAST = "--method=task_arithmetic"
ROWS = 64  # of the embeddings; the tokenizer has 63 tokens


def edit_vocabulary(directory: Path, **ids: int) -> None:
    content = read_json(directory / "tokenizer.json")
    content["model"]["vocab"] |= ids
    write_json(directory / "tokenizer.json", content)


def unigram(directory: Path, words: list[str]) -> None:
    write_json(directory / "tokenizer.json", {"model": {"type": "Unigram", "vocab": [[word, -1.5] for word in words]}})


def test_tokens_with_other_ids_are_told_once(merge):
    edit_vocabulary(merge.law, word0=4, word1=3)
    told = merge.warnings(FAST)
    assert len(told) == 1
    assert (
        "expert 'law': 2 of the 63 tokens of the base have other ids in its tokenizer: 'word0' 3 → 4, 'word1' 4 → 3;"
        in told[0]
    )


def test_other_formats_of_the_same_tokens(merge):
    """Another layout of the file, tokens that are added in another place, a unigram model."""
    write_json(merge.math / "tokenizer.json", read_json(merge.base / "tokenizer.json"))
    content = read_json(merge.law / "tokenizer.json")
    content["added_tokens"] = [{"id": content["model"]["vocab"].pop("word7"), "content": "word7", "special": False}]
    write_json(merge.law / "tokenizer.json", content)
    assert merge.warnings(FAST) == []
    unigram(merge.law, [*WORDS, "more"])
    (told,) = merge.warnings(FAST, "--overwrite")
    assert "the merge has no rows for them: 'more'; --vocabulary=union keeps them" in told
    unigram(merge.law, [WORDS[1], WORDS[0], *WORDS[2:]])
    assert "2 of the 63 tokens" in merge.warnings(FAST, "--overwrite")[0]


@pytest.mark.parametrize("model", ["math", "base"])
def test_no_tokenizer_to_compare_with(merge, model):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (merge.root / model / name).unlink()
    told = merge.warnings(FAST)
    if model == "math":
        assert told == []
    else:
        assert any(f"the base in {merge.base} has no tokenizer files" in said for said in told)


def test_chosen_tokenizer_that_is_not_there(merge):
    (merge.law / "tokenizer.json").unlink()
    message = merge.refusal("--tokenizer=law")
    assert (
        f"--tokenizer=law: {merge.law} has no tokenizer files (tokenizer.json, tokenizer.model, vocab.json)" in message
    )


@pytest.mark.parametrize("model", ["law", pytest.param("base", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("added", "pad_token"),
    [({"[PAD]": ROWS}, None), ({"last": ROWS - 1}, "[PAD]"), ({"last": ROWS - 1}, {"content": "[PAD]"})],
)
def test_an_id_without_a_row_is_told(merge, model, added, pad_token):
    """A token has it; or a special token has none, and gets the next one."""
    edit_vocabulary(merge.root / model, **added)
    edit_json(merge.root / model / "tokenizer_config.json", pad_token=pad_token)
    told = merge.warnings(FAST, f"--tokenizer={model}")
    assert (
        f"--tokenizer={model}: its tokens have ids up to 64 ('[PAD]'), the merged model has only the rows 0 to 63"
        in told
    )


def test_a_tokenizer_that_is_not_chosen_may_have_more_tokens(merge):
    edit_vocabulary(merge.law, **{"[PAD]": ROWS})
    assert merge.warnings(FAST) == []


def test_special_tokens_without_a_row_are_told(merge):
    edit_json(merge.base / "config.json", pad_token_id=ROWS)
    edit_json(merge.base / "generation_config.json", eos_token_id=[2, 70])
    told = "\n".join(merge.warnings(FAST))
    assert "config.json of the base says pad_token_id 64, the merged model has only the rows 0 to 63" in told
    assert "generation_config.json says eos_token_id 70, the merged model has only the rows 0 to 63" in told


def test_another_end_of_text_is_told(merge):
    """That of an expert; then that of its tokenizer, where the merge gets it."""
    edit_json(merge.law / "config.json", eos_token_id=7)
    edit_json(merge.law / "generation_config.json", eos_token_id=[2, 7])
    assert any(
        "expert 'law': its texts end with token 2, 7, those of the merge with 2" in t for t in merge.warnings(FAST)
    )
    told = merge.warnings(FAST, "--overwrite", "--tokenizer=law")
    assert told == []  # its generation_config.json says so
    edit_json(merge.law / "tokenizer_config.json", eos_token={"content": "word9"})
    told = merge.warnings(FAST, "--overwrite", "--tokenizer=law")
    assert "--tokenizer=law: its texts end with 'word9' (12), those of the merge with 2, 7 by config.json" in told


def test_a_template_that_only_an_expert_has_is_told(merge):
    (merge.base / "chat_template.jinja").unlink()
    assert any("--tokenizer=math takes it" in told for told in merge.warnings(FAST))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"vocab": {"a": "b"}}}', "[" * 100000])
def test_a_damaged_tokenizer(merge, content):
    """It is refused where the merge gets it; elsewhere it cannot be compared."""
    (merge.law / "tokenizer.json").write_text(content)
    told = merge.warnings(FAST)
    assert len(told) == 1
    assert f"{merge.law / 'tokenizer.json'} is not a tokenizer" in told[0]
    merge.output = merge.root / "other"
    assert f"{merge.law / 'tokenizer.json'} is not a tokenizer" in merge.refusal("--tokenizer=law")


def test_a_tokenizer_that_leads_out_is_not_read(merge):
    """Whose file it is decides what a message about it would show."""
    outside = merge.root / "secret"
    (merge.law / "tokenizer.json").rename(outside)
    (merge.law / "tokenizer.json").symlink_to(outside)
    told = merge.warnings(FAST)
    assert len(told) == 1
    assert f"{merge.law / 'tokenizer.json'} leads outside the directory" in told[0]


def test_slow_formats_are_compared_by_their_bytes(tmp_path, caplog):
    models = {}
    for name in ("base", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(b"other" if name == "other" else b"base")
        models[name] = Tokenizer(name, tmp_path / name, {"vocab_size": ROWS})
    check_tokenizers(models, "base")
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "expert 'other': its tokenizer.model is not the base's"
    ]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 9)), st.permutations("abcdefgh"))
def test_a_token_has_another_id_or_its_id_another_token(theirs, words):
    ours = {word: place for place, word in enumerate(words)}
    theirs = {word: id for id, word in {id: word for word, id in theirs.items()}.items()}  # one token for each id
    conflict = lambda token: theirs[token] != ours[token] if token in theirs else ours[token] in theirs.values()  # noqa: E731
    assert [token for token, _, _ in _moved(ours, theirs)] == [token for token in words if conflict(token)]


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda x: (
            st.lists(x, max_size=2)
            | st.dictionaries(st.sampled_from(["model", "vocab", "added_tokens", "id", "content"]), x)
        ),
        max_leaves=8,
    )
)
def test_any_json_is_a_tokenizer_or_a_message(tmp_path_factory, value):
    directory = tmp_path_factory.getbasetemp()
    (directory / "tokenizer.json").write_text(json.dumps(value))
    with suppress(CheckpointError):
        assert all(type(id) is int for id in Tokenizer("law", directory, {}).ids.values())
