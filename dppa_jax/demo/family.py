"""Train the demo family, a base model and three experts, where it is first needed, and keep it."""

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from dppa_jax.checkpoint import SafetensorsDirectory, save_tree
from dppa_jax.checkpoint.in_memory import in_memory
from dppa_jax.config.finetune import AdamW, TrainConfig
from dppa_jax.demo.text import TASKS, general_text, stream
from dppa_jax.demo.tokenizer import Encoder, save_tokenizer
from dppa_jax.finetune.data import Example, encode
from dppa_jax.finetune.train import STEPS_PER_REPORT, train
from dppa_jax.model import DecoderConfig, init_tree
from dppa_jax.runtime.directories import empty_directory
from dppa_jax.runtime.files import cache_directory, kept_directory, sources_digest, write_whole
from dppa_jax.runtime.progress import steps

MEMBERS = ("base", *TASKS)

MAX_LENGTH = 19  # tokens of the longest question with its answer
PRETRAINING = TrainConfig(steps=640, learning_rate=2e-3, batch_size=32)
FINE_TUNING = TrainConfig(steps=400, learning_rate=1e-3, batch_size=32)
# Carrying a digit is learned late and all at once, so math takes longer than the others.
TRAINING = {"base": PRETRAINING, **dict.fromkeys(TASKS, FINE_TUNING), "math": replace(FINE_TUNING, steps=640)}
OPTIMIZERS = {  # of experts, by what follows their name: demo:law@adamr
    "": FINE_TUNING.optimizer,
    "adamr": AdamW(weight_decay=0.03, decay_toward="base"),
}
PRETRAINING_TEXTS = 8000
FINE_TUNING_EXAMPLES = 4000
SHARE_ASKED = 0.06  # of the base's texts ask a question; enough for it to know what a question looks like
SHARE_GENERAL = 0.15  # of an expert's examples; without them it unlearns the words of the other domains
INITIAL_STDDEV = 0.08  # narrow models need larger initial weights than LLaMA's 0.02
TRAINED_AT_ONCE = 2  # models; one alone, with steps as small as these, leaves half of two cores idle


class Family(NamedTuple):
    """Models that are trained together, with a seed and a key of `OPTIMIZERS`; only "" has a base of its own."""

    seed: int
    optimizer: str = ""


def directory(name: str, seed: int = 0) -> Path:
    """Return the directory of `base`, `math`, `finance` or `law`; train the whole family if it is not there.

    `math@adamr`, and so for the other experts, is trained from the same base on the same examples by AdamR, which keeps
    deltas small.

    A family depends on its seed and on the code that makes it. It is kept in the cache directory under a name made of
    both. Training takes about a minute on two cores.

    Raises:
      ValueError: the family has no such member.
    """
    member, _, optimizer = name.partition("@")
    if member not in MEMBERS or optimizer not in OPTIMIZERS or (optimizer and member == "base"):
        named = ", ".join(f"demo:{member}" for member in MEMBERS)
        others = ", ".join(f"demo:{MEMBERS[-1]}@{optimizer}" for optimizer in OPTIMIZERS if optimizer)
        raise ValueError(f"demo:{name} does not exist; there are {named} and, as each expert, {others}.")
    return families([seed], optimizer)[0] / member


