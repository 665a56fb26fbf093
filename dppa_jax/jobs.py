"""The jobs of the command line, each a function of a JobConfig."""

import json
import resource
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from dppa_jax.checkpoint import MAX_SHARD_SIZE, SafetensorsDirectory, SafetensorsWriter, locate
from dppa_jax.checkpoint.names import LINEARS, CheckpointError
from dppa_jax.checkpoint.recipe import licence, model_card, recipe
from dppa_jax.config import MergeConfig
from dppa_jax.pipeline import Layout, Outcome, check_compatible, merge_checkpoints, output_tensors
from dppa_jax.plan import Plan, device_memory, make_plan
from dppa_jax.sharding import make_mesh, mesh_shape

OTHER_BASE = 1.0  # ‖δ‖/‖base‖; unrelated models of equal norm have √2, fine-tunes stay far below 1
PROBED_ROWS = 16  # of each linear of the first, middle and last layer


@dataclass(frozen=True)
class JobConfig:
    """Where the models are and go, and on what devices; `merge` says what is computed."""

    merge: MergeConfig
    base: str
    experts: Mapping[str, str]
    output: str = ""
    save_delta: str = ""
    tokenizer: str = "base"
    mesh: str = ""
    block_layers: int = 0
    residency: str = "auto"
    device_memory: int = 0
    max_shard_size: int = MAX_SHARD_SIZE
    overwrite: bool = False
    allow_other_base: bool = False
    calibration: str = ""
    flags: Mapping = field(default_factory=dict)


