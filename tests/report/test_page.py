"""The page: self-contained, complete, and harmless whatever the names on it are."""

import csv
import json
from html.parser import HTMLParser

import pytest
from report_runs import PAIR, two_seeds

from dppa_jax.report.page import Illustration, Report, page, surroundings, write_report
from dppa_jax.report.paper import paper_tables, raw
from dppa_jax.report.published import URL

VOID = {"meta", "link", "br", "hr", "img", "input", "use", "path", "rect"}
TABLES = paper_tables(two_seeds(), PAIR, 2)
FIGURE = '<svg viewBox="0 0 1 1"><text x="0" y="0">drawn</text></svg>'
REPORT = Report(
    title="Two experts",
    command="python -m dppa_jax.launch --job=report --base=demo:base",
    models={"base": "demo:base", "math": "demo:math", "finance": "demo:finance"},
    facts={"date": "2024-03-05", "machine": "2 CPU cores"},
    tables=TABLES,
    figures=[Illustration("search", "Score against factor.", FIGURE), Illustration("rates", "Rates.", FIGURE)],
    choices={"addition": {"prompt": "as it is", "scoring": "exact"}, "trend": {"scoring": "contains"}},
    recipe={"flags": {"method": "dppa"}, "factors": {"math": [1.8, 1.3]}},
    notes=("Factors were searched on the validation split.",),
    data={"scores": raw(two_seeds())},
)


class Parsed(HTMLParser):
    """Elements with their attributes, cells by table, text; tags must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    return Parsed(page(REPORT))


def test_nothing_is_fetched_and_nothing_runs(parsed):
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base"}
    assert [link for link in parsed.values("href") if not link.startswith(("#", "data:"))] == [URL]
    assert parsed.values("src") == []
    assert not any(name.startswith("on") for _, attrs in parsed.elements for name in attrs)
    assert "@import" not in page(REPORT)
    policy = next(attrs["content"] for _, attrs in parsed.elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_every_cell_of_every_table_is_there(parsed):
    for table in TABLES:
        for _, rows in table.sections():
            for name, cells in rows:
                assert [name, *map(str, cells)] in parsed.rows
        assert table.title in parsed.text
        for note in table.footnotes():
            assert note in parsed.text


def test_figures_choices_recipe_and_notes_are_there(parsed):
    assert parsed.text.count("drawn") == 2
    for text in ("Score against factor.", "2 CPU cores", "demo:finance", "validation split", '"method": "dppa"'):
        assert text in parsed.text
    assert ["addition", "as it is", "exact"] in parsed.rows
    assert ["trend", "", "contains"] in parsed.rows


def test_contents_lead_to_every_table_and_figure(parsed):
    links = [link[1:] for link in parsed.values("href") if link.startswith("#")]
    assert {table.name for table in TABLES} | {"figure-search", "figure-rates", "recipe", "choices"} <= set(links)
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    assert set(links) <= set(ids)


def test_names_are_text_whatever_they_contain():
    hostile = "<script>alert(1)</script>"
    report = Report(
        title=hostile,
        command=hostile,
        models={"base": hostile},
        facts={},
        recipe={"x": "</pre><script>"},
        choices={"t": {"prompt": hostile}},
        notes=(hostile,),
    )
    parsed = Parsed(page(report))
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert parsed.text.count(hostile) == 6  # the title twice


def test_a_run_without_tables_or_figures_is_a_page():
    parsed = Parsed(page(Report("Merge", "command", {"base": "demo:base"}, {"date": "today"})))
    assert "table" not in {tag for tag, _ in parsed.elements}
    assert "demo:base" in parsed.text


def test_long_commands_can_be_copied():
    assert "dppa_jax.launch \\\n  --job=report \\\n  --base=demo:base" in page(REPORT)


def test_report_is_written_in_every_form(tmp_path):
    paths = write_report(tmp_path, REPORT)
    names = {str(path.relative_to(tmp_path)) for path in paths}
    assert names == {
        "report.html",
        "tables.md",
        "tables.json",
        "figures/search.svg",
        "figures/rates.svg",
        *(f"tables/{table.name}.csv" for table in TABLES),
    }
    assert (tmp_path / "report.html").read_text() == page(REPORT)
    assert all(f"## {table.title}\n\n{table.markdown()}" in (tmp_path / "tables.md").read_text() for table in TABLES)
    content = json.loads((tmp_path / "tables.json").read_text())
    assert content["tables"]["table_6"] == next(table for table in TABLES if table.name == "table_6").as_dict()
    assert content["scores"]["0"]["base"]["addition"] == {"correct": 20, "total": 200}
    with (tmp_path / "tables/table_6.csv").open() as lines:
        assert len(list(csv.reader(lines))) == 1 + 4 * 2
    assert "<svg" in (tmp_path / "figures/search.svg").read_text()


def test_numbers_that_are_none_are_null(tmp_path):
    write_report(tmp_path, Report("Search", "", {}, {}, data={"scores": [0.5, float("nan")], "where": tmp_path}))
    text = (tmp_path / "tables.json").read_text()
    content = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert content == {"tables": {}, "scores": [0.5, None], "where": str(tmp_path)}


def test_two_tables_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names of their own"):
        write_report(tmp_path, Report("Merge", "", {}, {}, tables=[TABLES[0], TABLES[0]]))
    assert list(tmp_path.iterdir()) == []


def test_surroundings_name_the_machine_and_the_versions():
    facts = surroundings()
    assert "jax " in facts["versions"]
    assert "CPU cores" in facts["machine"]
    assert facts["date"].startswith("20")
