# SPDX-License-Identifier: MIT
"""The page for people: one file, no script, nothing from outside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jinja2

from verify.report.history import Changes
from verify.report.run import Run, printable
from verify.verdicts import FAILED, PASSED, Result, Severity, Verdict, tally

#: Readable without colour: a sign and a word.
SIGNS = {
    Verdict.PASS: "✔ pass",
    Verdict.FAIL: "✘ fail",
    Verdict.INCONCLUSIVE: "? inconclusive",
    Verdict.NOT_RUN: "\N{EN DASH} not run",
    Verdict.WAIVED: "~ waived",
}


def html(
    run: Run, since: Changes | None = None, failing: Mapping[tuple[str, str], tuple[str, int]] | None = None
) -> str:
    """The page of a run: with what is new `since` an earlier one, and how long what fails has been `failing`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    hosts: dict[str, dict[str, list[Result]]] = {}
    for result in run.results:
        hosts.setdefault(result.host, {}).setdefault(result.subject, []).append(result)
    page = environment.get_template("index.html.j2").render(
        run=run,
        counts=run.as_json(),
        hosts=hosts,
        signs=SIGNS,
        answer=answer(run),
        todo=todo(run),
        not_run=missing(run),
        waived=run.of(Verdict.WAIVED),
        since=since,
        failing=failing or {},
        brief=brief,
        tally=tally,
    )
    return printable(page)


def answer(run: Run) -> str:
    """Is the lab all right, in a sentence?"""
    of = f"Of what was chosen ({run.selection}): " if run.selection else ""
    told = _answer(run)
    return of + told if of else told[0].upper() + told[1:]


def _answer(run: Run) -> str:
    if run.exit_status == PASSED:
        rest = [
            (len(run.of(Verdict.FAIL)), "minor check failed", "minor checks failed"),
            (len(run.of(Verdict.WAIVED)), "failure is waived", "failures are waived"),
            (sum(result.expected for result in run.results), "check can't run here", "checks can't run here"),
        ]
        told = ", ".join(f"{number} {one if number == 1 else many}" for number, one, many in rest if number)
        return "every promise that counts is kept" + (f"; {told}." if told else ".")
    bad = [result for result in run.of(Verdict.FAIL, Verdict.INCONCLUSIVE) if result.counts]
    if run.exit_status == FAILED and bad:
        told = " and ".join(
            f"{number} {level.value}" for level in Severity if (number := sum(each.severity is level for each in bad))
        )
        return f"{told} {'check' if len(bad) == 1 else 'checks'} failed or can't tell."
    number = sum(result.counts for result in run.of(Verdict.NOT_RUN))
    if number:
        return f"not known: {number} {'check that counts was' if number == 1 else 'checks that count were'} not run."
    return "not known: nothing was checked."


def todo(run: Run) -> list[tuple[str, list[Result]]]:
    """What would heal the failures, each command once with all that it is for, the most severe first."""
    found: dict[str, list[Result]] = {}
    for result in run.of(Verdict.FAIL):
        found.setdefault(result.fix, []).append(result)
    again = [result for result in run.of(Verdict.INCONCLUSIVE) if result.counts]
    if again:
        found["run it again when nothing else uses what is measured"] = again
    return list(found.items())


def missing(run: Run) -> list[tuple[str, str, list[Result]]]:
    """Host, reason and checks of what was not run though it counts: one missing thing keeps many from running."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in run.of(Verdict.NOT_RUN):
        if not result.expected:
            found.setdefault((result.host, result.message), []).append(result)
    return [(host, reason, results) for (host, reason), results in found.items()]


def brief(result: Result) -> str:
    """What was found, without the host that the page says already."""
    return result.message.removeprefix(f"{result.host}: ") or ("as promised" if result.verdict is Verdict.PASS else "")
