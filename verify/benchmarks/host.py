# SPDX-License-Identifier: MIT
"""What the programs of tier 1 have in common: who computes, who else is on the card, and a report to fill in.

It goes to the guest in front of each of them, so it keeps to the standard library of Python 3.10; NVML is read through
`pynvml.py`, which lies in a folder that the control machine made.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from verify.nvidia.nvml import asker, processes, text

#: Seconds for the container engine to answer.
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
    """The keys of a report that say what computed, `cuda` or `cpu`: for `cuda` the first card, if NVML knows one."""
    if kind == "cpu":
        return {"device": "cpu", "card": None, "driver": None, "processor": processor()}
    unknown = {"device": "cuda", "card": None, "driver": None, "processor": ""}
    with first_card() as card:
        if card is None:
            return unknown
        nvml, handle = card
        pci = nvml.nvmlDeviceGetPciInfo(handle).pciDeviceId
        found = {
            "name": text(nvml.nvmlDeviceGetName(handle)),
            # Device and vendor in one number, 0x24b010de.
            "pci_id": f"{pci & 0xFFFF:04x}:{pci >> 16:04x}",
            "uuid": text(nvml.nvmlDeviceGetUUID(handle)),
        }
        return {**unknown, "card": found, "driver": text(nvml.nvmlSystemGetDriverVersion())}


def processor() -> str:
    """The processor's name, as the kernel has it."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip()[:100] if found else os.uname().machine


def others(containers: Sequence[str]) -> list[str]:
    """Processes on the card, `PID NAME`, that belong neither to those containers nor to MPS nor to this process."""
    with first_card() as card:
        if card is None:
            return []
        present = [
            each for each in processes(asker(*card)) if each["pid"] != os.getpid() and each["name"] != MPS_SERVER
        ]
    ours = [id_ for name in containers if (id_ := inspected(name, "{{.Id}}"))] if present else []
    strangers = [each for each in present if not any(name in each["cgroup"] for name in ours)]
    return sorted(f"PID {each['pid']} {each['name']}" for each in strangers)


@contextmanager
def first_card() -> Iterator[tuple[Any, Any] | None]:
    """NVML's module and its handle of the first card; None: there is no driver, or no card."""
    import pynvml

    with ExitStack() as held:
        try:
            pynvml.nvmlInit()
            held.callback(pynvml.nvmlShutdown)
            card = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError:
            card = None
        yield card


def nvml_from(folder: str) -> None:
    """Ask NVML through the `pynvml.py` in that folder."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, folder)


def inspected(name: str, what: str) -> str:
    """What a container engine tells of a container, by a template of Go's; empty: it has none of that name. Docker is
    asked, then Podman.
    """
    for engine in ("docker", "podman"):
        try:
            found = output([engine, "container", "inspect", "--format", what, name])
        except (OSError, subprocess.SubprocessError):
            continue
        if found:
            return found[0]
    return ""


def in_use(users: Sequence[str]) -> str:
    """The reason of a run that others() put an end to."""
    return f"GPU in use by {', '.join(users)}"


def entry(unit: str, samples: Sequence[float], wrong: int, better: str = "higher") -> dict[str, Any]:
    """A metric whose output was checked, as a report has it."""
    return {"unit": unit, "better": better, "samples": list(samples), "checked": True, "wrong": wrong}


def ruled(found: dict[str, Any], verdict: str, reason: str) -> None:
    found["verdict"], found["reason"] = verdict, reason


def say(words: str) -> None:
    """How far it is."""
    print(words, file=sys.stderr, flush=True)


def output(command: Sequence[str]) -> list[str]:
    """The lines that a command prints.

    Raises:
        OSError, subprocess.SubprocessError: it is not there, fails, or takes more than ANSWER_S.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
    return [line for line in done.stdout.splitlines() if line.strip()]
