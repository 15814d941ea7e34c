# SPDX-License-Identifier: MIT
"""The lab's own known_hosts: host keys read over a trusted path, pinned, shared by deploy and verify."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path


def known_hosts(state: Path) -> Path:
    """The file of a lab."""
    return state / "known_hosts"


def label(address: str, port: int) -> str:
    """How OpenSSH writes a host in known_hosts."""
    return address if port == 22 else f"[{address}]:{port}"


def known(state: Path, address: str, port: int) -> list[str]:
    """The pinned keys (`type base64`) of a host; empty when it is unknown."""
    return [key for name, key in _entries(state) if name == label(address, port)]


def pin(state: Path, address: str, port: int, keys: Iterable[str]) -> None:
    """Replace exactly this host's entries by `keys` (each `type base64`, a comment is dropped)."""
    path = known_hosts(state)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name = label(address, port)
        entries = [entry for entry in _entries(state) if entry[0] != name]
        entries += [(name, " ".join(key.split()[:2])) for key in keys]
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(f"{host} {key}\n" for host, key in entries))
        temporary.replace(path)


def _entries(state: Path) -> list[tuple[str, str]]:
    try:
        lines = known_hosts(state).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(line.split()[0], " ".join(line.split()[1:3])) for line in lines if len(line.split()) >= 3]
