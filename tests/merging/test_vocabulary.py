"""Vocabularies of base and experts: rows are matched by token, and a union has rows for tokens of experts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from command import Merge, launch
from families import (
    DTYPES,
    edit_json,
    edit_tensors,
    fine_tuned,
    llama_config,
    random_weights,
    read_json,
    write_model,
    write_weights,
)
from safetensors.numpy import load_file

from dppa_jax.checkpoint import Matched, SafetensorsDirectory
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.models import open_job

ORDINARY = ("[UNK]", "<s>", "</s>", *(f"word{i}" for i in range(37)))  # 40 words
PLACES = ("model.embed_tokens.weight", "lm_head.weight")
FAST = ("--method=task_arithmetic", "--coefficient=0.5")
TOKENS = {  # that were added to the 40 words; a row each, and rows that pad the matrix
    "base": (["<pad>", "<tool>"], 44),
    "math": (["<math>", "<pad>", "<tool>"], 43),
    "law": (["<pad>", "<law>", "<math>", "<tool>"], 48),
}


def write_tokenizer(directory: Path, added: Sequence[str], ordinary: Sequence[str] = ORDINARY) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(ordinary)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(token, special=token != "<tool>", normalized=False) for token in added])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def write_models(root: Path, tokens: Mapping[str, tuple[list[str], int]], dtype: str, tied: bool) -> Merge:
    """Base and experts with words and added tokens at places of their own; rows that are the base's are near it."""
    config = llama_config(dtype=dtype, tie_word_embeddings=tied, vocab_size=tokens["base"][1])
    base = random_weights(config)
    for seed, (name, (added, rows)) in enumerate(tokens.items()):
        tensors = fine_tuned(base, seed) if seed else base
        for tensor in set(PLACES) & set(tensors) if seed else ():
            generator = np.random.default_rng([seed, len(tensor)])
            wider = generator.normal(0, 0.2, (rows, 32)).astype(base[tensor].dtype)
            count = min(len(ORDINARY), rows)
            wider[:count] = tensors[tensor][:count]
            tensors[tensor] = wider
        write_model(root / name, config | {"vocab_size": rows}, tensors, tokenizer=False)
        write_tokenizer(root / name, added)
    return Merge(root)


@pytest.fixture
def models(tmp_path: Path) -> Merge:
    return write_models(tmp_path, TOKENS, "bfloat16", tied=False)


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def place(name: str, token: str) -> int:
    """The row of a token, from the table above."""
    return [*ORDINARY, *TOKENS[name][0]].index(token)


def row(models: Merge, name: str, tensor: str, token: str) -> np.ndarray:
    return single(weights(models.root / name)[tensor][place(name, token)])


def added_up(models: Merge, tensor: str, token: str) -> np.ndarray:
    """The base's row of a token, and half of each expert's delta to it, rounded once."""
    start = row(models, "base", tensor, token)
    deltas = [row(models, name, tensor, token) - start for name in ("math", "law")]
    return start + np.float32(0.5) * deltas[0] + np.float32(0.5) * deltas[1]


