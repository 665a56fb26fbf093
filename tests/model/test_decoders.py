"""Every family with a forward pass computes what transformers computes, on small random models."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from decoders import GEMMA, MODELS, SIZES, WINDOW, ours, torch_model

from dppa_jax.architecture.table import ARCHITECTURES
from dppa_jax.model import Decoder, DecoderConfig, abstract_tree, forward, generate
from dppa_jax.model.context import layer_kinds
from dppa_jax.model.decoder import Cache, embed, norm
from dppa_jax.model.families import FAMILIES

TOLERANCE = 1e-4  # on every logit, in float32
TIME, PROMPT, PADDING = 24, 16, 5
FAST = ("Gemma2", "Gemma3", "SmolLM3", "Qwen3-MoE, renormed")


def some_fast(names, fast=FAST):
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


def padded(seed=0):
    """Two texts in one batch, padded on the left and on the right; tokens, positions and where the texts are."""
    tokens = np.random.default_rng(seed).integers(1, 96, (2, TIME), dtype=np.int32)
    positions = np.stack([np.arange(TIME) - PADDING, np.arange(TIME)])
    text = np.stack([np.arange(TIME) >= PADDING, np.arange(TIME) < TIME - PADDING])
    return tokens, positions, text


def torch_logits(model, tokens, positions=None, text=None):
    given = {} if text is None else {"attention_mask": torch.tensor(text).long()}
    if positions is not None:
        given["position_ids"] = torch.tensor(positions).clamp(min=0)
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), use_cache=False, **given).logits.numpy()


def stepwise(config, tree, tokens, positions, prompt):
    """Return the logits of a prompt and then of one token at a time, with a cache."""
    cache = Cache.empty(config, len(tokens), tokens.shape[1], jnp.float32)
    logits, cache = forward(config, tree, tokens[:, :prompt], positions[:, :prompt], cache)
    parts = [logits]
    for at in range(prompt, tokens.shape[1]):
        logits, cache = forward(config, tree, tokens[:, at : at + 1], positions[:, at : at + 1], cache)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def torch_steps(model, tokens, prompt):
    """The logits of `stepwise`, by transformers with its own cache."""
    cache, parts = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in itertools.pairwise([0, *range(prompt, tokens.shape[1] + 1)]):
            parts.append(model(torch.tensor(tokens[:, start:stop]).long(), cache=cache, use_cache=True).logits.numpy())
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", some_fast(MODELS))
def test_logits_equal_transformers(name):
    """Padded on either side, longer than the window, at once and with a cache."""
    model = torch_model(*MODELS[name])
    config, tree = ours(model)
    Decoder(config, tree)  # which checks the shapes
    tokens, positions, text = padded()
    wanted = torch_logits(model, tokens, positions, text)
    assert np.std(wanted[text]) > 0.3
    at_once = forward(config, tree, tokens, positions)
    np.testing.assert_allclose(at_once[text], wanted[text], rtol=0, atol=TOLERANCE)
    steps = stepwise(config, tree, tokens, positions, PROMPT)
    np.testing.assert_allclose(steps[text], wanted[text], rtol=0, atol=TOLERANCE)


ORIGINAL = 14  # the context length of pre-training; texts go beyond it
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.4], "long_factor": [1.5, 6.0]}
PHI3 = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": ORIGINAL}
ROPES = {  # model_type, and what config.json says
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": ORIGINAL}),
    "llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}}),
    "yarn": ("qwen2", {"rope_scaling": YARN}),
    "yarn, steep": ("qwen2", {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.2, "truncate": False}}),
    "yarn, its own magnitude": ("qwen2", {"rope_scaling": {**YARN, "attention_factor": 1.7}}),
    "yarn, two magnitudes": ("qwen2", {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}),
    "yarn without a factor": ("qwen2", {"rope_parameters": {**YARN, "factor": None, "rope_theta": 500.0}}),
    "yarn in layers without a window": ("olmo3", {"rope_scaling": YARN, "sliding_window": WINDOW}),
    "linear in layers without a window": (
        "gemma3_text",
        GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 100.0,
                 "rope_theta": 1000.0, "sliding_window_pattern": 2},
    ),
    "longrope": ("phi3", {"rope_scaling": LONGROPE, **PHI3}),
    "longrope, its own factor": ("phi3", {"rope_scaling": {**LONGROPE, "factor": 9.0}, **PHI3}),
}  # fmt: skip


@pytest.mark.parametrize("name", some_fast(ROPES, fast=("dynamic", "yarn", "longrope")))
def test_ropes_equal_those_of_transformers_below_and_beyond_the_original_context(name):
    model_type, changes = ROPES[name]
    model = torch_model(model_type, changes)
    config, tree = ours(model)
    assert DecoderConfig.from_hf({"model_type": model_type, **SIZES, **changes}).ropes == config.ropes
    tokens = padded()[0][:1]
    short, whole = (forward(config, tree, tokens[:, :time]) for time in (ORIGINAL - 2, TIME))
    np.testing.assert_allclose(short, torch_logits(model, tokens[:, : ORIGINAL - 2]), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(whole, torch_logits(model, tokens), rtol=0, atol=TOLERANCE)
    steps = stepwise(config, tree, tokens, np.arange(TIME)[None], 8)
    np.testing.assert_allclose(steps, torch_steps(model, tokens, 8), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spelling", ["su", "yarn"])
def test_longrope_goes_by_other_names_in_files_of_phi3(spelling):
    given = {"model_type": "phi3", **SIZES, **PHI3}
    named = {"rope_scaling": {key: value for key, value in LONGROPE.items() if key != "rope_type"} | {"type": spelling}}
    assert DecoderConfig.from_hf(given | named) == DecoderConfig.from_hf(given | {"rope_scaling": LONGROPE})


def test_a_short_text_beside_a_long_one_is_rotated_as_when_it_is_alone():
    config, tree = ours(torch_model(*ROPES["longrope"]))
    tokens, positions = padded()[0], np.stack([np.arange(TIME) - 12, np.arange(TIME)])
    together = forward(config, tree, tokens, positions)
    alone = forward(config, tree, tokens[:1, 12:])
    np.testing.assert_allclose(together[:1, 12:], alone, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(together[1:], forward(config, tree, tokens[1:]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", some_fast(["Mistral", "Gemma2", "longrope"], fast=("Gemma2",)))
def test_answers_equal_those_of_transformers(name):
    model = torch_model(*(MODELS | ROPES)[name])
    config, tree = ours(model)
    prompts = [padded(seed)[0][0, :length].tolist() for seed, length in enumerate((3, 11, 20))]
    for prompt, answer in zip(prompts, generate((config, tree), prompts, 12, ()), strict=True):
        given = torch.tensor([prompt])
        wanted = model.generate(given, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert answer == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.forward and not row.own_heads])
def test_absent_keys_take_the_defaults_of_transformers(name):
    row = ARCHITECTURES[name]
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    given = {"architectures": list(row.classes), "model_type": row.model_type, "num_hidden_layers": 32, **sizes}
    given |= {"num_attention_heads": 32, "hidden_size": 64}
    theirs = transformers.AutoConfig.for_model(**given)
    assert DecoderConfig.from_hf(given) == DecoderConfig.from_hf(theirs.to_dict())


def test_every_row_with_a_forward_pass_is_tried():
    tried = {model_type for model_type, _ in MODELS.values()}
    assert (
        {row.model_type for row in ARCHITECTURES.values() if row.forward and not row.own_heads}
        == tried
        == FAMILIES.keys()
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp_only_layers": [1]}, "mlp_only_layers or decoder_sparse_step makes some layers dense"),
        ({"decoder_sparse_step": 2}, "mlp_only_layers or decoder_sparse_step makes some layers dense"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok 3 is more than the 2 experts"),
    ],
)
def test_a_mixture_that_is_not_computed_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        DecoderConfig.from_hf({"model_type": "qwen3_moe", **SIZES, **changes})


def test_a_model_without_a_feature_has_no_operation_of_it():
    """Of a LLaMA, neither kinds of layers nor a second mask or table are scanned or chosen."""
    config, tree = ours(torch_model("llama", {}))
    assert jax.tree.leaves(layer_kinds(config)) == []
    program = str(jax.make_jaxpr(lambda tree: forward(config, tree, padded()[0]))(tree))
    assert "tanh" not in program
    assert program.count("select_n") == 2  # a negative token, and what is not visible


@pytest.mark.parametrize("name", ["Gemma3", "SmolLM3"])
def test_more_layers_of_several_kinds_make_no_larger_program(name):
    model_type, changes = MODELS[name]
    changes = {key: value for key, value in changes.items() if key not in ("layer_types", "no_rope_layers")}
    lengths = []
    for layers in (8, 16):
        config = DecoderConfig.from_hf({"model_type": model_type, **SIZES, **changes, "num_hidden_layers": layers})
        tree = abstract_tree(config)
        lengths.append(
            len(jax.make_jaxpr(lambda tree, config=config: forward(config, tree, padded()[0]))(tree).jaxpr.eqns)
        )
        assert len(set(config.windowed_layers)) == len(set(config.rope_of_layer)) == 2
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("name", ["Gemma2", "Granite"])
def test_bfloat16_is_rounded_where_transformers_rounds_it(name):
    """The factor of Gemma's embeddings is rounded itself; Granite's is not. Norms are rounded once, at their end."""
    model = torch_model(*MODELS[name]).bfloat16()
    tokens = torch.arange(96)
    with torch.no_grad():
        rows = model.model.embed_tokens(tokens)
        wanted = rows * model.model.embedding_multiplier if name == "Granite" else rows
        normed = model.model.norm(wanted) if name == "Gemma2" else None
    config = DecoderConfig.from_hf(model.config.to_dict())
    found = embed(config, jnp.asarray(model.model.embed_tokens.weight.detach().float().numpy(), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(found, np.float32), wanted.float().numpy())
    if normed is not None:
        weights = {"norm": jnp.asarray(model.model.norm.weight.detach().float().numpy(), jnp.bfloat16)}
        np.testing.assert_array_equal(
            np.asarray(norm(config, weights, "norm", found), np.float32), normed.float().numpy()
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma2", "Qwen3-MoE, renormed"])
def test_gradients_equal_those_of_torch(name):
    model = torch_model(*MODELS[name])
    config, tree = ours(model)
    tokens = padded()[0]
    model(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
    for weight in model.parameters():
        weight.data = weight.grad
    wanted = ours(model)[1]

    def loss(tree):
        logits = forward(config, tree, tokens, remat=True)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    found = jax.jit(jax.grad(loss))(jax.tree.map(jnp.copy, tree))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5), found, wanted)
