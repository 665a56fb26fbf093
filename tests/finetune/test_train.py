"""The trainer: what it learns from, that it learns, and that it is reproducible."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import AutoTokenizer

from dppa_jax.demo.tokenizer import save_tokenizer
from dppa_jax.finetune.train import (
    AdamW,
    Example,
    Rows,
    TrainConfig,
    batches,
    encode,
    mean_loss,
    read_examples,
    train,
    update,
)
from dppa_jax.model import LlamaConfig, forward, init_tree

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
OPTIONS = TrainConfig(steps=30, learning_rate=1e-2, batch_size=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def tree() -> dict:
    return init_tree(CONFIG, jax.random.key(0), stddev=0.2)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Rows that count upwards, of which the second half is learned."""
    tokens = (np.arange(8) + np.arange(16)[:, None]).astype(np.int32) % CONFIG.vocab_size
    return Rows(tokens, np.broadcast_to(np.arange(8) >= 4, tokens.shape).copy())


def leaves(tree: dict) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_training_lowers_the_loss(tree, rows):
    trained, losses = train(CONFIG, tree, rows, OPTIONS)
    assert losses.shape == (OPTIONS.steps,)
    assert losses[-1] < 0.3 * losses[0]
    assert float(mean_loss(CONFIG, trained, *rows)) < 0.3 * float(mean_loss(CONFIG, tree, *rows))


def test_the_same_arguments_give_the_same_bits_and_another_seed_others(tree, rows):
    first, again = (train(CONFIG, tree, rows, OPTIONS)[0] for _ in range(2))
    other, _ = train(CONFIG, tree, rows, replace(OPTIONS, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(again), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(other), strict=True))


def test_the_starting_weights_are_left_as_they_are(tree, rows):
    before = [leaf.copy() for leaf in leaves(tree)]
    train(CONFIG, tree, rows, OPTIONS)
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves(tree), strict=True))


def test_every_weight_is_trained(tree, rows):
    trained, _ = train(CONFIG, tree, rows, OPTIONS)
    for path, delta in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: np.abs(a - b).max(), trained, tree)):
        assert delta > 0, jax.tree_util.keystr(path)


def test_steps_are_those_of_optax_adamw(tree, rows):
    options = replace(OPTIONS, steps=5, optimizer=AdamW(weight_decay=0.1, max_gradient_norm=0.5))
    rates = options.learning_rates()
    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda step: jnp.asarray(rates)[step], b1=0.9, b2=0.98, weight_decay=0.1),
    )
    expected, moments = tree, reference.init(tree)
    gradient_of = jax.jit(jax.grad(lambda t, tokens, learned: mean_loss(CONFIG, t, tokens, learned)))
    for batch in batches(len(rows.tokens), options):
        gradient = gradient_of(expected, rows.tokens[batch], rows.learned[batch])
        direction, moments = reference.update(gradient, moments, expected)
        expected = optax.apply_updates(expected, direction)
    trained, _ = train(CONFIG, tree, rows, options)
    for a, b in zip(leaves(trained), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_only_the_learned_tokens_count(tree, rows):
    logits = np.asarray(forward(CONFIG, tree, rows.tokens[:, :-1]), np.float64)
    log_shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    surprise = -np.take_along_axis(log_shares, rows.tokens[:, 1:, None], -1)[..., 0]
    expected = surprise[rows.learned[:, 1:]].mean()
    assert float(mean_loss(CONFIG, tree, *rows)) == pytest.approx(expected, rel=1e-5)


def test_rematerialisation_changes_no_result(tree, rows):
    plain, _ = train(CONFIG, tree, rows, replace(OPTIONS, steps=3))
    saved, _ = train(CONFIG, tree, rows, replace(OPTIONS, steps=3, remat=True))
    for a, b in zip(leaves(plain), leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_another_schedule_needs_no_other_compilation(tree, rows):
    train(CONFIG, tree, rows, OPTIONS)
    compiled = update._cache_size()
    train(CONFIG, tree, rows, replace(OPTIONS, steps=7, learning_rate=1e-4, warmup=0.5, seed=3))
    assert update._cache_size() == compiled


def test_the_learning_rate_rises_then_falls():
    rates = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final=0.05).learning_rates()
    assert rates[0] == 0
    assert np.argmax(rates) == 10
    assert rates[10] == pytest.approx(1)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert np.all(np.diff(rates[10:]) < 0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_have_finite_learning_rates(steps):
    rates = TrainConfig(steps=steps, learning_rate=1.0).learning_rates()
    assert rates.shape == (steps,)
    assert np.all(np.isfinite(rates))


@pytest.mark.parametrize("batch_size", [3, 10, 25])
def test_every_example_is_used_once_before_any_is_used_again(batch_size):
    options = TrainConfig(steps=40, learning_rate=0.0, batch_size=batch_size)
    used = np.concatenate(list(batches(10, options)))
    assert len(used) == 40 * batch_size
    for start in range(0, len(used) - 9, 10):
        assert sorted(used[start : start + 10]) == list(range(10))


def test_progress_is_reported_up_to_the_last_step(tree, rows):
    reported = []
    _, losses = train(CONFIG, tree, rows, replace(OPTIONS, steps=23), lambda done, loss: reported.append((done, loss)))
    assert [done for done, _ in reported] == [10, 20, 23]
    assert reported[-1][1] == pytest.approx(losses[-1])


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


@pytest.mark.parametrize("line", ['{"prompt": "a"}', "not json", "[1, 2]"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"examples\.jsonl:2: not of the form"):
        read_examples(path)
