"""A page as a browser takes it apart."""

import json
from html.parser import HTMLParser

from endwise.figures.interactive import library

VOID = {"meta", "img", "br", "path", "circle", "rect", "use", "link", "input"}


class Page(HTMLParser):
    """Collects tags, ids, references and text of what is a page's own: not the library that draws its figures, nor
    the figures' data. Fails on tags that do not nest.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        assert html.count(library()) == 1
        self.feed(html.replace(library(), ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            assert json.loads(data)
        else:
            self.text += data
