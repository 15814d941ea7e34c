# SPDX-License-Identifier: MIT
"""A page as a browser has it: parsed strictly, what it would fetch, and its text as a reader sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from xml.etree.ElementTree import Element

import html5lib

#: Elements that begin a line of their own.
BLOCKS = {
    "h1",
    "h2",
    "h3",
    "p",
    "li",
    "tr",
    "br",
    "div",
    "section",
    "header",
    "details",
    "summary",
    "figure",
    "figcaption",
}
#: Elements that show nothing of their text.
SILENT = {"head", "style", "script"}


def parsed(html: str) -> Element:
    """The page's tree.

    Raises:
        html5lib.html5parser.ParseError: it breaks a rule of HTML's syntax.
        ValueError: an id stands twice, which no parser minds.
    """
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree: Element = parser.parse(html)
    twice = [name for name, number in Counter(each.get("id") for each in tree.iter()).items() if name and number > 1]
    if twice:
        raise ValueError(f"ids that stand twice: {', '.join(twice)}")
    return tree


def fetches(tree: Element) -> list[str]:
    """What the page would load or lead to, other than places of its own."""
    return [
        f"{element.tag} {value}"
        for element in tree.iter()
        for key, value in element.attrib.items()
        if key in ("src", "href", "srcset", "data", "action", "poster") and not value.startswith("#")
    ]


def text(tree: Element) -> str:
    """The page's text, a line for each block, cells of a row apart."""
    lines = "".join(_words(tree)).splitlines()
    return "".join(f"{line}\n" for line in (" ".join(line.split()) for line in lines) if line)


def _words(element: Element) -> Iterator[str]:
    if element.tag in SILENT:
        return
    if element.tag in BLOCKS:
        yield "\n"
    # A line's end in the source is a space to a reader.
    yield " ".join((element.text or "").splitlines()) if element.get("class") != "message" else element.text or ""
    for child in element:
        yield from _words(child)
        yield " | " if child.tag in ("td", "th") else ""
        yield "\n" if child.tag in BLOCKS else ""
        yield " ".join((child.tail or "").splitlines())
