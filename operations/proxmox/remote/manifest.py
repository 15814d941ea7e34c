# SPDX-License-Identifier: MIT
"""Runs on the guest: every file below a mount point, with what tells whether it is the same elsewhere."""

import base64
import gzip
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from operations.remote.common import answer, text

CHUNK = 1 << 20


def read(mount: str, wait_s: float = 0) -> dict[str, Any]:
    """`mounted`, `now` (Unix seconds, before anything was looked at) and `packed`: the entries, compressed.

    An entry is path, kind (file, link, folder, other), size, last change and digest. `wait_s`: a disk that does not
    hold up the boot is mounted some seconds into it.
    """
    deadline = time.monotonic() + wait_s
    while not mounted(mount) and time.monotonic() < deadline:
        time.sleep(0.5)
    found = {"mounted": mounted(mount), "now": time.time(), "packed": ""}
    if found["mounted"]:
        listing = json.dumps(list(entries(mount)))
        found["packed"] = base64.b64encode(gzip.compress(listing.encode())).decode()
    return found


def mounted(mount: str) -> bool:
    """Is something mounted at `mount` itself?"""
    lines = (text("/proc/self/mountinfo") or "").splitlines()
    return mount in [line.split()[4] for line in lines]


def entries(mount: str) -> Iterator[tuple[str, str, int, float, str]]:
    """What lies below `mount`, on its own file system. What vanishes while it is read is left out."""
    device = os.lstat(mount).st_dev
    for folder, folders, files in os.walk(mount):
        for name in sorted([*folders, *files]):
            path = os.path.join(folder, name)
            try:
                found = entry(path, device)
            except FileNotFoundError:
                continue
            if found is not None:
                yield os.path.relpath(path, mount), *found
        folders[:] = [name for name in folders if same_device(os.path.join(folder, name), device)]


def same_device(path: str, device: int) -> bool:
    try:
        return os.lstat(path).st_dev == device
    except FileNotFoundError:
        return False


def entry(path: str, device: int) -> tuple[str, int, float, str] | None:
    """One entry without its path; None: it is of another file system."""
    status = os.lstat(path)
    kind, digest = "other", str(stat.S_IFMT(status.st_mode))
    if status.st_dev != device:
        return None
    if stat.S_ISDIR(status.st_mode):
        kind, digest = "folder", ""
    elif stat.S_ISLNK(status.st_mode):
        kind, digest = "link", os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        kind, digest = "file", content(path)
        # It may have changed while it was read.
        status = os.lstat(path)
    return kind, status.st_size, max(status.st_mtime, status.st_ctime), digest


def content(path: str) -> str:
    """SHA-256 of a file, or `unreadable: …`, which equals nothing."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        raise
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()


if __name__ == "__main__":
    answer(read)
