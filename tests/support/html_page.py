"""A page as a parser reads it."""

import math
from html.parser import HTMLParser

_VOID = {"meta", "br", "path", "rect", "use", "line"}


class Page(HTMLParser):
    """Tags, attributes, texts by section, and the exact numbers and words of every table row."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.rows = [], [], [], {}
        self._cells, self._words = {}, {}
        self._open, self._section, self._name = [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._open += [] if tag in _VOID else [tag]
        if tag == "h2":
            self._section = values["id"]
        if tag == "tr":
            self._name = ""
        if tag == "data" and "td" in self._open:
            self.rows.setdefault((self._section, self._name), []).append(float(values["value"]))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts.append((tuple(self._open), text))
        self._words[self._section] = self._words.get(self._section, "") + text
        if "th" in self._open and "tbody" in self._open:
            self._name += text
        if "td" in self._open:
            key = (self._section, self._name)
            self._cells[key] = self._cells.get(key, "") + text

    def row(self, section, start):
        """The numbers of the section's rows whose name begins with `start`, in order."""
        return [
            v
            for (s, name), vs in self.rows.items()
            if s == section and name.startswith(start)
            for v in vs
        ]

    def cells(self, section, start):
        """The words of the cells of the section's rows whose name begins with `start`."""
        return "".join(
            text
            for (s, name), text in self._cells.items()
            if s == section and name.startswith(start)
        )

    def row_names(self):
        """Section and name of every row with a cell of words, in order."""
        return list(self._cells)

    def words(self, section):
        """All words of a section; nothing if it is not there."""
        return self._words.get(section, "")


def numbers_of(*estimates):
    """Return each number and the ends of its interval, where they are defined."""
    known = [number for each in estimates for number in (each.value, each.low, each.high)]
    return [number for number in known if not math.isnan(number)]
