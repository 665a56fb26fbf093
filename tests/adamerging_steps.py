"""Entropies and gradients of AdaMerging on a small family; as a program, one of several processes that find them.

python adamerging_steps.py RESULT --coordinator=HOST:PORT --num_processes=N --process_id=I
"""

import argparse
from pathlib import Path

import numpy as np
from support import make_family

from dppa_jax.config.merge import MergeConfig
from dppa_jax.runtime import processes
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.search.adamerging_step import Step
from dppa_jax.search.coefficients import fixed_coefficients, groups_of
from dppa_jax.search.mixture import Mixture
from dppa_jax.search.prompts import draw, prompts_of

EXPERTS = ("math", "law")
MERGE = MergeConfig(EXPERTS, method="dare", rate=0.7, seed=5)


def steps(mesh: str) -> dict[str, np.ndarray]:
    """Entropies and gradient, what every process read, and the share of a linear that this one has."""
    base, experts = make_family(EXPERTS, "bfloat16", num_hidden_layers=3)
    generator = np.random.default_rng(3)
    tokens = [generator.integers(1, base.config["vocab_size"], n).tolist() for n in (5, 17, 9, 12)]
    batch = draw({"math": prompts_of(tokens, "all")}, 0, 4, seed=0)
    mixture = Mixture(base, experts, MERGE, make_mesh(mesh))
    groups = groups_of("linear", base.specs)
    step = Step(mixture, groups.of_tensor, fixed_coefficients(MERGE, base.specs), 1e-3)
    entropies, gradient = step.gradient(np.full((len(groups.names), len(EXPERTS)), 0.3, np.float32), batch)
    return {
        "entropies": entropies,
        "gradient": gradient,
        "bytes read": np.array(processes.exchange("bytes read", mixture.bytes_read)),
        "share of q_proj": np.array(share(mixture.tree["layers"]["self_attn"]["q_proj"].base)),
    }


def share(array) -> float:
    """Of an array's elements that this process has."""
    return sum(shard.data.size for shard in array.addressable_shards) / array.size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    given = parser.parse_args()
    processes.start(given.coordinator, given.num_processes, given.process_id)
    np.savez(given.result.with_name(f"{given.result.name}-{given.process_id}.npz"), **steps(""))


if __name__ == "__main__":
    main()
