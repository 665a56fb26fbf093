"""The model computes what transformers' LlamaForCausalLM computes, and trains."""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx
from smollm import smollm_directory

from dppa_jax.model import Decoder, DecoderConfig, decoder_layer, forward, init_tree
from dppa_jax.model.context import context_of, layer_kinds
from dppa_jax.model.decoder import norm, rms_norm, unembed
from dppa_jax.where import load_tree

TOLERANCE = 1e-4  # on every logit, in float32

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "grouped queries": {},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads as query heads": {"num_key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "heads wider than hidden / heads": {"head_dim": 16},
    "other rope base": {"rope_theta": 500000.0},
    "linear rope scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear rope scaling, oldest spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3 rope scaling": {"rope_scaling": LLAMA3},
    "llama3 rope scaling as transformers 5 writes it": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
}
FAST = (("fp32", "expert0"), ("bf16", "base"))
FAST_VARIANTS = (
    "one key/value head",
    "tied embeddings",
    "heads wider than hidden / heads",
    "linear rope scaling, oldest spelling",
    "llama3 rope scaling as transformers 5 writes it",
)


def torch_model(directory):
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def torch_config(config):
    return transformers.LlamaConfig.from_dict(copy.deepcopy(config))  # it writes into nested dicts


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def random_tokens(vocabulary, shape, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)


