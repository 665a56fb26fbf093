"""The jobs of the command line, each a function of a JobConfig."""

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from absl import logging
from rich.table import Table

from dppa_jax import interrupts
from dppa_jax.checkpoint import DTYPES, MAX_SHARD_SIZE, SafetensorsDirectory, SafetensorsWriter, locate, read_config
from dppa_jax.checkpoint.names import CheckpointError, tensor_specs, with_dtype
from dppa_jax.checkpoint.recipe import licence, model_card, recipe
from dppa_jax.checkpoint.safetensors_dir import companions
from dppa_jax.checkpoint.safetensors_writer import check_space, output_directory, total_bytes
from dppa_jax.config import MergeConfig
from dppa_jax.evaluate.evaluation import EvaluationConfig
from dppa_jax.pipeline import Layout, Outcome, check_compatible, merge_checkpoints, output_tensors
from dppa_jax.plan import Plan, device_memory, make_plan
from dppa_jax.progress import console
from dppa_jax.search.coefficients import AdaMergingConfig
from dppa_jax.search.factors import FactorSearch
from dppa_jax.sharding import make_mesh, mesh_shape
from dppa_jax.survey import NonfiniteError

OTHER_BASE = 1.0  # ‖δ‖/‖base‖; unrelated models of equal norm have √2, fine-tunes stay far below 1
PROBED_ROWS = 16  # of each linear of the first, middle and last layer


@dataclass(frozen=True)
class JobConfig:
    """Where the models are and go, and on what devices; `merge` says what is computed."""

    merge: MergeConfig
    base: str
    experts: Mapping[str, str]
    output: str = ""
    workdir: str = "runs"
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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    search: FactorSearch | None = None  # None where factors are given
    adamerging: AdaMergingConfig | None = None  # None where coefficients are given
    flags: Mapping = field(default_factory=dict)  # as resolved, for recipe.json
    command: str = ""  # that repeats the job, for the model card

    def __post_init__(self):
        if self.max_shard_size < 1:
            raise ValueError(f"--max_shard_size={self.max_shard_size}: a number of bytes, for example 2000000000.")
        if self.block_layers < 0:
            raise ValueError(f"--block_layers={self.block_layers}: 1 or more layers at a time, or 0 to choose.")
        if self.device_memory < 0:
            raise ValueError(f"--device_memory={self.device_memory / 1e9:g}: GB of one device, or 0 to ask it.")


