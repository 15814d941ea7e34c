# SPDX-License-Identifier: MIT
"""Runs on the guest: restart Docker with new settings, and put the previous ones back when it does not start."""

import json
import os
import shutil
import sys
import time

from operations.remote.common import run

UNIT = "docker.service"


def restart() -> bool:
    """Restart the engine; does it run?"""
    # Failed starts count towards systemd's limit, and a socket that gave up with the service stays down.
    run("systemctl", "reset-failed", UNIT, "docker.socket")
    return run("systemctl", "restart", UNIT, timeout=180)[0] == 0


def last_words(since: float) -> str:
    """The engine's own reason in the journal: what it said last of a failure."""
    run("journalctl", "--sync")
    # Matched by the process' unit: what systemd says of it is no reason.
    words = ("_SYSTEMD_UNIT=docker.service", "-o", "cat", "--no-pager", "-q", f"--since=@{since:.3f}")
    lines = [line for line in run("journalctl", *words)[1].splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("unable to", "failed to")) or "level=fatal" in line]
    return (telling or lines or ["its journal says nothing"])[-1]


def previous(versions: str, path: str) -> str | None:
    """The version of the file before it was written last; `.absent`: it was not there. None: it was never written."""
    folder = versions + path
    names = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = [int(name.split("-")[1].split(".")[0]) for name in names if name.startswith("before-")]
    if not numbers:
        return None
    found = f"{folder}/before-{max(numbers)}"
    return found if os.path.exists(found) else f"{found}.absent"


def put_back(version: str, path: str) -> None:
    if version.endswith(".absent"):
        os.unlink(path)
        return
    shutil.copy2(version, path + ".gpulab-new")
    status = os.stat(version)
    os.chown(path + ".gpulab-new", status.st_uid, status.st_gid)
    os.rename(path + ".gpulab-new", path)


def main() -> int:
    order = json.loads(sys.argv[1])
    path, began = order["path"], time.time()
    if restart():
        return 0
    print(f"Docker does not start with {path}: {last_words(began)}", file=sys.stderr)
    version = previous(order["versions"], path) if order["written"] else None
    if version is None:
        return 1
    # It would be started again and again meanwhile.
    run("systemctl", "stop", UNIT, timeout=120)
    put_back(version, path)
    began = time.time()
    if restart():
        # They went down with the engine, and only a restart that succeeds brings them along.
        run("systemctl", "start", *order["followers"], timeout=180)
        print("The previous file is back, and Docker runs with it.", file=sys.stderr)
    else:
        print(f"The previous file is back, and Docker does not start with it: {last_words(began)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
