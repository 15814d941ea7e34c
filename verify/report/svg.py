# SPDX-License-Identifier: MIT
"""Drawings as SVG inside of a page, in its colours: index.html.j2 has the style of the classes that are named here.

Each drawing is an image with one text that says what it shows; who can't see it has that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

Point = tuple[float, float]

#: Units of the drawings are about a pixel each. Room for text to the left of a chart and below it.
LEFT, BELOW, TOP = 44.0, 14.0, 6.0
#: A row of a bar chart: its height, and where bar and value begin.
ROW, BAR, VALUE = 22.0, 132.0, 268.0


@dataclass(frozen=True)
class Bar:
    """One row: `share` of the whole from 0 to 1, `mark` the least that is expected of it. `kind`: a class of colour."""

    label: str
    share: float
    value: str
    kind: str
    mark: float | None = None


@dataclass(frozen=True)
class Axis:
    """From where to where a chart goes, and what stands at both ends."""

    low: float
    high: float
    low_label: str
    high_label: str

    def at(self, value: float) -> float:
        """The place of a value, from 0 to 1; what is beyond an end is put there."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclass(frozen=True)
class Roof:
    """A level that no figure gets above, from the place where it meets the slope. `limit`: the card's own."""

    label: str
    level: float
    limit: float | None
    kind: str


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars, one below the other."""
    width, height = 416.0, ROW * len(rows)
    svg = drawing(title, width, height)
    for number, row in enumerate(rows):
        y = number * ROW
        text(svg, row.label, 0, y + 15, "name")
        add(svg, "rect", "ground", x=BAR, y=y + 4, width=VALUE - BAR - 8, height=ROW - 8)
        whole = VALUE - BAR - 8
        add(svg, "rect", row.kind, x=BAR, y=y + 4, width=whole * min(row.share, 1.0), height=ROW - 8)
        if row.mark is not None:
            x = BAR + whole * min(row.mark, 1.0)
            add(svg, "line", "mark", x1=x, x2=x, y1=y + 1, y2=y + ROW - 1)
        text(svg, row.value, VALUE, y + 15, "value")
    return written(svg)


def line(
    title: str,
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    width: float,
    height: float,
    band: tuple[float | None, float | None] | None = None,
    last: str = "",
    whisker: tuple[float, float] | None = None,
    ideal: tuple[Point, Point] | None = None,
) -> str:
    """A line through the points, in order of x.

    `band`: from where to where is what is expected, None: without end there. `last`: the class of colour of a dot at
    the last point, with its `whisker` from where to where. `ideal`: both ends of the line that it should be.
    """
    svg = drawing(title, width, height)
    across, down = width - LEFT - 6, height - TOP - BELOW

    def place(point: Point) -> Point:
        return LEFT + across * x.at(point[0]), TOP + down * (1 - y.at(point[1]))

    if band is not None:
        low, high = (end if each is None else each for each, end in zip(band, (y.low, y.high), strict=True))
        top, bottom = place((x.low, high))[1], place((x.low, low))[1]
        add(svg, "rect", "band", x=LEFT, y=top, width=across, height=bottom - top)
        for edge in (each for each in band if each is not None):
            level = place((x.low, edge))[1]
            add(svg, "line", "bound", x1=LEFT, x2=LEFT + across, y1=level, y2=level)
    add(svg, "line", "axis", x1=LEFT, x2=LEFT + across, y1=TOP + down, y2=TOP + down)
    if ideal is not None:
        (left, top), (right, bottom) = map(place, ideal)
        add(svg, "line", "bound", x1=left, y1=top, x2=right, y2=bottom)
    places = [place(point) for point in points]
    if len(places) > 1:
        add(svg, "polyline", "line", points=" ".join(f"{left:.1f},{top:.1f}" for left, top in places))
    if last and places:
        left, top = places[-1]
        if whisker is not None:
            ends = [place((x.low, each))[1] for each in whisker]
            add(svg, "line", f"whisker {last}", x1=left, x2=left, y1=ends[0], y2=ends[1])
        add(svg, "circle", last, cx=left, cy=top, r=3)
    text(svg, y.high_label, LEFT - 4, TOP + 7, "end")
    text(svg, y.low_label, LEFT - 4, TOP + down, "end")
    text(svg, x.low_label, LEFT, height - 2, "start")
    text(svg, x.high_label, LEFT + across, height - 2, "end")
    return written(svg)


def roofline(title: str, slope: float, roofs: Sequence[Roof], dot: Point, labels: tuple[str, str]) -> str:
    """Both axes logarithmic: the slope in y per x, below which all lies that memory holds back, the roofs, and a dot.

    `labels`: of the slope and of the dot. What the card could do is dashed.
    """
    width, height, x = 392.0, 250.0, Axis(-1.0, 3.5, "", "")
    top = max(max(each.level, each.limit or 0) for each in roofs)
    y = Axis(math.log10(slope) + x.low, math.log10(top) + 0.15, "", "")
    svg = drawing(title, width, height)
    across, down = width - LEFT - 6, height - TOP - BELOW

    def place(intensity: float, rate: float) -> Point:
        return LEFT + across * x.at(math.log10(intensity)), TOP + down * (1 - y.at(math.log10(rate)))

    add(svg, "line", "axis", x1=LEFT, x2=LEFT + across, y1=TOP + down, y2=TOP + down)
    for power in range(math.ceil(x.low), math.floor(x.high) + 1):
        left = place(10.0**power, top)[0]
        add(svg, "line", "axis", x1=left, x2=left, y1=TOP + down, y2=TOP + down + 3)
        text(svg, f"{10.0**power:g}", left, height - 2, "middle")
    for power in range(math.ceil(y.low), math.floor(y.high) + 1):
        text(svg, f"{10.0**power:g}", LEFT - 4, place(1.0, 10.0**power)[1] + 3, "end")
    highest = max(each.level for each in roofs)
    begin, end = place(10.0**x.low, slope * 10.0**x.low), place(highest / slope, highest)
    add(svg, "line", "line", x1=begin[0], y1=begin[1], x2=end[0], y2=end[1])
    for roof in roofs:
        for level, kind in ((roof.limit, "bound"), (roof.level, f"roof {roof.kind}")):
            if level is not None:
                left, level_y = place(level / slope, level)
                add(svg, "line", kind, x1=left, x2=LEFT + across, y1=level_y, y2=level_y)
        text(svg, roof.label, LEFT + across, place(1.0, roof.level)[1] + 11, "end")
    left, dot_y = place(*dot)
    add(svg, "circle", "line", cx=left, cy=dot_y, r=3)
    text(svg, labels[1], left + 7, dot_y + 4, "start")
    middle = place(3.0, slope * 3.0)
    text(svg, labels[0], middle[0] - 6, middle[1], "end")
    return written(svg)


def drawing(title: str, width: float, height: float) -> Element:
    svg = Element("svg", {"class": "chart", "viewBox": f"0 0 {width:g} {height:g}", "role": "img"})
    SubElement(svg, "title").text = title
    return svg


def add(svg: Element, tag: str, kind: str, **numbers: float | str) -> None:
    values = {key: value if isinstance(value, str) else f"{value:.1f}" for key, value in numbers.items()}
    SubElement(svg, tag, {"class": kind, **values})


def text(svg: Element, words: str, x: float, y: float, kind: str) -> None:
    if words:
        SubElement(svg, "text", {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"}).text = words


def written(svg: Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)
