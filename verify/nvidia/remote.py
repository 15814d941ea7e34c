# SPDX-License-Identifier: MIT
"""Runs on the guest, as root: prints the driver's and the GPU's state as JSON and changes nothing.

NVML is read through `pynvml.py`, which the control machine puts into `folder` first; the folder is removed here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def observe(arguments: dict[str, Any], root: Path = Path("/")) -> dict[str, Any]:
    """`arguments`: names of `packages`, `repositories` (URLs that apt must check), `folder` of pynvml.py."""
    proc = word(root / "proc/driver/nvidia/version")
    nvml = read_nvml(arguments["folder"])
    answers = output(["apt-cache", "policy", *arguments["packages"]])
    says = {"the kernel module": proc or "", "NVML": json.dumps(nvml)}
    return {
        "loaded": word(root / "sys/module/nvidia/version"),
        "on_disk": output(["modinfo", "-F", "version", "nvidia"]).strip() or None,
        "policy": {name: policy(answers, name) for name in arguments["packages"]},
        "sources": {url: sources(root / "etc/apt", url) for url in arguments["repositories"]},
        "xids": xids(output(["journalctl", "-b", "-o", "cat", "--no-pager", "-q", *KERNEL])),
        "nvml": nvml,
        "simulated": [name for name, text in says.items() if "simulated" in text.lower()],
    }


#: The kernel's own messages, and those that arrive under its name.
KERNEL = ("_TRANSPORT=kernel", "+", "SYSLOG_IDENTIFIER=kernel")


def xids(journal: str) -> list[int]:
    """Numbers of the Xid errors since boot, each once."""
    return sorted({int(number) for number in re.findall(r"NVRM: Xid \([^)]*\): ([0-9]+)", journal)})


def policy(text: str, name: str) -> dict[str, Any]:
    """What `apt-cache policy` says of a package: installed, candidate, and the priority of each known version."""
    found: dict[str, Any] = {"installed": None, "candidate": None, "priorities": {}}
    current = False
    for line in text.splitlines():
        if not line.startswith(" "):
            current = line.rstrip(":") == name
        if not current:
            continue
        if field := re.match(r"  (Installed|Candidate): (\S+)", line):
            found[field[1].lower()] = None if field[2] == "(none)" else field[2]
        # Versions stand at column 5, or after the mark of the installed one; their origins further right.
        if version := re.match(r" (?:\*\*\*|   ) (\S+) (-?[0-9]+)$", line):
            found["priorities"][version[1]] = int(version[2])
    return found


def sources(folder: Path, url: str) -> list[dict[str, Any]]:
    """apt's sources whose address begins with `url`: file, and how packages of it are trusted."""
    found = []
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    for path in files:
        text = word(path) if path.is_file() else None
        for signed, trusted, address in entries(path, text or ""):
            if address.startswith(url):
                found.append({"file": path.name, "signed_by": signed, "trusted": trusted})
    return found


def entries(path: Path, text: str) -> list[tuple[bool, bool, str]]:
    """Each source of a file: is it signed by a key of its own, does apt trust it unseen, its address."""
    found = []
    if path.suffix == ".sources":
        for block in re.split(r"\n\s*\n", text):
            lines = [line for line in block.splitlines() if not line.startswith("#")]
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", "\n".join(lines), re.M))
            keys = {key.lower(): value.strip() for key, value in fields.items()}
            if keys.get("enabled", "yes").lower() in ("no", "false"):
                continue
            trusted = keys.get("trusted", "no").lower() in ("yes", "true")
            found += [(bool(keys.get("signed-by")), trusted, address) for address in keys.get("uris", "").split()]
    elif path.suffix == ".list":
        for line in text.splitlines():
            source = re.match(r"\s*deb(?:\s+\[([^]]*)\])?\s+(\S+)", line)
            if source:
                options = source[1] or ""
                found.append(
                    ("signed-by=" in options, re.search(r"trusted=(yes|true)", options) is not None, source[2])
                )
    return found


def read_nvml(folder: str) -> dict[str, Any]:
    """What NVML says: `error` when it can't be used, else the driver's version and its GPUs."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, folder)
    try:
        import pynvml
    finally:
        shutil.rmtree(folder)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": str(error), "gpus": []}
    try:
        count = pynvml.nvmlDeviceGetCount()
        return {
            "error": None,
            "driver": text(pynvml.nvmlSystemGetDriverVersion()),
            "gpus": [gpu(pynvml, index) for index in range(count)],
        }
    except pynvml.NVMLError as error:
        return {"error": str(error), "gpus": []}
    finally:
        pynvml.nvmlShutdown()


def gpu(nvml: Any, index: int) -> dict[str, Any]:
    """One GPU. None for what it or its driver does not answer."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Callable[..., Any], *more: Any) -> Any:
        try:
            return question(handle, *more)
        except nvml.NVMLError:
            return None

    pci = nvml.nvmlDeviceGetPciInfo(handle)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    ecc = ask(nvml.nvmlDeviceGetEccMode)
    remapped = ask(nvml.nvmlDeviceGetRemappedRows)
    uncorrected = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    return {
        "name": text(nvml.nvmlDeviceGetName(handle)),
        # NVML gives device and vendor in one number, 0x24b010de.
        "id": f"{pci.pciDeviceId & 0xFFFF:04x}:{pci.pciDeviceId >> 16:04x}",
        "bus": text(pci.busId),
        "memory_mib": memory.total // 2**20 if memory else None,
        "link_width": ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        "link_generation": ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
        "persistence": ask(nvml.nvmlDeviceGetPersistenceMode),
        "ecc": ecc[0] if ecc else None,
        "ecc_uncorrected": ask(nvml.nvmlDeviceGetTotalEccErrors, *uncorrected) if ecc and ecc[0] else None,
        # Uncorrectable rows that were remapped, a remapping that waits for a reset, one that failed.
        "remapped": list(remapped)[1:] if remapped else None,
    }


def text(value: str | bytes) -> str:
    """NVML's strings are bytes in some versions of its module."""
    return value if isinstance(value, str) else value.decode(errors="replace")


def word(path: Path) -> str | None:
    """A file's text without white space around it; None: no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def output(command: list[str]) -> str:
    """What a command prints; empty when it is not there or fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


if __name__ == "__main__":
    json.dump(observe(json.loads(sys.argv[1])), sys.stdout)
