# SPDX-License-Identifier: MIT
"""Runs on the guest: the data disk, whether or not anything lies on it."""

import json
import os
import stat
import struct
from typing import Any

from operations.remote.common import answer, run, text


def read(by_id: str, mount: str) -> dict[str, Any]:
    """Everything that decides what may be done with the disk `by_id`; sizes are bytes."""
    known = sorted(os.listdir(os.path.dirname(by_id))) if os.path.isdir(os.path.dirname(by_id)) else []
    found: dict[str, Any] = {"device": None, "known": known, "fstab": text("/etc/fstab") or ""}
    found["boot_id"] = (text("/proc/sys/kernel/random/boot_id") or "").strip()
    found["mounted"] = mounted(mount)
    found["mount_point"] = mount_point(mount)
    if not os.path.exists(by_id):
        return found
    device = os.path.realpath(by_id)
    status = os.stat(device)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if stat.S_ISBLK(status.st_mode) else ""
    system = f"/sys/dev/block/{number}"
    # sysfs names the partitions in folders of their own inside the disk's.
    entries = os.listdir(system) if number and os.path.isdir(system) else []
    # wipefs knows every file system, partition table, RAID, LVM and LUKS header that libblkid knows.
    exit_status, listing, words = run("wipefs", "--no-act", "--json", "--output", "TYPE,UUID,LABEL", device)
    signatures = json.loads(listing)["signatures"] if listing.strip() else []
    return found | {
        "device": device,
        "number": number,
        "size": int(text(f"{system}/size") or 0) * 512,
        "read_only": (text(f"{system}/ro") or "0").strip() == "1",
        "partitions": sorted(name for name in entries if os.path.exists(f"{system}/{name}/partition")),
        "holders": sorted(os.listdir(f"{system}/holders")) if "holders" in entries else [],
        "signatures": signatures,
        "error": words.strip() if exit_status else "",
        "filesystem_size": ext4_size(device) if [item["type"] for item in signatures] == ["ext4"] else 0,
    }


def mounted(mount: str) -> dict[str, str] | None:
    """What is mounted at `mount` itself: its device number, source and type."""
    found = None
    for line in (text("/proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == mount:
            kind, source = after.split()[:2]
            # The last one lies on top.
            found = {"number": before.split()[2], "source": source, "type": kind}
    return found


def mount_point(mount: str) -> dict[str, Any] | None:
    """The folder itself, whatever is mounted on it, None when there is none: the first of its `entries`, and whether
    it is `immutable` (None: its file system has no such flag)."""
    if not os.path.isdir(mount):
        return None
    # In a mount namespace of its own, a bind mount of the folder above shows what lies beneath.
    script = 'mount --bind "$1" /mnt && ls -A "/mnt/$2" && echo / && lsattr -d "/mnt/$2"'
    parent, name = os.path.split(mount.rstrip("/"))
    _, output, _ = run("unshare", "--mount", "sh", "-c", script, "beneath", parent, name)
    # No file name has a slash in it.
    entries, _, flags = output.partition("/\n")
    return {
        "entries": sorted(entries.splitlines())[:5],
        "immutable": "i" in flags.partition(" ")[0] if flags.strip() else None,
    }


def ext4_size(device: str) -> int:
    """The size that the file system's superblock states."""
    with open(device, "rb") as disk:
        disk.seek(1024)
        block = disk.read(1024)
    low, shift, high = (struct.unpack_from("<I", block, offset)[0] for offset in (0x04, 0x18, 0x150))
    # The upper half counts only in a 64-bit file system.
    wide = struct.unpack_from("<I", block, 0x60)[0] & 0x80
    return int((low + ((high << 32) if wide else 0)) << (10 + shift))


if __name__ == "__main__":
    answer(read)
