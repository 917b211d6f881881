"""What a report shows, for tests."""

from __future__ import annotations

from html.parser import HTMLParser


class Elements(HTMLParser):
    """Every element's attributes, and the text outside of script and style, by section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.section, self.silent = "top", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self.silent = tag in {"script", "style"}
        if tag == "section":
            self.section = str(values["id"])

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style"}:
            self.silent = False
        if tag == "section":
            self.section = "top"

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.text[self.section] = self.text.get(self.section, "") + data
