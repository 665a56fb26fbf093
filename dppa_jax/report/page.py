"""What a run leaves to be read: one self-contained HTML page, and the same tables and figures as files."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import jax
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dppa_jax.checkpoint.card import library_versions
from dppa_jax.report import published
from dppa_jax.report.tables import ResultTable


@dataclass(frozen=True)
class Illustration:
    """A figure as it stands on the page; `svg` is an svg element and is not escaped."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Run:
    """What a page says of a run.

    Attributes:
      title: of the page.
      command: what repeats the run.
      models: where they came from: "base" and the experts by name.
      facts: date, machine, versions and the like; `surroundings()` knows those of this process.
      choices: by task, the variants of prompt and scoring in force, by name.
      recipe: everything that was decided, shown folded.
      notes: what a reader must know before comparing numbers.
      data: what tables.json holds beside the tables, for example every score.
    """

    title: str
    command: str
    models: Mapping[str, str]
    facts: Mapping[str, str]
    tables: Sequence[ResultTable] = ()
    figures: Sequence[Illustration] = ()
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    data: Mapping[str, object] = field(default_factory=dict)


def surroundings() -> dict[str, str]:
    """Date, machine and versions, as this process sees them."""
    devices = [device.device_kind for device in jax.devices()]
    kinds = ", ".join(f"{devices.count(kind)} × {kind}" for kind in dict.fromkeys(devices))
    versions = {"python": platform.python_version(), **library_versions()}
    return {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "JAX devices": kinds,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def page(run: Run) -> str:
    """A page that a browser opens without a network: nothing on it is fetched, nothing runs."""
    recipe = _json(run.recipe, indent=2) if run.recipe else ""
    variants = list(dict.fromkeys(name for chosen in run.choices.values() for name in chosen))
    return (
        _environment()
        .get_template("page.html")
        .render(run=run, recipe=recipe, variants=variants, source=published.SOURCE, url=published.URL)
    )


def write_report(directory: Path, run: Run) -> list[Path]:
    """Write report.html, tables.md, tables.json, tables/NAME.csv and figures/NAME.svg; returns their paths.

    Files of an earlier report that this one does not have are left alone.

    Raises:
      ValueError: if two tables or two figures have one name.
    """
    for what, names in (("tables", [t.name for t in run.tables]), ("figures", [f.name for f in run.figures])):
        if len(set(names)) < len(names):
            raise ValueError(f"{what} of a report need names of their own, not {', '.join(names)}.")
    content = {"tables": {table.name: table.as_dict() for table in run.tables}, **run.data}
    texts = {
        "report.html": page(run),
        "tables.md": "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in run.tables),
        "tables.json": _json(content, indent=1) + "\n",
        **{f"tables/{table.name}.csv": table.csv() for table in run.tables},
        **{f"figures/{figure.name}.svg": f"{figure.svg}\n" for figure in run.figures},
    }
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def _json(content: object, indent: int) -> str:
    """JSON that every reader takes: null where a number is none, text for what JSON does not know."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, default=str)


def _finite(content: object) -> object:
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _environment() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