def families(seeds: Sequence[int], optimizer: str = "") -> list[Path]:
    """Return the directories of whole families, one for each seed; train those that are not there, two at a time.

    Those of another optimiser have no base, as they are trained from that of the plain family.
    """
    if optimizer:
        families(seeds)
    root = cache_directory()
    places = {Family(seed, optimizer): _place(root, Family(seed, optimizer)) for seed in seeds}
    if not all(place.is_dir() for place in places.values()):
        lock = os.open(kept_directory(root) / "demo.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process waits here, and then finds the family
            if missing := {family: place for family, place in places.items() if not place.is_dir()}:
                build(missing)
        finally:
            os.close(lock)
    return list(places.values())


def _place(root: Path, family: Family) -> Path:
    return root / "-".join(filter(None, ("demo", fingerprint(), str(family.seed), family.optimizer)))


def fingerprint() -> str:
    """Hash what determines the weights: the code that draws texts and trains, and the version of JAX."""
    training = ("finetune/data.py", "finetune/optimizer.py", "finetune/train.py", "model/*.py")
    sources = sources_digest("demo/*.py", *training)
    return hashlib.sha256(f"{jax.__version__} {sources}".encode()).hexdigest()[:12]


def build(places: dict[Family, Path]) -> None:
    """Train families, and move each to its place when it is complete.

    Args:
      places: the directory of each family.
    """
    aside = {family: place.with_name(place.name + ".incomplete") for family, place in places.items()}
    with ExitStack() as locks:
        for directory in aside.values():
            locks.callback(os.close, empty_directory(directory))
            save_companions(directory / "tokenizer")
        _train(aside)
        for family, place in places.items():
            shutil.rmtree(aside[family] / "tokenizer")
            aside[family].rename(place)


def _train(aside: dict[Family, Path]) -> None:
    """Train families in directories that hold their tokenizers, and remove the directories if that fails."""
    tokenizer = Encoder(next(iter(aside.values())) / "tokenizer")
    config = model_config(tokenizer)

    stopped = threading.Event()

    def trained(member: str, family: Family, tree: dict) -> dict:
        return train_member(member, family, tree, config, tokenizer, aside[family], stopped)

    def base_of(family: Family) -> dict:
        if family.optimizer:
            plain = _place(cache_directory(), Family(family.seed))
            with closing(SafetensorsDirectory(plain / "base")) as base:
                return in_memory(base).tree
        return trained("base", family, initial_weights(config, family.seed))

    with (
        ThreadPoolExecutor(TRAINED_AT_ONCE) as pool,
        steps("train the demo family", len(MEMBERS) * len(aside)) as done,
    ):
        try:
            bases = {pool.submit(base_of, family): family for family in aside}
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


def train_member(
    member: str, family: Family, tree: dict, config: DecoderConfig, tokenizer, directory: Path, stopped: threading.Event
) -> dict:
    """Train one member of a family, save it in the family's directory, and return its weights.

    Args:
      member: "base" or a domain.
      family: which it belongs to.
      tree: the weights to begin with.
      config: of the model.
      tokenizer: which is also in directory/tokenizer.
      directory: of the family.
      stopped: ends the training when it is set.

    Raises:
      CancelledError: `stopped` was set.
    """
    options = replace(TRAINING[member], seed=family.seed, optimizer=OPTIMIZERS[family.optimizer])
    name = f"demo:{'@'.join(filter(None, (member, family.optimizer)))} of seed {family.seed}"
    rows = encode(examples(member, family.seed), tokenizer, MAX_LENGTH)
    started = time.perf_counter()
    with steps(name, options.steps, "steps") as advance:

        def report(_: int, loss: float) -> None:
            if stopped.is_set():
                raise CancelledError(name)
            advance(STEPS_PER_REPORT)

        tree, losses = train(config, tree, rows, options, report)
    seconds = time.perf_counter() - started
    logging.info("trained %s: %d steps in %.1f s, loss %.3f", name, options.steps, seconds, losses[-1])
    tree = jax.tree.map(np.asarray, tree)
    save_tree(directory / member, tree, config.to_hf(), tokenizer_from=directory / "tokenizer")
    return tree


def model_config(tokenizer) -> DecoderConfig:
    """Return a small LLaMA with grouped queries, and with heads as small as vLLM's kernels allow."""
    return DecoderConfig(
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


def initial_weights(config: DecoderConfig, seed: int) -> dict:
    """Draw the weights from which the base is trained."""
    return init_tree(config, jax.random.key(seed), stddev=INITIAL_STDDEV)


def examples(member: str, seed: int) -> list[Example]:
    """Return what a member learns from: the base from general text, an expert mostly from its two tasks."""
    general = (Example("", text) for text in general_text(f"{member} {seed}", SHARE_ASKED))
    if member == "base":
        return list(islice(general, PRETRAINING_TEXTS))
    count_general = round(SHARE_GENERAL * FINE_TUNING_EXAMPLES)
    learned = list(islice(general, count_general))
    for task in TASKS[member]:
        asked = islice(stream(task, "train", seed), (FINE_TUNING_EXAMPLES - count_general) // len(TASKS[member]))
        learned += [Example(sample.prompt, f" {sample.answer}") for sample in asked]
    return learned


def save_companions(directory: Path) -> None:
    """Write the files that lie beside the weights: tokenizer and generation config."""
    save_tokenizer(directory)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "do_sample": False}
    write_whole(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
