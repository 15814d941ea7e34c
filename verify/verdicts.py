# SPDX-License-Identifier: MIT
"""What a check can come to, and what all of them together mean for the exit status."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn

import pytest


class Severity(StrEnum):
    """How much a failure means; the descriptions stand with pytest's markers."""

    CRITICAL = "critical"
    MAJOR = "major"
    MINOR = "minor"


class Verdict(StrEnum):
    """`INCONCLUSIVE`: it ran and cannot tell. `NOT_RUN`: it could not run, and the message says why. `WAIVED`: it
    failed or cannot tell, and somebody has said until when that is accepted.
    """

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not run"
    WAIVED = "waived"


class Undecided(pytest.skip.Exception):  # type: ignore[name-defined]  # documented, but made at run time
    """Ends a check without pass or fail."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


class Broken(AssertionError):
    """A failure that knows better than its check's `fix` what would heal it."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def inconclusive(reason: str) -> NoReturn:
    """End the check: what was measured does not decide it."""
    raise Undecided(Verdict.INCONCLUSIVE, reason)


def not_run(reason: str) -> NoReturn:
    """End the check: something else has to be there first."""
    raise Undecided(Verdict.NOT_RUN, reason)


@dataclass(frozen=True)
class Result:
    """One check on one host. `message`: what was found; `fix`: what would heal it, if it failed, waived or not."""

    id: str
    host: str
    subject: str
    severity: Severity
    verdict: Verdict
    message: str = ""
    fix: str = ""
    duration_s: float = 0.0
    #: What the check asks, as a sentence that is true when it passes.
    title: str = ""
    #: The values of the inventory that it is about: `cores = 8; affinity = 0-7`. Empty: none, it holds for every lab.
    promise: str = ""
    #: What stood in for the real thing, empty when nothing did.
    simulated: str = ""
    #: `not run`, and the inventory says that it would be.
    expected: bool = False
    #: Reason and last day, of one that is waived.
    waiver: str = ""

    @property
    def counts(self) -> bool:
        """Does it bear on the exit status?"""
        return self.severity is not Severity.MINOR and not self.expected and self.verdict is not Verdict.WAIVED


#: Exit statuses of a verify run; 3 and 4 are pytest's own (internal error, usage).
PASSED, FAILED, INCOMPLETE = 0, 1, 2


def exit_status(results: Collection[Result]) -> int:
    """PASSED, FAILED (a critical or major check failed or is inconclusive) or INCOMPLETE (one did not run)."""
    verdicts = {result.verdict for result in results if result.counts}
    if verdicts & {Verdict.FAIL, Verdict.INCONCLUSIVE}:
        return FAILED
    if Verdict.NOT_RUN in verdicts or not results:
        return INCOMPLETE
    return PASSED


def count(results: Iterable[Result], verdict: Verdict) -> int:
    """How many results have that verdict."""
    return sum(result.verdict is verdict for result in results)


def tally(results: list[Result]) -> str:
    """Counts of verdicts, those that want to be looked at first."""
    order = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.NOT_RUN, Verdict.WAIVED, Verdict.PASS)
    words = {Verdict.PASS: "passed", Verdict.FAIL: "failed"}
    counts = {verdict: sum(result.verdict is verdict for result in results) for verdict in order}
    return ", ".join(f"{number} {words.get(verdict, verdict.value)}" for verdict, number in counts.items() if number)
