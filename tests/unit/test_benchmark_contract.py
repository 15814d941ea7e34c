# SPDX-License-Identifier: MIT
"""What gpubench prints is read strictly, and nonsense is refused in words."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.benchmark_reports import A4000, PROCESSOR, metric, of_tier_1, printed, report
from verify.benchmarks.contract import TOOLS, BadReport, Tool, read


def refusal(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(BadReport) as error:
        read(text)
    return str(error.value)


def changed(path: str, value: Any) -> dict[str, Any]:
    """A report with one key replaced; dots of metric names are written `/`."""
    found = copy.deepcopy(printed())
    *parents, last = (part.replace("/", ".") for part in path.split("."))
    place: Any = found
    for part in parents:
        place = place[part]
    place[last] = value
    return found


def test_report_is_read_as_printed() -> None:
    found = report(metrics={name: metric(name, [3.0] * 6) for name in TOOLS["gpubench"]})

    assert list(found.metrics) == list(TOOLS["gpubench"])
    assert found.card is not None and found.card.pci_id == "10de:24b0"
    assert found.metrics["launch.latency"].better == "lower"


def whole_numbers(tool: Tool) -> dict[str, float]:
    """A level of each metric; none of errors."""
    return {name: 0.0 if unit == "errors" else 3.0 for name, (unit, _) in TOOLS[tool].items()}


@pytest.mark.parametrize("tool", list(TOOLS))
def test_programs_have_metrics_of_their_own(tool: Tool) -> None:
    found = report(**of_tier_1(tool, whole_numbers(tool)))

    assert list(found.metrics) == list(TOOLS[tool])
    other = "gpubench" if tool != "gpubench" else "mps"
    words = refusal(of_tier_1(other, whole_numbers(tool)))
    assert words == f"the report: expected metrics of {other} in schema 1, got {next(iter(TOOLS[tool]))!r}"


def test_processor_has_no_card() -> None:
    found = report(**of_tier_1("milvus", {"milvus.recall": 0.0}, **PROCESSOR))

    assert (found.computed_by, found.driver) == ("AMD EPYC 7313", None)
    words = refusal(of_tier_1("milvus", {"milvus.recall": 0.9}, **{**PROCESSOR, "processor": ""}))
    assert words == "the report: expected `processor` beside verdict 'measured'"


def test_report_without_a_driver_has_no_card() -> None:
    found = report(card=None, driver="", metrics={}, verdict="not run", reason="no CUDA driver")

    assert (found.card, found.verdict, found.reason) == (None, "not run", "no CUDA driver")


def test_card_of_which_nothing_was_read_is_none() -> None:
    """So gpubench prints it where there is no driver."""
    unseen = {**dict.fromkeys(A4000), "link": dict.fromkeys(A4000["link"])}

    found = report(card=unseen, driver=None, cuda_driver=None, metrics={}, verdict="not run", reason="no CUDA driver")

    assert (found.card, found.driver, found.verdict) == (None, None, "not run")


def test_card_may_keep_all_to_itself_but_its_id() -> None:
    found = report(card={**dict.fromkeys(A4000), "pci_id": "10de:24b0", "link": dict.fromkeys(A4000["link"])})

    assert found.card is not None and found.card.pci_id == "10de:24b0"
    words = refusal(printed(card={**A4000, "pci_id": None}))
    assert words.startswith("card.pci_id: expected a valid string, got None")


def test_unknown_keys_of_a_later_gpubench_are_passed_over() -> None:
    assert report(weather="fine", card={**A4000, "colour": "green"}).verdict == "measured"


SAMPLES = "metrics.memory/triad.samples"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema", 2, "schema: expected 1, got 2"),
        ("tool", "nvbandwidth", "tool: expected 'gpubench', 'mps', 'pytorch', 'ollama' or 'milvus', got 'nvbandwidth'"),
        ("began", "yesterday", "began: expected a valid number, got 'yesterday'"),
        ("quick", 1, "quick: expected a valid boolean, got 1"),
        ("duration_s", -1.0, "duration_s: expected greater than or equal to 0, got -1.0"),
        ("card.pci_id", "24B0", "card.pci_id: expected text of the form ^[0-9a-f]{4}:[0-9a-f]{4}$, got '24B0'"),
        ("card.bus_width_bits", 0, "card.bus_width_bits: expected greater than or equal to 1, got 0"),
        ("card.link", [4, 16], "card.link: expected an object, got [4, 16]"),
        (SAMPLES, [], "metrics.memory.triad.samples: expected at least 1 of them, got []"),
        (SAMPLES, [388.0, "fast"], "metrics.memory.triad.samples.1: expected a valid number, got 'fast'"),
        (SAMPLES, [388.0, None], "metrics.memory.triad.samples.1: expected a valid number, got None"),
        (SAMPLES, [True], "metrics.memory.triad.samples.0: expected a valid number, got True"),
        (SAMPLES, [-388.0], "metrics.memory.triad.samples.0: expected greater than or equal to 0, got -388.0"),
        (SAMPLES, [388.0, 0.0], "metrics.memory.triad: expected `samples` above 0, got 0 GB/s"),
        ("metrics.memory/triad.unit", "GiB/s", "metrics.memory.triad.unit: expected 'GB/s', 'TFLOP/s'"),
        ("metrics.memory/triad.better", "lower", "expected memory.triad in GB/s, higher is better; got GB/s, lower"),
        ("metrics.memory/triad.unit", "us", "expected memory.triad in GB/s, higher is better; got us, higher"),
        ("metrics.memory/triad.limit", 0, "metrics.memory.triad.limit: expected greater than 0, got 0"),
        ("metrics.memory/triad.sm_mhz", -5, "metrics.memory.triad.sm_mhz: expected greater than 0, got -5"),
        ("metrics.memory/triad.wrong", -1, "metrics.memory.triad.wrong: expected greater than or equal to 0, got -1"),
        (
            "metrics",
            {"x": metric("memory.copy", [1.0])},
            "the report: expected metrics of gpubench in schema 1, got 'x'",
        ),
        ("metrics", {}, "the report: expected `metrics` beside verdict 'measured'"),
        ("driver", "", "the report: expected `driver` beside verdict 'measured'"),
        ("card", None, "the report: expected `card` beside verdict 'measured'"),
        ("verdict", "pass", "verdict: expected 'measured', 'inconclusive', 'not run' or 'failed', got 'pass'"),
        ("verdict", "failed", "the report: expected a `reason` beside verdict 'failed'"),
        (
            "not_run",
            {"memory.triad": "x"},
            "expected each metric in `metrics` or in `not_run`, got memory.triad in both",
        ),
    ],
)
def test_nonsense_is_refused_in_words(path: str, value: Any, words: str) -> None:
    assert words in refusal(changed(path, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite_are_refused(value: float) -> None:
    """Python's json writes NaN and Infinity, which are no JSON, and reads them."""
    assert "metrics.memory.triad.samples.1: expected" in refusal(changed(SAMPLES, [388.0, value]))
    assert "finite" in refusal(changed("began", value)) or "greater" in refusal(changed("began", value))


