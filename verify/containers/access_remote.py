# SPDX-License-Identifier: MIT
"""Runs on the guest, as root, with the standard library alone: prints what of the proxy can be seen there, as JSON."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

#: The state LISTEN in /proc/net/tcp.
LISTEN = "0A"
#: How much of the log's end is looked at.
TAIL_BYTES = 256 * 1024


def observe(arguments: dict[str, Any], root: Path = Path("/")) -> dict[str, Any]:
    """`folder`: where the proxy's secrets lie; `log`: its access log; `requests`: ids of lines that are wanted."""
    folder = root / arguments["folder"].lstrip("/")
    return {
        "active": output(["systemctl", "is-active", "nginx.service"]).strip(),
        "enabled": output(["systemctl", "is-enabled", "nginx.service"]).strip(),
        "refused": refused(),
        "files": {str(path): described(path) for path in [folder, *sorted(folder.glob("*"))] if path.exists()},
        "log": log(root / arguments["log"].lstrip("/"), set(arguments["requests"])),
        "listens": listening(root),
    }


def refused() -> str:
    """Why nginx would not start with the files as they are; empty: it would."""
    done = run(["nginx", "-t", "-q"])
    # The last line only says that it failed.
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["nginx -t failed"])[0]


def described(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid, "folder": path.is_dir()}


def log(path: Path, requests: set[str]) -> dict[str, Any]:
    """The lines of some requests, and how many of the last lines are no JSON. `mode` is None without a log."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {"mode": None, "lines": [], "broken": 0}
    # The first of a tail may be half a line.
    lines = lines[1:] if size > TAIL_BYTES else lines
    found, broken = [], 0
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if entry.get("request") in requests:
            found.append(entry)
    return {"mode": mode, "lines": found, "broken": broken}


def listening(root: Path) -> list[dict[str, Any]]:
    """Everything that listens on TCP beyond the loopback addresses: `address`, `port`, `program`."""
    inodes = {}
    for name, width in (("tcp", 8), ("tcp6", 32)):
        path = root / "proc/net" / name
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            words = line.split()
            address, _, port = words[1].partition(":")
            where = dotted(address[:width])
            if words[3] == LISTEN and not where.startswith(("127.", "0000:0000:0000:0000:0000:0000:0000:0001")):
                inodes[words[9]] = (where, int(port, 16))
    programs = owners(root, set(inodes))
    return [
        {"address": address, "port": port, "program": programs.get(inode, "")}
        for inode, (address, port) in sorted(inodes.items(), key=lambda item: item[1][1])
    ]


def owners(root: Path, inodes: set[str]) -> dict[str, str]:
    """Which program has each of these sockets."""
    found = {}
    for folder in (root / "proc").glob("[0-9]*"):
        for link in sorted(folder.glob("fd/*")):
            try:
                # A descriptor may be closed by now.
                target = os.readlink(link)
                if target.startswith("socket:[") and target[8:-1] in inodes:
                    found[target[8:-1]] = (folder / "comm").read_text().strip()
            except OSError:
                continue
    return found


def dotted(raw: str) -> str:
    """An address of /proc/net/tcp, whose 32-bit words are in the machine's (little-endian) order."""
    octets = [raw[start : start + 8] for start in range(0, len(raw), 8)]
    data = b"".join(bytes.fromhex(part)[::-1] for part in octets)
    if len(data) == 4:
        return ".".join(str(octet) for octet in data)
    return ":".join(data[start : start + 2].hex() for start in range(0, 16, 2))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def output(command: list[str]) -> str:
    return run(command).stdout


if __name__ == "__main__":
    json.dump(observe(json.loads(sys.argv[1])), sys.stdout)
