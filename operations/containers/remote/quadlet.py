# SPDX-License-Identifier: MIT
"""Runs on the guest: put a service of Podman's in the place of the one of its name, and that one back when it fails."""

import json
import os
import sys
import tempfile
from typing import Any

from operations.containers.remote.service import SECRETS, Failed, Place, do, forget, given, last_lines, wait
from operations.remote.common import run, text

FOLDER = "/etc/containers/systemd"
GENERATOR = "/usr/lib/systemd/system-generators/podman-system-generator"
#: Behind the name of the file that the running container was made of, while its successor is tried.
PREVIOUS = ".previous"


def systemctl(*words: str, timeout: float = 180) -> None:
    status, output, error = run("systemctl", *words, timeout=timeout)
    if status != 0:
        raise Failed(f"systemctl {' '.join(words)}: {(error or output).strip()}")


def state(unit: str) -> dict[str, str]:
    keys = "LoadState,ActiveState,SubState,Result,NRestarts,ExecMainStatus,RequiredBy"
    return dict(line.partition("=")[::2] for line in run("systemctl", "show", "-p", keys, unit)[1].splitlines())


def check(files: dict[str, str]) -> None:
    """
    Raises:
        Failed: Podman's generator makes no unit of a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            write(f"{folder}/{name}", content)
        words = ("env", f"QUADLET_UNIT_DIRS={folder}", GENERATOR, "--dryrun")
        status, _, error = run(*words)
    if status != 0:
        raise Failed(f"Podman makes no unit of it:\n{error.strip()}")


def write(path: str, content: str) -> None:
    """There in whole or not at all, readable to root alone: environments are nobody else's business."""
    descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    os.rename(f"{path}.new", path)


def replace(order: dict[str, Any]) -> None:
    """Have Podman look at the files first: a declaration that it refuses costs nobody anything."""
    name = order["name"]
    file, unit = f"{FOLDER}/{name}.container", f"{name}.service"
    place = Place(order)
    try:
        check(order["files"])
    except Failed:
        place.give_back()
        raise
    os.makedirs(FOLDER, exist_ok=True)
    # A run that was killed left the file that worked last.
    if os.path.exists(file) and not os.path.exists(file + PREVIOUS):
        os.rename(file, file + PREVIOUS)
    followers = [each for each in state(unit).get("RequiredBy", "").split() if state(each)["ActiveState"] == "active"]
    if state(unit)["ActiveState"] not in ("inactive", "failed"):
        systemctl("stop", unit, timeout=order["stop_s"] + 60)
    for each, content in order["files"].items():
        write(f"{FOLDER}/{each}", content)
    try:
        place.hand_over()
        start(order)
    except (Failed, OSError) as failed:
        words = f"{failed}\n{last_words(name)}"
        run("systemctl", "stop", unit, timeout=order["stop_s"] + 60)
        os.unlink(file)
        place.give_back()
        raise Failed(f"{words}\n{put_back(name, followers)}".rstrip()) from None
    if os.path.exists(file + PREVIOUS):
        os.unlink(file + PREVIOUS)
    place.keep()
    if followers:
        # They are bound to it, and went down with the old one.
        systemctl("start", *followers)


def put_back(name: str, followers: list[str]) -> str:
    """Start what was stopped, if there was something; what came of it."""
    file = f"{FOLDER}/{name}.container"
    there = os.path.exists(file + PREVIOUS)
    try:
        if there:
            os.rename(file + PREVIOUS, file)
        systemctl("daemon-reload")
        run("systemctl", "reset-failed", f"{name}.service")
        if there:
            systemctl("start", f"{name}.service", *followers)
    except Failed as failed:
        return f"The previous container does not start either: {failed}"
    return "The previous container runs again." if there else ""


def start(order: dict[str, Any]) -> None:
    """Start it and wait until it is what was asked for."""
    name = order["name"]
    systemctl("daemon-reload")
    if state(f"{name}.service")["LoadState"] != "loaded":
        raise Failed(f"systemd has no {name}.service of {FOLDER}/{name}.container")
    run("systemctl", "reset-failed", f"{name}.service")
    systemctl("start", f"{name}.service", timeout=order["deadline_s"] + 60)
    wait(order, "podman", unready)


def unready(name: str) -> str:
    """Why the service is not ready yet, empty when it is. One that keeps ending never will be."""
    found = state(f"{name}.service")
    again = int(found["NRestarts"] or 0) > 2
    # Only between two starts is the status that of the one before; during a start it is 0 again.
    if found["ActiveState"] in ("failed", "inactive") or (again and found["SubState"].startswith("auto-restart")):
        raise Failed(f"{name} ended with status {found['ExecMainStatus']} ({found['Result']})")
    if again:
        return f"it was started again {found['NRestarts']} times"
    if found["ActiveState"] != "active":
        return f"it is {found['ActiveState']} ({found['SubState']})"
    status, output, error = run("podman", "container", "inspect", name)
    if status != 0:
        return f"podman inspect: {error.strip()}"
    inside = json.loads(output)[0]["State"]
    if inside["Status"] != "running":
        return f"it is {inside['Status']}"
    # Without a health check there is no word, or an empty one.
    health = (inside.get("Health") or {}).get("Status") or "healthy"
    return "" if health == "healthy" else f"its health check says {health}"


def last_words(name: str) -> str:
    """Of the container, or of systemd where there is none any more."""
    if run("podman", "container", "exists", name)[0] == 0:
        return last_lines("podman", name)
    words = ("-u", f"{name}.service", "-n", "15", "-o", "cat", "--no-pager", "-q")
    return f"Its unit's last lines:\n{run('journalctl', *words)[1].rstrip()}"


def remove(order: dict[str, Any]) -> None:
    """Take services away with their networks and secrets, and nothing of their data."""
    for name in order["names"]:
        run("systemctl", "stop", f"{name}.service", timeout=order["stop_s"] + 60)
        for end in (".container", ".container" + PREVIOUS):
            if os.path.exists(f"{FOLDER}/{name}{end}"):
                os.unlink(f"{FOLDER}/{name}{end}")
        network = f"gpulab-{name}"
        if not used(network):
            run("systemctl", "stop", f"{network}-network.service")
            # Podman refuses this while a container is connected.
            run("podman", "network", "rm", network)
            if os.path.exists(f"{FOLDER}/{network}.network"):
                os.unlink(f"{FOLDER}/{network}.network")
        if order["secrets_too"]:
            forget(f"{SECRETS}/{name}", set())
    systemctl("daemon-reload")


def used(network: str) -> bool:
    """Does another service's file name this network?"""
    names = os.listdir(FOLDER) if os.path.isdir(FOLDER) else []
    texts = [text(f"{FOLDER}/{name}") or "" for name in names if name.endswith(".container")]
    return any(f"Network={network}.network" in each.splitlines() for each in texts)


def main() -> int:
    # Of cgroups v1, with each command; it would stand between a service's last lines.
    os.environ["PODMAN_IGNORE_CGROUPSV1_WARNING"] = "1"
    return do(given(), replace=replace, start=start, remove=remove)


if __name__ == "__main__":
    sys.exit(main())
