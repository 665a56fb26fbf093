"""recipe.json and the model card: what a merged checkpoint was made from, and how."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dppa_jax.architecture.specs import Linears
from dppa_jax.checkpoint.inside import readable
from dppa_jax.config.numbers import Coefficient
from dppa_jax.runtime import markdown
from dppa_jax.runtime.reading import printable

LIBRARIES = ("dppa_jax", "jax", "jaxlib", "numpy", "flax", "transformers", "safetensors")
METADATA_BYTES = 64_000  # of a model card; its metadata stand first


def recipe(
    flags: Mapping,
    config: Mapping,
    inputs: Mapping[str, Mapping],
    tables: Mapping[str, np.ndarray],
    linears: Linears,
    rates: Sequence[float],
    cost: Mapping,
    gone: Mapping[str, Mapping] = MappingProxyType({}),
    **told: Mapping,
) -> str:
    """Return the text of recipe.json: everything that a merge was made from and everything that it decided.

    Args:
      flags: every flag with the value it had.
      config: the MergeConfig as a dict.
      inputs: for each model ("base" and the experts' names), where it was and its fingerprint.
      tables: "rates", "thresholds", "densities" and "weights": arrays (experts, partitions, linears).
      linears: the last axis of the tables.
      rates: the target rate of each partition, highest first.
      cost: wall time, bytes read and written, peak memory.
      gone: by expert, what is gone of its delta as a whole, as (gone, of) pairs.
      **told: what else there is to tell: the `vocabulary`, where models' tokens are not at the same places, and the
        `advice` that chose the method.
    """
    names = [name for name in inputs if name != "base"]
    per_expert = {
        name: {
            what: [
                {"rate": rate, "density": round(1.0 - rate, 12), "by_tensor": linears.named(table[e, p])}
                for p, rate in enumerate(rates)
            ]
            for what, table in tables.items()
        }
        | ({"gone": {what: {"gone": n, "of": of} for what, (n, of) in gone[name].items()}} if name in gone else {})
        for e, name in enumerate(names)
    }
    content = {
        "flags": dict(flags),
        "config": dict(config),
        "inputs": dict(inputs),
        "factors": config["factors"],
        "coefficients": config["coefficients"],
        "experts": per_expert,
        **{name: dict(said) for name, said in told.items() if said},
        "cost": dict(cost),
        "versions": library_versions(),
    }
    return json.dumps(content, indent=1, default=str) + "\n"


def model_card(
    name: str,
    base: str,
    experts: Mapping[str, str],
    config: Mapping,
    licences: Sequence[str],
    command: str = "",
    notes: Sequence[str] = (),
    parents: Sequence[str] = (),
    configuration: str = "",
) -> str:
    """Return the README.md of a merged model, with the metadata block that the hub reads.

    Args:
      name: the title.
      base: where the base was.
      experts: where each expert was, by name.
      config: the MergeConfig as a dict.
      licences: those of all models.
      command: the command line that repeats the merge; none without it.
      notes: what else a user of the model should know, in sentences.
      parents: the hub ids of the models, to which the hub links.
      configuration: the recipe, as YAML, if there is one.
    """
    licence = licences[0] if len(set(licences)) == 1 else "other"
    header = _metadata(parents, experts.values(), config["method"], licence)
    rows = "\n".join(_row(expert, where, config) for expert, where in experts.items())
    pruned = f" {_removed(config, list(experts))}" if config["score"] else ""
    named = markdown.text(", ".join(dict.fromkeys(licences)))
    licence_note = f"The inputs' licences: {named}. Check that they allow what you do with the merge."
    repeat = f"To repeat it:\n\n{markdown.block(command)}\n" if command else ""
    recipe = f"\nThe recipe:\n\n{markdown.block(configuration.rstrip(), 'yaml')}\n" if configuration else ""
    noted = "".join(f"\n- {markdown.text(note)}" for note in notes) + "\n" * bool(notes)
    return f"""{header}

# {markdown.text(name)}

A merge of {len(experts)} fine-tuned models on {markdown.code(base)}, made by [dppa_jax](https://pypi.org/project/dppa_jax)
with the method `{config["method"]}` (score {config["score"]}, allocate {config["allocate"]}, scale {config["scale"]},
combine {config["combine"]}).{pruned}

| expert | model | coefficient | factors |
|---|---|---|---|
{rows}
{noted}
`recipe.json` holds every flag, the rates and thresholds of every linear, and fingerprints of the inputs.
{repeat}{recipe}
{licence_note}
"""


def _row(expert: str, where: str, config: Mapping) -> str:
    """Return the row of an expert."""
    numbers = _number(config["coefficients"][expert]), _factors(config, expert)
    return markdown.row([markdown.text(expert), markdown.code(where), *numbers])


def _metadata(parents: Sequence[str], experts: Iterable[str], method: str, licence: str) -> str:
    """Return the block of YAML that the hub reads."""
    quoted = json.dumps  # a JSON string is a YAML string, whatever is in it
    metadata = ["---", "library_name: transformers"]
    if parents:
        metadata += ["base_model:", *(f"- {quoted(parent)}" for parent in parents), "base_model_relation: merge"]
    metadata += [f"license: {quoted(licence)}", "pipeline_tag: text-generation", "tags:", "- merge", "- dppa_jax"]
    metadata += [f"- {method}", "merged_models:", *(f"- {quoted(where)}" for where in experts), "---"]
    return "\n".join(metadata)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result may depend on, as far as they are installed."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def licence(directory: Path) -> str:
    """Return the licence that the metadata of a model's card name, or 'unknown'.

    Raises:
      CheckpointError: README.md leads outside the directory, is no file, or may not be read.
    """
    if not os.path.lexists(directory / "README.md"):
        return "unknown"
    with open(readable(directory, "README.md"), "rb") as file:
        card = file.read(METADATA_BYTES).decode(errors="replace")
    if card.startswith("---"):
        for line in card.split("\n---", 1)[0].splitlines():
            if line.startswith("license:"):
                value = line.removeprefix("license:").split(" #")[0].strip().strip("'\"")
                return printable(value[:99]) or "unknown"
    return "unknown"


def _number(given: Coefficient, times: float = 1.0, unit: str = "") -> str:
    """Say a number, or the range of those by tensor, as so many of a unit.

    >>> _number({"model.norm.weight": 0.25, "lm_head.weight": 0.35})
    '0.25 to 0.35 by tensor, mean 0.3'
    """
    if not isinstance(given, Mapping):
        return f"{given * times:.6g}{unit}"
    values = [times * value for value in given.values()]
    return f"{min(values):.3g} to {max(values):.3g}{unit} by tensor, mean {np.mean(values):.3g}"


def _removed(config: Mapping, experts: Sequence[str]) -> str:
    """Say how much of the deltas is removed.

    >>> config = {"rate": 0.9, "lora_factors": False, "expert_rates": {"law": {"lm_head.weight": 0.25, "b": 0.75}}}
    >>> _removed(config, ["math", "law"])
    'Removed of each delta: math 90 %; law 25 to 75 % by tensor, mean 50.'
    """
    own = {expert: _number(config["expert_rates"].get(expert, config["rate"]), 100, " %") for expert in experts}
    if len(set(own.values())) > 1:
        return f"Removed of each delta: {'; '.join(f'{markdown.text(name)} {said}' for name, said in own.items())}."
    what = "the factors of each expert's adapter" if config["lora_factors"] else "each expert's delta"
    return f"{own[experts[0]]} of {what} is removed."


def _factors(config: Mapping, expert: str) -> str:
    """Say an expert's factors, one for each partition."""
    factors = config["factors"].get(expert, ())
    return ", ".join(f"{f:g}" for f in factors) or "none"
