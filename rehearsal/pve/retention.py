# SPDX-License-Identifier: MIT
"""Which backups of a guest `prune-backups` keeps: a pure function of their times, as PVE's pruning decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rehearsal.pve.errors import bad_parameters
from rehearsal.pve.vmconfig import parse_properties

Keep = dict[str, int]

# In the order in which PVE applies them: each looks only at what those before it left over.
_PERIODS: tuple[tuple[str, Callable[[int], str]], ...] = (
    ("keep-last", str),
    ("keep-hourly", lambda ctime: time.strftime("%Y-%j %H", time.localtime(ctime))),
    ("keep-daily", lambda ctime: time.strftime("%Y-%j", time.localtime(ctime))),
    ("keep-weekly", lambda ctime: time.strftime("%G-%V", time.localtime(ctime))),
    ("keep-monthly", lambda ctime: time.strftime("%Y-%m", time.localtime(ctime))),
    ("keep-yearly", lambda ctime: time.strftime("%Y", time.localtime(ctime))),
)
OPTIONS = ("keep-all", *(name for name, _ in _PERIODS))
ALL: Keep = {"keep-all": 1}


def parse(text: str, parameter: str = "prune-backups") -> Keep:
    """The property string `keep-daily=7,keep-weekly=4`; nothing positive in it means that all are kept.

    Raises:
        ApiError: 400 in PVE's words.
    """
    wrong = ""
    keep: Keep = {}
    for name, value in parse_properties(text).items():
        if name not in OPTIONS:
            wrong = "property is not defined in schema and the schema does not allow additional properties"
        elif not value.isdecimal():
            wrong = f"type check ('{'boolean' if name == 'keep-all' else 'integer'}') failed - got '{value}'"
        if wrong:
            bad_parameters({parameter: f"invalid format - format error\n{parameter}.{name}: {wrong}\n"})
        keep[name] = int(value)
    counts = {name: number for name, number in keep.items() if name != "keep-all"}
    if not any(counts.values()):
        return dict(ALL)
    if keep.get("keep-all"):
        bad_parameters({parameter: "keep-all cannot be set together with other options.\n"})
    return counts


def text(keep: Mapping[str, Any]) -> str:
    """The property string again, keys sorted as PVE writes them."""
    return ",".join(f"{name}={keep[name]}" for name in sorted(keep))


def marks(backups: Iterable[tuple[int, bool]], keep: Keep) -> list[str]:
    """`keep`, `remove` or `protected` for each backup of one guest, given as (time, protected).

    A period keeps its newest backup, and one that an earlier option kept already covers its period. A protected one
    is never removed and counts for nothing.
    """
    entries = [(ctime, "protected" if protected else "") for ctime, protected in backups]
    if keep.get("keep-all") or not any(number for name, number in keep.items() if name != "keep-all"):
        return [mark or "keep" for _, mark in entries]
    newest_first = sorted(range(len(entries)), key=lambda n: -entries[n][0])
    found = [mark for _, mark in entries]
    for name, period in _PERIODS:
        _mark(found, [(n, period(entries[n][0])) for n in newest_first], keep.get(name, 0))
    return [mark or "remove" for mark in found]


def _mark(found: list[str], newest_first: list[tuple[int, str]], count: int) -> None:
    if not count:
        return
    covered = {period for n, period in newest_first if found[n] == "keep"}
    kept: set[str] = set()
    for n, period in newest_first:
        if found[n] or period in covered:
            continue
        if period in kept:
            found[n] = "remove"
            continue
        if len(kept) >= count:
            return
        kept.add(period)
        found[n] = "keep"
