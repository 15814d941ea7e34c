# SPDX-License-Identifier: MIT
"""Runs on the guest, as root, with the standard library alone: prints what is there as JSON and changes nothing."""

from __future__ import annotations

import time

# Before everything else: the clock is compared with the control machine's, and each import widens the interval.
BEGAN = time.time()

import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def observe(arguments: dict[str, Any], root: Path = Path("/")) -> dict[str, Any]:
    """`arguments`: `mount` of the data disk, names of `packages`."""
    return {
        "addresses": re.findall(r"inet ([0-9.]+/[0-9]+)", output(["ip", "-o", "-4", "address"])),
        "data": data_disk(root, arguments["mount"]),
        "packages": installed([*arguments["packages"], "unattended-upgrades"]),
        "upgrades": upgrades(output(["apt-config", "dump"])),
        "simulated": [],
    }


def data_disk(root: Path, mount: str) -> dict[str, Any]:
    """What is mounted at `mount`, and its line of fstab. None for what is not there."""
    mounts = mounted((root / "proc/self/mountinfo").read_text())
    here = mounts.get(mount)
    found: dict[str, Any] = {
        "fstab": fstab((root / "etc/fstab").read_text(), mount),
        "source": None,
        "beneath": beneath(str(root / mount.lstrip("/"))),
    }
    if here is not None:
        number, kind, source = here
        system = mounts.get("/", ("", "", ""))[0]
        found |= {
            "source": source,
            "filesystem": kind,
            "separate": disk(root, number) != disk(root, system),
            "uuid": output(["blkid", "-o", "value", "-s", "UUID", source]).strip(),
            "size_bytes": int(output(["blockdev", "--getsize64", source]).strip() or 0),
        }
    return found


def beneath(mount: str) -> dict[str, Any] | None:
    """The mount point itself, whatever is mounted there: its entries, and whether it is immutable (None: no such flag).

    None: there is no such folder, or it can't be looked at. A bind mount of the folder above, in a mount namespace of
    its own, shows what lies beneath a mount.
    """
    parent, name = os.path.split(mount.rstrip("/"))
    script = 'mount --bind "$1" /mnt && cd "/mnt/$2" && ls -A . && echo / && lsattr -d .'
    entries, shown, flags = output(["unshare", "--mount", "sh", "-c", script, "sh", parent, name]).partition("/\n")
    if not shown:
        return None
    words = flags.split()
    return {"entries": sorted(entries.splitlines())[:5], "immutable": "i" in words[0] if words else None}


def mounted(mountinfo: str) -> dict[str, tuple[str, str, str]]:
    """Mount point to (major:minor, file system, source); of several on one point the last, which is seen."""
    found = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        words, rest = left.split(), right.split()
        if len(words) > 4 and len(rest) > 1:
            found[words[4].replace("\\040", " ")] = (words[2], rest[0], rest[1])
    return found


def disk(root: Path, number: str) -> str:
    """The whole disk behind a block device `major:minor`: a partition's parent."""
    folder = root / "sys/dev/block" / number
    return folder.resolve().parent.name if (folder / "partition").exists() else number


def fstab(text: str, mount: str) -> str | None:
    """The first field of the line that mounts something at `mount`."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 3 and not words[0].startswith("#") and words[1].rstrip("/") == mount.rstrip("/"):
            return words[0]
    return None


def installed(packages: list[str]) -> dict[str, str]:
    """Version of each package that is installed."""
    query = ["dpkg-query", "-W", "-f", "${Package}\t${db:Status-Status}\t${Version}\n", *packages]
    rows = [line.split("\t") for line in output(query).splitlines()]
    return {row[0]: row[2] for row in rows if len(row) == 3 and row[1] == "installed"}


def upgrades(dump: str) -> dict[str, Any]:
    """What apt's effective configuration says of security upgrades, and the state of the timer that starts them."""
    found = dict(re.findall(r'^(\S+) "(.*)";$', dump, re.MULTILINE))
    show = ["systemctl", "show", "--property=LoadState,ActiveState", "apt-daily-upgrade.timer"]
    timer = dict(line.partition("=")[::2] for line in output(show).splitlines())
    return {
        "runs": found.get("APT::Periodic::Unattended-Upgrade", "0") not in ("", "0"),
        "reboots": found.get("Unattended-Upgrade::Automatic-Reboot", "false").lower() in ("true", "1", "yes"),
        "timer": "masked" if timer.get("LoadState") == "masked" else timer.get("ActiveState", ""),
    }


def output(command: list[str]) -> str:
    """What a command prints; empty when it is not there or fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


if __name__ == "__main__":
    found = observe(json.loads(sys.argv[1]))
    json.dump({**found, "began": BEGAN, "ended": time.time()}, sys.stdout)
