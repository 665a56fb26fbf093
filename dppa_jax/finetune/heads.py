"""An encoder with a classification head: the base's own where it has one, a fresh one where it has none."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
from absl import logging

from dppa_jax.architecture.generic import dense_role
from dppa_jax.architecture.row import CLASSIFIER
from dppa_jax.architecture.specs import TensorSpec, tensor_specs, tree_of
from dppa_jax.architecture.table import architecture_of
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.stacked import StoredArray
from dppa_jax.model import EncoderConfig, abstract_tree

POOLED = ("{root}pooler.dense", "classifier")  # the linears of a head, of a family with a pooler
OWN = ("classifier.dense", "classifier.out_proj")  # and of one without
STDDEV = 0.02  # of fresh weights, where config.json has no initializer_range; biases are 0


@dataclass(frozen=True)
class Headed:
    """An encoder with a classification head.

    Attributes:
      config: the content of its config.json, with the names of the classes.
      specs: of its tensors.
      directory: of its tokenizer.
      tree: its weights: those of the base, which are read when they are wanted, and fresh ones.
    """

    config: dict
    specs: Mapping[str, TensorSpec]
    directory: Path
    tree: dict


def with_head(base: Checkpoint, names: tuple[str, ...], seed: int) -> Headed:
    """Return an encoder with a head for these classes.

    Args:
      base: an encoder. The pooler and the classifier that it lacks are drawn, as transformers draws them; a head of
        another kind, such as one for masked tokens, is left out.
      names: of the classes, by their numbers.
      seed: of the draws.
    """
    row, said = architecture_of(base.config), base.config
    kind = next(name for name in row.classes if name.endswith(CLASSIFIER))
    config = {key: value for key, value in said.items() if key != "num_labels"} | {
        "architectures": [kind],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "regression" if len(names) == 1 else "single_label_classification",
    }
    shapes, specs = abstract_tree(EncoderConfig.from_hf(config)), tensor_specs(config)
    for linear in POOLED if row.pooled else OWN:
        for part in ("weight", "bias"):
            name = f"{linear.format(root=row.root)}.{part}"
            spec = TensorSpec(name, (), dense_role(name, (1,)), linear, head=not name.startswith(row.root))
            shape = reduce(getitem, spec.path, shapes).shape
            specs[name] = TensorSpec(name, shape, dense_role(name, shape), spec.kind, head=spec.head)
    generator, fresh = np.random.default_rng(seed), []

    def weights(group: list[TensorSpec]):
        spec = group[0]
        if spec.name in base.specs and base.specs[spec.name].shape == spec.shape:
            return StoredArray(base, group)
        fresh.append(spec.name)
        spread = 0.0 if spec.name.endswith("bias") else said.get("initializer_range", STDDEV)
        return (spread * generator.standard_normal(spec.shape)).astype(base.dtype)

    tree = tree_of(specs.values(), weights)
    left = [name for name in base.specs if name not in specs]
    if fresh or left:
        logging.info("a fresh head: %s; left out: %s", ", ".join(fresh) or "none", ", ".join(left[:3]) or "nothing")
    return Headed(config, specs, base.directory, tree)
