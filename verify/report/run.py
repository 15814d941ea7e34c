# SPDX-License-Identifier: MIT
"""A verify run as its reports have it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verify.verdicts import FAILED, PASSED, Result, Severity, Verdict, count

#: Characters that neither XML 1.0 nor HTML can hold, not even escaped: what a host prints may have them.
NO_TEXT = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010fffd]")


def printable(text: str) -> str:
    """`text` with a replacement character for each that can't stand in a page."""
    return NO_TEXT.sub("\ufffd", text)


@dataclass(frozen=True)
class Figure:
    """A drawing for the page: SVG with its own text, which is taken as it is, and what it shows in words."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Run:
    """A whole verify run. `began`: seconds since the epoch; `simulated`: what the inventory says stands in."""

    lab: str
    file: str
    began: float
    duration_s: float
    revision: str
    exit_status: int
    results: list[Result]
    limits: tuple[str, ...] = ()
    #: The options that chose a part of the checks (`--limit gpu01 -k milvus`); empty: all were to run.
    selection: str = ""
    #: Host and id of the checks that are made only when they are asked for (benchmarks, disruptive ones) and were not.
    left_out: list[tuple[str, str]] = field(default_factory=list)
    #: What of the benchmarks was left out, a line a guest, with what it came to last.
    unmeasured: list[str] = field(default_factory=list)
    simulated: list[str] = field(default_factory=list)
    #: Real guests whose `expected_not_run` is not empty: it excuses nothing.
    unexcused: list[str] = field(default_factory=list)
    #: Versions and the like, by host and name.
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    #: Seconds that each read took, by host and subject.
    reads: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    #: Waivers in force whose check passed, each as a line.
    needless: list[str] = field(default_factory=list)
    #: Drawings of what was measured; they are in the page alone.
    figures: list[Figure] = field(default_factory=list)
    #: Where it was written.
    folder: Path | None = None

    @property
    def when(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.began))

    @property
    def word(self) -> str:
        """The exit status in one word."""
        return {PASSED: "PASS", FAILED: "FAIL"}.get(self.exit_status, "INCOMPLETE")

    @property
    def stand_ins(self) -> list[str]:
        """Everything that stood in for the real thing, declared or seen."""
        return sorted({*self.simulated, *(result.simulated for result in self.results if result.simulated)})

    def of(self, *verdicts: Verdict) -> list[Result]:
        """The results of these verdicts, the most severe first."""
        levels = list(Severity)
        found = [result for result in self.results if result.verdict in verdicts]
        return sorted(found, key=lambda result: levels.index(result.severity))

    def as_json(self) -> dict[str, Any]:
        """What verify.json holds."""
        return {
            "lab": self.lab,
            "file": self.file,
            "when": self.when,
            "began": round(self.began, 3),
            "duration_s": round(self.duration_s, 3),
            "revision": self.revision,
            "limit": list(self.limits),
            "selection": self.selection,
            "left_out": [list(key) for key in self.left_out],
            "simulated": self.stand_ins,
            "exit_status": self.exit_status,
            "checks": len(self.results),
            "passed": count(self.results, Verdict.PASS),
            "failed": count(self.results, Verdict.FAIL),
            "inconclusive": count(self.results, Verdict.INCONCLUSIVE),
            "not_run": count(self.results, Verdict.NOT_RUN),
            "waived": count(self.results, Verdict.WAIVED),
            "expected_not_run": sorted({result.id for result in self.results if result.expected}),
            "unexcused": self.unexcused,
            "needless_waivers": self.needless,
            "facts": self.facts,
            "reads": self.reads,
            "results": [dataclasses.asdict(result) for result in self.results],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """The run that a verify.json tells of.

        Raises:
            KeyError, TypeError, ValueError: it is none, or of a version that wrote less.
        """
        return cls(
            lab=data["lab"],
            file=data["file"],
            began=float(data["began"]),
            duration_s=float(data["duration_s"]),
            revision=data["revision"],
            exit_status=data["exit_status"],
            results=[
                Result(**{**each, "severity": Severity(each["severity"]), "verdict": Verdict(each["verdict"])})
                for each in data["results"]
            ],
            limits=tuple(data["limit"]),
            selection=data["selection"],
            # Older versions did not tell.
            left_out=[(host, id_) for host, id_ in data.get("left_out", [])],
            simulated=data["simulated"],
            unexcused=data["unexcused"],
            facts=data["facts"],
            reads=data.get("reads", {}),
            needless=data["needless_waivers"],
        )
