# SPDX-License-Identifier: MIT
"""The thermal policy's decision: never outside the card's range, never above the declared limit, no flapping."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operations.nvidia.remote.thermal import CRITICAL, LOWEST, NORMAL, WARNING, Decision, decide

POLICY: dict[str, Any] = {
    "warning_c": 83,
    "critical_c": 90,
    "action": "lower-power",
    "step_w": 10,
    "hysteresis_c": 5,
    "interval_s": 15,
}
W = 1000
SPAN = (100 * W, 140 * W)


@pytest.mark.parametrize(
    ("temperature", "limit", "level", "expected"),
    [
        (60, 130, NORMAL, Decision(None, "", NORMAL)),
        (83, 130, NORMAL, Decision(None, "83 °C, warning from 83 °C", WARNING)),
        (84, 130, WARNING, Decision(None, "", WARNING)),
        (89, 130, CRITICAL, Decision(None, "", CRITICAL)),
        (90, 130, WARNING, Decision(120 * W, "90 °C, critical: power limit 130 W -> 120 W", CRITICAL)),
        (90, 104, CRITICAL, Decision(100 * W, "90 °C, critical: power limit 104 W -> 100 W", CRITICAL)),
        (
            95,
            100,
            CRITICAL,
            Decision(None, "95 °C, critical, and the power limit is the card's lowest, 100 W", LOWEST),
        ),
        (95, 100, LOWEST, Decision(None, "", LOWEST)),
        # Between the warning and its hysteresis nothing moves.
        (82, 110, CRITICAL, Decision(None, "", CRITICAL)),
        (79, 110, CRITICAL, Decision(None, "", CRITICAL)),
        (78, 110, CRITICAL, Decision(120 * W, "78 °C, cooled down: power limit 110 W -> 120 W", NORMAL)),
        (70, 125, NORMAL, Decision(130 * W, "70 °C, cooled down: power limit 125 W -> 130 W", NORMAL)),
        (70, 130, WARNING, Decision(None, "70 °C, cooled down", NORMAL)),
        # Somebody has set more than is declared: the settings' affair while it is cool, a cap when it is hot.
        (70, 140, NORMAL, Decision(None, "", NORMAL)),
        (91, 140, NORMAL, Decision(120 * W, "91 °C, critical: power limit 140 W -> 120 W", CRITICAL)),
    ],
)
def test_one_look(temperature: int, limit: int, level: str, expected: Decision) -> None:
    assert decide(temperature, limit * W, 130 * W, SPAN, POLICY, level) == expected


def test_action_log_changes_nothing_and_says_so_once() -> None:
    policy = {**POLICY, "action": "log"}
    first = decide(91, 130 * W, 130 * W, SPAN, policy, WARNING)
    assert first == Decision(None, "91 °C, critical from 90 °C", CRITICAL)
    assert decide(92, 130 * W, 130 * W, SPAN, policy, first.level) == Decision(None, "", CRITICAL)


spans = st.tuples(st.integers(50, 200), st.integers(0, 200)).map(lambda pair: (pair[0] * W, (pair[0] + pair[1]) * W))
policies = st.builds(
    lambda warning, more, step, hysteresis: {
        **POLICY,
        "warning_c": warning,
        "critical_c": warning + more,
        "step_w": step,
        "hysteresis_c": hysteresis,
    },
    st.integers(40, 100),
    st.integers(1, 30),
    st.integers(1, 100),
    st.integers(1, 40),
)
temperatures = st.integers(0, 120)
levels = st.sampled_from([NORMAL, WARNING, CRITICAL, LOWEST])


@given(temperatures, st.integers(0, 500 * W), st.integers(0, 500 * W), spans, policies, levels)
def test_a_new_limit_is_within_the_cards_range_and_never_above_the_declared_one(
    temperature: int, limit: int, declared: int, span: tuple[int, int], policy: dict[str, Any], level: str
) -> None:
    new = decide(temperature, limit, declared, span, policy, level).limit
    if new is not None:
        assert span[0] <= new <= span[1]
        assert new <= max(declared, span[0])
        # Hot never raises, cool never lowers.
        assert new < limit if temperature >= policy["critical_c"] else new > limit


@given(temperatures, temperatures, st.integers(100 * W, 140 * W), policies, levels)
def test_a_hotter_card_never_gets_more(one: int, other: int, limit: int, policy: dict[str, Any], level: str) -> None:
    def after(temperature: int) -> int:
        new = decide(temperature, limit, 140 * W, SPAN, policy, level).limit
        return limit if new is None else new

    assert after(max(one, other)) <= after(min(one, other))


@given(st.lists(temperatures, max_size=60), policies)
def test_within_the_band_nothing_moves_however_the_temperature_swings(
    swings: list[int], policy: dict[str, Any]
) -> None:
    """Between the critical temperature and the end of the hysteresis the limit stays, and nothing is said twice."""
    low, high = policy["warning_c"] - policy["hysteresis_c"] + 1, policy["critical_c"] - 1
    level, said = NORMAL, 0
    for swing in swings:
        decision = decide(min(max(swing, low), high), 120 * W, 140 * W, SPAN, policy, level)
        assert decision.limit is None
        level, said = decision.level, said + bool(decision.log)
    assert said <= 1


@given(policies, st.integers(100 * W, 140 * W))
def test_a_cool_card_comes_to_its_declared_limit_and_stays(policy: dict[str, Any], limit: int) -> None:
    level = CRITICAL
    for _ in range(60):
        decision = decide(0, limit, 135 * W, SPAN, policy, level)
        limit, level = limit if decision.limit is None else decision.limit, decision.level
    assert limit == max(limit, 135 * W)
    assert decide(0, limit, 135 * W, SPAN, policy, level) == Decision(None, "", NORMAL)
