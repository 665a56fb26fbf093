"""The jobs of the command line, each a function of a JobConfig."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import psutil
from absl import logging
from rich.table import Table

from dppa_jax.architecture.specs import CheckpointError, tensor_specs, with_dtype
from dppa_jax.checkpoint import DTYPES, Checkpoint, SafetensorsWriter, read_config
from dppa_jax.checkpoint.card import library_versions, licence, model_card, recipe
from dppa_jax.checkpoint.safetensors import companions
from dppa_jax.checkpoint.safetensors_writer import check_space, output_directory, total_bytes
from dppa_jax.config.run import JobConfig
from dppa_jax.merge.blocks import owners
from dppa_jax.merge.compatible import check_compatible
from dppa_jax.merge.merger import ARITHMETIC, Layout, Outcome, merge_checkpoints, output_tensors
from dppa_jax.merge.plan import Plan, make_plan
from dppa_jax.merge.speed import measure_speeds
from dppa_jax.merge.survey import NonfiniteError
from dppa_jax.runtime import processes, signals
from dppa_jax.runtime.files import digest
from dppa_jax.runtime.journal import Journal
from dppa_jax.runtime.memory import device_memory, peak_resident
from dppa_jax.runtime.mesh import make_mesh, mesh_shape
from dppa_jax.runtime.progress import console, write_json
from dppa_jax.where import locate, open_checkpoint

OTHER_BASE = 1.0  # ‖δ‖/‖base‖; unrelated models of equal norm have √2, fine-tunes stay far below 1
PROBED_ROWS = 16  # of each linear of the first, middle and last layer


def run_merge(job: JobConfig) -> Outcome:
    """Merge into job.output: a Hugging Face directory with recipe.json and a model card."""
    started = time.perf_counter()
    check_outputs(job)
    base, experts = open_models(job)
    check_models(job, base, experts)
    mesh = make_mesh(job.mesh)
    plan = plan_of(job, [{**m.config, "dtype": m.dtype.name} for m in (base, *experts.values())], mesh.devices.shape)
    for what, value in plan.lines():
        (logging.info if plan.fits else logging.warning)("plan: %s: %s", what, value)
    norms = activation_norms(job, experts) if job.merge.score == "wanda" else None
    layout = Layout(plan.block_layers, plan.resident, processes.count(), processes.index())

    with ExitStack() as opened:
        for model in (base, *experts.values()):
            opened.callback(model.close)
        identity = identity_of(job, {"base": base, **experts}, layout) if job.resume else ""
        writers = {name: opened.enter_context(writer) for name, writer in _writers(job, base, identity)}
        writer = writers.pop("--output")
        journal = opened.enter_context(journal_of((writer, *writers.values()), identity))
        try:
            outcome = merge_checkpoints(base, experts, job.merge, writer, mesh, layout, writers, norms, journal=journal)
        except NonfiniteError as error:
            raise _damaged(error, {"base": base, **experts}) from error
        texts = _texts(job, base, experts, outcome, _cost(outcome, (writer, *writers.values()), started))
        signals.check()
        for delta in writers.values():
            delta.complete(with_dtype(base.config, job.merge.delta_dtype), base.directory)
        tokenizer = base if job.tokenizer == "base" else experts[job.tokenizer]
        writer.complete(with_dtype(base.config, job.merge.output_dtype or base.dtype.name), tokenizer.directory, texts)
        for whole in (*writers.values(), writer):
            whole.publish()
    logging.info("wrote %s in %.1f s", job.output, time.perf_counter() - started)
    return outcome


def identity_of(job: JobConfig, models: Mapping[str, Checkpoint], layout: Layout) -> str:
    """Of all that decides what a merge writes."""
    inputs = {name: input_identity(model) for name, model in models.items()}
    calibration = Path(job.calibration).read_text() if job.calibration else ""
    outputs = {flag: str(Path(where).resolve()) for flag, where in _outputs(job).items()}
    computed = [ARITHMETIC, library_versions(), jax.default_backend(), job.merge.as_dict(), calibration]
    return common_identity([computed, inputs, outputs, replace(layout, process=0), job.max_shard_size])


def common_identity(content) -> str:
    """Of a run of this content: one that was ended is taken up by one of the same identity only.

    Several processes have one between them, and each may have copies of the inputs of its own.
    """
    return digest(processes.exchange("identity", digest(content)))


def input_identity(model: Checkpoint) -> tuple[str, list[tuple[str, int, int]]]:
    """Fingerprint, and names, sizes and times of change of the files."""
    found = ((path, path.stat()) for path in sorted(model.directory.rglob("*")) if path.is_file())
    files = [(str(path.relative_to(model.directory)), stat.st_size, stat.st_mtime_ns) for path, stat in found]
    return model.fingerprint(), files


@contextmanager
def journal_of(writers: Sequence[SafetensorsWriter], identity: str) -> Iterator[Journal]:
    """Of what is written into these directories; it lies in the first."""
    flush = lambda: [writer.flush() for writer in writers]  # noqa: E731
    journal = Journal(writers[0].journal if identity else None, all(writer.resumed for writer in writers), flush)
    if journal.known:
        logging.info("goes on after %d steps that an earlier run has done; --resume=false starts anew", journal.known)
    try:
        yield journal
    finally:
        journal.close()


def _cost(outcome: Outcome, writers: Sequence[SafetensorsWriter], started: float) -> dict:
    """Time, and what each process read and wrote; of resident memory the peak of a process."""
    mine = outcome.bytes_read, sum(w.nbytes for w in writers), peak_resident()
    read, written, peak = zip(*processes.exchange("cost", mine), strict=True)
    cost = {"seconds": round(time.perf_counter() - started, 3), "bytes_read": sum(read), "bytes_written": sum(written)}
    cost |= {"peak_memory": max(peak)}
    return cost | ({"processes": {"bytes_read": read, "bytes_written": written}} if len(read) > 1 else {})


def run_plan(job: JobConfig) -> Plan:
    """Print the plan, and write it as JSON to plan.json in --workdir.

    The config.json files are enough, and devices of the mesh are needed only for the time.
    """
    where = {"base": job.base, **job.experts}
    configs = {name: read_config(locate(place, job.merge.seed, weights=False)) for name, place in where.items()}
    models = {name: SimpleNamespace(config=config, specs=tensor_specs(config)) for name, config in configs.items()}
    check_compatible(models.pop("base"), models)
    plan = plan_of(job, list(configs.values()), mesh_shape(job.mesh, 1))
    told, predicted = _predicted_time(job, plan)
    table = Table("plan", "", show_header=False)
    for row in (*plan.lines(), ("time", told)):
        table.add_row(*row)
    console().print(table)
    write_json(Path(job.workdir) / "plan.json", asdict(plan) | predicted)
    return plan


def _predicted_time(job: JobConfig, plan: Plan) -> tuple[str, dict]:
    """From speeds measured here, where the weights are: in words, and for plan.json; or why there is none."""
    if job.device_memory:
        return "not predicted: the devices of --device_memory are not here to be measured", {}
    if not job.output:
        return "not predicted: give --output, as it depends on that disk", {}
    try:
        base, experts = open_models(job, weights=False)
        speeds = measure_speeds((base, *experts.values()), Path(job.output), job.merge, make_mesh(job.mesh))
    except (ValueError, OSError) as error:
        return f"not predicted: {error}", {}
    return plan.time(speeds), {"seconds": plan.seconds(speeds), "speeds": asdict(speeds)}


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
    free = 0 if job.device_memory else psutil.virtual_memory().available
    several = job.num_processes or processes.count()
    cut = (job.block_layers, job.residency, memory, platform, several)
    return make_plan(configs, job.merge, tuple(mesh), *cut, bool(job.save_delta), free)


def open_models(job: JobConfig, weights: bool = True) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Base and experts; without `weights` nothing large is fetched, and models that are not here are an error."""
    seed = job.merge.seed
    with processes.first_alone("models"):  # it fetches or builds what the others then find
        base = open_checkpoint(job.base, seed, weights)
        return base, {name: open_checkpoint(where, seed, weights) for name, where in job.experts.items()}


