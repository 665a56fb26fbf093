"""BERT and RoBERTa with a classification head compute what transformers computes, on small random models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from encoders import SIZES, classifier

from dppa_jax.model import EncoderConfig, abstract_tree, classify, init_tree
from dppa_jax.model.encoder import compared_states, encode
from dppa_jax.where import load

TOLERANCE = 1e-4
LENGTHS = (21, 9)


def batch(pairs: bool):
    """Two texts, padded on the right; tokens, which are text, types."""
    width = max(LENGTHS)
    text = np.arange(width) < np.array(LENGTHS)[:, None]
    tokens = np.where(
        text, np.random.default_rng(0).integers(3, SIZES["vocab_size"], text.shape), SIZES["pad_token_id"]
    )
    types = (np.arange(width) >= 5) & text if pairs else np.zeros_like(text)
    return tokens.astype(np.int32), text, types.astype(np.int32)


@pytest.mark.parametrize("labels", [3, 1])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_logits_and_hidden_states_equal_transformers(family, labels, tmp_path):
    model = classifier(family, num_labels=labels)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    config, tree = EncoderConfig.from_hf(loaded.config), loaded.tree
    assert len(config.labels) == labels
    shapes = lambda tree: jax.tree.map(lambda array: tuple(array.shape), tree)  # noqa: E731
    assert shapes(tree) == shapes(abstract_tree(config))
    for pairs in (False, True):
        tokens, text, types = batch(pairs)
        given = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(text).long()}
        with torch.no_grad():
            typed = {"token_type_ids": torch.tensor(types).long()} if pairs else {}
            wanted = model(**given, **typed, output_hidden_states=True)
        assert np.ptp(wanted.logits.numpy(), axis=0).max() > 0.02
        found = classify(config, tree, tokens, text, types if pairs else None)
        np.testing.assert_allclose(found, wanted.logits.numpy(), rtol=0, atol=TOLERANCE)
        states = wanted.hidden_states[-1]
        hidden = jax.jit(partial(encode, config))(tree, tokens, text, types if pairs else None)
        np.testing.assert_allclose(hidden[text], states.numpy()[text], rtol=0, atol=TOLERANCE)
    wanted = states if config.pooled else model.classifier.dense(states)
    found = jax.jit(partial(compared_states, config))(tree, hidden)
    np.testing.assert_allclose(found[text], wanted.detach().numpy()[text], rtol=0, atol=TOLERANCE)


def test_padding_changes_nothing_and_types_do():
    config = EncoderConfig(40, 16, 24, 2, 2, max_position_embeddings=32, labels=("a", "b"))
    tree = init_tree(config, jax.random.key(0), stddev=0.3)
    tokens = jnp.array([[3, 9, 8, 7]])
    padded = jnp.pad(tokens, ((0, 0), (0, 9)), constant_values=5)
    alone = classify(config, tree, tokens)
    np.testing.assert_allclose(classify(config, tree, padded, padded != 5), alone, rtol=0, atol=1e-6)
    assert abs(classify(config, tree, padded) - alone).max() > 1e-3
    assert abs(classify(config, tree, tokens, None, jnp.array([[0, 0, 1, 1]])) - alone).max() > 1e-3


def test_what_is_not_computed_is_refused():
    config = classifier("bert").config.to_dict() | {"architectures": ["BertForSequenceClassification"]}
    for changed in ({"position_embedding_type": "relative_key"}, {"hidden_act": "tanh"}, {"is_decoder": True}):
        with pytest.raises(ValueError, match=f"config.json: an encoder with .*{next(iter(changed.values()))}"):
            EncoderConfig.from_hf(config | changed)
    with pytest.raises(ValueError, match="number them from 0"):
        EncoderConfig.from_hf(config | {"id2label": {"1": "a", "2": "b"}})
