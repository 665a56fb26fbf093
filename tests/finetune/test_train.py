"""The trainer: that it learns what it is asked to, by the steps it is asked for, and that it is reproducible."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppa_jax.config.finetune import AdamW, TrainConfig
from dppa_jax.finetune.data import Rows, batches
from dppa_jax.finetune.train import STEPS_PER_REPORT, Trainer, compiled, learning_rates, loss_sums, train
from dppa_jax.model import DecoderConfig, forward, init_tree

CONFIG = DecoderConfig(
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
def tree() -> dict:
    return init_tree(CONFIG, jax.random.key(0), stddev=0.2)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Rows that count upwards, of which the second half is learned."""
    tokens = (np.arange(8) + np.arange(16)[:, None]).astype(np.int32) % CONFIG.vocab_size
    return Rows(tokens, np.broadcast_to(np.arange(8) >= 4, tokens.shape).copy())


def mean_loss(tree: dict, rows: Rows):
    total, count = loss_sums(CONFIG, tree, rows)
    return total / count


def leaves(tree: dict) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_training_lowers_the_loss(tree, rows):
    trained, losses = train(CONFIG, tree, rows, OPTIONS)
    assert losses.shape == (OPTIONS.steps,)
    assert losses[-1] < 0.3 * losses[0]
    assert mean_loss(trained, rows) < 0.3 * mean_loss(tree, rows)


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


@pytest.mark.slow
def test_steps_are_those_of_optax_adamw(tree, rows):
    options = replace(OPTIONS, steps=5, optimizer=AdamW(weight_decay=0.1, max_gradient_norm=0.5))
    rates = learning_rates(options)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda step: jnp.asarray(rates)[step], b1=0.9, b2=0.98, weight_decay=0.1),
    )
    expected, moments = tree, reference.init(tree)
    gradient_of = jax.jit(jax.grad(mean_loss))
    for batch in batches(rows.count, options.batch_size, options.steps, options.seed):
        gradient = gradient_of(expected, rows.take(batch))
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
    assert float(mean_loss(tree, rows)) == pytest.approx(expected, rel=1e-5)


def test_rematerialisation_changes_no_result(tree, rows):
    plain, _ = train(CONFIG, tree, rows, replace(OPTIONS, steps=3))
    saved, _ = train(CONFIG, tree, rows, replace(OPTIONS, steps=3, remat=True))
    for a, b in zip(leaves(plain), leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_another_schedule_needs_no_other_compilation(tree, rows):
    train(CONFIG, tree, rows, OPTIONS)
    before = compiled.cache_info().misses
    train(CONFIG, tree, rows, replace(OPTIONS, steps=7, learning_rate=1e-4, warmup=0.5, seed=3))
    assert compiled.cache_info().misses == before


def test_the_learning_rate_rises_then_falls():
    rates = learning_rates(TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final=0.05))
    assert rates[0] == 0
    assert np.argmax(rates) == 10
    assert rates[10] == pytest.approx(1)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert np.all(np.diff(rates[10:]) < 0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_have_finite_learning_rates(steps):
    rates = learning_rates(TrainConfig(steps=steps, learning_rate=1.0))
    assert rates.shape == (steps,)
    assert np.all(np.isfinite(rates))


def test_progress_is_reported_up_to_the_last_step(tree, rows):
    reported = []
    _, losses = train(CONFIG, tree, rows, replace(OPTIONS, steps=23), lambda done, loss: reported.append((done, loss)))
    assert [done for done, _ in reported] == [STEPS_PER_REPORT, 2 * STEPS_PER_REPORT, 23]
    assert reported[-1][1] == pytest.approx(losses[-1])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_parts_are_one_batch(tree, rows, parts):
    """Also where parts have different numbers of learned tokens: a token counts the same in whatever part it is."""
    learned = rows.learned.copy()
    learned[::3, 5:] = False
    uneven = rows._replace(learned=learned)
    whole, losses = train(CONFIG, tree, uneven, replace(OPTIONS, steps=4))
    summed, found = train(CONFIG, tree, uneven, replace(OPTIONS, steps=4, accumulate=parts))
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    for a, b in zip(leaves(summed), leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)  # Adam divides rounding errors by small second moments


@pytest.mark.slow
def test_bfloat16_is_for_computing_only(tree, rows):
    trainer = Trainer(CONFIG, replace(OPTIONS, dtype="bfloat16"))
    state = trainer.start(tree)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    trained, losses = train(CONFIG, tree, rows, replace(OPTIONS, dtype="bfloat16"))
    exact, _ = train(CONFIG, tree, rows, OPTIONS)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    assert losses[-1] < 0.3 * losses[0]
    assert not all(np.array_equal(a, b) for a, b in zip(leaves(trained), leaves(exact), strict=True))


@pytest.mark.parametrize("count", [*(pytest.param(count, marks=pytest.mark.slow) for count in (1, 7, 8)), 13])
def test_a_loss_is_the_mean_over_all_rows_whatever_the_batches(tree, rows, count):
    part, trainer = rows.take(slice(count)), Trainer(CONFIG, OPTIONS)
    before = part.learned.copy()
    assert trainer.loss(trainer.start(tree), part) == pytest.approx(float(mean_loss(tree, part)), rel=1e-6)
    np.testing.assert_array_equal(part.learned, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 8, "accumulate": 3}, "--accumulate=3: --train_batch_size=8 must be a multiple of it"),
        ({"accumulate": 0}, "--accumulate=0: it must be 1 or more"),
        ({"steps": 0}, "--train_steps=0"),
        ({"dtype": "bfloat61"}, "--train_dtype=bfloat61: not one of float32, bfloat16. Did you mean 'bfloat16'?"),
        ({"warmup": 1.5}, r"--warmup=1.5: outside \[0, 1\]"),
        ({"learning_rate": float("nan")}, "--learning_rate=nan"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **wrong)
