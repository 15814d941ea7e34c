# SPDX-License-Identifier: MIT
"""Who listens on TCP, as the kernel has it. Sent to a host in front of the script that imports it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

#: The state LISTEN in /proc/net/tcp.
LISTEN = "0A"


def listening(root: Path) -> list[dict[str, Any]]:
    """Each socket that listens: `address`, `port` and the `program` that holds it."""
    found = {}
    for name, width in (("tcp", 8), ("tcp6", 32)):
        path = root / "proc/net" / name
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            words = line.split()
            address, _, port = words[1].partition(":")
            if words[3] == LISTEN:
                inode = words[9] if len(words) > 9 else ""
                found[dotted(address[:width]), int(port, 16)] = inode
    holding = holders(root) if found else {}
    return [
        {"address": address, "port": port, "program": holding.get(inode, "")}
        for (address, port), inode in sorted(found.items())
    ]


def holders(root: Path) -> dict[str, str]:
    """The program behind each socket, by the socket's inode."""
    found = {}
    for descriptor in (root / "proc").glob("[0-9]*/fd/*"):
        try:
            link = os.readlink(descriptor)
            if link.startswith("socket:["):
                found[link[8:-1]] = (descriptor.parents[1] / "comm").read_text(errors="replace").strip()
        except OSError:
            # It was closed meanwhile, or its process has ended.
            continue
    return found


def dotted(raw: str) -> str:
    """An address of /proc/net/tcp, whose 32-bit words are in the machine's (little-endian) order."""
    octets = [raw[start : start + 8] for start in range(0, len(raw), 8)]
    data = b"".join(bytes.fromhex(part)[::-1] for part in octets)
    if len(data) == 4:
        return ".".join(str(octet) for octet in data)
    return ":".join(data[start : start + 2].hex() for start in range(0, 16, 2))
