# SPDX-License-Identifier: MIT
"""What the units of ours for the card have in common: where their programs lie, how they are started."""

from __future__ import annotations

from pyinfra.api import QuoteString, StringCommand

from operations.files import File
from operations.remote import program

PROGRAMS = "/usr/local/libexec/gpulab"

# systemctl itself says no more than where to look.
_RESTART = """
since=$(date +%s.%N)
systemctl restart "$1" && exit
status=$?
journalctl --unit "$1" --since "@$since" --lines 15 --output cat --no-pager --quiet >&2
exit $status
"""


def installed(name: str) -> File:
    """A program of `remote/` as a file that a unit starts: the same text that a deploy sends."""
    return File(f"#!/usr/bin/python3 -I\n{program(__file__, name)}\n", mode=0o755)


def restart(unit: str) -> StringCommand:
    """Start it anew; its last words are shown when it does not come up."""
    return StringCommand("sh", "-c", QuoteString(_RESTART.strip()), "restart", unit)
