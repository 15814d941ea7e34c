# SPDX-License-Identifier: MIT
"""When gpubench has samples enough: cards that are steady, noisy, or change, on a clock that only samples move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from verify.benchmarks import gpubench
from verify.benchmarks.gpubench import Bench, Effort, Job, Metric

#: 10 to 30 s, and 6 samples.
EFFORT = Effort(100.0, 10.0, 30.0, 0.0, 0.0, 0.0, 6, 0, 0, 0)
#: Seconds of a sample.
SAMPLE_S = 1.0


@dataclass
class Card:
    """Gives these figures, one a second, and remembers after which of them a result was looked at."""

    figures: Iterator[float]
    every: bool = False
    own: dict[str, Any] = field(default_factory=dict)
    now: float = 0.0
    taken: int = 0
    checked: list[int] = field(default_factory=list)

    def once(self) -> float:
        self.now += SAMPLE_S
        self.taken += 1
        return next(self.figures)

    def check(self) -> int:
        self.checked.append(self.taken)
        return 0

    @contextmanager
    def job(self, bench: Bench) -> Iterator[Job]:
        yield Job(self.once, lambda: None, self.check, every=self.every, **self.own)


Sampled = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Sampled:
    def run(card: Card, noise: float = 0.01, deadline: float = 1000.0) -> tuple[int, list[str]]:
        """Number of samples, and the notes."""
        monkeypatch.setattr(gpubench, "time", SimpleNamespace(monotonic=lambda: card.now))
        nothing: Any = None
        telemetry: Any = SimpleNamespace(intruders=[], median=lambda *_: None)
        bench = Bench(nothing, 0, {}, EFFORT, 1, 0.9, telemetry, deadline, 0, 0, 0, {})
        metric = Metric("GB/s", "higher", card.job, gpubench.no_limit, noise)
        found = bench.measure("some", metric)
        # One is taken before those that count.
        assert card.checked[0] == 1 and card.checked[-1] == card.taken == len(found["samples"]) + 1
        return len(found["samples"]), bench.notes

    return run


def swinging(share: float) -> Iterator[float]:
    return itertools.cycle([100 * (1 - share), 100 * (1 + share)])


def then(number: int, first: Iterable[float], rest: Iterable[float]) -> Iterator[float]:
    return itertools.chain(itertools.islice(first, number), rest)


#: Where not every result is looked at, the one that is comes on top.
EVERY = pytest.mark.parametrize(("every", "more"), [(True, 0), (False, 1)])


@EVERY
def test_steady_card_takes_the_least_time(sampled: Sampled, every: bool, more: int) -> None:
    assert sampled(Card(swinging(0.005), every)) == (10 + more, [])


@EVERY
def test_noisy_card_takes_its_time_and_says_so(sampled: Sampled, every: bool, more: int) -> None:
    number, notes = sampled(Card(swinging(0.02), every))

    assert number == 30 + more
    assert notes == [f"some: {number} samples in {number}.0 s leave an interval wider than 1 % to either side"]


def test_noise_decides(sampled: Sampled) -> None:
    assert sampled(Card(swinging(0.02)), noise=0.03)[1] == []


def test_few_slow_samples_are_not_enough_however_equal(sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SAMPLE_S", 9.0)

    assert sampled(Card(swinging(0.0))) == (6, [])


def test_card_that_becomes_steady_takes_until_then(sampled: Sampled) -> None:
    """Its first figures no longer reach the interval's ranks."""
    number, notes = sampled(Card(then(4, swinging(0.5), swinging(0.0))))

    assert 10 < number < 30 and notes == []


def test_last_sample_that_widens_the_interval_was_not_the_last(sampled: Sampled) -> None:
    # Of 10 samples and of 11 the second from each side counts, of 12 the third.
    card = Card(itertools.chain([100.0], [100.0] * 4, [90.0], [100.0] * 5, [90.0], itertools.repeat(100.0)))

    assert sampled(card) == (13, [])
    assert card.checked == [1, 12, 14]


def test_what_is_counted_takes_its_own_time(sampled: Sampled) -> None:
    own = {"samples": 2, "seconds": 17.0}

    assert sampled(Card(itertools.repeat(0.0), every=True, own=own), noise=0.0) == (17, [])
    assert sampled(Card(then(3, [0.0, 4.0, 4.0], itertools.repeat(0.0)), every=True, own=own), noise=0.0) == (17, [])


def test_run_whose_time_is_up_takes_no_more(sampled: Sampled) -> None:
    assert sampled(Card(swinging(0.0)), deadline=3.5) == (4, ["some: 4 samples instead of 6: the time was up"])
