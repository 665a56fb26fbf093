"""A base model and three experts, small enough to be trained where they are first needed."""

import fcntl
import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from transformers import AutoTokenizer

from dppa_jax.cache import cache_directory
from dppa_jax.checkpoint import save_tree
from dppa_jax.demo import text
from dppa_jax.finetune import train
from dppa_jax.model import LlamaConfig, init_tree, llama

DOMAINS = tuple(text.TASKS)
MEMBERS = ("base", *DOMAINS)

MAX_LENGTH = 19  # tokens of the longest question with its answer
PRETRAINING = train.TrainConfig(steps=360, learning_rate=3e-3)
FINE_TUNING = train.TrainConfig(steps=240, learning_rate=1.5e-3)
PRETRAINING_TEXTS = 8000
FINE_TUNING_EXAMPLES = 4000
SHARE_ASKED = 0.06  # of the general text: enough for the base to know what a question looks like
SHARE_GENERAL = 0.1  # of general text among an expert's examples: without it the other domains are not just forgotten,
# they are unlearned so thoroughly that no merge of the experts answers anything
TRAINED_AT_ONCE = 2  # steps this small leave half of two cores idle


def directory(name: str, seed: int = 0) -> Path:
    """The checkpoint of a member of the family, `base`, `math`, `finance` or `law`; trains the family if need be.

    A family is a function of the seed and of the code that makes it, and is kept in the cache directory under a name
    made of both. Training takes about half a minute on two cores.
    """
    if name not in MEMBERS:
        raise ValueError(f"demo:{name} does not exist; there are {', '.join(f'demo:{member}' for member in MEMBERS)}")
    return families([seed])[0] / name


def families(seeds: Sequence[int]) -> list[Path]:
    """The directories of several families, which hold one checkpoint per member; trains those that are not there."""
    places = [cache_directory() / f"demo-{fingerprint()}-{seed}" for seed in seeds]
    cache_directory().mkdir(parents=True, exist_ok=True)
    with open(cache_directory() / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits and finds the family made
        missing = {seed: place for seed, place in zip(seeds, places, strict=True) if not place.is_dir()}
        if missing:
            build(missing)
    return places


def fingerprint() -> str:
    """Of the code that determines a family's weights."""
    sources = sorted([*Path(__file__).parent.glob("*.py"), Path(train.__file__), Path(llama.__file__)])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def build(places: dict[int, Path]) -> None:
    """Trains the families of the given seeds, bases first, and gives each its place when it is complete."""
    aside = {seed: place.with_name(f"{place.name}.incomplete") for seed, place in places.items()}
    for partial in aside.values():
        shutil.rmtree(partial, ignore_errors=True)
        save_companions(partial / "tokenizer")
    vocabulary = AutoTokenizer.from_pretrained(next(iter(aside.values())) / "tokenizer")
    config = model_config(vocabulary)
    with ThreadPoolExecutor(TRAINED_AT_ONCE) as pool, progress() as started:

        def make(member: str, seed: int, tree: dict) -> dict:
            examples, options = recipe(member, seed)
            rows = train.encode(examples, vocabulary, MAX_LENGTH)
            tree, _ = train.train(config, tree, rows, options, started(f"demo:{member}, seed {seed}", options.steps))
            save_tree(aside[seed] / member, jax.tree.map(np.asarray, tree), config.to_hf(), aside[seed] / "tokenizer")
            return tree

        bases = {seed: pool.submit(make, "base", seed, initial_weights(config, seed)) for seed in places}
        bases = {seed: base.result() for seed, base in bases.items()}
        experts = [pool.submit(make, domain, seed, bases[seed]) for seed in places for domain in DOMAINS]
        for expert in experts:
            expert.result()
    for seed, place in places.items():
        shutil.rmtree(aside[seed] / "tokenizer")
        aside[seed].rename(place)


def model_config(vocabulary) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=(vocabulary.eos_token_id,),
    )


def initial_weights(config: LlamaConfig, seed: int) -> dict:
    return init_tree(config, jax.random.key(seed), stddev=config.hidden_size**-0.5)


def recipe(member: str, seed: int) -> tuple[list[train.Example], train.TrainConfig]:
    """What a member learns from, and how."""
    options = PRETRAINING if member == "base" else FINE_TUNING
    return examples(member, seed), replace(options, seed=seed)
