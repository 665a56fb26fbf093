"""Write a report: one self-contained HTML page, and the same tables and figures as files."""

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
from dppa_jax.runtime import markdown
from dppa_jax.runtime.files import write_whole


@dataclass(frozen=True)
class Illustration:
    """A figure of the page with its caption. `svg` is an svg element; it is put on the page as it is."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
      title: the page's title.
      command: the command line that repeats the run.
      models: where "base" and each expert came from, by name.
      facts: date, machine, versions and the like; `surroundings()` returns those of this process.
      tables, figures: in the order in which they are shown.
      choices: for each task the variants of prompt and scoring that were used, by name.
      recipe: everything that was decided; the page shows it folded.
      notes: sentences that a reader must know before comparing numbers.
      data: content of tables.json beside the tables, for example every score.
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
    """Return date, machine, devices and versions, as this process sees them."""
    devices = [device.device_kind for device in jax.devices()]
    kinds = ", ".join(f"{devices.count(kind)} × {kind}" for kind in dict.fromkeys(devices))
    versions = {"python": platform.python_version(), **library_versions()}
    return {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "JAX devices": kinds,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def page(report: Report) -> str:
    """Return the HTML page. It needs no network: nothing is fetched, and no script runs."""
    recipe = _json(report.recipe, indent=2) if report.recipe else ""
    variants = list(dict.fromkeys(name for chosen in report.choices.values() for name in chosen))
    return (
        _environment()
        .get_template("page.html")
        .render(report=report, recipe=recipe, variants=variants, source=published.SOURCE, url=published.URL)
    )


def write_report(directory: Path, report: Report) -> list[Path]:
    """Write report.html, tables.md, tables.json, tables/NAME.csv and figures/NAME.svg; return their paths.

    Files of an earlier report that this one does not have stay where they are.

    Raises:
      ValueError: two tables, or two figures, have the same name.
    """
    for what, names in (("tables", [t.name for t in report.tables]), ("figures", [f.name for f in report.figures])):
        if len(set(names)) < len(names):
            raise ValueError(f"{what} of a report need names of their own, not {', '.join(names)}.")
    content = {"tables": {table.name: table.as_dict() for table in report.tables}, **report.data}
    texts = {
        "report.html": page(report),
        "tables.md": "\n".join(f"## {markdown.text(table.title)}\n\n{table.markdown()}" for table in report.tables),
        "tables.json": _json(content, indent=1) + "\n",
        **{f"tables/{table.name}.csv": table.csv() for table in report.tables},
        **{f"figures/{figure.name}.svg": f"{figure.svg}\n" for figure in report.figures},
    }
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return [directory / name for name in texts]


def _json(content: object, indent: int) -> str:
    """Return JSON that every reader takes: null for NaN and Inf, text for what JSON does not know."""
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
