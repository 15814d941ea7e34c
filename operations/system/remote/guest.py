# SPDX-License-Identifier: MIT
"""Runs on the guest: what system it is, and the state of the packages and units asked for."""

import os
import platform
import time
from typing import Any

from operations.remote.common import answer, packages, run, text, units


def read(package_names: list[str], unit_names: list[str]) -> dict[str, Any]:
    """The guest's system; `lists_age_s`: seconds since apt last fetched its lists, None when it never did."""
    release = dict(line.partition("=")[::2] for line in (text("/etc/os-release") or "").splitlines())
    lists = "/var/lib/apt/lists"
    fetched = os.path.isdir(lists) and any(name.endswith(("_InRelease", "_Release")) for name in os.listdir(lists))
    return {
        "distribution": (release.get("ID", "") + release.get("VERSION_ID", "")).replace('"', ""),
        "release": release.get("PRETTY_NAME", "").strip('"'),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "virtualization": run("systemd-detect-virt")[1].strip(),
        "boot_id": (text("/proc/sys/kernel/random/boot_id") or "").strip(),
        "reboot_required": os.path.exists("/run/reboot-required"),
        "lists_age_s": time.time() - os.stat(lists).st_mtime if fetched else None,
        "packages": packages(package_names),
        "units": units(unit_names),
        "clock_synchronized": run("timedatectl", "show", "-p", "NTPSynchronized", "--value")[1].strip() == "yes",
    }


if __name__ == "__main__":
    answer(read)
