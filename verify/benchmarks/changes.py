# SPDX-License-Identifier: MIT
"""Where a series of figures changed its level, without a guess at its distribution and with a stated rate of alarms.

The candidate is the cut that leaves the least sum of distances of the figures from the medians of their sides (least
absolute deviations). How much of that chance alone brings about is counted, not assumed: the same search over the
series in random orders (a permutation test) leaves as little in at most ALPHA of the orders, or there was no change.
Medians keep one or two odd runs from being a change.

Compared with what exists: `ruptures` brings SciPy, and its penalty states no rate of alarms; Pettitt's test states one
by an approximation that is poor for the ten to forty runs of a lab, and its ranks see the newest change late.
"""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

#: How often a series that did not change is said to have done so, at each look.
ALPHA = 0.01
#: Runs on either side of a change: two odd ones in a row are none.
LEAST = 3
#: Orders that a candidate is compared with. The least number that can show ALPHA is 1 / ALPHA - 1.
ORDERS = 999
#: Samples of one run are drawn together to this many, so that thousands of them take no longer.
BINS = 40
#: So that the same series always has the same answer.
SEED = 20261129


@dataclass(frozen=True)
class Change:
    """From `index` on the series has another level: the medians of both sides, and how often chance does as much."""

    index: int
    before: float
    after: float
    chance: float

    @property
    def relative(self) -> float:
        """The change as a share of the level before it."""
        return (self.after - self.before) / abs(self.before) if self.before else math.inf


def find(series: Sequence[float], *, noise: float) -> list[Change]:
    """All changes of level, in order. One that is smaller than `noise`, a share of the level, is none.

    The most certain one is looked for first, then each side of it by itself.
    """
    found = _find(list(series), 0, noise)
    places = [0, *(index for index, _ in found), len(series)]
    medians = [statistics.median(series[start:end]) for start, end in pairwise(places) if end > start]
    return [
        Change(index, before, after, chance)
        for (index, chance), (before, after) in zip(found, pairwise(medians), strict=True)
    ]


def levels(samples: Sequence[float], *, noise: float) -> list[float]:
    """The medians of the levels that the samples of one run had, in order: one level if they were steady."""
    size = -(-len(samples) // BINS)
    bins = [statistics.median(samples[start : start + size]) for start in range(0, len(samples), size)]
    places = [0, *(change.index * size for change in find(bins, noise=noise)), len(samples)]
    return [statistics.median(samples[start:end]) for start, end in pairwise(places)]


def _find(series: list[float], start: int, noise: float) -> list[tuple[int, float]]:
    """Index and chance of each change of a part that begins at `start`."""
    certain = _most_certain(series, noise)
    if certain is None:
        return []
    at, chance = certain
    return [*_find(series[:at], start, noise), (start + at, chance), *_find(series[at:], start + at, noise)]


def _most_certain(series: list[float], noise: float) -> tuple[int, float] | None:
    if len(series) < 2 * LEAST:
        return None
    left, at = _cut(series)
    before, after = statistics.median(series[:at]), statistics.median(series[at:])
    if abs(after - before) <= noise * abs(before):
        return None
    order, shuffled, as_good = random.Random(SEED), list(series), 0
    for _ in range(ORDERS):
        order.shuffle(shuffled)
        as_good += _cut(shuffled)[0] <= left
        if (as_good + 1) / (ORDERS + 1) > ALPHA:
            return None
    return at, (as_good + 1) / (ORDERS + 1)


def _cut(series: list[float]) -> tuple[float, int]:
    """The least sum of distances that two levels leave, and where the second one begins."""
    left, right = sorted(series[:LEAST]), sorted(series[LEAST:])
    least, at = _distances(left) + _distances(right), LEAST
    for cut in range(LEAST + 1, len(series) - LEAST + 1):
        insort(left, series[cut - 1])
        del right[bisect_left(right, series[cut - 1])]
        if (rest := _distances(left) + _distances(right)) < least:
            least, at = rest, cut
    return least, at


def _distances(ordered: list[float]) -> float:
    """The sum of the distances of sorted figures from their median."""
    half = len(ordered) // 2
    return sum(ordered[-half:]) - sum(ordered[:half])
