"""The in-process evaluator: its answers, its limits, and weights that change."""

import json

import numpy as np
import pytest
from families import fine_tuned, llama_config, random_weights, write_model

import dppa_jax
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.model import DecoderConfig, generate
from dppa_jax.model.generate import decode, end_tokens

CONFIG = llama_config()
PROMPTS = [np.random.default_rng(i).integers(3, 64, 3 + 2 * i).tolist() for i in range(6)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    base = random_weights(CONFIG)
    write_model(root / "base", CONFIG, base)
    write_model(root / "math", CONFIG, fine_tuned(base, 1, size=0.1))
    return root


@pytest.fixture
def evaluator(family):
    evaluator = JaxEvaluator(batch_size=4)
    evaluator.use(family / "base")
    return evaluator


def test_answers_are_the_models_in_float32(evaluator, family):
    model = dppa_jax.load(family / "base")
    tree = {name: part for name, part in model.tree.items() if name != "layers"}
    tree = {name: np.asarray(part, np.float32) for name, part in tree.items()}
    tree["layers"] = {
        name: {key: np.asarray(value, np.float32) for key, value in part.items()}
        if isinstance(part, dict)
        else np.asarray(part, np.float32)
        for name, part in model.tree["layers"].items()
    }
    assert evaluator.generate(PROMPTS, 8) == generate((DecoderConfig.from_hf(CONFIG), tree), PROMPTS, 8)


def test_answers_follow_the_weights_without_a_new_compilation(evaluator, family):
    first = evaluator.generate(PROMPTS, 8)
    compiled = decode._cache_size()
    evaluator.use(dppa_jax.load(family / "math"))
    assert evaluator.generate(PROMPTS, 8) != first
    evaluator.use(family / "base")
    assert evaluator.generate(PROMPTS, 8) == first
    assert decode._cache_size() == compiled


def test_long_answers_are_decoded_in_batches_that_fit_into_memory(evaluator, monkeypatch):
    wanted = evaluator.generate(PROMPTS, 8)
    rows = []

    def watched(model, prompts, limits, end, batch_size):
        rows.append(batch_size)
        return generate(model, prompts, limits, end, batch_size=batch_size)

    monkeypatch.setattr("dppa_jax.evaluate.local.generate", watched)
    monkeypatch.setattr("dppa_jax.evaluate.local.device_memory", lambda: (100_000, "cpu"))
    assert evaluator.generate(PROMPTS, 8) == wanted
    assert evaluator.generate(PROMPTS, 100) != wanted
    assert rows[0] > rows[1] >= 1


def test_a_model_in_memory_may_change_after_it_was_handed_over(evaluator, family):
    model = dppa_jax.load(family / "base")
    evaluator.use(model)
    first = evaluator.generate(PROMPTS, 8)
    model.tree["norm"][:] = 0
    assert evaluator.generate(PROMPTS, 8) == first


def test_every_prompt_has_its_own_limit(evaluator):
    long = evaluator.generate(PROMPTS, 8)
    limits = [8, 0, 1, 5, 8, 2]
    assert evaluator.generate(PROMPTS, limits) == [a[:limit] for a, limit in zip(long, limits, strict=True)]


def test_an_answer_ends_where_the_model_or_the_limit_does(family, caplog):
    evaluator = JaxEvaluator(max_length=20)
    evaluator.use(family / "base")
    answers = evaluator.generate([[5] * 18, [5] * 20, [5] * 21], 8)
    assert [len(answer) for answer in answers] == [2, 0, 0]
    assert "2 prompts have 20 tokens or more and get no answer" in caplog.text
    longer = JaxEvaluator(max_length=4096)  # than the model's 128 positions
    longer.use(family / "base")
    assert [len(answer) for answer in longer.generate([[5] * 126], 8)] == [2]


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [([9, 7], 2, (7, 9)), (7, [2, 3], (7,)), (None, [2, 3], (2, 3)), (None, None, ()), ([], 5, (5,))],
)
def test_the_generation_config_says_where_answers_end_or_else_the_config(tmp_path, generation, config, wanted):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_tokens(CONFIG | {"eos_token_id": config}, tmp_path) == wanted
    assert end_tokens(CONFIG | {"eos_token_id": [2, 3]}, None) == (2, 3)


@pytest.mark.parametrize("end", ["</s>", ["</s>"], [[2]], {"id": 2}, 1.5, True, 2**40, -7])
def test_an_end_token_that_is_no_id_is_named_with_its_file(tmp_path, end):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id: .* Give the number of the token"):
        end_tokens(CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id: "):
        DecoderConfig.from_hf(CONFIG | {"eos_token_id": end})


@pytest.mark.parametrize("content", [b"[2]", b"\xe4", b"[" * 100_000])
def test_a_generation_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        end_tokens(CONFIG, tmp_path)


def test_bfloat16_is_another_decoding_than_float32(family):
    assert JaxEvaluator().decoding == JaxEvaluator(dtype="float32").decoding  # on a CPU
    assert JaxEvaluator(dtype="bfloat16").decoding != JaxEvaluator().decoding


def test_after_close_weights_are_needed_anew(evaluator):
    evaluator.close()
    with pytest.raises(ValueError, match="call use"):
        evaluator.generate(PROMPTS, 1)
