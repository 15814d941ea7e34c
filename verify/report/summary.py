# SPDX-License-Identifier: MIT
"""The end of a run on the terminal: counts, what failed with what heals it, where the report is."""

from __future__ import annotations

from verify.report import Run
from verify.verdicts import FAILED, PASSED, Result, Verdict


def lines(run: Run) -> list[str]:
    """The summary, ready to print."""
    found = []
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
        for result in run.of(verdict):
            found += entry(result)
    # One missing thing keeps many checks from running: said once, with all of them.
    missing: dict[tuple[str, str], list[str]] = {}
    for result in run.of(Verdict.NOT_RUN):
        if not result.expected:
            missing.setdefault((result.host, result.message), []).append(result.id)
    for (host, reason), ids in missing.items():
        found += [f"NOT RUN on {host}: {reason}", f"    {', '.join(ids)}"]
    expected = [result for result in run.results if result.expected]
    if expected:
        words = ", ".join(f"{result.id} on {result.host} ({result.message})" for result in expected)
        found.append(f"expected not to run: {words}")
    for guest in run.unexcused:
        found.append(f"{guest}: expected_not_run excuses nothing here, since {guest} is not simulated")
    counts = run.as_json()
    word = {PASSED: "PASS", FAILED: "FAIL"}.get(run.exit_status, "INCOMPLETE")
    parts = [f"{counts[key]} {key.replace('_', ' ')}" for key in ("passed", "failed", "inconclusive", "not_run")]
    found.append(f"verify: {word}: {counts['checks']} checks: {', '.join(parts)} in {run.duration_s:.1f} s")
    for stand_in in run.stand_ins:
        found.append(f"simulated: {stand_in}")
    if run.folder is not None:
        found.append(f"report: {run.folder / 'index.html'}")
    return found


def entry(result: Result) -> list[str]:
    """One check that did not pass."""
    head = f"{result.verdict.value.upper()} {result.id} [{result.severity.value}] {result.host}"
    body = [f"    {line}" for line in result.message.splitlines()]
    return [head, *body, *([f"    fix: {result.fix}"] if result.fix else [])]
