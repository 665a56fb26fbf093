"""Generation is greedy, equals transformers', and depends on nothing but the prompt."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from smollm import smollm_directory

from dppa_jax.model import Decoder, DecoderConfig, forward, generate, init_tree
from dppa_jax.model.generate import decode
from dppa_jax.where import load_tree

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
FAST = (("fp32", "expert0"), ("bf16", "base"))


@pytest.fixture(scope="module")
def tree():
    return init_tree(CONFIG, jax.random.key(0), stddev=0.3)


def random_prompts(lengths, vocabulary=96, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocabulary, length).tolist() for length in lengths]


def torch_answer(model, prompt, max_new_tokens):
    prompt = torch.tensor([prompt])
    new = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=2
    )
    return new[0, prompt.shape[1] :].tolist()


def recomputed(tree, prompt, max_new_tokens, eos=()):
    """Greedy decoding by the definition: one prompt at a time, and everything computed anew for every token."""
    tokens = np.zeros((1, 128), np.int32)  # one shape, compiled once; no token sees the zeros that follow it
    tokens[0, : len(prompt)] = prompt
    answer = []
    while len(answer) < max_new_tokens and not (answer and answer[-1] in eos):
        at = len(prompt) + len(answer)
        answer.append(int(np.argmax(forward(CONFIG, tree, tokens)[0, at - 1])))
        tokens[0, at] = answer[-1]
    return answer


@pytest.mark.parametrize(
    ("precision", "member"),
    [
        pytest.param(*of, marks=[] if of in FAST else pytest.mark.slow)
        for of in itertools.product(("fp32", "bf16"), ("base", "expert0", "expert1", "expert2"))
    ],
)
def test_answers_equal_transformers_on_the_golden_family(golden, precision, member):
    directory = golden / "family" / precision / member
    config, tree = load_tree(directory)
    reference = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = random_prompts([1, 5, 17, 60], config["vocab_size"])
    answers = generate(Decoder(DecoderConfig.from_hf(config), tree, dtype=jnp.float32), prompts, 40)
    assert answers == [torch_answer(reference, prompt, 40) for prompt in prompts]


@pytest.mark.slow
def test_answers_equal_transformers_on_smollm2():
    directory = smollm_directory()
    config, tree = load_tree(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    reference = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = [tokenizer(text)["input_ids"] for text in ("The capital of France is", "def fibonacci(n):\n")]
    answers = generate(Decoder(DecoderConfig.from_hf(config), tree, dtype=jnp.float32), prompts, 12)
    assert answers == [torch_answer(reference, prompt, 12) for prompt in prompts]
    assert tokenizer.decode(answers[0]).startswith(" Paris")


def test_the_cache_changes_no_answer(tree):
    prompts = random_prompts([1, 2, 15, 16, 17, 40])
    answers = generate((CONFIG, tree), prompts, 25, eos_token_id=())
    assert answers == [recomputed(tree, prompt, 25) for prompt in prompts]
    assert len({token for answer in answers for token in answer}) > 30  # not a model that says one thing


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_batch_it_is_in(tree):
    prompts = random_prompts([3, 30, 7, 1, 16, 5])
    together = generate((CONFIG, tree), prompts, 20, ())
    assert [generate((CONFIG, tree), [prompt], 20, ())[0] for prompt in prompts] == together
    assert generate((CONFIG, tree), prompts[::-1], 20, ()) == together[::-1]
    for batch_size in (1, 4):
        assert generate((CONFIG, tree), prompts, 20, (), batch_size=batch_size) == together


@pytest.mark.slow
def test_a_shorter_limit_cuts_the_answer_and_changes_nothing_else(tree):
    prompts = random_prompts([4, 9])
    long = generate((CONFIG, tree), prompts, 20, ())
    for limit in (0, 1, 7, 16, 17):
        assert generate((CONFIG, tree), prompts, limit, ()) == [answer[:limit] for answer in long]


def test_each_prompt_may_have_a_limit_of_its_own(tree):
    prompts = random_prompts([4, 30, 9, 17])
    long = generate((CONFIG, tree), prompts, 20, ())
    for limits in ([20, 3, 0, 17], [1, 20, 20, 1]):
        wanted = [answer[:limit] for answer, limit in zip(long, limits, strict=True)]
        assert generate((CONFIG, tree), prompts, limits, ()) == wanted
        assert generate((CONFIG, tree), prompts, limits, (), batch_size=2) == wanted


def test_decoding_stops_when_every_row_has_reached_its_limit(tree):
    (prompt,) = random_prompts([4])
    tokens = np.asarray([prompt, prompt], np.int32)
    new = decode(CONFIG, tree, tokens, np.array([4, 4]), np.array([2, 5]), np.array([], np.int32), answer_slots=64)
    assert not np.any(new[:, 5:])  # slots that no step has written


def test_an_answer_ends_with_the_end_of_sequence_token(tree):
    prompts = random_prompts([4, 9, 12, 6])
    endless = generate((CONFIG, tree), prompts, 20, ())
    ends = (endless[0][3], endless[1][11])
    answers = generate((CONFIG, tree), prompts, 20, ends)
    assert answers == [recomputed(tree, prompt, 20, ends) for prompt in prompts]
    assert len(answers[0]) <= 4
    assert answers[0][-1] in ends


def test_the_end_of_sequence_token_is_the_configs_unless_given(tree):
    (prompt,) = random_prompts([4])
    endless = generate((CONFIG, tree), [prompt], 20, ())[0]
    end = endless[3]
    expected = endless[: endless.index(end) + 1]
    assert generate((replace(CONFIG, eos_token_id=(end,)), tree), [prompt], 20) == [expected]
    assert generate((CONFIG, tree), [prompt], 20, end) == [expected]


def test_decoding_stops_when_every_row_has_ended(tree):
    (prompt,) = random_prompts([4])
    first = generate((CONFIG, tree), [prompt], 1, ())[0][0]
    tokens = np.asarray([prompt], np.int32)
    new = decode(CONFIG, tree, tokens, np.array([4]), np.array([64]), np.array([first], np.int32), answer_slots=64)
    assert new[0, 0] == first
    assert not np.any(new[0, 1:])  # slots that no step has written


def test_new_weights_and_lengths_of_one_bucket_need_no_new_compilation(tree):
    generate((CONFIG, tree), random_prompts([9, 12]), 10)
    compiled = decode._cache_size()
    other = jax.tree.map(lambda weight: weight * 1.1, tree)
    for lengths, limit in [([3, 16], 10), ([1, 2], 16), ([5, 5], 1)]:
        generate((CONFIG, other), random_prompts(lengths), limit)
    assert decode._cache_size() == compiled


@pytest.mark.slow
def test_two_runs_in_bfloat16_agree(tree):
    model = Decoder(CONFIG, tree, dtype=jnp.bfloat16)
    prompts = random_prompts([3, 30, 7])
    assert generate(model, prompts, 20, ()) == generate(model, prompts, 20, ())


def test_equally_likely_tokens_resolve_to_the_first(tree):
    flat = tree | {"lm_head": jnp.ones_like(tree["lm_head"])}
    assert generate((CONFIG, flat), [[5, 6]], 3, ()) == [[0, 0, 0]]


def test_no_prompts_have_no_answers(tree):
    assert generate((CONFIG, tree), [], 5) == []


def test_an_empty_prompt_is_refused(tree):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate((CONFIG, tree), [[1], []], 5)


def test_a_token_outside_the_vocabulary_is_refused(tree):
    with pytest.raises(ValueError, match="prompt 0 has tokens 4 to 96, the model knows 0 to 95"):
        generate((CONFIG, tree), [[4, 96]], 5)