def test_figure_beyond_a_double_is_refused() -> None:
    assert "finite" in refusal(json.dumps(printed()).replace("83.4", "1e999"))


def test_errors_are_whole_numbers() -> None:
    words = refusal(printed(metrics={"memory.pattern": metric("memory.pattern", [0, 0.5])}))

    assert words == "metrics.memory.pattern: expected whole numbers of errors in `samples`"


def test_wrong_values_take_a_check() -> None:
    unchecked = metric("memory.triad", [388.0], checked=False, wrong=3)

    words = refusal(printed(metrics={"memory.triad": unchecked}))

    assert words == "metrics.memory.triad: expected `checked` beside 3 wrong values"


@pytest.mark.parametrize("text", ["", "x", "Traceback (most recent call last)", '{"schema": 1', "[]", "null", "7"])
def test_what_is_no_report_is_refused(text: str) -> None:
    assert refusal(text).startswith("the report: expected ")


def test_everything_that_is_wrong_is_named_at_once() -> None:
    words = refusal({"schema": 1, "tool": "gpubench"}).splitlines()

    assert words == [f"{key}: missing" for key in ("began", "duration_s", "quick", "seed", "verdict")]


@given(st.text() | st.binary())
def test_no_input_makes_the_reader_break(text: str | bytes) -> None:
    with pytest.raises(BadReport):
        read(text)
