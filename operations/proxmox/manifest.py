# SPDX-License-Identifier: MIT
"""Two manifests of a data disk, compared: the guest's own and that of a VM restored from its backup. Pure."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from inventory import GpulabError

#: Seconds by which two clocks may disagree after they were compared: a file that is as old as the backup to within
#: these counts as changed.
CLOCK_S = 5.0
#: Names that a message holds.
SHOWN = 10


@dataclass(frozen=True)
class Entry:
    """`kind`: file, link, folder, other. `changed`: Unix seconds, the guest's clock. A link's digest is its target."""

    kind: str
    size: int
    changed: float
    digest: str

    @property
    def counts(self) -> bool:
        """Does it hold data?"""
        return self.kind in ("file", "link")


@dataclass(frozen=True)
class Manifest:
    """What lies on a data disk. `now`: the guest's clock when it was read."""

    mounted: bool
    now: float
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Outcome:
    """`equal` and `changed` count files and links, `size` is the equal ones' in bytes. `wrong`: lines with a path."""

    equal: int
    size: int
    changed: int
    wrong: tuple[str, ...]

    @property
    def line(self) -> str:
        amount = f"{self.size / 2**30:.1f} GiB" if self.size >= 2**30 else f"{self.size / 2**20:.1f} MiB"
        return f"compared {self.equal} files, {amount}: equal; {self.changed} changed since the backup"


def parse(answer: object, of: str) -> Manifest:
    """What `remote/manifest.py` printed, from the host `of`.

    Raises:
        GpulabError: it is something else.
    """
    try:
        found: Any = json.loads(answer) if isinstance(answer, str) else answer
        packed = found["packed"]
        listing = json.loads(gzip.decompress(base64.b64decode(packed))) if packed else []
        entries = {
            str(path): Entry(str(kind), int(size), float(at), str(digest)) for path, kind, size, at, digest in listing
        }
        return Manifest(bool(found["mounted"]), float(found["now"]), entries)
    except (ValueError, TypeError, KeyError, OSError, EOFError) as error:
        raise GpulabError(f"{of}: its list of files cannot be understood: {error}") from None


def compare(live: Manifest, spare: Manifest, before: float) -> Outcome:
    """Every file that the guest has had unchanged since `before` (its clock) has to be in the restored VM, equal.

    What was made, changed or renamed since then says nothing about the backup.
    """
    equal = size = changed = 0
    wrong = []
    for path, entry in sorted(live.entries.items()):
        if entry.changed >= before or _moved(path, live, spare, before):
            changed += entry.counts
            continue
        if problem := _problem(entry, spare.entries.get(path)):
            wrong.append(f"{path}: {problem}")
        elif entry.counts:
            equal += 1
            size += entry.size
    return Outcome(equal, size, changed, tuple(wrong))


def _problem(entry: Entry, other: Entry | None) -> str | None:
    if other is None:
        return "missing"
    if other.kind != entry.kind:
        return f"a {other.kind}, expected a {entry.kind}"
    for each, where in ((entry, "the guest"), (other, "the restored VM")):
        if each.kind == "file" and each.digest.startswith("unreadable"):
            return f"{each.digest} in {where}"
    if other.digest != entry.digest:
        return "differs" if entry.kind == "file" else f"leads to {other.digest}, expected {entry.digest}"
    return None


def _moved(path: str, live: Manifest, spare: Manifest, before: float) -> bool:
    """Does it lie in a folder that has come to its place since? What is in a renamed folder looks unchanged."""
    if path in spare.entries:
        return False
    parents = [str(parent) for parent in PurePosixPath(path).parents if str(parent) not in spare.entries]
    found = [live.entries[parent] for parent in parents if parent in live.entries]
    return any(entry.kind == "folder" and entry.changed >= before for entry in found)


def verdict(outcome: Outcome, live: Manifest) -> GpulabError | None:
    """What is wrong with a comparison; None: the restored data is the guest's."""
    if outcome.wrong:
        more = len(outcome.wrong) - SHOWN
        lines = [*outcome.wrong[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        return GpulabError(
            f"{len(outcome.wrong)} of {len(outcome.wrong) + outcome.equal} files of the restored data are not the "
            "guest's",
            "\n".join(f"  {line}" for line in lines),
        )
    if not outcome.equal and any(entry.counts for entry in live.entries.values()):
        return GpulabError(
            "no file was compared: each one on the data disk is younger than the backup",
            f"{outcome.changed} files have changed since it was begun.",
            "--data fresh=1 takes a new backup first",
        )
    return None
