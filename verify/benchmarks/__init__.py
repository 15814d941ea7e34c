# SPDX-License-Identifier: MIT
"""Benchmarks that prove the card performs, tier 0: one program for the guest's own Python."""

from __future__ import annotations

import json
from pathlib import Path

PROGRAM = Path(__file__).with_name("gpubench.py")
KERNELS = Path(__file__).with_name("kernels")
#: The line of the program that its kernels replace.
PLACE = "PTX: Mapping[str, str] | None = None\n"


def program() -> str:
    """The whole of gpubench.py with its kernels, as one text: `ssh GUEST python3 -I - --quick < TEXT`.

    For `--drain` the text must be put into a file on the guest first.
    """
    before, place, after = PROGRAM.read_text().partition(PLACE)
    if not place:
        raise RuntimeError(f"{PROGRAM} has no place for the kernels")
    # JSON of plain ASCII text is Python too.
    kernels = json.dumps({path.stem: path.read_text() for path in sorted(KERNELS.glob("*.ptx"))}, indent=4)
    return f"{before}PTX = {kernels}\n{after}"
