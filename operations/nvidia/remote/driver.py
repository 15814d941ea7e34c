# SPDX-License-Identifier: MIT
"""Runs on the guest: the GPU and its driver, from the PCI bus up to nvidia-smi."""

import glob
import os
import platform
import re
from typing import Any

from operations.remote.common import answer, packages, run, text

#: The columns of `nvidia-smi --query-gpu`, in this order.
COLUMNS = "index,name,uuid,driver_version,persistence_mode,pci.bus_id,memory.total"


def read(package_names: list[str], blacklist: str) -> dict[str, Any]:
    """The driver's state; `family` are all installed packages that belong to it, whatever they are called."""
    kernel = platform.release()
    installed = packages(package_names)
    version = upstream(next((value for value in installed.values() if value), ""))
    related = packages(["*nvidia*", "*cuda*", "libnv*"]) if version else {}
    loaded = (text("/sys/module/nvidia/version") or "").strip() or None
    query = run("nvidia-smi", f"--query-gpu={COLUMNS}", "--format=csv,noheader,nounits", timeout=60)
    # `nvidia/580.95.05, 6.12.48+deb13-amd64, x86_64: installed`
    dkms = [line for line in run("dkms", "status")[1].splitlines() if line.startswith("nvidia")]
    built = any(f"/{version}, {kernel}, " in line and re.search(r":\s*installed", line) for line in dkms)
    headers = packages([f"linux-headers-{kernel}"])[f"linux-headers-{kernel}"] is not None
    return {
        "kernel": kernel,
        "boot_id": (text("/proc/sys/kernel/random/boot_id") or "").strip(),
        "packages": installed,
        "family": sorted(name for name, value in related.items() if value and upstream(value) == version),
        "held": sorted(run("apt-mark", "showhold")[1].split()) if version else [],
        "headers": headers,
        # A kernel that is not the distribution's own has none.
        "headers_exist": headers or bool(run("apt-cache", "show", f"linux-headers-{kernel}")[1].strip()),
        "dkms": dkms,
        "dkms_built": built,
        "make_log": "" if built else make_log(),
        "loaded": loaded,
        "on_disk": run("modinfo", "-F", "version", "nvidia")[1].strip() or None,
        "nouveau": os.path.isdir("/sys/module/nouveau"),
        "gpus": gpus(),
        "devices": sorted(glob.glob("/dev/nvidia*")),
        "users": users(),
        "smi": {"status": query[0], "output": (query[1] + query[2]).strip()},
        "simulated": "simulated" in (text("/proc/driver/nvidia/version") or "").lower(),
        "secure_boot": "enabled" in run("mokutil", "--sb-state")[1],
        "blacklist": text(blacklist),
    }


def upstream(version: str) -> str:
    """A Debian version without epoch and revision."""
    return version.rpartition(":")[2].rpartition("-")[0]


def make_log() -> str:
    """The end of the newest build log of DKMS."""
    logs = sorted(glob.glob("/var/lib/dkms/nvidia/*/build/make.log"), key=os.path.getmtime)
    return "\n".join((text(logs[-1]) or "").splitlines()[-20:]) if logs else ""


def gpus() -> list[dict[str, str]]:
    """The NVIDIA display devices on the PCI bus: address and `vendor:device`."""
    found = []
    for folder in sorted(glob.glob("/sys/bus/pci/devices/*")):
        words = {name: (text(f"{folder}/{name}") or "").strip().removeprefix("0x") for name in ("vendor", "device")}
        kind = (text(f"{folder}/class") or "").strip().removeprefix("0x")
        if words["vendor"] == "10de" and kind.startswith("03"):
            found.append({"address": os.path.basename(folder), "id": f"{words['vendor']}:{words['device']}"})
    return found


def users() -> list[str]:
    """The processes that keep the GPU open, other than the persistence daemon: `name (pid)`."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("/dev/nvidia"):
            pid = link.split("/")[2]
            name = (text(f"/proc/{pid}/comm") or "").strip()
            if name and not "nvidia-persistenced".startswith(name):
                found.add(f"{name} ({pid})")
    return sorted(found)


if __name__ == "__main__":
    answer(read)
