# SPDX-License-Identifier: MIT
"""A lab's own figures: one line of JSON a run, in the lab's private folder, and what earlier runs say of a new one.

Figures of different cards, metrics, units, settings and kinds of run (quick or full) never meet. A baseline and the
median of the last runs are those of one version of the driver and of the software measured; a change of level is looked
for across versions, since it is a new one that often makes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from inventory import Guest, Lab
from verify.benchmarks import changes
from verify.benchmarks.contract import Better, Identity, Report, Strict, Tool, Unit
from verify.benchmarks.intervals import interval
from verify.benchmarks.references import MARGIN, NOISE, Bounds, figure

SCHEMA = 1
#: Runs that a baseline is learned from.
LEARN = 5
#: Runs that the newest one is compared with, and those at least that it takes.
RECENT, LEAST_RECENT = 10, 3
#: Runs among which a change of level is looked for.
WINDOW = 60
#: Median absolute deviations that make one standard deviation of normal noise, and how many of those are unusual.
NORMAL, UNUSUAL = 1.4826, 3.0


class Figure(Strict):
    """One metric of one run: the median and its interval."""

    unit: Unit
    better: Better
    median: float
    low: float
    high: float
    n: int = Field(ge=1)


class Past(Strict):
    """One run as the history keeps it. `revision`: that of the configuration; `began`: seconds since the epoch.

    `card`: its PCI id, or the processor's name where that computed; a processor has neither `uuid` nor `driver`.
    """

    version: Literal[1] = Field(alias="schema", serialization_alias="schema")
    tool: Tool
    began: float = Field(gt=0)
    quick: bool
    card: Identity
    uuid: str
    driver: str
    software: str = ""
    setting: str = ""
    revision: str
    figures: dict[str, Figure]

    @property
    def under(self) -> str:
        """The versions that it was measured under."""
        return ", ".join(filter(None, [self.driver and f"driver {self.driver}", self.software]))

    @property
    def day(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.began))


def file_of(lab: Lab, guest: Guest) -> Path:
    """Where the runs of that guest are kept."""
    return guest.state / "benchmarks" / lab.node_of(guest).cluster_name / f"{guest.name}.jsonl"


def past(report: Report, revision: str) -> Past | None:
    """What is kept of a run: sound figures with an interval. None: it has none, or others used the GPU meanwhile."""
    if report.verdict != "measured" or not report.computed_by:
        return None
    figures = {}
    for name, metric in report.metrics.items():
        found = interval(metric.samples)
        if metric.unit != "errors" and not metric.wrong and found.known:
            figures[name] = Figure(
                unit=metric.unit,
                better=metric.better,
                median=found.median,
                low=found.low,
                high=found.high,
                n=found.n,
            )
    if not figures:
        return None
    return Past(
        schema=1,
        tool=report.tool,
        began=report.began,
        quick=report.quick,
        card=report.card.pci_id if report.card is not None else report.processor,
        uuid=(report.card.uuid or "") if report.card is not None else "",
        driver=report.driver or "",
        software=report.software,
        setting=report.setting,
        revision=revision,
        figures=figures,
    )


@dataclass(frozen=True)
class History:
    """The runs of one guest, the oldest first. `notes`: lines that could not be read, and why."""

    runs: list[Past] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def before(self, run: Past, name: str) -> list[Past]:
        """The earlier runs whose figure of that metric may be compared with that of `run`."""
        mine = run.figures[name]
        return [
            other
            for other in self.runs
            if all(getattr(other, key) == getattr(run, key) for key in ("card", "uuid", "quick", "setting"))
            and other.began < run.began
            and (theirs := other.figures.get(name)) is not None
            and (theirs.unit, theirs.better) == (mine.unit, mine.better)
        ]


def read(path: Path) -> History:
    """All runs in a file of the history; a file that is not there has none.

    A line that is torn, of another schema or of no run at all costs a note. A run that is there twice counts once.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return History()
    except OSError as error:
        return History(notes=[f"{path}: {error.strerror}: its runs are not compared with"])
    runs: dict[tuple[str, str, float], Past] = {}
    notes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            run = Past.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            whole = first["type"] != "json_invalid"
            why = (
                f"{'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}" if whole else "not a whole line of JSON"
            )
            notes.append(f"{path}, line {number}: left out ({why})")
        else:
            runs.setdefault((run.tool, run.uuid, run.began), run)
    return History(sorted(runs.values(), key=lambda run: run.began), notes)


