# SPDX-License-Identifier: MIT
"""The end of a run on the terminal: counts, what failed with what heals it, where the report is."""

from __future__ import annotations

from verify.report.history import Changes
from verify.report.run import Run
from verify.verdicts import Result, Verdict


def lines(run: Run, since: Changes | None = None) -> list[str]:
    """The summary, ready to print; with what is new `since` an earlier run."""
    found = []
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
        for result in run.of(verdict):
            found += entry(result)
    # One missing thing keeps many checks from running: said once, with all of them.
    missing: dict[tuple[str, str, bool], list[str]] = {}
    for result in run.of(Verdict.NOT_RUN):
        missing.setdefault((result.host, result.message, result.expected), []).append(result.id)
    for (host, reason, expected), ids in sorted(missing.items(), key=lambda each: each[0][2]):
        what = "expected not to run" if expected else "NOT RUN"
        found += [f"{what} on {host}: {reason}", f"    {', '.join(ids)}"]
    for guest in run.unexcused:
        found.append(f"{guest}: expected_not_run excuses nothing here, since {guest} is not simulated")
    for result in run.of(Verdict.WAIVED):
        found += [f"WAIVED {result.id} [{result.severity.value}] {result.host} ({result.waiver})"]
        found += [f"    {line}" for line in result.message.splitlines()]
    found += [f"no longer needed, its check passed: the waiver of {line}" for line in run.needless]
    found += run.unmeasured
    found += news(since) if since is not None else []
    if not run.results:
        found.append(f"nothing was checked: no check is of {run.selection or 'any host of this lab'}")
    counts = run.as_json()
    parts = [f"{counts[key]} {key.replace('_', ' ')}" for key in ("passed", "failed", "inconclusive", "not_run")]
    parts += [f"{counts['waived']} waived"] if counts["waived"] else []
    found.append(f"verify: {run.word}: {counts['checks']} checks: {', '.join(parts)} in {run.duration_s:.1f} s")
    for stand_in in run.stand_ins:
        found.append(f"simulated: {stand_in}")
    if run.folder is not None:
        found.append(f"report: {run.folder / 'index.html'}")
    return found


def news(since: Changes) -> list[str]:
    """What changed, a line for each kind of change; none when nothing did."""
    kinds = [
        ("new failures", [f"{each.id} on {each.host}" for each in since.broken]),
        ("healed", [f"{each.id} on {each.host}" for each in since.healed]),
        ("changed", [f"{now.id} on {now.host} ({was.value}, now {now.verdict.value})" for was, now in since.other]),
        ("not checked then", [f"{each.id} on {each.host}" for each in since.added]),
        ("no longer checked", [f"{each.id} on {each.host}" for each in since.gone]),
        ("found", [f"{host} {name} {old}, now {new}".strip() for host, name, old, new in since.facts]),
    ]
    told = [f"    {kind}: {', '.join(each)}" for kind, each in kinds if each]
    return [f"since {since.before.when}:", *told] if told else []


def entry(result: Result) -> list[str]:
    """One check that did not pass."""
    head = f"{result.verdict.value.upper()} {result.id} [{result.severity.value}] {result.host}"
    body = [f"    {line}" for line in result.message.splitlines()]
    return [head, *body, *([f"    fix: {result.fix}"] if result.fix else [])]
