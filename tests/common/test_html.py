"""Templates: text that goes in comes out as text, what is HTML already stays it, and nothing may be missing."""

from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from bad_input import HOSTILE, hidden_in
from endwise.common.html import PARTS, Wide, part, render, table
from endwise.common.text import printable


def read(html):
    """Tags and texts, in their order."""
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = lambda text: texts.append(text) if text.strip() else None
    parser.feed(html)
    parser.close()
    return tags, texts


def test_a_table_holds_its_cells_as_text_and_parts_as_html():
    rows = [[HOSTILE, Wide(HOSTILE, 2)], [HOSTILE, 1.5, Markup("<b>2</b>")]]
    tags, texts = read(table([HOSTILE] * 3, rows, text=(1,), title=HOSTILE, note=HOSTILE))
    safe = printable(HOSTILE)
    assert texts == [safe] * 7 + ["1.5", "2", safe] and not hidden_in("".join(texts))
    assert [tag for tag, _ in tags].count("b") == 1 and not {"script", "img"} & {tag for tag, _ in tags}
    cells = [attributes for tag, attributes in tags if tag == "td"]
    assert cells == [{"class": "words", "colspan": "2"}, {"class": "text"}, {}]


def test_an_attribute_is_text_too():
    tags, texts = read(part(PARTS, "bullets", HOSTILE, [HOSTILE], HOSTILE))
    assert tags == [("ul", dict.fromkeys(("class", "role"), printable(HOSTILE))), ("li", {})]
    assert texts == [printable(HOSTILE)] and part(PARTS, "bullets", "remarks", []) == ""


def test_what_a_template_asks_for_must_be_given():
    with pytest.raises(UndefinedError, match="is undefined"):
        render("figures/page.html.j2", title="a page without its lead")
