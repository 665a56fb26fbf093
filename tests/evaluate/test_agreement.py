"""Both evaluators on a real model and real questions: where they part, two tokens were equally likely to rounding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smollm import smollm_directory
from transformers import AutoTokenizer
from vllm_python import vllm_python

import dppa_jax
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.vllm import VllmEvaluator
from dppa_jax.model import DecoderConfig, forward

NEW_TOKENS, EACH = 24, 8
ROUNDING = 1e-3  # of logits of about 20 that float32 products of 576 to 49152 terms add up to in another order
LONGEST = 150  # characters of a question, which keeps the test short


def questions(shared, tokenizer) -> list[list[int]]:
    """EACH of each task, as the model's chat template has them."""
    found = []
    for task in ("gsm8k_test", "fpb"):
        rows = map(json.loads, (shared / "data" / f"{task}.jsonl").read_text().splitlines())
        found += [row["question"] for row in rows if len(row["question"]) < LONGEST][:EACH]
    chats = [[{"role": "user", "content": text}] for text in found]
    return list(tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"])


def gap_where_they_part(config, tree, prompt, ours, theirs) -> float:
    """By how much our first other token is likelier to us than theirs, in logits."""
    at = next(i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    logits = forward(config, tree, jnp.array([prompt + ours[:at]]))[0, -1]
    return float(logits[ours[at]] - logits[theirs[at]])


@pytest.mark.slow
def test_both_evaluators_give_the_same_answers(shared, tmp_path):
    python, directory = vllm_python(), smollm_directory()
    tokenizer, model = AutoTokenizer.from_pretrained(directory), dppa_jax.load(directory)
    prompts = questions(shared, tokenizer)
    other = dppa_jax.load(directory)
    other.tree["embed_tokens"] = np.roll(other.tree["embed_tokens"], 1, axis=0)  # another model to begin with
    options = {"dtype": "float32", "max_num_seqs": 2 * EACH, "max_model_len": 512, "cpu_cache_gb": 2, "timeout": 300}
    vllm, local = VllmEvaluator(python, tmp_path, **options), JaxEvaluator(batch_size=EACH)
    try:
        vllm.use(other)
        vllm.use(model)
        theirs = vllm.generate(prompts, NEW_TOKENS)
    finally:
        vllm.close()
    local.use(model)
    ours = local.generate(prompts, NEW_TOKENS)
    print({what: [round(s, 2) for s in found] for what, found in vllm.seconds.items()}, sum(map(len, theirs)), "tokens")
    different = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    config, tree = DecoderConfig.from_hf(model.config), jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.tree)
    gaps = [gap_where_they_part(config, tree, prompts[i], ours[i], theirs[i]) for i in different]
    print(f"{len(prompts) - len(different)} of {len(prompts)} answers are the same, gaps {gaps}")
    assert len(prompts) == 2 * EACH
    assert len(different) <= 1
    assert all(abs(gap) < ROUNDING for gap in gaps)
