# SPDX-License-Identifier: MIT
"""What NVML tells of one GPU, and of who is on it. Goes to the guest in front of the programs that ask."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Question = Callable[..., Any]


def asker(nvml: Any, handle: Any) -> Question:
    """Asks about one GPU; None for what it, its driver or its module does not answer."""

    def ask(question: str, *more: Any) -> Any:
        try:
            return getattr(nvml, question)(handle, *more)
        except (nvml.NVMLError, AttributeError):
            return None

    return ask


def processes(ask: Question) -> list[dict[str, Any]]:
    """Who computes on the GPU: pid, name, user id, MiB of its memory (None: NVML does not say) and the control group,
    which holds the id of a container.
    """
    found: dict[int, dict[str, Any]] = {}
    for kind in ("Compute", "MPSCompute", "Graphics"):
        for process in ask(f"nvmlDeviceGet{kind}RunningProcesses") or []:
            here = Path(f"/proc/{process.pid}")
            uid = owner(here)
            name = os.path.basename((word(here / "cmdline") or "").partition("\0")[0])
            if uid is None or (process.pid in found and found[process.pid]["memory_mib"] is not None):
                continue
            used = getattr(process, "usedGpuMemory", None)
            found[process.pid] = {
                "pid": process.pid,
                "name": name,
                "uid": uid,
                "memory_mib": None if used is None else round(used / 2**20),
                "cgroup": (word(here / "cgroup") or "").rpartition("::")[2],
            }
    return list(found.values())


def text(value: str | bytes) -> str:
    """NVML's strings are bytes in some versions of its module."""
    return value if isinstance(value, str) else value.decode(errors="replace")


def owner(path: Path) -> int | None:
    """Who a process runs as; None: it is gone."""
    try:
        return path.stat().st_uid
    except OSError:
        return None


def word(path: Path) -> str | None:
    """A file's text without white space around it; None: no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
