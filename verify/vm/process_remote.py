# SPDX-License-Identifier: MIT
"""Runs on the node, as root, with the standard library alone: a VM's process as JSON; changes nothing."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any


def observe(vmid: int, memory: bool, root: Path = Path("/")) -> dict[str, Any]:
    """`pid` of the VM's QEMU (None: there is none, though another process may have its number), its `threads` with the
    `cpus` that each may run on, and, if asked for by `memory`, `huge_mib`: size of pages in KiB to the MiB that are
    mapped by them.
    """
    pid = word(root / f"run/qemu-server/{vmid}.pid")
    process = root / f"proc/{pid}"
    words = word(process / "cmdline").split("\0") if pid.isdigit() else []
    # PVE starts each with the number of its VM.
    if ("-id", str(vmid)) not in itertools.pairwise(words):
        return {"pid": None, "threads": [], "huge_mib": {}, "simulated": []}
    return {
        "pid": int(pid),
        "threads": [thread for path in (process / "task").iterdir() if (thread := threaded(path))["cpus"]],
        "huge_mib": huge(word(process / "smaps")) if memory else {},
        "simulated": [],
    }


def threaded(path: Path) -> dict[str, str]:
    """A thread's name and the CPUs that the scheduler gives it, as `0-3,6`; empty: it has ended."""
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)$", word(path / "status"), re.MULTILINE)
    return {"name": word(path / "comm"), "cpus": allowed[1] if allowed else ""}


def huge(smaps: str) -> dict[str, int]:
    """MiB of hugetlbfs' pages by their size in KiB, out of /proc/PID/smaps."""
    found: dict[str, int] = {}
    size = ""
    for key, kib in re.findall(r"^(KernelPageSize|Shared_Hugetlb|Private_Hugetlb): +([0-9]+) kB$", smaps, re.MULTILINE):
        if key == "KernelPageSize":
            size = kib
        elif int(kib):
            found[size] = found.get(size, 0) + int(kib)
    return {size: kib // 1024 for size, kib in found.items()}


def word(path: Path) -> str:
    """A file's text without white space around it; empty: no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    json.dump(observe(**json.loads(sys.argv[1])), sys.stdout)
