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

from verify.sockets import listening

LOOPBACK = ("127.", "0000:0000:0000:0000:0000:0000:0000:0001")
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
        "listens": reachable(root),
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


def reachable(root: Path) -> list[dict[str, Any]]:
    """Everything that listens beyond the loopback addresses, by port."""
    beyond = [each for each in listening(root) if not each["address"].startswith(LOOPBACK)]
    return sorted(beyond, key=lambda each: each["port"])


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
