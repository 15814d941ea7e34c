# SPDX-License-Identifier: MIT
"""The runs before this one: kept beside the report, a bounded number of them, to see what changed."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from verify.report.run import Run
from verify.verdicts import Result, Verdict, tally

#: Runs that are kept of a lab; the oldest go.
KEPT = 50
#: The folder of the kept runs, below that of the report.
FOLDER = "history"
#: What a kept run is called: when it began (UTC), and a number where another one began in the same second.
NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z(-[0-9]+)?")
#: Verdicts that somebody has to do something about.
BAD = (Verdict.FAIL, Verdict.INCONCLUSIVE)


@dataclass(frozen=True)
class Changes:
    """What a run has that an earlier one of the same checks had not."""

    before: Run
    #: Failed or inconclusive now, and neither before.
    broken: list[Result] = field(default_factory=list)
    #: Failed or inconclusive before, passed now.
    healed: list[Result] = field(default_factory=list)
    #: Everything else that came to another verdict, with the one before.
    other: list[tuple[Verdict, Result]] = field(default_factory=list)
    #: Checks that were not made before, and checks that are no longer made.
    added: list[Result] = field(default_factory=list)
    gone: list[Result] = field(default_factory=list)
    #: Host (empty: the lab), what, before, now.
    facts: list[tuple[str, str, str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.broken, self.healed, self.other, self.added, self.gone, self.facts))


def changes(before: Run, now: Run, older: Sequence[Run] = ()) -> Changes:
    """What is new in `now`.

    A check that `before` left out is compared with the last of the `older` runs, the newest first, that made it; that
    it is made again, or that `now` leaves it out, is no change.
    """
    older_results = [result for _, result in last(before.left_out, older)]
    old = {(result.host, result.id): result for result in [*older_results, *before.results]}
    new = {(result.host, result.id): result for result in now.results}
    both = [(old[key].verdict, result) for key, result in new.items() if key in old]
    differing = [(verdict, result) for verdict, result in both if verdict is not result.verdict]
    broken = [result for verdict, result in differing if result.verdict in BAD and verdict not in BAD]
    healed = [result for verdict, result in differing if verdict in BAD and result.verdict is Verdict.PASS]
    told = [id(result) for result in (*broken, *healed)]
    return Changes(
        before=before,
        broken=broken,
        healed=healed,
        other=[(verdict, result) for verdict, result in differing if id(result) not in told],
        added=[result for key, result in new.items() if key not in old and key not in before.left_out],
        gone=[result for key, result in old.items() if key not in new and key not in now.left_out],
        facts=differing_facts(before, now),
    )


def last(keys: Iterable[tuple[str, str]], past: Sequence[Run]) -> list[tuple[Run, Result]]:
    """The last result of each of these checks, by host and id, and its run; of the `past` runs the newest is first."""
    wanted = set(keys)
    found: dict[tuple[str, str], tuple[Run, Result]] = {}
    for run in past:
        for result in run.results:
            if (result.host, result.id) in wanted:
                found.setdefault((result.host, result.id), (run, result))
    return list(found.values())


def unmeasured(run: Run, past: Sequence[Run]) -> list[str]:
    """A line for each guest of whose benchmarks the run left some out: how many, and what they came to last."""
    found = []
    benchmarks = [key for key in run.left_out if key[1].startswith("benchmarks.")]
    for host in sorted({host for host, _ in benchmarks}):
        keys = [key for key in benchmarks if key[0] == host]
        known = last(keys, past)
        line = f"{host}: {len(keys)} figure{'s were' if len(keys) > 1 else ' was'} not measured"
        if known:
            oldest = min((before for before, _ in known), key=lambda before: before.began)
            line += f"; when last they were, on {oldest.when} or later: {tally([result for _, result in known])}"
            bad = [result.id for _, result in known if result.verdict in BAD]
            line += f" ({', '.join(bad)})" if bad else ""
        else:
            line += ", nor before; --benchmarks full measures them"
        found.append(line)
    return found


def differing_facts(before: Run, now: Run) -> list[tuple[str, str, str, str]]:
    """Facts that both runs know of a host and tell differently, and the revision."""
    found = [("", "revision", before.revision, now.revision)] if before.revision != now.revision else []
    for host, facts in now.facts.items():
        known = before.facts.get(host, {})
        found += [(host, name, known[name], told) for name, told in facts.items() if known.get(name, told) != told]
    return found


def failing_since(run: Run, past: Sequence[Run]) -> dict[tuple[str, str], tuple[str, int]]:
    """Of each check that is bad now: when it was first seen so, and in how many runs without a good one in between.

    `past`: earlier runs, the newest first; those that did not make a check say nothing about it.
    """
    found = {}
    for result in run.of(*BAD):
        when, runs = run.when, 1
        for earlier in past:
            same = next((each for each in earlier.results if (each.host, each.id) == (result.host, result.id)), None)
            if same is None or same.verdict is Verdict.NOT_RUN:
                continue
            if same.verdict not in (*BAD, Verdict.WAIVED):
                break
            when, runs = earlier.when, runs + 1
        found[result.host, result.id] = (when, runs)
    return found


def kept(folder: Path) -> list[Path]:
    """Folders of the runs kept below a report's folder, the newest first."""
    found = [path for path in (folder / FOLDER).glob("*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: _order(path.name), reverse=True)


def _order(name: str) -> tuple[str, int]:
    stamp, _, number = name.partition("-")
    return stamp, int(number or 1)


def read(path: Path) -> Run | None:
    """The run kept in that folder; None: it can't be read, or a version wrote it that knew less."""
    try:
        return Run.from_json(json.loads((path / "verify.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def earlier(folder: Path, selection: str) -> list[Run]:
    """The kept runs that chose the same checks, the newest first."""
    runs: Iterable[Run | None] = map(read, kept(folder))
    return [run for run in runs if run is not None and run.selection == selection]


def place(folder: Path, began: float) -> Path:
    """A new folder for a run that began then, and room for it."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(began))
    number = 1
    while True:
        path = folder / FOLDER / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        for old in kept(folder)[KEPT:]:
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
        return path
