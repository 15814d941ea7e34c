# SPDX-License-Identifier: MIT
"""Waivers: failures that somebody has accepted, each with a reason and a last day. docs/verify.md has the format."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from inventory import GpulabError
from verify.verdicts import Result, Severity, Verdict

KEYS = ("id", "host", "reason", "until")
#: What a waiver can cover: a check that did not run has seen nothing that anybody could accept.
COVERED = (Verdict.FAIL, Verdict.INCONCLUSIVE)
#: Subject of the results that are about waivers, and the first word of their ids.
SUBJECT = "waiver"


class WaiverError(GpulabError):
    """The waivers are wrong: raised before any host is asked, for all of them at once."""


@dataclass(frozen=True)
class Waiver:
    """Accepts that the check `id` fails on `host`, up to and including the day `until`, which is a local one."""

    id: str
    host: str
    reason: str
    until: date

    @property
    def key(self) -> tuple[str, str]:
        return self.host, self.id

    def __str__(self) -> str:
        return f"{self.reason}, until {self.until}"


def beside(inventory: Path) -> Path:
    """Where the waivers of an inventory file lie: `lab.waivers.toml` beside `lab.py`."""
    return inventory.with_suffix(".waivers.toml")


def load(path: Path) -> list[Waiver]:
    """The waivers of a file.

    Raises:
        WaiverError: the file can't be read or any entry of it is wrong; the message lists every error.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise WaiverError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WaiverError(f"{path}: {error}") from None
    entries = data.pop("waiver", [])
    problems = [f"{key}: unknown; expected only [[waiver]] tables" for key in data]
    if not isinstance(entries, list):
        problems, entries = [*problems, "waiver: one table; expected [[waiver]], which may stand several times"], []
    found = []
    for number, entry in enumerate(entries, 1):
        wrong = problems_of(entry)
        problems += [f"{place(number, entry)}: {problem}" for problem in wrong]
        if not wrong:
            found.append(Waiver(**entry))
    twice = {waiver.key for waiver in found if [other.key for other in found].count(waiver.key) > 1}
    problems += [f"{id_} on {host}: waived twice; expected one waiver" for host, id_ in sorted(twice)]
    refuse(path, problems)
    return found


def problems_of(entry: Any) -> list[str]:
    """What is wrong with one table of the file."""
    if not isinstance(entry, dict):
        return ["no table; expected " + ", ".join(KEYS)]
    found = [f"{key}: missing" for key in KEYS if key not in entry]
    for key, value in entry.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            found.append(f"{key}: unknown key" + (f"; did you mean `{near[0]}`?" if near else ""))
        elif key == "until":
            if not isinstance(value, date) or isinstance(value, datetime):
                found.append(f"until = {value!r}: expected a date without quotes, such as 2027-03-31")
        elif not isinstance(value, str) or not value.strip():
            found.append(f"{key} = {value!r}: expected some text")
    return found


def place(number: int, entry: Any) -> str:
    """How an error names the table that it is about."""
    known = [str(entry[key]) for key in ("id", "host") if key in entry] if isinstance(entry, dict) else []
    return f"waiver {number}" + (f" ({' on '.join(known)})" if known else "")


def check(
    path: Path, waivers: Iterable[Waiver], hosts: Collection[str], checks: Mapping[tuple[str, str], Severity]
) -> None:
    """Refuse waivers of what is not there. `checks`: the severity of every check by host and id.

    Raises:
        WaiverError: a host or a check is unknown, or a critical check is waived; the message lists every error.
    """
    problems = []
    for waiver in waivers:
        if waiver.host not in hosts:
            problems.append(f"{waiver.id}: host {waiver.host} is not in the inventory, which has {', '.join(hosts)}")
        elif waiver.key not in checks:
            near = difflib.get_close_matches(waiver.id, [id_ for host, id_ in checks if host == waiver.host], 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{waiver.id}: {waiver.host} has no such check{meant}")
        elif checks[waiver.key] is Severity.CRITICAL:
            problems.append(f"{waiver.id} on {waiver.host}: critical checks can't be waived")
    refuse(path, problems)


def refuse(path: Path, problems: Collection[str]) -> None:
    if problems:
        raise WaiverError(
            f"{path} has {len(problems)} error{'s' if len(problems) > 1 else ''}; nothing was checked.",
            "\n".join(f"  {problem}" for problem in problems),
            "docs/verify.md says what may stand in it",
        )


def waived(result: Result, waivers: Iterable[Waiver], today: date) -> Result:
    """The result, as `WAIVED` where a waiver that holds today covers it."""
    if result.verdict not in COVERED:
        return result
    for waiver in waivers:
        if waiver.key == (result.host, result.id) and today <= waiver.until:
            return dataclasses.replace(result, verdict=Verdict.WAIVED, waiver=str(waiver))
    return result


def expired(waivers: Iterable[Waiver], results: Collection[Result], path: Path, today: date) -> list[Result]:
    """A critical failure for each waiver that has run out and whose check was among those of this run."""
    ran = {(result.host, result.id) for result in results}
    return [
        Result(
            id=f"{SUBJECT}.{waiver.id}",
            host=waiver.host,
            subject=SUBJECT,
            severity=Severity.CRITICAL,
            verdict=Verdict.FAIL,
            title=f"Waiver of {waiver.id} is still in force",
            promise=f"until = {waiver.until}",
            message=f"{waiver.host}: the waiver of {waiver.id} ran out on {waiver.until}: {waiver.reason}",
            fix=f"heal it and take the waiver out of {path}, or look again and set a later `until` there",
        )
        for waiver in waivers
        if waiver.until < today and waiver.key in ran
    ]


def needless(waivers: Iterable[Waiver], results: Collection[Result], today: date) -> list[Waiver]:
    """Waivers in force whose check passed."""
    passed = {(result.host, result.id) for result in results if result.verdict is Verdict.PASS}
    return [waiver for waiver in waivers if today <= waiver.until and waiver.key in passed]
