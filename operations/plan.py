# SPDX-License-Identifier: MIT
"""gpulab's own plan: what each host would get, file by file and key by key, with the reboots that apply now.

Operations record here, before their first `yield`, the same pure diff that they act on. pyinfra's own list names
conditional steps whether they will run or not and shows no difference; this one does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from weakref import WeakKeyDictionary

from pyinfra.api import State


class Kind(Enum):
    CHANGE = "change"
    REBOOT = "reboot"
    REFUSED = "refused"
    WAITS = "waits"
    NOTE = "note"


@dataclass(frozen=True)
class Entry:
    """One thing that will happen to one host. `assumed`: planned for a guest that could not be read yet."""

    host: str
    subject: str
    lines: tuple[str, ...] = ()
    kind: Kind = Kind.CHANGE
    assumed: bool = False


@dataclass
class Plan:
    """The entries of one run, in the order in which they were decided."""

    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        if entry not in self.entries:
            self.entries.append(entry)

    def of(self, host: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.host == host]

    def render(self, hosts: Iterable[str]) -> str:
        """The plan as text: one block a host, `reboot: no` or `reboot: yes (reason)` at its end."""
        blocks = [self._block(host) for host in hosts]
        changes = sum(entry.kind is Kind.CHANGE for entry in self.entries)
        reboots = sum(entry.kind is Kind.REBOOT for entry in self.entries)
        refused = sum(entry.kind is Kind.REFUSED for entry in self.entries)
        total = f"plan: {changes} changes, {reboots} reboots" + (f", {refused} refused" if refused else "")
        return "\n".join([*blocks, total])

    def _block(self, host: str) -> str:
        lines = [host]
        reboot = "no"
        for entry in self.of(host):
            mark = " (assumed)" if entry.assumed else ""
            if entry.kind is Kind.REBOOT:
                reboot = f"yes ({', '.join(entry.lines)})" + mark
                continue
            word = {Kind.CHANGE: "", Kind.REBOOT: ""}.get(entry.kind, f"{entry.kind.value}: ")
            lines.append(f"  {word}{entry.subject}{mark}")
            lines += [f"      {line}" for line in entry.lines]
        if all(entry.kind in (Kind.NOTE, Kind.REBOOT) for entry in self.of(host)):
            lines.insert(1, "  nothing to change")
        return "\n".join([*lines, f"  reboot: {reboot}"])


_plans: WeakKeyDictionary[State, Plan] = WeakKeyDictionary()


def of_run(state: State) -> Plan:
    """The plan of a pyinfra run."""
    return _plans.setdefault(state, Plan())


def file_diff(current: str | None, wanted: str | None) -> tuple[str, ...]:
    """The lines that a file loses (`-`) and gains (`+`); None: the file is absent."""
    before = [] if current is None else current.splitlines()
    after = [] if wanted is None else wanted.splitlines()
    # The first two lines name the files. Told by their place: a removed `-- x` looks like one of them.
    changes = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    # A file may hold bytes that are no text; they travel as they are and are shown as what they are not.
    shown = (line.encode(errors="surrogateescape").decode(errors="replace") for line in changes)
    return tuple(line for line in shown if not line.startswith("@@"))


def key_diff(current: dict[str, str | None], wanted: dict[str, str | None]) -> tuple[str, ...]:
    """`key: old -> new` for each key of `wanted` that differs; None: absent."""
    return tuple(
        f"{key}: {'absent' if current.get(key) is None else current[key]} -> {'absent' if value is None else value}"
        for key, value in sorted(wanted.items())
        if current.get(key) != value
    )
