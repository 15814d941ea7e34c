# SPDX-License-Identifier: MIT
"""The interval of a median: exact ranks, its stated rate of coverage, what it does with awkward samples."""

from __future__ import annotations

import ast
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verify.benchmarks import gpubench, intervals
from verify.benchmarks.intervals import interval, least_samples, stop

figures = st.floats(min_value=1e-3, max_value=1e6)
series = st.lists(figures, min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("n", "ranks", "coverage"),
    [
        # As in any table of the sign test.
        (6, (1, 6), 0.96875),
        (8, (1, 8), 0.9921875),
        (9, (2, 8), 0.9609375),
        (10, (2, 9), 0.978515625),
        (15, (4, 12), 0.96484375),
        (20, (6, 15), 0.958610534),
        (25, (8, 18), 0.956714869),
    ],
)
def test_ranks_are_those_of_the_sign_test(n: int, ranks: tuple[int, int], coverage: float) -> None:
    found = interval(range(1, n + 1))

    assert (found.low, found.high) == ranks
    assert found.coverage == pytest.approx(coverage)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_samples_say_nothing(n: int) -> None:
    found = interval([7.0] * n)

    assert not found.known and found.half_width == math.inf
    assert (found.median, found.low, found.high, found.n) == (7.0, -math.inf, math.inf, n)


def test_least_number_of_samples_follows_the_level() -> None:
    assert [least_samples(level) for level in (0.5, 0.9, 0.95, 0.99)] == [2, 5, 6, 8]


def test_equal_samples_have_an_interval_of_no_width() -> None:
    found = interval([389.0] * 10)

    assert (found.low, found.median, found.high, found.half_width) == (389.0, 389.0, 389.0, 0.0)


def test_one_outlier_does_not_move_the_interval() -> None:
    steady = [100.0 + i / 100 for i in range(15)]
    spoilt = [*steady[:-1], 1.0]

    assert interval(spoilt).low >= 100.0 and interval(spoilt).high <= 100.15


def test_bimodal_samples_have_an_interval_over_both_modes() -> None:
    halves = interval([300.0] * 10 + [390.0] * 10)
    mostly = interval([300.0] * 4 + [390.0] * 26)

    assert (halves.low, halves.high) == (300.0, 390.0)
    assert (mostly.low, mostly.high) == (390.0, 390.0)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], [1.0, -math.inf]])
def test_what_is_no_sample_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="sample"):
        interval(bad)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 95.0])
def test_level_that_is_none_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="a level between 0 and 1"):
        interval([1.0], level)


@given(series, st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(samples: list[float], order: random.Random) -> None:
    shuffled = list(samples)
    order.shuffle(shuffled)

    assert interval(shuffled) == interval(samples)


# Powers of two scale exactly in floating point.
@given(series, st.sampled_from([0.25, 2.0, 1024.0]))
def test_scaled_samples_scale_the_interval(samples: list[float], factor: float) -> None:
    found, scaled = interval(samples), interval([sample * factor for sample in samples])

    assert (scaled.low, scaled.median, scaled.high) == (
        found.low * factor,
        found.median * factor,
        found.high * factor,
    )
    assert scaled.half_width == pytest.approx(found.half_width)


@given(series, st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]))
def test_interval_holds_the_median_and_keeps_its_level(samples: list[float], level: float) -> None:
    found = interval(samples, level)

    assert found.low <= found.median <= found.high
    assert found.coverage >= level
    assert found.median == statistics.median(samples)


@given(st.lists(figures, min_size=6, max_size=60))
def test_higher_level_is_never_narrower(samples: list[float]) -> None:
    narrow, wide = interval(samples, 0.8), interval(samples, 0.95)

    assert wide.low <= narrow.low and narrow.high <= wide.high


def skewed(chance: random.Random) -> float:
    return 100 - chance.expovariate(1.0)


def two_modes(chance: random.Random) -> float:
    return chance.gauss(390, 2) if chance.random() < 0.6 else chance.gauss(300, 2)


def steady(chance: random.Random) -> float:
    return chance.gauss(100, 1)


@pytest.mark.parametrize("n", [6, 10, 25])
@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (steady, 100.0),
        (skewed, 100 - math.log(2)),
        # P(X < m) = 1/2 is 0.4 + 0.6 P(N(390, 2) < m): the quantile 1/6 of the upper mode.
        (two_modes, statistics.NormalDist(390, 2).inv_cdf(1 / 6)),
    ],
)
def test_interval_covers_the_true_median_at_its_rate(
    draw: Callable[[random.Random], float], truth: float, n: int
) -> None:
    """The rate is exact for continuous distributions, whatever their form: tested from both sides."""
    chance, tries = random.Random(20261129 + n), 4000
    found = [interval(draw(chance) for _ in range(n)) for _ in range(tries)]
    covered = sum(each.low <= truth <= each.high for each in found) / tries
    rate = found[0].coverage

    assert abs(covered - rate) < 4 * math.sqrt(rate * (1 - rate) / tries)


def test_sampling_stops_when_the_interval_is_narrower_than_the_noise() -> None:
    steady, noisy = [100.0, 100.1] * 5, [90.0, 110.0] * 5

    assert stop(steady, noise=0.01, elapsed_s=1, limit_s=10)
    assert not stop(noisy, noise=0.01, elapsed_s=1, limit_s=10)
    assert not stop(noisy, noise=0.09, elapsed_s=1, limit_s=10)
    assert stop(noisy, noise=0.1, elapsed_s=1, limit_s=10)
    assert stop(noisy, noise=0.01, elapsed_s=10, limit_s=10)


def test_sampling_never_stops_on_too_few_equal_samples() -> None:
    assert not stop([5.0] * 5, noise=0.01, elapsed_s=0, limit_s=1)
    assert not stop([], noise=0.01, elapsed_s=0, limit_s=1)
    assert stop([], noise=0.01, elapsed_s=1, limit_s=1)


def test_module_that_goes_to_guests_keeps_to_their_python_and_its_library() -> None:
    tree = ast.parse(Path(intervals.__file__).read_text(), feature_version=(3, 10))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}

    # Newer than 3.10 would be these, of all that it could want.
    assert names <= sys.stdlib_module_names | {"collections.abc"} and not names & {"enum", "tomllib"}


@given(st.lists(st.one_of(figures, st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=520))
def test_gpubench_has_the_same_interval_in_its_own_words(samples: list[float]) -> None:
    assert gpubench.half_width(samples) == pytest.approx(interval(samples).half_width, rel=1e-12)


def test_gpubench_has_the_same_ranks() -> None:
    for n in range(1, gpubench.MOST_SAMPLES + 1):
        found = interval(range(1, n + 1))
        assert gpubench.rank(n) == (found.low if found.known else 0)


def test_width_around_zero_is_no_share_of_it() -> None:
    assert interval([-1.0, 1.0] * 5).half_width == math.inf
    assert interval([0.0] * 10).half_width == 0.0