def assert_rows(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to half a unit in the last place of bfloat16, as sums may be added in another order."""
    np.testing.assert_allclose(single(found), wanted, rtol=2**-8, atol=1e-6)


# ---- base


def test_rows_of_a_token_are_merged_wherever_experts_have_it(models):
    told = models.warnings(*FAST)
    merged, base = weights(models.output), weights(models.base)
    for tensor in PLACES:
        assert merged[tensor].shape == (44, 32)
        for token in (*ORDINARY, "<pad>", "<tool>"):
            assert_rows(merged[tensor][place("base", token)], added_up(models, tensor, token))
        # Row 42 pads the base; math has a token there, and so has law.
        assert merged[tensor][42].tobytes() == base[tensor][42].tobytes()
    assert (models.output / "tokenizer.json").read_bytes() == (models.base / "tokenizer.json").read_bytes()
    lost = [said for said in told if "has no rows for them" in said]
    assert [said.split(": ")[0] for said in lost] == ["expert 'math'", "expert 'law'"]
    assert "2 of its tokens" in lost[1]
    assert "'<law>', '<math>'; --vocabulary=union keeps them" in lost[1]
    assert r"'\<law\>', '\<math\>'" in (models.output / "README.md").read_text()
    recipe = read_json(models.output / "recipe.json")
    assert recipe["vocabulary"] == {
        "rows": 44, "added": {}, "dropped": {"math": ["<math>"], "law": ["<law>", "<math>"]},
    }  # fmt: skip
    assert recipe["flags"]["vocabulary"] == "base"


def test_a_token_that_an_expert_lacks_has_no_delta_of_it(tmp_path):
    """The base has more rows than math, in another dtype, which rounds the base's row."""
    tokens = {"base": (["<pad>", "<tool>"], 44), "math": ([], 40), "law": (["<tool>", "<pad>"], 42)}
    models = write_models(tmp_path, tokens, "float32", tied=True)
    half = {name: array.astype(np.float16) for name, array in weights(models.math).items()}
    write_weights(models.math, half)
    edit_json(models.math / "config.json", dtype="float16")
    models(*FAST)
    merged = weights(models.output)[PLACES[0]]
    start, law = (weights(directory)[PLACES[0]] for directory in (models.base, models.law))
    np.testing.assert_array_equal(merged[40], start[40] + np.float32(0.5) * (law[41] - start[40]))
    np.testing.assert_array_equal(merged[42:], start[42:])


def test_models_with_their_tokens_at_the_same_places_are_read_as_they_are(models):
    """So the bits and the speed are those of a merge that knows nothing of tokens."""
    for name in ("math", "law"):
        config = llama_config(vocab_size=44 + (name == "law"))
        edit_json(models.root / name / "config.json", vocab_size=config["vocab_size"])
        (models.root / name / "model.safetensors").unlink()
        write_weights(models.root / name, random_weights(config, 1))
        write_tokenizer(models.root / name, TOKENS["base"][0])
    experts = {name: str(models.root / name) for name in ("math", "law")}
    job = JobConfig(MergeConfig(tuple(experts), "task_arithmetic"), str(models.base), experts, allow_other_base=True)
    with open_job(job) as opened:
        assert opened.vocabulary is None
        assert {type(model) for model in opened.models.values()} == {SafetensorsDirectory}
    write_tokenizer(models.law, TOKENS["law"][0])
    with open_job(job) as opened:
        assert [type(model) for model in opened.models.values()] == [
            SafetensorsDirectory,
            SafetensorsDirectory,
            Matched,
        ]


def test_rows_of_the_tokenizer_that_is_chosen_keep_their_delta(tmp_path):
    """Law has a token where the base's matrix is padded, and gives the merge its tokenizer: the row is law's."""
    tokens = {"base": (["<pad>"], 44), "math": (["<pad>", "<math>"], 44), "law": (["<pad>", "<law>"], 44)}
    models = write_models(tmp_path, tokens, "float32", tied=True)
    models(*FAST, "--tokenizer=law")
    base, law, merged = (weights(directory)[PLACES[0]] for directory in (models.base, models.law, models.output))
    np.testing.assert_array_equal(merged[41], base[41] + np.float32(0.5) * (law[41] - base[41]))


# ---- union


@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", False), ("float32", True)])
def test_a_union_has_a_row_for_every_token(tmp_path, dtype, tied):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = write_models(tmp_path, TOKENS, dtype, tied)
    assert not any("has no rows" in said for said in models.warnings(*FAST, "--vocabulary=union"))
    merged = weights(models.output)
    for tensor in PLACES[: 2 - tied]:
        assert merged[tensor].shape == (44, 32), "two rows of padding are taken"
        for token in (*ORDINARY, "<pad>", "<tool>"):
            assert_rows(merged[tensor][place("base", token)], added_up(models, tensor, token))
        both = [row(models, name, tensor, "<math>") for name in ("math", "law")]
        wanted = ((both[0] + both[1]) / np.float32(2)).astype(DTYPES[dtype])
        assert merged[tensor][42].tobytes() == wanted.tobytes()
        assert merged[tensor][43].tobytes() == weights(models.law)[tensor][place("law", "<law>")].tobytes()
    tokenizer = AutoTokenizer.from_pretrained(models.output)
    model = AutoModelForCausalLM.from_pretrained(models.output, dtype="auto")
    ids = tokenizer("word0 <math> <law> <tool> word36")["input_ids"]
    assert ids == [3, 42, 43, 41, 39]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["word0", "<tool>", "word36"]
    rows = model.get_input_embeddings().weight.float().detach().numpy()
    np.testing.assert_array_equal(rows, single(merged[PLACES[0]]))
    assert len(tokenizer) == model.config.vocab_size == 44
    assert model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False).shape[1] > 5
    assert tokenizer.chat_template == "{{ messages }}"
    recipe = read_json(models.output / "recipe.json")
    assert recipe["vocabulary"]["added"] == {"<math>": 42, "<law>": 43}


