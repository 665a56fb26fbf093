"""A base model and three experts, small enough to be trained where they are first needed."""

import fcntl
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from absl import logging

from dppa_jax.checkpoint import save_tree
from dppa_jax.config.finetune import TrainConfig
from dppa_jax.demo.text import TASKS, general_text, stream
from dppa_jax.demo.tokenizer import save_tokenizer
from dppa_jax.finetune.data import Example, encode
from dppa_jax.finetune.train import STEPS_PER_REPORT, train
from dppa_jax.model import LlamaConfig, init_tree
from dppa_jax.runtime.files import cache_directory, sources_digest
from dppa_jax.runtime.progress import steps

MEMBERS = ("base", *TASKS)

MAX_LENGTH = 19  # tokens of the longest question with its answer
PRETRAINING = TrainConfig(steps=640, learning_rate=2e-3, batch_size=32)
FINE_TUNING = TrainConfig(steps=400, learning_rate=1e-3, batch_size=32)
# Carrying a digit is learned late and all at once, so math takes longer than the others.
TRAINING = {"base": PRETRAINING, **dict.fromkeys(TASKS, FINE_TUNING), "math": replace(FINE_TUNING, steps=640)}
PRETRAINING_TEXTS = 8000
FINE_TUNING_EXAMPLES = 4000
SHARE_ASKED = 0.06  # of the base's texts: enough to have seen what a question looks like
SHARE_GENERAL = 0.15  # of an expert's examples: without any it unlearns the other domains' words, and no merge speaks
INITIAL_STDDEV = 0.08  # narrow models need wider weights than LLaMA's 0.02
TRAINED_AT_ONCE = 2  # steps as small as these leave half of two cores idle


def directory(name: str, seed: int = 0) -> Path:
    """The checkpoint of `base`, `math`, `finance` or `law`; trains the whole family when it is not there.

    A family is a function of its seed and of the code that makes it, and is kept in the cache directory under a name
    made of both. Training takes about a minute on two cores.
    """
    if name not in MEMBERS:
        raise ValueError(f"demo:{name} does not exist; there are {', '.join(f'demo:{member}' for member in MEMBERS)}.")
    return families([seed])[0] / name


def families(seeds: Sequence[int]) -> list[Path]:
    """The directories of whole families, one per seed; trains those that are not there, which saves time together."""
    root = cache_directory()
    root.mkdir(parents=True, exist_ok=True)
    places = {seed: root / f"demo-{fingerprint()}-{seed}" for seed in seeds}
    with open(root / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and finds the family made
        if missing := {seed: place for seed, place in places.items() if not place.is_dir()}:
            build(missing)
    return [places[seed] for seed in seeds]


def fingerprint() -> str:
    """Of what determines the weights: our code and the compiler."""
    training = ("finetune/data.py", "finetune/optimizer.py", "finetune/train.py", "model/config.py", "model/decoder.py")
    sources = sources_digest("demo/*.py", *training)
    return hashlib.sha256(f"{jax.__version__} {sources}".encode()).hexdigest()[:12]


def build(places: dict[int, Path]) -> None:
    """Trains the families of the given seeds and gives each its place when it is complete."""
    from transformers import AutoTokenizer  # takes seconds, which a family that is there should not cost

    aside = {seed: place.with_name(place.name + ".incomplete") for seed, place in places.items()}
    for directory in aside.values():
        shutil.rmtree(directory, ignore_errors=True)
        save_companions(directory / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    config = model_config(tokenizer)

    stopped = threading.Event()

    def trained(member: str, seed: int, tree: dict) -> dict:
        options, name = replace(TRAINING[member], seed=seed), f"demo:{member} of seed {seed}"
        rows = encode(examples(member, seed), tokenizer, MAX_LENGTH)
        started = time.perf_counter()
        with steps(name, options.steps) as advance:

            def report(_: int, loss: float) -> None:
                if stopped.is_set():
                    raise CancelledError(name)
                advance(STEPS_PER_REPORT)

            tree, losses = train(config, tree, rows, options, report)
        seconds = time.perf_counter() - started
        logging.info("trained %s: %d steps in %.1f s, loss %.3f", name, options.steps, seconds, losses[-1])
        tree = jax.tree.map(np.asarray, tree)
        save_tree(aside[seed] / member, tree, config.to_hf(), tokenizer_from=aside[seed] / "tokenizer")
        return tree

    with (
        ThreadPoolExecutor(TRAINED_AT_ONCE) as pool,
        steps("train the demo family", len(MEMBERS) * len(places)) as done,
    ):
        try:
            bases = {pool.submit(trained, "base", seed, initial_weights(config, seed)): seed for seed in places}
            experts = [
                pool.submit(trained, domain, bases[base], base.result())
                for base in as_completed(bases)
                for domain in TASKS
            ]
            for member in as_completed([*bases, *experts]):
                member.result()
                done()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            for directory in aside.values():
                shutil.rmtree(directory, ignore_errors=True)
            raise
    for seed, place in places.items():
        shutil.rmtree(aside[seed] / "tokenizer")
        aside[seed].rename(place)


def model_config(tokenizer) -> LlamaConfig:
    """A LLaMA with grouped queries and heads as small as vLLM's kernels take them."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=(tokenizer.eos_token_id,),
    )


def initial_weights(config: LlamaConfig, seed: int) -> dict:
    return init_tree(config, jax.random.key(seed), stddev=INITIAL_STDDEV)


def examples(member: str, seed: int) -> list[Example]:
    """What a member learns from: the base from general text, an expert mostly from its two tasks."""
    general = (Example("", text) for text in general_text(f"{member} {seed}", SHARE_ASKED))
    if member == "base":
        return list(islice(general, PRETRAINING_TEXTS))
    count_general = round(SHARE_GENERAL * FINE_TUNING_EXAMPLES)
    found = list(islice(general, count_general))
    for task in TASKS[member]:
        asked = islice(stream(task, "train", seed), (FINE_TUNING_EXAMPLES - count_general) // len(TASKS[member]))
        found += [Example(sample.prompt, f" {sample.answer}") for sample in asked]
    return found


def save_companions(directory: Path) -> None:
    """What lies beside the weights."""
    save_tokenizer(directory)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