def append(path: Path, run: Past) -> None:
    """Add a run: whole or, should the machine stop meanwhile, as a last line that the next reader leaves out.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    line = json.dumps(run.model_dump(by_alias=True), separators=(",", ":")).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        # Behind a torn line a new one would be lost with it.
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            line = b"\n" + line
        written = file.write(line)
        os.fsync(file.fileno())
    if written != len(line):
        raise OSError(f"{path}: {written} of {len(line)} bytes written")


def mad(figures: Sequence[float]) -> float:
    """The median absolute deviation."""
    middle = statistics.median(figures)
    return statistics.median(abs(each - middle) for each in figures)


@dataclass(frozen=True)
class Baseline:
    """What this card did in its first runs under this driver. `bounds` is None until LEARN of them are there."""

    runs: int
    bounds: Bounds | None


def baseline(history: History, run: Past, name: str) -> Baseline:
    """The bound that a lab has learned for itself, frozen after the first LEARN runs, so that slow decay meets it too.

    Only the worse side is bounded: MARGIN of the median, or UNUSUAL standard deviations where the runs varied more.
    """
    mine = run.figures[name]
    first = [other for other in history.before(run, name) if other.under == run.under][:LEARN]
    if len(first) < LEARN:
        return Baseline(len(first), None)
    medians = [other.figures[name].median for other in first]
    middle = statistics.median(medians)
    room = max(MARGIN * middle, UNUSUAL * NORMAL * mad(medians))
    source = f"baseline of the first {LEARN} runs under {run.under}, median {figure(middle)}"
    if mine.better == "higher":
        return Baseline(LEARN, Bounds(max(middle - room, 0.0), None, mine.unit, source))
    return Baseline(LEARN, Bounds(None, middle + room, mine.unit, source))


@dataclass(frozen=True)
class Recent:
    """The newest figure beside the median of the runs before it. `relative`: the difference as a share of that."""

    median: float
    mad: float
    runs: int
    under: str
    relative: float
    unusual: bool


def recent(history: History, run: Past, name: str) -> Recent | None:
    """The comparison with the last runs under the same versions, else under those before; None: too few."""
    before = history.before(run, name)
    for under in dict.fromkeys([run.under, *(other.under for other in reversed(before))]):
        medians = [other.figures[name].median for other in before if other.under == under][-RECENT:]
        if len(medians) >= LEAST_RECENT:
            middle, spread = statistics.median(medians), mad(medians)
            off = run.figures[name].median - middle
            usual = max(NOISE.get(name, 0.0) * abs(middle), UNUSUAL * NORMAL * spread)
            return Recent(middle, spread, len(medians), under, off / middle if middle else 0.0, abs(off) > usual)
    return None


@dataclass(frozen=True)
class Shift:
    """A change of level in the history, and what else changed with the first run that has it."""

    change: changes.Change
    unit: str
    first: Past
    causes: tuple[str, ...]

    def __str__(self) -> str:
        cause = f"with {' and '.join(self.causes)}" if self.causes else "versions and configuration as before"
        return (
            f"{self.change.relative * 100:+.1f} % since the run of {self.first.day} "
            f"({figure(self.change.before)} to {figure(self.change.after)} {self.unit}), {cause}"
        )


def shifts(history: History, run: Past, name: str) -> list[Shift]:
    """All changes of level among the last WINDOW runs, `run` included, in order."""
    runs = [*history.before(run, name), run][-WINDOW:]
    found = changes.find([each.figures[name].median for each in runs], noise=NOISE.get(name, 0.0))
    unit = run.figures[name].unit
    return [
        Shift(change, unit, runs[change.index], _causes(runs[change.index - 1], runs[change.index])) for change in found
    ]


def _causes(before: Past, after: Past) -> tuple[str, ...]:
    pairs = {
        "driver": (before.driver, after.driver),
        "software": (before.software, after.software),
        "configuration": (before.revision, after.revision),
    }
    return tuple(f"{what} {old or 'unknown'} to {new or 'unknown'}" for what, (old, new) in pairs.items() if old != new)
