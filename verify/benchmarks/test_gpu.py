# SPDX-License-Identifier: MIT
"""Does the card do what such a card should, and does it compute right? As gpubench measured it on the guest."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Guest
from verify.benchmarks.measured import Measured
from verify.verdicts import Verdict, inconclusive, not_run

pytestmark = pytest.mark.on("gpus")

SLOW = (
    "nvidia-smi -q -d PERFORMANCE,CLOCK,POWER,TEMPERATURE on {host} says what holds the card back; if it is meant to "
    "be slower now, see Learned baselines in docs/verify.md"
)
FAULTY = (
    "stop and start the VM of {host} on {node}, then pytest verify --lab {lab} --limit {host} --benchmarks full; "
    "if it comes back, take the card out of use"
)
IN_USE = "hint: --drain stops the services of {host} meanwhile"


@pytest.mark.critical
@pytest.mark.promise("benchmarks.gpu.answers", "card.name", fix=FAULTY)
def test_card_answers_to_the_end(guest: Guest, benchmarks: Measured, seen: Callable[[str], None]) -> None:
    """What it computed wrong on the way is told by the check of that figure."""
    report = benchmarks.report
    match report.verdict:
        case "inconclusive":
            inconclusive(in_use(guest, benchmarks, report.reason))
        case "not run":
            not_run(report.reason)
        case "failed":
            assert any(metric.wrong for metric in report.metrics.values()), f"{guest.name}: {report.reason}"
    what = "quick" if report.quick else "full"
    seen("; ".join([f"{len(report.metrics)} figures in {report.duration_s:.0f} s ({what})", *report.notes]))


@pytest.mark.critical
@pytest.mark.promise("benchmarks.gpu.memory.pattern", "card.name", "nvidia.ecc", fix=FAULTY)
def test_memory_holds_what_was_written(guest: Guest, benchmarks: Measured, seen: Callable[[str], None]) -> None:
    decided(guest, benchmarks, "memory.pattern", seen)


@pytest.mark.major
@pytest.mark.promise("benchmarks.gpu.{figure}", "card.name", fix=SLOW)
def test_card_is_as_fast_as_it_should_be(
    guest: Guest, figure: str, benchmarks: Measured, seen: Callable[[str], None]
) -> None:
    decided(guest, benchmarks, figure, seen)


def decided(guest: Guest, benchmarks: Measured, metric: str, seen: Callable[[str], None]) -> None:
    """End the check with the verdict on that metric."""
    found = benchmarks.judgements[metric]
    # The id beside it has the name already.
    told = found.sentence.removeprefix(f"{metric}: ").removeprefix(f"{metric} ")
    match found.verdict:
        case Verdict.NOT_RUN if benchmarks.report.verdict == "inconclusive":
            inconclusive(in_use(guest, benchmarks, told))
        case Verdict.NOT_RUN:
            not_run(told)
        case Verdict.INCONCLUSIVE:
            inconclusive("; ".join([in_use(guest, benchmarks, told), *found.remarks]))
    text = "; ".join([told, *found.remarks])
    assert found.verdict is Verdict.PASS, f"{guest.name}: {text}"
    seen(text)


def in_use(guest: Guest, benchmarks: Measured, reason: str) -> str:
    """The reason, with what can be done where it is that services use the card: tier 1 needs them, and names others."""
    report = benchmarks.report
    helped = report.tool != "gpubench" or any(note.startswith("stopped for this run") for note in report.notes)
    return reason if helped or "GPU in use" not in reason else f"{reason}; {IN_USE.format(host=guest.name)}"
