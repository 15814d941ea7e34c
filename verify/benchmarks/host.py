# SPDX-License-Identifier: MIT
"""What the programs of tier 1 have in common: who computes, who else is on the card, and a report to fill in.

It goes to the guest in front of each of them, so it keeps to the standard library of Python 3.10.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Seconds for nvidia-smi or the container engine to answer.
ANSWER_S = 20
#: MPS' own process on the card.
MPS_SERVER = "nvidia-cuda-mps-server"


def report(tool: str, *, software: str = "", setting: str = "") -> dict[str, Any]:
    """A report of schema 1 in which nothing was measured yet. It has the seed of the data, too."""
    return {
        "schema": 1,
        "tool": tool,
        "began": time.time(),
        "duration_s": 0.0,
        "quick": False,
        "seed": int.from_bytes(os.urandom(4), "little"),
        "device": "cuda",
        "card": None,
        "driver": None,
        "processor": "",
        "software": software,
        "setting": setting,
        "verdict": "measured",
        "reason": "",
        "metrics": {},
        "not_run": {},
        "series": {},
        "notes": [],
    }


def device(kind: str) -> dict[str, Any]:
    """The keys of a report that say what computed, `cuda` or `cpu`. The first card, for `cuda`."""
    if kind == "cpu":
        return {"device": "cpu", "card": None, "driver": None, "processor": processor()}
    lines = smi("--query-gpu=name,pci.device_id,uuid,driver_version")
    if not lines:
        return {"device": "cuda", "card": None, "driver": None, "processor": ""}
    name, pci, uuid, driver = (word.strip() for word in lines[0].split(","))
    # 0x24B010DE: device, then vendor.
    number = int(pci, 16)
    card = {"name": name, "pci_id": f"{number & 0xFFFF:04x}:{number >> 16:04x}", "uuid": uuid}
    return {"device": "cuda", "card": card, "driver": driver, "processor": ""}


def processor() -> str:
    """The processor's name, as the kernel has it."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip()[:100] if found else os.uname().machine


def others(containers: Sequence[str]) -> list[str]:
    """Processes on the card, `PID NAME`, that belong neither to those containers nor to MPS nor to this process."""
    ours = [each for each in map(container_id, containers) if each]
    found = []
    for line in smi("--query-compute-apps=pid,process_name"):
        pid, _, name = (word.strip() for word in line.partition(","))
        base = name.rpartition("/")[2]
        if not pid.isdigit() or int(pid) == os.getpid() or base == MPS_SERVER:
            continue
        group = cgroup(int(pid))
        # A process that has ended meanwhile is on the card no more.
        if group and not any(each in group for each in ours):
            found.append(f"PID {pid} {base}")
    return sorted(found)


def cgroup(pid: int) -> str:
    """The control groups of a process; empty: it has ended."""
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


def container_id(name: str) -> str:
    """The id of a container of that name, empty where there is none. Of Docker, else of Podman."""
    for engine in ("docker", "podman"):
        try:
            found = output([engine, "container", "inspect", "--format", "{{.Id}}", name])
        except (OSError, subprocess.SubprocessError):
            continue
        if found:
            return found[0]
    return ""


def smi(question: str) -> list[str]:
    """Lines of nvidia-smi's answer; none where it or its driver is not there."""
    try:
        return output(["nvidia-smi", question, "--format=csv,noheader,nounits"])
    except (OSError, subprocess.SubprocessError):
        return []


def output(command: Sequence[str]) -> list[str]:
    """The lines that a command prints.

    Raises:
        OSError, subprocess.SubprocessError: it is not there, fails, or takes more than ANSWER_S.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
    return [line for line in done.stdout.splitlines() if line.strip()]
