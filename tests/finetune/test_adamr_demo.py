"""AdamR on the law expert of the demo family, as darex.md measured it: dense as good, deltas smaller, DARE survives."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import dppa_jax
from dppa_jax.checkpoint import save_tree
from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
from dppa_jax.config.finetune import AdamW
from dppa_jax.config.run import EvaluateConfig
from dppa_jax.demo.family import FINE_TUNING, MAX_LENGTH, examples
from dppa_jax.demo.text import TASKS
from dppa_jax.demo.tokenizer import Encoder
from dppa_jax.finetune.data import encode
from dppa_jax.finetune.train import train
from dppa_jax.jobs.evaluate import run_evaluate
from dppa_jax.model import DecoderConfig
from dppa_jax.where import load_tree

SEEDS = (0, 1, 2)
DECAYS = {"without": AdamW(), "pulled": AdamW(weight_decay=0.03, decay_toward="base")}


@pytest.mark.slow
def test_7_deltas_of_adamr_are_half_as_large_and_survive_dare_where_others_do_not(trained: Path, tmp_path):
    base = trained / "base"
    hf_config, tree = load_tree(base)
    rows = encode(examples("law", 0), Encoder(base), MAX_LENGTH)
    models, sizes = {}, {}
    for name, optimizer in DECAYS.items():
        expert, _ = train(DecoderConfig.from_hf(hf_config), tree, rows, replace(FINE_TUNING, optimizer=optimizer))
        deltas = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).ravel(), expert, tree)
        sizes[name] = np.concatenate(jax.tree.leaves(deltas)).mean()
        models[name] = str(tmp_path / name)
        save_tree(tmp_path / name, jax.tree.map(np.asarray, expert), hf_config, base)
        for seed in SEEDS:
            opened = {"law": dppa_jax.load(models[name])}
            models[f"{name} {seed}"] = str(tmp_path / f"{name}-{seed}")
            merged = dppa_jax.merge(dppa_jax.load(str(base)), opened, "dare", rate=0.9, seed=seed)
            dppa_jax.save(merged, models[f"{name} {seed}"])
    evaluation = EvaluationConfig(tuple(TASKS["law"]), options=TaskOptions(limit=150))
    scores = run_evaluate(EvaluateConfig(models, evaluation, workdir=str(tmp_path / "runs")))
    found = {name: 100 * np.mean([score.accuracy for score in one.values()]) for name, one in scores.items()}
    dare = {name: np.mean([found[f"{name} {seed}"] for seed in SEEDS]) for name in DECAYS}
    assert found["pulled"] >= 97
    assert sizes["pulled"] < 0.6 * sizes["without"]
    assert dare["pulled"] >= dare["without"] + 20
