# SPDX-License-Identifier: MIT
"""How well a median is known: its confidence interval from order statistics, and when there are samples enough.

The interval takes nothing for granted but independent samples of one distribution: no normality, which times and rates
do not have (one slow side, several modes), and no asymptotics, so that it is exact for the handful of samples that a
benchmark has. The standard library has no such interval, and SciPy is too large a dependency for this sum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

#: How often the interval holds the true median.
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """The median of `n` samples and the interval that holds the true one, at least `level` of the time.

    `coverage` is the rate that the ranks really give, `level` or more. With too few samples for the level, `low` and
    `high` are infinite: nothing is known.
    """

    median: float
    low: float
    high: float
    n: int
    level: float
    coverage: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def half_width(self) -> float:
        """Half of the interval's width as a share of the median."""
        width = self.high - self.low
        if width == 0:
            return 0.0
        return width / 2 / abs(self.median) if self.median else math.inf


def interval(samples: Iterable[float], level: float = LEVEL) -> Interval:
    """The confidence interval of the median.

    With X(1) to X(n) in order, X(k) to X(n+1-k) holds the median unless fewer than k samples fell on one side of it,
    and that number is binomial(n, 1/2). The largest k is taken whose rate is `level` or more; ties only raise it.

    Raises:
        ValueError: no sample, one that is not finite, or a level outside of 0 to 1.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if not ordered:
        raise ValueError("no sample")
    if not all(map(math.isfinite, ordered)):
        raise ValueError("a sample is not a finite number")
    if not 0 < level < 1:
        raise ValueError(f"a level between 0 and 1, got {level}")
    k, missed = _rank(n, level)
    low, high = (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)
    return Interval(statistics.median(ordered), low, high, n, level, float(1 - missed))


def least_samples(level: float = LEVEL) -> int:
    """How many samples the interval takes at least: 6 at 95 %."""
    n = 1
    while not _rank(n, level)[0]:
        n += 1
    return n


def _rank(n: int, level: float) -> tuple[int, Fraction]:
    """The largest k that keeps the level, 0 if none does, and how often its interval misses the median."""
    allowed = 1 - Fraction(str(level))
    # Of the 2**n outcomes, those in which fewer than k samples fell on one given side.
    most = allowed.numerator * 2**n // (2 * allowed.denominator)
    k, tail, ways = 0, 0, 1
    while tail + ways <= most:
        tail += ways
        ways = ways * (n - k) // (k + 1)
        k += 1
    return k, Fraction(2 * tail, 2**n)


def stop(samples: Sequence[float], *, noise: float, elapsed_s: float, limit_s: float, level: float = LEVEL) -> bool:
    """Are there samples enough? Either the interval's half width is at most `noise` of the median, or `limit_s` is up.

    For programs that run on a guest with this module in front of them, so it keeps to Python 3.10; gpubench.py, one
    file that also runs alone, has the rule in its own words. To look again after each sample makes the rate of coverage
    a little less than `level`; the noise of a metric is to be declared well below the distance to its bounds, so that
    this does not decide a verdict.
    """
    return elapsed_s >= limit_s or (len(samples) > 0 and interval(samples, level).half_width <= noise)