def run_merge(job: JobConfig) -> Outcome:
    """Merge into job.output: a Hugging Face directory with recipe.json and a model card."""
    started = time.perf_counter()
    check_output(job.output, job.overwrite)
    base, experts = open_models(job)
    check_compatible(base, experts)
    if not job.allow_other_base:
        for name, expert in experts.items():
            check_same_base(base, expert, name)
    mesh = make_mesh(job.mesh)
    plan = plan_of(job, [base.config, *(e.config for e in experts.values())], mesh.devices.shape)
    for what, value in plan.lines():
        logging.info("plan: %s: %s", what, value)
    norms = _activation_norms(job, experts) if job.merge.score == "wanda" else None

    config = job.merge
    writer = SafetensorsWriter(job.output, output_tensors(base, config), job.max_shard_size)
    deltas = _delta_writers(job, base)
    try:
        outcome = merge_checkpoints(
            base, experts, config, writer, mesh, Layout(plan.block_layers, plan.resident), deltas, norms
        )
        cost = {
            "seconds": round(time.perf_counter() - started, 3),
            "bytes_read": outcome.bytes_read,
            "bytes_written": writer.nbytes,
            "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        tokenizer = base if job.tokenizer == "base" else experts[job.tokenizer]
        texts = _texts(job, base, experts, outcome, cost)
        dtype = next(iter(output_tensors(base, config).values()))[1].name
        for name, delta in deltas.items():
            delta.commit({**base.config, "torch_dtype": config.delta_dtype}, base.directory)
            logging.info("delta of %s: %s", name, delta.directory)
        writer.commit({**base.config, "torch_dtype": dtype}, tokenizer.directory, texts)
    except BaseException:
        for unfinished in (writer, *deltas.values()):
            unfinished.abort()
        raise
    logging.info("wrote %s in %.1f s", job.output, time.perf_counter() - started)
    return outcome


def run_plan(job: JobConfig) -> Plan:
    """Print the plan; reads config.json files only, and needs no devices of the mesh."""
    configs = []
    for where in (job.base, *job.experts.values()):
        directory = locate(where, job.merge.seed, weights=False)
        configs.append(json.loads((directory / "config.json").read_text()))
    plan = plan_of(job, configs, mesh_shape(job.mesh, 1))
    table = Table("plan", "", show_header=False)
    for row in plan.lines():
        table.add_row(*row)
    Console().print(table)
    return plan


def plan_of(job: JobConfig, configs: list[Mapping], mesh: tuple[int, int]) -> Plan:
    memory, platform = device_memory(job.device_memory)
    if job.device_memory:
        platform = "accelerator"  # an imagined device: plan for its memory, not for this machine's page cache
    return make_plan(configs, job.merge, tuple(mesh), job.block_layers, job.residency, memory, platform)


def open_models(job: JobConfig) -> tuple[SafetensorsDirectory, dict[str, SafetensorsDirectory]]:
    seed = job.merge.seed
    base = SafetensorsDirectory(locate(job.base, seed))
    return base, {name: SafetensorsDirectory(locate(where, seed)) for name, where in job.experts.items()}


def check_output(output: str, overwrite: bool) -> None:
    if not output:
        raise ValueError("--output is empty: give the directory of the merged model.")
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise CheckpointError(f"{output} is not empty; choose another --output, or --overwrite to replace it.")


def check_same_base(base: SafetensorsDirectory, expert: SafetensorsDirectory, name: str) -> None:
    """Refuse an expert whose delta is as large as the weights, on a few rows of every kind of linear."""
    layers = base.config["num_hidden_layers"]
    difference = norm = 0.0
    for spec in base.specs.values():
        if spec.linear is None or spec.layer not in (0, layers // 2, layers - 1):
            continue
        for row in np.linspace(0, spec.rows - 1, PROBED_ROWS).astype(int):
            b, e = (_row(source, spec.name, row) for source in (base, expert))
            difference += np.square(e - b).sum()
            norm += np.square(b).sum()
    relative = np.sqrt(difference / norm) if norm else 0.0
    if relative > OTHER_BASE:
        raise CheckpointError(
            f"expert {name!r}: its delta is {relative:.2f} times as large as the base's weights, that of a fine-tune is "
            f"a small part of them: was {expert.directory} made from {base.directory}? --allow_other_base merges it."
        )


def _row(source: SafetensorsDirectory, name: str, row: int) -> np.ndarray:
    tensor = source.tensors[name]
    out = np.empty(tensor.shape[-1], tensor.dtype)
    source.read_rows(name, row, row + 1, out)
    return out.astype(np.float64)


def _delta_writers(job: JobConfig, base: SafetensorsDirectory) -> dict[str, SafetensorsWriter]:
    if not job.save_delta:
        return {}
    from dppa_jax.checkpoint import DTYPES

    dtype = DTYPES[job.merge.delta_dtype]
    tensors = {name: (spec.shape, dtype) for name, spec in base.specs.items()}
    directories = {name: Path(job.save_delta) / name for name in job.experts}
    for directory in directories.values():
        check_output(str(directory), job.overwrite)
    return {name: SafetensorsWriter(path, tensors, job.max_shard_size) for name, path in directories.items()}


def _activation_norms(job: JobConfig, experts: Mapping[str, SafetensorsDirectory]) -> dict:
    from dppa_jax.model.calibrate import activation_norms, calibration_tokens

    if not job.calibration:
        raise ValueError("--score=wanda needs --calibration=FILE, a text file whose lines the experts read.")
    norms = {}
    for name, expert in experts.items():
        norms[name] = activation_norms(expert, calibration_tokens(expert.directory, Path(job.calibration)))
        logging.info("activation norms of %s on %s", name, job.calibration)
    return norms


def _texts(job: JobConfig, base, experts: Mapping[str, SafetensorsDirectory], outcome: Outcome, cost: Mapping) -> dict:
    """recipe.json and README.md."""
    config = job.merge.as_dict()
    opened = {"base": base, **experts}
    where = {"base": job.base, **job.experts}
    inputs = {
        name: {"where": where[name], "directory": str(m.directory), "fingerprint": m.fingerprint()}
        for name, m in opened.items()
    }
    tables = {name: getattr(outcome, name) for name in ("rates", "thresholds", "densities", "weights")}
    cards = [m.directory / "README.md" for m in opened.values()]
    licences = [licence(card.read_text()) if card.is_file() else "unknown" for card in cards]
    command = shlex.join(["python", "-m", "dppa_jax.launch", *sys.argv[1:]])
    card = model_card(Path(job.output).name, job.base, job.experts, config, licences, command)
    return {"recipe.json": recipe(job.flags, config, inputs, tables, cost), "README.md": card}


__all__ = ["LINEARS", "JobConfig", "check_output", "open_models", "run_merge", "run_plan"]
