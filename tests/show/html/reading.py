"""A page as a browser reads it: its elements, its texts, its tables; and results whose every text is a stranger's."""

import dataclasses
from enum import Enum
from html.parser import HTMLParser

import msgspec

VOID = {"meta", "link", "wbr"}

EVIL = (
    "</style></title><script>alert(1)</script><img src=//evil.example/x onerror=alert(1)>\"'&lt;\x1b[2J\u202e\ud800\n"
)
"""What a file could try: to end an element, to begin one, to end an attribute, to turn the direction of writing."""


class Page(HTMLParser):
    """The elements of a page, in order.

    Attributes:
        elements: Name and attributes of each.
        tables: By label, the texts of the cells, row by row.
        texts: Every text that is shown, in order.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.tables, self.texts = [], {}, []
        self._open, self._rows = [], None
        self.feed(text)
        self.close()
        assert self._open == [], "an element has no end"

    @property
    def skeleton(self):
        """Every element with the names of its attributes: what no text may change, but for where a line may end."""
        return [(name, tuple(attributes)) for name, attributes in self.elements if name != "wbr"]

    @property
    def shown(self):
        """The texts that are more than space."""
        return [text for text in self.texts if text.strip()]

    @property
    def text(self):
        """All texts, one a line."""
        return "\n".join(self.texts)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if attributes.get("role") == "region":
            self._rows = self.tables.setdefault(attributes["aria-label"], [])
        if tag == "tr" and self._rows is not None:
            self._rows.append([])
        if tag in ("td", "th") and self._rows:
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> ends another element"
        if tag == "table":
            self._rows = None

    def handle_data(self, data):
        if self._rows and {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data
        if "style" not in self._open:
            self.texts.append(data.replace("\u00a0", " "))


def with_texts(value, behind):
    """A result with something behind every text in it: names, answers, reasons, keys."""
    match value:
        case Enum():
            return value
        case str():
            return value + behind
        case dict():
            return {with_texts(key, behind): with_texts(inner, behind) for key, inner in value.items()}
        case list() | tuple():
            return type(value)(with_texts(inner, behind) for inner in value)
    if isinstance(value, msgspec.Struct):
        return type(value)(**{name: with_texts(getattr(value, name), behind) for name in value.__struct_fields__})
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return type(value)(**{name: with_texts(inner, behind) for name, inner in fields.items()})
    return value