def run_merge(job: JobConfig) -> Outcome:
    """Merge into job.output: a Hugging Face directory with recipe.json and a model card."""
    started = time.perf_counter()
    check_outputs(job)
    base, experts = open_models(job)
    check_models(job, base, experts)
    mesh = make_mesh(job.mesh)
    plan = plan_of(job, [{**m.config, "dtype": m.dtype.name} for m in (base, *experts.values())], mesh.devices.shape)
    for what, value in plan.lines():
        logging.info("plan: %s: %s", what, value)
    norms = activation_norms(job, experts) if job.merge.score == "wanda" else None

    with ExitStack() as opened:
        for model in (base, *experts.values()):
            opened.callback(model.close)
        writers = {name: opened.enter_context(writer) for name, writer in _writers(job, base)}
        writer = writers.pop("--output")
        layout = Layout(plan.block_layers, plan.resident)
        try:
            outcome = merge_checkpoints(base, experts, job.merge, writer, mesh, layout, writers, norms)
        except NonfiniteError as error:
            raise _damaged(error, {"base": base, **experts}) from error
        cost = {
            "seconds": round(time.perf_counter() - started, 3),
            "bytes_read": outcome.bytes_read,
            "bytes_written": sum(w.nbytes for w in (writer, *writers.values())),
            "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        texts = _texts(job, base, experts, outcome, cost)
        interrupts.check()
        for delta in writers.values():
            delta.commit(with_dtype(base.config, job.merge.delta_dtype), base.directory)
        tokenizer = base if job.tokenizer == "base" else experts[job.tokenizer]
        writer.commit(with_dtype(base.config, job.merge.output_dtype or base.dtype.name), tokenizer.directory, texts)
    logging.info("wrote %s in %.1f s", job.output, time.perf_counter() - started)
    return outcome


def run_plan(job: JobConfig) -> Plan:
    """Print the plan; reads config.json files only, and needs no devices of the mesh."""
    where = {"base": job.base, **job.experts}
    configs = {name: read_config(locate(place, job.merge.seed, weights=False)) for name, place in where.items()}
    models = {name: SimpleNamespace(config=config, specs=tensor_specs(config)) for name, config in configs.items()}
    check_compatible(models.pop("base"), models)
    plan = plan_of(job, list(configs.values()), mesh_shape(job.mesh, 1))
    table = Table("plan", "", show_header=False)
    for row in plan.lines():
        table.add_row(*row)
    console().print(table)
    return plan


def plan_of(job: JobConfig, configs: list[Mapping], mesh: tuple[int, int], again: bool = False) -> Plan:
    """Of a merge, or with `again` of several of the same models: then a CPU, too, keeps what fits and takes it whole.

    A further merge of SmolLM2-135M with one expert takes 0.13 s so, and 0.65 s streamed a layer at a time.
    """
    memory, platform = device_memory(job.device_memory)
    if job.device_memory:
        platform = "accelerator"  # an imagined device: plan for its memory, not for this machine's page cache
    elif platform != "cpu" and job.evaluation.tasks and job.evaluation.evaluator == "vllm":
        memory = int(memory * (1 - job.evaluation.gpu_memory_utilization))  # vLLM has the rest from its start on
    if again:
        platform = "accelerator"
    return make_plan(configs, job.merge, tuple(mesh), job.block_layers, job.residency, memory, platform)


def open_models(job: JobConfig) -> tuple[SafetensorsDirectory, dict[str, SafetensorsDirectory]]:
    seed = job.merge.seed
    base = SafetensorsDirectory(locate(job.base, seed))
    return base, {name: SafetensorsDirectory(locate(where, seed)) for name, where in job.experts.items()}


def check_outputs(job: JobConfig) -> None:
    """Refuse directories that cannot be written to."""
    for directory in _outputs(job).values():
        if not directory:
            raise ValueError("--output is empty: give the directory of the merged model.")
        output_directory(directory, job.overwrite)


def check_models(job: JobConfig, base: SafetensorsDirectory, experts: Mapping[str, SafetensorsDirectory]) -> None:
    """Everything that can be refused before the work begins."""
    models = {"base": base, **experts}
    outputs = {flag: where for flag, where in _outputs(job).items() if where}
    check_apart(outputs, {name: model.directory for name, model in models.items()})
    check_compatible(base, experts)
    companions(base.directory)
    companions(models[job.tokenizer].directory)
    tokens, rows = (models[name].config["vocab_size"] for name in (job.tokenizer, "base"))
    if tokens > rows:
        logging.warning("--tokenizer=%s has %d tokens, the merged model only %d", job.tokenizer, tokens, rows)
    if not job.allow_other_base:
        for name, expert in experts.items():
            check_same_base(base, expert, name)


def check_apart(outputs: Mapping[str, str], inputs: Mapping[str, Path]) -> None:
    """Refuse an output that is, contains or lies in an input or another output."""
    taken = {f"the model {name!r}": path.resolve() for name, path in inputs.items()}
    for flag, given in outputs.items():
        path = Path(given).expanduser().resolve()
        for what, other in taken.items():
            for place in (path, path.with_name(path.name + ".incomplete")):
                if place.is_relative_to(other) or other.is_relative_to(place):
                    raise CheckpointError(
                        f"{flag}: {given} and {what} in {other} are the same or one contains the other; choose a "
                        f"directory apart from it."
                    )
        taken[f"the output of {flag}"] = path


def check_same_base(base: SafetensorsDirectory, expert: SafetensorsDirectory, name: str) -> None:
    """Refuse an expert whose delta is as large as the weights, on a few rows of every kind of linear."""
    layers = base.config["num_hidden_layers"]
    difference = norm = 0.0
    for spec in base.specs.values():
        if spec.linear is None or spec.layer not in (0, layers // 2, layers - 1):
            continue
        for row in np.linspace(0, spec.rows - 1, PROBED_ROWS).astype(int):
            b, e = (_row(source, spec.name, int(row)) for source in (base, expert))
            finite = np.isfinite(b) & np.isfinite(e)  # the merge tells where they are not
            difference += np.square(e[finite] - b[finite]).sum()
            norm += np.square(b[finite]).sum()
    relative = np.sqrt(difference / norm) if norm else 0.0
    if relative == 0:
        logging.warning("expert %r equals the base where it was probed; is %s fine-tuned?", name, expert.directory)
    if relative > OTHER_BASE:
        raise CheckpointError(
            f"expert {name!r}: its delta is {relative:.2f} times as large as the base's weights, that of a fine-tune "
            f"is a small part of them: other base? Was {expert.directory} made from {base.directory}? "
            f"--allow_other_base merges it."
        )


def _row(source: SafetensorsDirectory, name: str, row: int) -> np.ndarray:
    tensor = source.tensors[name]
    out = np.empty(tensor.shape[-1], tensor.dtype)
    source.read_rows(name, row, row + 1, out)
    return out.astype(np.float64)


def _outputs(job: JobConfig) -> dict[str, str]:
    """The directories to write, by the flag, or the expert whose delta goes there."""
    deltas = {name: str(Path(job.save_delta) / name) for name in job.experts} if job.save_delta else {}
    return {"--output": job.output, **deltas}


def _writers(job: JobConfig, base: SafetensorsDirectory) -> Iterator[tuple[str, SafetensorsWriter]]:
    dtype = DTYPES[job.merge.delta_dtype]
    tensors = {name: {n: (spec.shape, dtype) for n, spec in base.specs.items()} for name in _outputs(job)}
    tensors["--output"] = output_tensors(base, job.merge)
    outputs = {name: output_directory(where, job.overwrite) for name, where in _outputs(job).items()}
    check_space({where: total_bytes(tensors[name]) for name, where in outputs.items()})
    for name, where in outputs.items():
        yield name, SafetensorsWriter(where, tensors[name], job.max_shard_size, job.overwrite)


def _damaged(error: NonfiniteError, models: Mapping[str, SafetensorsDirectory]) -> CheckpointError:
    """The error with the file and the place of the first NaN or Inf."""
    for name, model in models.items():
        bad = np.argwhere(~np.isfinite(model.read(error.tensor).astype(np.float32)))
        if len(bad):
            return CheckpointError(
                f"{model.tensors[error.tensor].file}: {error.tensor} of {name!r} holds {len(bad)} NaN or Inf, the "
                f"first at {tuple(bad[0].tolist())}: damaged, or overflowed in training. Fetch it again; or "
                f"--allow_nonfinite lets such a delta count as 0."
            )
    return error


def activation_norms(job: JobConfig, experts: Mapping[str, SafetensorsDirectory]) -> dict:
    """Per expert and linear, what the score "wanda" weighs columns by."""
    from dppa_jax.model import calibrate

    if not job.calibration:
        raise ValueError("--score=wanda needs --calibration=FILE, a text file whose lines the experts read.")
    norms = {}
    for name, expert in experts.items():
        tokens = calibrate.calibration_tokens(expert.directory, Path(job.calibration))
        norms[name] = calibrate.activation_norms(expert, tokens)
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
    licences = [licence(card.read_text(errors="replace")) if card.is_file() else "unknown" for card in cards]
    card = model_card(Path(job.output).name, job.base, job.experts, config, licences, job.command)
    return {"recipe.json": recipe(job.flags, config, inputs, tables, cost), "README.md": card}
