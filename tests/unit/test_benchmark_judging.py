# SPDX-License-Identifier: MIT
"""From a report and the lab's history to verdicts, as an admin reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.benchmark_reports import A4000, metric, of_tier_1, report, steady
from verify.benchmarks import history
from verify.benchmarks.contract import TOOLS, Report
from verify.benchmarks.history import LEARN, History
from verify.benchmarks.judging import Judgement, judge, overall
from verify.verdicts import Verdict

TRIAD = "memory.triad"
DAY = 86400.0
BEGAN = 1796000000.0


def of(found: Report, name: str, past: History | None = None, revision: str = "r2") -> Judgement:
    return next(each for each in judge(found, past or History(), revision) if each.metric == name)


def triad(samples: list[float], **keys: Any) -> Judgement:
    return of(report(metrics={TRIAD: metric(TRIAD, samples, **keys)}), TRIAD)


def lived(name: str, levels: list[float], **keys: Any) -> History:
    """A history of daily runs before the one that is judged."""
    found = []
    for number, level in enumerate(levels):
        began = BEGAN - (len(levels) - number) * DAY
        one = history.past(report(began=began, metrics={name: metric(name, steady(level))}, **keys), "r1")
        assert one is not None
        found.append(one)
    return History(found)


def test_figure_above_its_floor_passes_with_everything_worth_knowing() -> None:
    found = triad(steady(388.0))

    assert found.verdict is Verdict.PASS and not found.learning
    assert found.sentence.startswith("memory.triad 388 GB/s, 95 % interval 387.6 to 388.4, of 12 samples: within")
    assert "at least 290.75 GB/s (NVIDIA/DCGM nvvs/diag-skus.yaml.in at 0fb6699, id 24b0: " in found.sentence
    assert found.ratio == pytest.approx(388 / 448, rel=0.001)
    assert found.remarks[0] == "86.6 % of the card's limit, 448.1 GB/s: 256 bits x 2 x 7001 MHz (held)"
    assert found.remarks[1].startswith("387.7 GB/s measured elsewhere (NVIDIA/DCGM ")


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        (steady(200.0), Verdict.FAIL),
        ([280.0, 300.0] * 6, Verdict.INCONCLUSIVE),
        ([388.0] * 2, Verdict.INCONCLUSIVE),
        ([388.0], Verdict.INCONCLUSIVE),
        ([388.0] * 12, Verdict.PASS),
        # A card that heats up while it is measured: above the floor all the while, through it, from below on.
        ([390.0 - 3 * i for i in range(14)], Verdict.PASS),
        ([390.0 - 10 * i for i in range(14)], Verdict.INCONCLUSIVE),
        ([280.0 - 5 * i for i in range(14)], Verdict.FAIL),
        # The interval of the median is 388 to 388.
        ([388.0] * 20 + [200.0] * 8, Verdict.INCONCLUSIVE),
        # Two modes in turn, both within, or one without.
        ([388.0, 388.0, 340.0] * 8, Verdict.PASS),
        ([388.0, 200.0] * 8, Verdict.INCONCLUSIVE),
        # One odd sample among many.
        ([*steady(388.0, 19), 3.0], Verdict.PASS),
        ([*steady(200.0, 19), 388.0], Verdict.FAIL),
    ],
)
def test_series_of_each_kind_has_its_verdict(samples: list[float], wanted: Verdict) -> None:
    assert triad(samples).verdict is wanted


def test_level_that_changes_while_it_is_measured_is_told() -> None:
    within, through = triad([390.0] * 10 + [350.0] * 10), triad([388.0] * 20 + [200.0] * 8)

    assert within.verdict is Verdict.PASS
    assert within.remarks[-1] == "its level changed while it was measured: 390 to 350 GB/s"
    assert through.sentence.startswith(
        "memory.triad 388 GB/s, 95 % interval 388 to 388, of 28 samples: "
        "some of its levels are within what is expected, at least 290.75 GB/s ("
    )
    assert through.sentence.endswith("), others are not")


def test_wrong_values_fail_however_fast() -> None:
    found = triad(steady(388.0), wrong=3)

    assert found.verdict is Verdict.FAIL
    assert found.sentence == "memory.triad: 3 values of its output are wrong, so its figure says nothing"


def test_unchecked_output_does_not_pass() -> None:
    found = triad(steady(388.0), checked=False)

    assert found.verdict is Verdict.INCONCLUSIVE and found.sentence.endswith(": its output was not checked")


def test_launches_have_no_output_to_check() -> None:
    found = of(
        report(metrics={"launch.latency": metric("launch.latency", steady(4.0), checked=False)}), "launch.latency"
    )

    assert found.verdict is Verdict.PASS and found.learning


def test_figure_beyond_what_the_card_can_do_is_a_mistake_of_the_measurement() -> None:
    found = triad(steady(900.0))

    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.sentence.endswith(": more than the card can do, 448.1 GB/s (256 bits x 2 x 7001 MHz (held))")


def test_gpubenchs_other_limit_is_told() -> None:
    found = triad(steady(388.0), limit=768.0, limit_of="384 bits")

    assert "gpubench states another limit, 768 GB/s: 384 bits" in found.remarks


@pytest.mark.parametrize(
    ("samples", "checked", "wanted", "words"),
    [
        ([0] * 8, True, Verdict.PASS, "no error in 8 passes"),
        # The median of these is 0.
        ([0] * 7 + [1], True, Verdict.FAIL, "1 errors in 8 passes, none expected"),
        ([0], True, Verdict.PASS, "no error in 1 passes"),
        ([0], False, Verdict.INCONCLUSIVE, "its output was not checked"),
    ],
)
def test_single_flipped_bit_fails(samples: list[float], checked: bool, wanted: Verdict, words: str) -> None:
    name = "memory.pattern"

    found = of(report(metrics={name: metric(name, samples, checked=checked)}), name)

    assert (found.verdict, found.sentence) == (wanted, f"{name}: {words}")


def test_metrics_that_were_not_measured_say_why() -> None:
    found = judge(report(not_run={"tensor.int8": "no mma.sync for it"}), History(), "r1")

    assert [each.metric for each in found] == list(TOOLS["gpubench"])
    reasons = {each.metric: each.sentence for each in found if each.verdict is Verdict.NOT_RUN}
    assert reasons["tensor.int8"] == "tensor.int8: no mma.sync for it"
    assert reasons["h2d.pinned"] == "h2d.pinned: gpubench gave no figure of it"
    assert TRIAD not in reasons


def test_without_a_driver_nothing_was_run() -> None:
    found = report(card=None, driver="", metrics={}, verdict="not run", reason="no CUDA driver")

    assert overall(found) == (Verdict.NOT_RUN, "no CUDA driver")
    assert {(each.verdict, each.sentence) for each in judge(found, History(), "r1")} == {
        (Verdict.NOT_RUN, f"{name}: no CUDA driver") for name in TOOLS["gpubench"]
    }


@pytest.mark.parametrize("level", [388.0, 200.0])
def test_figures_taken_while_others_used_the_gpu_decide_nothing(level: float) -> None:
    busy = report(verdict="inconclusive", reason="GPU in use by ollama", metrics={TRIAD: metric(TRIAD, steady(level))})

    assert overall(busy) == (Verdict.INCONCLUSIVE, "GPU in use by ollama")
    assert of(busy, TRIAD).verdict is Verdict.INCONCLUSIVE
    assert of(busy, TRIAD).sentence.endswith(": GPU in use by ollama")


def test_verdict_on_the_run() -> None:
    wrong = report(metrics={TRIAD: metric(TRIAD, [388.0], wrong=3)})

    assert overall(report()) == (Verdict.PASS, "1 metrics of the NVIDIA RTX A4000 in 83 s")
    assert overall(wrong) == (Verdict.FAIL, "memory.triad: 3 wrong values")
    assert overall(report(verdict="failed", reason="CUDA error 700")) == (Verdict.FAIL, "CUDA error 700")


@pytest.mark.parametrize(
    ("name", "level", "wanted"),
    [
        ("mps.fairness", 0.97, Verdict.PASS),
        ("mps.fairness", 0.55, Verdict.FAIL),
        ("mps.share", 0.25, Verdict.FAIL),
        ("mps.gain", 1.9, Verdict.PASS),
        ("mps.gain", 1.0, Verdict.FAIL),
    ],
)
def test_sharing_is_bound_by_what_it_is(name: str, level: float, wanted: Verdict) -> None:
    """No lab shall learn that one client gets all."""
    found = report(**of_tier_1("mps", {name: level}))

    assert of(found, name).verdict is wanted


# Cards and metrics that no source knows.


def test_unknown_card_learns_a_baseline_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "gpu01.jsonl"
    card = {**A4000, "pci_id": "10de:ffff", "uuid": "GPU-new"}
    seen = []
    for number, level in enumerate([388.0, 389.0, 387.0, 388.0, 388.0, 386.0, 340.0]):
        one = report(card=card, began=BEGAN + number * DAY, metrics={TRIAD: metric(TRIAD, steady(level))})
        seen.append(of(one, TRIAD, history.read(path)))
        kept = history.past(one, "r1")
        assert kept is not None
        history.append(path, kept)

    assert [each.sentence.partition(": ")[2] for each in seen[:LEARN]] == [
        f"learning a baseline, run {number} of 5" for number in range(1, LEARN + 1)
    ]
    assert all(each.learning and each.verdict is Verdict.PASS for each in seen[:LEARN])
    assert [each.verdict for each in seen[LEARN:]] == [Verdict.PASS, Verdict.FAIL]
    assert seen[-1].sentence.endswith(
        "all of it below what is expected, at least 349.2 GB/s "
        "(baseline of the first 5 runs under driver 580.95.05, median 388)"
    )


def test_metric_without_a_reference_learns_on_a_known_card() -> None:
    name = "tensor.fp16"
    now = report(metrics={name: metric(name, steady(60.0), limit=76.7, limit_of="its tensor cores")})

    assert of(now, name).sentence.endswith("learning a baseline, run 1 of 5")
    assert of(now, name).ratio == pytest.approx(60 / 76.7)
    assert of(now, name, lived(name, [60.0] * 2)).sentence.endswith("learning a baseline, run 3 of 5")
    assert of(now, name, lived(name, [60.0] * 5)).verdict is Verdict.PASS
    assert of(now, name, lived(name, [80.0] * 5)).verdict is Verdict.FAIL


def test_too_few_samples_teach_nothing() -> None:
    found = of(report(metrics={"tensor.fp16": metric("tensor.fp16", [60.0] * 3)}), "tensor.fp16")

    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.sentence == (
        "tensor.fp16 60 TFLOP/s, of 3 samples where an interval of 95 % takes 6: "
        "too few samples to learn a baseline from"
    )


def test_reference_without_a_bound_is_shown_and_a_baseline_learned() -> None:
    now = report(card={**A4000, "pci_id": "10de:2684"}, metrics={"h2d.pinned": metric("h2d.pinned", steady(25.0))})

    found = of(now, "h2d.pinned")

    assert found.learning and found.bounds is None
    assert "26.19 GB/s measured elsewhere (NVIDIA/nvbandwidth issue 15, eight cards in one host)" in found.remarks


# The lab's own history beside a source's floor.


def test_fall_above_the_floor_passes_and_is_told_with_its_cause() -> None:
    past = lived(TRIAD, [388.0, 387.6, 388.3, 388.1, 387.9, 388.2] * 3)
    slow = lived(TRIAD, [340.0, 341.0], driver="590.44.01")
    now = report(driver="590.44.01", metrics={TRIAD: metric(TRIAD, steady(340.5))})
    moved = [one.model_copy(update={"began": one.began - 2 * DAY}) for one in past.runs]

    found = of(now, TRIAD, History([*moved, *slow.runs]))

    assert found.verdict is Verdict.PASS, "340 GB/s is above DCGM's floor"
    day = slow.runs[0].day
    assert found.remarks[-2:] == (
        "-12.3 % against the last 10 runs under driver 580.95.05 (median 388.1 GB/s, MAD 0.15)",
        f"changed by -12.3 % since the run of {day} (388.1 to 340.5 GB/s), with driver 580.95.05 to 590.44.01",
    )
    assert found.recent is not None and found.recent.unusual
    assert [shift.first for shift in found.shifts] == [slow.runs[0]]


def test_steady_lab_has_no_remarks_of_its_history() -> None:
    found = of(report(), TRIAD, lived(TRIAD, [388.0, 387.0, 389.0] * 5))

    assert found.recent is not None and not found.recent.unusual
    assert found.shifts == () and len(found.remarks) == 2
