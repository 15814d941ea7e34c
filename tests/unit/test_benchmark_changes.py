# SPDX-License-Identifier: MIT
"""A change of level is found at its run, and noise is none."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.benchmarks.changes import ALPHA, BINS, LEAST, ORDERS, find, levels

NOISE = 0.02


def steady(chance: random.Random) -> float:
    return chance.gauss(100, 1)


def skewed(chance: random.Random) -> float:
    return 100 - chance.expovariate(0.3)


def two_modes(chance: random.Random) -> float:
    return chance.gauss(100, 0.5) if chance.random() < 0.5 else chance.gauss(90, 0.5)


def drawn(draw: Callable[[random.Random], float], n: int, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [draw(chance) for _ in range(n)]


@pytest.mark.parametrize("n", [10, 20, 40])
@pytest.mark.parametrize("draw", [steady, skewed, two_modes])
def test_false_alarms_are_at_most_the_stated_rate(draw: Callable[[random.Random], float], n: int) -> None:
    """ALPHA, and three standard deviations of 300 tries at it, with no size too small to be spoken of."""
    tries = 300
    alarms = sum(bool(find(drawn(draw, n, seed), noise=0.0)) for seed in range(tries))

    assert alarms <= tries * ALPHA + 3 * (tries * ALPHA * (1 - ALPHA)) ** 0.5


@pytest.mark.parametrize(("before", "after"), [(12, LEAST), (17, 3), (5, 5), (20, 20), (3, 12), (30, 4)])
@pytest.mark.parametrize("step", [-8.0, 8.0])
def test_step_is_found_at_its_run(before: int, after: int, step: float) -> None:
    for seed in range(8):
        noise = drawn(lambda chance: chance.gauss(0, 1), before + after, seed)
        series = [100 + each + (step if i >= before else 0) for i, each in enumerate(noise)]

        changes = find(series, noise=NOISE)

        assert [change.index for change in changes] == [before]
        assert changes[0].relative == pytest.approx(step / 100, abs=0.03)
        assert changes[0].chance <= ALPHA


def test_each_of_two_steps_is_found() -> None:
    noise = drawn(lambda chance: chance.gauss(0, 0.5), 36, 7)
    series = [each + (100 if i < 12 else 90 if i < 24 else 110) for i, each in enumerate(noise)]

    changes = find(series, noise=NOISE)

    assert [change.index for change in changes] == [12, 24]
    assert [round(change.before) for change in changes] == [100, 90]
    assert [round(change.after) for change in changes] == [90, 110]


@pytest.mark.parametrize("odd", [1, 2])
def test_one_or_two_odd_runs_are_no_change(odd: int) -> None:
    for at in (4, 10, 20 - odd):
        series = drawn(steady, 20, at)
        series[at : at + odd] = [60.0] * odd

        assert find(series, noise=NOISE) == []


def test_change_below_the_noise_is_none() -> None:
    series = [100.0 + i % 2 / 100 for i in range(10)] + [101.0 + i % 2 / 100 for i in range(10)]

    assert find(series, noise=NOISE) == []
    assert [change.index for change in find(series, noise=0.005)] == [10]


def test_equal_figures_and_exact_steps() -> None:
    assert find([5.0] * 20, noise=NOISE) == []
    # Two of the twenty ways to arrange these are a step.
    assert find([5.0] * 3 + [4.0] * 3, noise=NOISE) == []
    assert [change.index for change in find([5.0] * 10 + [4.0] * 10, noise=NOISE)] == [10]


@pytest.mark.parametrize("n", range(2 * LEAST))
def test_too_few_runs_have_no_change(n: int) -> None:
    assert find([100.0, 1.0, 50.0, 7.0, 9.0][:n], noise=0.0) == []


def test_drift_is_a_change_of_level() -> None:
    series = [100 - i * 0.5 + each for i, each in enumerate(drawn(lambda chance: chance.gauss(0, 0.5), 30, 3))]

    changes = find(series, noise=NOISE)

    assert changes and all(change.after < change.before for change in changes)


def test_number_of_orders_can_show_the_rate() -> None:
    assert 1 / (ORDERS + 1) < ALPHA


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(min_value=1, max_value=1000), max_size=20), st.sampled_from([0.5, 2.0, 64.0]))
def test_scale_does_not_matter(series: list[float], factor: float) -> None:
    found, scaled = find(series, noise=NOISE), find([each * factor for each in series], noise=NOISE)

    assert [change.index for change in scaled] == [change.index for change in found]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([90.0, 100.0, 101.0]), max_size=25))
def test_changes_are_in_order_and_leave_enough_runs_on_each_side(series: list[float]) -> None:
    places = [0, *(change.index for change in find(series, noise=NOISE)), len(series)]

    assert all(right - left >= LEAST for left, right in pairwise(places) if len(places) > 2)


@pytest.mark.parametrize("n", [1, 6, BINS, 1000, 4001])
def test_steady_samples_have_one_level_however_many(n: int) -> None:
    samples = drawn(steady, n, n)

    assert levels(samples, noise=NOISE) == [statistics.median(samples)]


@pytest.mark.parametrize("n", [20, 400, 4000])
def test_samples_that_fall_have_two_levels(n: int) -> None:
    samples = [each - (10 if i >= n // 2 else 0) for i, each in enumerate(drawn(steady, n, 1))]

    assert levels(samples, noise=NOISE) == [pytest.approx(100, abs=1), pytest.approx(90, abs=1)]
