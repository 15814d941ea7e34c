# SPDX-License-Identifier: MIT
"""Bounds and limits: the table of figures, verdicts on both sides of a bound, what the card itself can do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory.references import REFERENCES, Reference
from tests.unit.benchmark_reports import A4000, metric
from verify.benchmarks import gpubench
from verify.benchmarks.contract import METRICS, TOOLS, Gpu, Metric
from verify.benchmarks.intervals import interval
from verify.benchmarks.references import NOISE, Bounds, limit, measured, reference, sentence, verdict
from verify.verdicts import Verdict

ROWS = [(card, name, row) for card, rows in REFERENCES.items() for name, row in rows.items()]
FLOOR = Bounds(290.75, None, "GB/s", "a source")
CEILING = Bounds(None, 5.0, "us", "a source")


def gpu(**keys: Any) -> Gpu:
    return Gpu.model_validate({**A4000, **keys})


def one(name: str, **keys: Any) -> Metric:
    return Metric.model_validate(metric(name, [1.0], **keys))


@pytest.mark.parametrize(("card", "name", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_row_has_its_source_its_unit_and_a_sound_bound(card: str, name: str, row: Reference) -> None:
    assert re.fullmatch(r"10de:[0-9a-f]{4}", card)
    assert row.unit == METRICS[name][0]
    assert re.match(r"[A-Za-z]+/[A-Za-z-]+ (nvvs/|conf/|issue )", row.source)
    assert row.bounded or row.reference is not None
    assert row.reference is None or (row.low or 0) < row.reference < (row.high or 1e9)
    if row.source.startswith("NVIDIA/DCGM"):
        assert card.removeprefix("10de:") in row.source
        assert row.reference is not None and row.low == pytest.approx(0.75 * row.reference, rel=0.011)


def test_table_of_the_documentation_is_the_same() -> None:
    text = Path(__file__).parents[2].joinpath("docs/verify.md").read_text()
    rows = [[cell.strip("` ") for cell in line.strip("|").split("|")] for line in text.splitlines() if "`10de:" in line]

    def cell(value: float | None, unit: str) -> str:
        return "\N{EN DASH}" if value is None else f"{value:g} {unit}"

    assert [row[1:5] for row in rows] == [
        [card, name, cell(row.reference, row.unit), cell(row.low, row.unit)] for card, name, row in ROWS
    ]
    assert all(row.high is None for *_, row in ROWS), "the table says that there is none above"


def test_gpubench_samples_until_the_same_noise() -> None:
    assert {name: each.noise for name, each in gpubench.METRICS.items()} == {
        name: NOISE[name] for name in TOOLS["gpubench"]
    }


def test_floors_of_the_a4000_are_those_of_dcgm() -> None:
    rows = REFERENCES["10de:24b0"]

    assert {name: (row.reference, row.low, row.high, row.unit) for name, row in rows.items()} == {
        "memory.triad": (387.7, 290.75, None, "GB/s"),
        "fp32.fma": (10.1, 7.5, None, "TFLOP/s"),
    }


def test_noise_is_declared_for_each_metric() -> None:
    assert NOISE.keys() == METRICS.keys()


@pytest.mark.parametrize(
    ("samples", "bounds", "wanted"),
    [
        ([388.0] * 10, FLOOR, Verdict.PASS),
        ([280.0] * 10, FLOOR, Verdict.FAIL),
        ([280.0] * 5 + [300.0] * 5, FLOOR, Verdict.INCONCLUSIVE),
        ([290.75] * 10, FLOOR, Verdict.PASS),
        ([388.0] * 5, FLOOR, Verdict.INCONCLUSIVE),
        ([4.9] * 10, CEILING, Verdict.PASS),
        ([5.1] * 10, CEILING, Verdict.FAIL),
        ([4.0] * 4 + [6.0] * 4, CEILING, Verdict.INCONCLUSIVE),
        ([9.0] * 8, Bounds(10, 20, "us", ""), Verdict.FAIL),
        ([15.0] * 8, Bounds(10, 20, "us", ""), Verdict.PASS),
        ([21.0] * 8, Bounds(10, 20, "us", ""), Verdict.FAIL),
        ([5.0, 25.0] * 8, Bounds(10, 20, "us", ""), Verdict.INCONCLUSIVE),
        # One mode on each side of the bound: whether it passes hangs on how often each comes.
        ([200.0] * 10 + [390.0] * 10, FLOOR, Verdict.INCONCLUSIVE),
        ([200.0] * 4 + [390.0] * 26, FLOOR, Verdict.PASS),
    ],
)
def test_verdict_is_that_of_the_whole_interval(samples: list[float], bounds: Bounds, wanted: Verdict) -> None:
    assert verdict(interval(samples), bounds) is wanted


RANK = {Verdict.FAIL: 0, Verdict.INCONCLUSIVE: 1, Verdict.PASS: 2}
samples = st.lists(st.floats(min_value=1, max_value=500), min_size=1, max_size=40)


@given(samples, st.lists(st.floats(min_value=0, max_value=100), min_size=40, max_size=40))
def test_better_samples_never_have_a_worse_verdict(taken: list[float], gains: list[float]) -> None:
    better = [sample + gain for sample, gain in zip(taken, gains, strict=False)]

    assert RANK[verdict(interval(better), FLOOR)] >= RANK[verdict(interval(taken), FLOOR)]
    ceiling = Bounds(None, 290.75, "us", "")
    assert RANK[verdict(interval(better), ceiling)] <= RANK[verdict(interval(taken), ceiling)]


@given(samples, st.floats(min_value=1, max_value=500), st.floats(min_value=0, max_value=100))
def test_stricter_bound_never_has_a_better_verdict(taken: list[float], low: float, more: float) -> None:
    lax, strict = Bounds(low, None, "GB/s", ""), Bounds(low + more, None, "GB/s", "")

    assert RANK[verdict(interval(taken), strict)] <= RANK[verdict(interval(taken), lax)]


@given(samples, st.floats(min_value=1, max_value=500), st.sampled_from([0.5, 4.0, 1024.0]))
def test_verdict_does_not_hang_on_the_unit(taken: list[float], low: float, factor: float) -> None:
    scaled = interval([sample * factor for sample in taken])

    assert verdict(scaled, Bounds(low * factor, None, "", "")) is verdict(interval(taken), Bounds(low, None, "", ""))


def test_sentence_says_figure_interval_number_and_bound() -> None:
    fine, slow = interval([388.0, 389.0] * 6), interval([250.0] * 12)
    mixed = interval([280.0, 300.0] * 6)

    assert sentence("memory.triad", fine, FLOOR) == (
        "memory.triad 388.5 GB/s, 95 % interval 388 to 389, of 12 samples: within what is expected, "
        "at least 290.75 GB/s (a source)"
    )
    assert sentence("memory.triad", slow, FLOOR) == (
        "memory.triad 250 GB/s, 95 % interval 250 to 250, of 12 samples: all of it below what is expected, "
        "at least 290.75 GB/s (a source)"
    )
    assert sentence("memory.triad", mixed, FLOOR) == (
        "memory.triad 290 GB/s, 95 % interval 280 to 300, of 12 samples: on both sides of what is expected, "
        "at least 290.75 GB/s (a source)"
    )
    assert "all of it above what is expected, at most 5 us" in sentence("launch.latency", interval([6.0] * 9), CEILING)


def test_sentence_of_too_few_samples_says_how_many_it_takes() -> None:
    assert measured("fp32.fma", interval([18.0]), "TFLOP/s") == (
        "fp32.fma 18 TFLOP/s, of 1 sample where an interval of 95 % takes 6"
    )


# What the card itself can do.


def test_limit_of_memory_is_that_of_the_datasheet_at_the_clock_held() -> None:
    found = limit("memory.triad", gpu(), one("memory.triad"))
    throttled = limit("memory.copy", gpu(), one("memory.copy", memory_mhz=5001.0))
    unseen = limit("memory.copy", gpu(memory_clock_max_mhz=7001), one("memory.copy", memory_mhz=None))

    assert found is not None and throttled is not None and unseen is not None
    assert found.value == pytest.approx(448.0, rel=0.001)
    assert found.words == "256 bits x 2 x 7001 MHz (held)"
    assert throttled.value == pytest.approx(320.064)
    assert unseen.words == "256 bits x 2 x 7001 MHz (the highest: what it held was not seen)"


def test_limit_of_fp32_is_that_of_the_datasheet_at_its_boost_clock() -> None:
    found = limit("fp32.fma", gpu(), one("fp32.fma", sm_mhz=1560.0))

    assert found is not None
    assert found.value == pytest.approx(19.17, abs=0.005)
    assert found.words == "48 SMs x 128 x 2 x 1560 MHz (held)"


def test_limit_of_a_link_is_what_it_can_do_not_what_it_idles_at() -> None:
    one_way = limit("h2d.pinned", gpu(), one("h2d.pinned"))
    both = limit("bidirectional.pinned", gpu(), one("bidirectional.pinned"))

    assert one_way is not None and both is not None
    assert one_way.value == pytest.approx(31.5, abs=0.01)
    assert one_way.words == "PCIe generation 4 x 16 lanes"
    assert both.value == 2 * one_way.value


def test_limit_that_cannot_be_worked_out_is_gpubenchs_own() -> None:
    stated = one("tensor.fp16", limit=76.7, limit_of="48 SMs x 512 x 2 x 1560 MHz")
    unknown = limit("fp32.fma", gpu(compute_capability="13.0"), one("fp32.fma", limit=50.0))

    found = limit("tensor.fp16", gpu(), stated)

    assert found is not None and (found.value, found.words) == (76.7, "48 SMs x 512 x 2 x 1560 MHz")
    assert unknown is not None and unknown.words == "as gpubench states"
    assert limit("launch.latency", gpu(), one("launch.latency")) is None
    assert limit("h2d.pinned", gpu(link=None), one("h2d.pinned")) is None
    unseen = {**dict.fromkeys(A4000), "pci_id": "10de:24b0", "link": dict.fromkeys(A4000["link"])}
    for name in METRICS:
        assert limit(name, gpu(**unseen), one(name, sm_mhz=None, memory_mhz=None)) is None


@pytest.mark.parametrize(
    ("generation", "width", "applies"), [(4, 16, True), (5, 16, True), (3, 16, False), (4, 8, False), (5, 8, False)]
)
def test_figure_of_a_link_is_no_bound_on_a_slot_with_less(generation: int, width: int, applies: bool) -> None:
    slot = {"generation": 1, "width": width, "generation_max": generation, "width_max": width}
    card = gpu(pci_id="10de:20b5", link=slot)

    assert (reference(card, "h2d.pinned") is not None) == applies
    assert reference(card, "memory.triad") is not None


def test_unknown_card_and_metric_have_no_reference() -> None:
    assert reference(gpu(pci_id="10de:ffff"), "memory.triad") is None
    assert reference(gpu(), "tensor.fp16") is None
    assert reference(gpu(pci_id="10de:20b5", link=None), "h2d.pinned") is None
