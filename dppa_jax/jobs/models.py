"""Open a job's models once, and refuse what cannot work before the work begins."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import logging

from dppa_jax.architecture.row import Role
from dppa_jax.architecture.specs import layer_count, linears_of
from dppa_jax.architecture.table import grown
from dppa_jax.checkpoint import DTYPE_BY_NAME
from dppa_jax.checkpoint.card import licence
from dppa_jax.checkpoint.hub import check_room
from dppa_jax.checkpoint.inside import companions
from dppa_jax.checkpoint.matched import vocabulary_tensors
from dppa_jax.checkpoint.output import output_directory
from dppa_jax.checkpoint.safetensors_writer import Tensors, total_bytes
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.places import check_apart, directories
from dppa_jax.merging.compatible import check_classes, check_compatible, check_same_base, check_same_tensors
from dppa_jax.merging.lora_factors import check_adapters
from dppa_jax.merging.merger import check_named, output_tensors
from dppa_jax.merging.opened import Opened
from dppa_jax.merging.rest import Rest, settle_rest
from dppa_jax.merging.tokenizers import Tokenizer, check_tokenizers
from dppa_jax.merging.vocabulary import Vocabulary, match_vocabularies
from dppa_jax.runtime import processes
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.runtime.reading import printable
from dppa_jax.where import Looked, open_models


def open_job(job: JobConfig, writes: bool = False) -> Opened:
    """Open the models of a job; what can be refused without work is.

    Args:
      writes: does the job write the merge, and the deltas, where it says?

    Raises:
      CheckpointError: models that do not belong together or lack files, an output that is or contains an input.
    """
    outputs = check_outputs(job) if writes else {}
    mesh = make_mesh(job.mesh)
    checked: list[Prepared] = []
    base, experts = open_models(job, lambda models: checked.append(check_models(job, models, outputs)))
    prepared = prepare(job, {"base": base, **experts}, checked[0])
    if not job.allow_other_base:
        for name, expert in prepared.experts.items():
            check_same_base(prepared.base, expert, name)
    return Opened(job, prepared.base, prepared.experts, outputs, mesh, prepared.rest, prepared.vocabulary)


@dataclass(frozen=True)
class Prepared:
    """Models as they are merged.

    Attributes:
      base, experts: read in the order of the merge's tokens, without what is not merged.
      rest: what the output has beside the merged tensors.
      vocabulary: where the rows of tokens are; None where they are at the same places.
    """

    base: Any
    experts: Mapping[str, Any]
    rest: Rest
    vocabulary: Vocabulary | None


def prepare(job: JobConfig, models: Mapping[str, Any], checked: Prepared | None = None) -> Prepared:
    """Say how models are merged, by their config.json, headers and tokenizers. Warn of what is lost.

    Args:
      models: base and experts by name; the base is called "base".
      checked: what this said of their headers, before the weights were there; then no warning is repeated.

    Raises:
      CheckpointError: models that do not belong together.
    """
    base, experts = models["base"], {name: model for name, model in models.items() if name != "base"}
    check_classes(base, experts)
    base, experts, rest = settle_rest(base, experts, quiet=checked is not None)
    if checked:
        vocabulary = checked.vocabulary
    else:
        tokenizers = {name: Tokenizer(name, model.directory, model.config) for name, model in models.items()}
        vocabulary = match(job, base, experts, tokenizers)
        check_tokenizers(tokenizers, job.tokenizer, vocabulary.size if vocabulary else 0)
    if vocabulary:
        base, experts = vocabulary.wrap(base, experts)
        rest = replace(rest, config=grown(rest.config, vocabulary.size))
    return Prepared(base, experts, rest, vocabulary)


def match(
    job: JobConfig, base: Any, experts: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer]
) -> Vocabulary | None:
    """Match the rows of the models by their tokens; None where they are at the same places. Warn of what is lost.

    Of base and experts only `config` and `specs` are looked at, so that a plan needs no weights.
    """
    check_same_tensors(base, experts)
    if not (names := vocabulary_tensors(base.specs)):
        return None
    rows = {name: min(m.specs[tensor].rows for tensor in names) for name, m in {"base": base, **experts}.items()}
    vocabulary = match_vocabularies(tokenizers, rows, job.tokenizer, job.vocabulary == "union", job.allow_other_base)
    for said in vocabulary.losses() if vocabulary else ():
        logging.warning("%s; --vocabulary=union keeps them", said)
    return vocabulary


def check_outputs(job: JobConfig) -> dict[str, Path]:
    """Return the directories to write, by "--output" or the expert whose delta goes there.

    Raises:
      ValueError: --output is not given.
      CheckpointError: a directory cannot be written to without destroying something.
    """
    if not job.output:
        raise ValueError("--output is empty: give the directory of the merged model.")
    with processes.first_alone("outputs"):  # process 0 puts right what a killed run left; the others find it done
        return {name: output_directory(where, job.overwrite) for name, where in _outputs(job).items()}


def check_models(job: JobConfig, models: Mapping[str, Looked], outputs: Mapping[str, Path]) -> Prepared:
    """Refuse models that do not belong together, lack files, or lie where the output goes, by their headers alone.

    Args:
      models: base and experts by name; the base is called "base".
      outputs: the directories to write, as `check_outputs` returned them.
    """
    works = job.evaluation.tasks or job.q or job.advise or not outputs  # a merge alone writes nothing to --workdir
    check_apart(
        _outputs(job) if outputs else {},
        directories(models),
        job.workdir if works else "",
    )
    tell_recognised(models["base"])
    tell_renamed(models)
    if job.merge.lora_factors:
        check_adapters(models)
    prepared = prepare(job, models)
    base = prepared.base
    check_compatible(base, prepared.experts)
    check_named(job.merge, base.specs)
    for directory in directories(models).values():
        licence(directory)  # the model card names it in the end
    companions(models["base"].directory)
    companions(models[job.tokenizer].directory)
    if outputs:
        check_code(base)
    tensors = written_tensors(job, base, outputs)
    copied = {"--output": prepared.rest.tensors}
    room = {where: total_bytes(tensors[name] | copied.get(name, {})) for name, where in outputs.items()}
    check_room(models.values(), room)
    return prepared


def tell_renamed(models: Mapping[str, Looked]) -> None:
    """Say how models call their tensors, where they call them differently."""
    renamed = {name: getattr(model, "renamed", {}) for name, model in models.items()}
    if all(names == renamed["base"] for names in renamed.values()):
        return
    for name, names in renamed.items():
        for own, stored in list(names.items())[:1]:
            logging.info(
                "%r: %d tensors are called otherwise in its files, as %s is there %s; a merge has the base's names",
                *(name, len(names), own, printable(stored)),
            )


def tell_recognised(base: Looked) -> None:
    """Say in a line what the tensors of a model without a row in the table of architectures were taken for."""
    if not getattr(base, "stated", None):
        return
    specs, linears = base.specs.values(), linears_of(base.specs)
    vocabulary = [spec.name for spec in specs if spec.role is Role.VOCABULARY]
    named = (base.config.get("architectures") or ["a model"])[0]
    logging.info(
        "%s is taken by the names and shapes of its tensors: %d layers, %d linears (%s), vocabulary %s, %d tensors "
        "that are not pruned; dppa_jax inspect shows them",
        *(printable(str(named)), layer_count(base.specs), len(linears), ", ".join(map(printable, linears.kinds[:12]))),
        *(", ".join(map(printable, vocabulary)) or "none", len(base.specs) - len(linears) - len(vocabulary)),
    )


def written_tensors(job: JobConfig, base: Looked, outputs: Iterable[str]) -> dict[str, Tensors]:
    """Return shape and dtype of every tensor of each output, by "--output" or the expert whose delta goes there."""
    dtype = DTYPE_BY_NAME[job.merge.delta_dtype]
    tensors = {name: {n: (spec.shape, dtype) for n, spec in base.specs.items()} for name in outputs}
    return tensors | ({"--output": output_tensors(base, job.merge)} if "--output" in tensors else {})


def check_code(model: Looked) -> None:
    """Warn where config.json names code: it is never copied, and config.json of the output does not name it."""
    if "auto_map" in model.config:
        logging.warning(
            "%s: config.json names code (auto_map %s), which is never copied; the output's config.json has no "
            "auto_map, so that the class of its architecture in transformers is used",
            model.directory,
            model.config["auto_map"],
        )


def _outputs(job: JobConfig) -> dict[str, str]:
    """The directories to write, as they were given."""
    deltas = {name: str(Path(job.save_delta) / name) for name in job.experts} if job.save_delta else {}
    return {"--output": job.output, **deltas}