def test_a_union_grows_and_is_filled_up_where_the_base_was_padded(tmp_path):
    tokens = {"base": (["<pad>"], 44), "math": ([f"<{i}>" for i in range(8)], 48), "law": (["<pad>", "<0>"], 42)}
    models = write_models(tmp_path, tokens, "float32", tied=True)
    deltas = tmp_path / "deltas"
    models(*FAST, "--vocabulary=union", f"--save_delta={deltas}")
    base, merged = weights(models.base)[PLACES[0]], weights(models.output)[PLACES[0]]
    config = read_json(models.output / "config.json")
    assert config["vocab_size"] == len(merged) == 52, "49 tokens, and a multiple of 4 as before"
    np.testing.assert_array_equal(merged[49:], base[[43] * 3])
    for name in ("math", "law"):
        delta = weights(deltas / name)[PLACES[0]]
        assert delta.shape == merged.shape
        assert not delta[41:].any()
        assert delta[:40].any()
        assert read_json(deltas / name / "config.json")["vocab_size"] == 52
        assert (deltas / name / "tokenizer.json").read_bytes() == (models.output / "tokenizer.json").read_bytes()


def test_a_base_that_is_not_padded_gets_as_many_rows_as_it_needs(tmp_path):
    """Two experts add different tokens with one id, as fine-tunes of LLaMA did."""
    tokens = {"base": ([], 40), "math": (["[PAD]"], 41), "law": (["<|im_start|>", "<|im_end|>"], 42)}
    models = write_models(tmp_path, tokens, "float32", tied=True)
    models(*FAST, "--vocabulary=union")
    merged, math, law = (weights(directory)[PLACES[0]] for directory in (models.output, models.math, models.law))
    assert len(merged) == 43
    np.testing.assert_array_equal(merged[40:], np.concatenate([math[40:], law[40:]]))


def test_files_that_list_added_tokens_list_the_new_ones(models):
    listed = {"40": {"content": "<pad>", "special": True}, "41": {"content": "<tool>", "special": False}}
    edit_json(models.base / "tokenizer_config.json", added_tokens_decoder=listed, pad_token="<pad>")
    (models.base / "added_tokens.json").write_text('{"<pad>": 40, "<tool>": 41}')
    models(*FAST, "--vocabulary=union")
    assert read_json(models.output / "added_tokens.json") == {"<pad>": 40, "<tool>": 41, "<math>": 42, "<law>": 43}
    settings = read_json(models.output / "tokenizer_config.json")
    assert settings["added_tokens_decoder"]["43"]["content"] == "<law>"
    assert settings["added_tokens_decoder"]["43"]["special"]
    assert settings["pad_token"] == "<pad>"


def test_a_special_token_that_only_the_settings_name_keeps_its_id(tmp_path):
    """Transformers gives it the id after the last one of tokenizer.json; here only experts have a row for it."""
    from transformers import AutoTokenizer

    tokens = {"base": ([], 40), "math": (["[PAD]"], 41), "law": (["<law>"], 41)}
    models = write_models(tmp_path, tokens, "float32", tied=True)
    edit_json(models.base / "tokenizer_config.json", pad_token="[PAD]")
    models(*FAST, "--vocabulary=union")
    tokenizer = AutoTokenizer.from_pretrained(models.output)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "<law>"]) == [40, 41]
    np.testing.assert_array_equal(weights(models.output)[PLACES[0]][41], weights(models.law)[PLACES[0]][40])


