# SPDX-License-Identifier: MIT
"""The table of the fault matrix: one line a fault, what became of it, what the user was told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What a fault came to, found out from what happened."""

    SURVIVED = "survived"
    REFUSED = "refused"
    HEALED = "healed"
    LOST = "LOST"


MEANING = {
    Verdict.SURVIVED: "the run went on to its end",
    Verdict.REFUSED: "nothing was changed, and a message says why",
    Verdict.HEALED: "this run failed, the next one did the rest",
    Verdict.LOST: "something that must hold was broken",
}


@dataclass(frozen=True)
class Row:
    where: str
    injected: str
    verdict: Verdict
    message: str

    def cells(self) -> tuple[str, str, str, str]:
        return self.where, self.injected, self.verdict.value, self.message


def row(cells: Sequence[str]) -> Row:
    """The row that has these cells."""
    where, injected, verdict, message = cells
    return Row(where, injected, Verdict(verdict), message)


#: Of the test that runs, in the order in which the faults happened.
ROWS: list[Row] = []


def render(rows: Sequence[Row]) -> str:
    """The table as text, with a count for each verdict at its end."""
    head = ("host or call", "what was injected", "verdict", "first line of what the user saw")
    lines = [head, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [
        " | ".join([*(line[column].ljust(widths[column]) for column in range(3)), line[3]]).rstrip() for line in lines
    ]
    text.insert(1, "-+-".join(["-" * width for width in widths] + ["-" * len(head[3])]))
    counts = Counter(row.verdict for row in rows)
    ends = [f"{counts[verdict]:5} {verdict.value}: {MEANING[verdict]}" for verdict in Verdict]
    return "\n".join([*text, "", *ends, f"{len(rows):5} faults", ""])