def random_torch_model(config, seed=0):
    """Weights wide enough that attention is far from uniform: errors in positions or masks move the logits."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(torch_config(config | {"attn_implementation": "eager"})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (weight.ndim == 1))
    return model


def next_token_loss(config, tree, tokens, remat=False):
    logits = forward(config, tree, tokens, remat=remat)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


loss_gradients = jax.jit(jax.grad(next_token_loss, argnums=1), static_argnums=0, static_argnames="remat")


@pytest.fixture(scope="module")
def tiny():
    config = DecoderConfig.from_hf(TINY)
    return config, init_tree(config, jax.random.key(0), stddev=0.3)


@pytest.mark.parametrize(
    ("precision", "member"),
    [
        pytest.param(*of, marks=[] if of in FAST else pytest.mark.slow)
        for of in itertools.product(("fp32", "bf16"), ("base", "expert0", "expert1", "expert2"))
    ],
)
def test_logits_equal_transformers_on_the_golden_family(golden, precision, member):
    directory = golden / "family" / precision / member
    config, tree = load_tree(directory)
    tokens = random_tokens(config["vocab_size"], (4, 100))
    logits = Decoder(DecoderConfig.from_hf(config), tree, dtype=jnp.float32)(tokens)
    np.testing.assert_allclose(logits, torch_logits(torch_model(directory), tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in FAST_VARIANTS else pytest.mark.slow) for name in VARIANTS]
)
def test_logits_equal_transformers_for_every_kind_of_llama(tmp_path, variant):
    config = TINY | VARIANTS[variant]
    reference = random_torch_model(config)
    reference.save_pretrained(tmp_path)
    _, tree = load_tree(tmp_path)
    tokens = random_tokens(config["vocab_size"], (2, 300))
    logits = forward(DecoderConfig.from_hf(config), tree, tokens)
    np.testing.assert_allclose(logits, torch_logits(reference, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_logits_equal_transformers_on_smollm2():
    directory = smollm_directory()
    config, tree = load_tree(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    reference = torch_model(directory)
    model = Decoder(DecoderConfig.from_hf(config), tree, dtype=jnp.float32)
    for text in ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n"]:
        tokens = np.asarray([tokenizer(text)["input_ids"]], np.int32)
        with jax.default_matmul_precision("highest"):
            logits = model(tokens)
        np.testing.assert_allclose(logits, torch_logits(reference, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_gradients_equal_those_of_torch(tmp_path):
    reference = random_torch_model(TINY)
    reference.save_pretrained(tmp_path)
    config, tree = load_tree(tmp_path)
    tokens = random_tokens(TINY["vocab_size"], (4, 20))
    reference(
        torch.from_numpy(tokens.astype(np.int64)), labels=torch.from_numpy(tokens.astype(np.int64))
    ).loss.backward()
    gradients = loss_gradients(DecoderConfig.from_hf(config), tree, tokens)
    for layer, theirs in enumerate(reference.model.layers):
        ours = jax.tree.map(lambda gradient, layer=layer: gradient[layer], gradients["layers"])
        np.testing.assert_allclose(
            ours["self_attn"]["k_proj"], theirs.self_attn.k_proj.weight.grad, rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(ours["mlp"]["down_proj"], theirs.mlp.down_proj.weight.grad, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(ours["input_layernorm"], theirs.input_layernorm.weight.grad, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        gradients["embed_tokens"], reference.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_remat_changes_no_gradient(tiny):
    config, tree = tiny
    tokens = random_tokens(config.vocab_size, (2, 12))
    plain = loss_gradients(config, tree, tokens)
    saved = loss_gradients(config, tree, tokens, remat=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, saved)


def test_a_flax_optimizer_trains_the_module(tiny):
    model = Decoder(*tiny)
    tokens = random_tokens(model.config.vocab_size, (4, 16))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: next_token_loss(model.config, model.tree, tokens))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]


def test_the_state_of_the_module_is_the_tree(tiny):
    config, tree = tiny
    state = nnx.to_pure_dict(nnx.state(Decoder(config, tree), nnx.Param))
    assert jax.tree.structure(state) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, state, tree)


def test_dtype_casts_the_weights_and_logits_stay_float32(tiny):
    model = Decoder(*tiny, dtype=jnp.bfloat16)
    assert {array.dtype for array in jax.tree.leaves(model.tree)} == {jnp.dtype(jnp.bfloat16)}
    assert model(random_tokens(96, (1, 8))).dtype == jnp.float32


def test_decoder_layers_called_one_by_one_are_the_model(tiny):
    config, tree = tiny
    tokens = random_tokens(config.vocab_size, (2, 10))
    positions = jnp.arange(10)[None]
    context = context_of(config, positions, positions).of(layer_kinds(config))
    hidden, of_one = tree["embed_tokens"][tokens], jax.jit(decoder_layer, static_argnums=0)
    for index in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda array, index=index: array[index], tree["layers"])
        hidden, _ = of_one(config, layer, hidden, None, context)
    logits = unembed(config, tree, norm(config, tree, "norm", hidden))
    np.testing.assert_allclose(logits, forward(config, tree, tokens), rtol=1e-4, atol=1e-4)


def test_padding_changes_no_logit_of_the_text(tiny):
    config, tree = tiny
    text, padding = random_tokens(config.vocab_size, (1, 9)), random_tokens(config.vocab_size, (1, 5), seed=1)
    alone = forward(config, tree, text)
    right = forward(config, tree, np.concatenate([text, padding], 1))[:, :9]
    left = forward(config, tree, np.concatenate([padding, text], 1), positions=np.arange(-5, 9)[None])[:, 5:]
    np.testing.assert_allclose(right, alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(left, alone, rtol=1e-4, atol=1e-4)


def test_texts_packed_into_one_row_do_not_see_each_other(tiny):
    config, tree = tiny
    first, second = random_tokens(config.vocab_size, (1, 9)), random_tokens(config.vocab_size, (1, 6), seed=1)
    packed = forward(
        config, tree, np.concatenate([first, second], 1), positions=np.concatenate([np.arange(9), np.arange(6)])[None]
    )
    np.testing.assert_allclose(packed[:, :9], forward(config, tree, first), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[:, 9:], forward(config, tree, second), rtol=1e-4, atol=1e-4)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    hidden = (1 + np.arange(4096) / 4096).astype(jnp.bfloat16)  # summed in bfloat16, the squares stop growing at 256
    weight = np.full(4096, 1.5, jnp.bfloat16)
    wide = hidden.astype(np.float64)
    expected = 1.5 * wide / np.sqrt(np.mean(wide**2))
    normed = rms_norm(jnp.asarray(hidden), jnp.asarray(weight), 0.0)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, expected.astype(jnp.bfloat16))


def test_init_is_what_transformers_initialises_with():
    config = DecoderConfig.from_hf(TINY | {"hidden_size": 256, "vocab_size": 512})
    tree = init_tree(config, jax.random.key(0))
    np.testing.assert_array_equal(tree["layers"]["input_layernorm"], 1)
    np.testing.assert_array_equal(tree["norm"], 1)
    for weight in (tree["embed_tokens"], tree["lm_head"], tree["layers"]["mlp"]["down_proj"]):
        assert np.std(weight) == pytest.approx(0.02, rel=0.02)


class TestConfig:
    OLD = TINY | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    NEW = TINY | {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "bfloat16"}

    def test_transformers_4_and_5_say_the_same(self):
        config = DecoderConfig.from_hf(self.OLD)
        assert config == DecoderConfig.from_hf(self.NEW)
        assert [(rope.rope_theta, rope.factor) for rope in config.ropes] == [(5e5, 8.0)]

    @pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
    def test_what_is_written_is_read_back(self, changes):
        config = DecoderConfig.from_hf(TINY | changes)
        assert DecoderConfig.from_hf(config.to_hf()) == config
        assert DecoderConfig.from_hf(torch_config(config.to_hf()).to_dict()) == config

    @pytest.mark.parametrize(("given", "expected"), [(2, (2,)), ([2, 7], (2, 7)), (None, ())])
    def test_end_of_sequence_may_be_one_token_several_or_none(self, given, expected):
        config = DecoderConfig.from_hf(TINY | {"eos_token_id": given})
        assert config.eos_token_id == expected
        assert config.to_hf()["eos_token_id"] == given

    def test_absent_keys_take_the_defaults_of_transformers(self):
        sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3}
        given = sizes | {"num_attention_heads": 4, "model_type": "llama"}
        assert DecoderConfig.from_hf(given) == DecoderConfig.from_hf(torch_config(given).to_dict())

    def test_an_unknown_rope_type_is_refused_with_those_that_are_supported(self):
        with pytest.raises(
            ValueError, match="'mrope' is not supported; supported are default, linear, dynamic, llama3"
        ):
            DecoderConfig.from_hf(TINY | {"rope_scaling": {"rope_type": "mrope", "factor": 4.0}})

    def test_incomplete_rope_scaling_is_refused_with_what_is_missing(self):
        with pytest.raises(ValueError, match="'llama3' needs low_freq_factor, high_freq_factor"):
            DecoderConfig.from_hf(
                TINY | {"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64}}
            )

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"hidden_act": "relu"}, "activation 'relu' is not computed"),
            ({"model_type": "falcon"}, "'falcon' is not supported"),
            ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
            ({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
            ({"model_type": "qwen3", "layer_types": ["full_attention"] * 2}, "2 layer_types for 3 layers"),
            ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "2 no_rope_layers for 3 layers"),
            ({"model_type": "qwen3", "sliding_window": 0}, "Expected `int` >= 1 - at `\\$.sliding_window`"),
            ({"model_type": "gemma2", "query_pre_attn_scalar": "256"}, "Expected `float`, got `str`"),
            ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "rope: Expected `float`, got `str`"),
            ({"rope_scaling": {"rope_type": ["linear"]}}, "is not supported"),
        ],
    )
    def test_what_the_model_does_not_compute_is_refused(self, changes, said):
        with pytest.raises(ValueError, match=said):
            DecoderConfig.from_hf(TINY | changes)

    def test_only_a_llama_is_written(self):
        with pytest.raises(ValueError, match="keep the one that the model came with"):
            DecoderConfig.from_hf(TINY | {"model_type": "qwen2"}).to_hf()

    def test_heads_that_cannot_be_grouped_are_refused(self):
        with pytest.raises(ValueError, match="4 attention heads cannot share 3 key/value heads"):
            DecoderConfig.from_hf(TINY | {"num_key_value_heads": 3})


def test_weights_that_do_not_fit_the_config_are_refused_by_name(tiny):
    config, tree = tiny
    tree = tree | {"layers": tree["layers"] | {"input_layernorm": np.ones((2, 32))}}
    with pytest.raises(ValueError, match=r"layers.input_layernorm: .* shape \(2, 32\), the config calls for \(3, 32\)"):
        Decoder(config, tree)
    with pytest.raises(ValueError, match=r"lm_head: .* shape \(absent\), the config calls for \(96, 32\)"):
        Decoder(config, {name: part for name, part in tiny[1].items() if name != "lm_head"})
