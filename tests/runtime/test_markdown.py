"""Names in Markdown: whatever they hold, a reader sees them as they are, and the table keeps its columns."""

import html
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dppa_jax.checkpoint.card import model_card
from dppa_jax.runtime import markdown
from dppa_jax.runtime.reading import printable

HOSTILE = "a|b `x` ``` <img src=x onerror=y> [t](javascript:z)\n# head \x1b[2J\\"
NAMES = st.text(alphabet="ab|`\\*<>&[]()!_~ \n\x1b", min_size=1, max_size=12)


def cells(page: str) -> list[str]:
    """What a browser shows in the cells of all tables."""
    rendered = MarkdownIt("commonmark").enable("table").render(page)
    found = re.findall(r"<td[^>]*>(.*?)</td>", rendered, re.DOTALL)
    return [html.unescape(re.sub(r"</?code>", "", cell)) for cell in found]


@settings(max_examples=60, deadline=None)
@example("a|b")
@example("\\|")
@example("`")
@example("_<_")
@example("q_proj")
@given(NAMES.filter(str.strip))
def test_a_cell_shows_the_name(name):
    page = "\n".join(["| a | b |", "|---|---|", markdown.row([markdown.text(name), markdown.code(name)])])
    words = " ".join(printable(name, keep="").split())
    assert [" ".join(cell.split()) for cell in cells(page)] == [words, words]


def test_a_model_card_shows_hostile_names():
    config = {"coefficients": {"math": 0.5}, "factors": {}, "method": "ties", "score": None, "lora_factors": False}
    config |= dict.fromkeys(("allocate", "scale", "combine"), "x")
    card = model_card(HOSTILE, HOSTILE, {"math": HOSTILE}, config, [HOSTILE], f"python --base={HOSTILE!r}")
    shown = printable(HOSTILE, keep="")
    assert cells(card)[:2] == ["math", shown]
    rendered = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert "<img" not in rendered
    assert "href=" not in rendered.replace('href="https://pypi.org', "")
    assert rendered.count("<h1>") == 1
    assert f"<h1>{html.escape(shown)}</h1>" in rendered


@pytest.mark.parametrize("text", ["```", "plain", "a ```` b"])
def test_a_block_ends_where_the_text_does(text):
    assert MarkdownIt().render(markdown.block(text)) == f"<pre><code>{text}\n</code></pre>\n"