def check_outputs(job: JobConfig) -> None:
    """Refuse directories that cannot be written to."""
    for directory in _outputs(job).values():
        if not directory:
            raise ValueError("--output is empty: give the directory of the merged model.")
        output_directory(directory, job.overwrite)


def check_models(job: JobConfig, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
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


def check_same_base(base: Checkpoint, expert: Checkpoint, name: str) -> None:
    """Refuse an expert whose delta is as large as the weights, on a few rows of every kind of linear.

    Each process looks at layers of its own.
    """
    own = processes.share(base.config["num_hidden_layers"], processes.count(), processes.index())
    if not own:
        return
    difference = norm = 0.0
    for spec in base.specs.values():
        if spec.linear is None or spec.layer not in (own[0], own[len(own) // 2], own[-1]):
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


def _row(source: Checkpoint, name: str, row: int) -> np.ndarray:
    tensor = source.tensors[name]
    out = np.empty(tensor.shape[-1], tensor.dtype)
    source.read_rows(name, row, row + 1, out)
    return out.astype(np.float64)


def _outputs(job: JobConfig) -> dict[str, str]:
    """The directories to write, by the flag, or the expert whose delta goes there."""
    deltas = {name: str(Path(job.save_delta) / name) for name in job.experts} if job.save_delta else {}
    return {"--output": job.output, **deltas}


def _writers(job: JobConfig, base: Checkpoint, identity: str) -> Iterator[tuple[str, SafetensorsWriter]]:
    dtype = DTYPES[job.merge.delta_dtype]
    tensors = {name: {n: (spec.shape, dtype) for n, spec in base.specs.items()} for name in _outputs(job)}
    tensors["--output"] = output_tensors(base, job.merge)
    outputs = {name: output_directory(where, job.overwrite) for name, where in _outputs(job).items()}
    check_space({where: total_bytes(tensors[name]) for name, where in outputs.items()})
    owner = owners(base.specs, processes.count())
    for name, where in outputs.items():
        yield name, SafetensorsWriter(where, tensors[name], job.max_shard_size, job.overwrite, identity, owner)


def _damaged(error: NonfiniteError, models: Mapping[str, Checkpoint]) -> CheckpointError:
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


def activation_norms(job: JobConfig, experts: Mapping[str, Checkpoint]) -> dict:
    """Per expert and linear, what the score "wanda" weighs columns by."""
    from dppa_jax.merge import activations

    if not job.calibration:
        raise ValueError("--score=wanda needs --calibration=FILE, a text file whose lines the experts read.")
    norms = {}
    for name, expert in experts.items():
        tokens = activations.calibration_tokens(expert.directory, Path(job.calibration))
        norms[name] = activations.activation_norms(expert, tokens)
        logging.info("activation norms of %s on %s", name, job.calibration)
    return norms


def _texts(job: JobConfig, base, experts: Mapping[str, Checkpoint], outcome: Outcome, cost: Mapping) -> dict:
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