def test_an_unfinished_merge_is_not_taken_up_with_other_tokens(models, monkeypatch):
    """What was written of the one vocabulary is not in the other; the same goes on."""
    from dppa_jax.checkpoint.safetensors_writer import SafetensorsWriter

    complete = SafetensorsWriter.complete

    def interrupted(self, *given):
        raise KeyboardInterrupt

    def begun(*flags):
        monkeypatch.setattr(SafetensorsWriter, "complete", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            models(*FAST, *flags)
        monkeypatch.setattr(SafetensorsWriter, "complete", complete)

    resumed = []
    monkeypatch.setattr("dppa_jax.merging.identity.logging.info", lambda text, *_: resumed.append(text))
    begun("--vocabulary=union")
    models(*FAST, "--vocabulary=union")
    assert any("goes on after" in text for text in resumed)
    resumed.clear()
    models.output = models.root / "other"
    begun()
    write_tokenizer(models.law, ["<pad>", "<law>", "<tool>", "<math>"])  # the weights are what they were
    models(*FAST)
    assert not any("goes on after" in text for text in resumed)


def test_a_plan_counts_the_rows_of_a_union(models, tmp_path):
    work = tmp_path / "work"
    parameters = []
    for flags in ((), ("--vocabulary=union",)):
        edit_json(models.law / "config.json", vocab_size=48)
        write_tokenizer(models.law, [*TOKENS["law"][0], *(f"<{i}>" for i in range(4))])
        launch("--job=plan", *models.flags(), *FAST, *flags, f"--workdir={work}")
        parameters.append(read_json(work / "plan.json")["parameters"])
    assert parameters[1] - parameters[0] == 2 * 4 * 32


# ---- refusals


def test_a_tokenizer_of_another_kind_is_refused(models):
    write_tokenizer(models.law, [], ["[UNK]", *(f"other{i}" for i in range(47))])
    message = models.refusal(*FAST)
    assert (
        "expert 'law': its tokenizer has 3 of the 42 tokens of the base's tokenizer, so it is of another kind"
        in message
    )
    models(*FAST, "--allow_other_base")


def test_a_tokenizer_that_contradicts_the_rows_is_refused(models):
    message = models.refusal(*FAST, "--tokenizer=math")
    assert "--tokenizer=math: 2 tokens of the base have other ids in it, '<pad>', '<tool>'" in message


def test_ordinary_tokens_of_an_expert_cannot_be_added(models):
    write_tokenizer(models.math, ["<pad>", "<tool>"], [*ORDINARY, "extra"])
    message = models.refusal(*FAST, "--vocabulary=union")
    assert "1 tokens of expert 'math', 'extra', are ordinary entries of its vocabulary" in message
    assert "--tokenizer=math takes that" in message


def test_the_tokenizer_of_an_expert_may_have_more_ordinary_tokens(tmp_path):
    tokens = {"base": ([], 40), "math": ([], 42), "law": (["<law>"], 41)}
    models = write_models(tmp_path, tokens, "float32", tied=True)
    write_tokenizer(models.math, [], [*ORDINARY, "longer", "words"])
    models(*FAST, "--vocabulary=union", "--tokenizer=math")
    merged, math, law = (weights(directory)[PLACES[0]] for directory in (models.output, models.math, models.law))
    np.testing.assert_array_equal(merged[40:], np.concatenate([math[40:], law[40:]]))
    content = read_json(models.output / "tokenizer.json")
    assert content["model"]["vocab"]["words"] == 41
    assert [(token["content"], token["id"]) for token in content["added_tokens"]] == [("<law>", 42)]


def test_a_union_of_tokens_that_are_not_known_is_refused(models):
    for directory in (models.law, models.base):
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer.model").write_bytes(b"pieces")
    assert f"{models.base} has no tokenizer.json" in models.refusal(*FAST, "--vocabulary=union")
    write_tokenizer(models.base, TOKENS["base"][0])
    assert f"{models.law} has no tokenizer.json that can be read" in models.refusal(*FAST, "--vocabulary=union")


def test_a_token_that_has_a_row_nowhere_is_refused(models):
    write_tokenizer(models.base, ["<pad>", "<tool>", "<a>", "<b>", "<c>"])
    message = models.refusal(*FAST, "--vocabulary=union")
    assert "the tokenizer has '<c>' with the id 44, and no model has a row for it" in message


def test_ids_that_the_library_does_not_give_are_refused(models):
    """It counts added tokens on, whatever the file says of their ids."""
    content = read_json(models.base / "tokenizer.json")
    content["added_tokens"][-1]["id"] = 43
    (models.base / "tokenizer.json").write_text(json.dumps(content))
    message = models.refusal(*FAST, "--vocabulary=union")
    assert "the tokenizers library gives '<tool>' the id 41, where the file says 43" in message


def test_fewer_rows_than_the_experts_tokens_are_refused(models):
    edit_json(models.math / "config.json", vocab_size=41)
    edit_tensors(models.math / "model.safetensors", lambda t: t.update({name: t[name][:41] for name in PLACES}))
    assert "expert 'math': model.embed_tokens.weight has 41 rows, and the base 44" in models.refusal(*FAST)
