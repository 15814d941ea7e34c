# SPDX-License-Identifier: MIT
"""Runs on the guest: what is the same for a service of Docker and one of Podman: its folders, secrets and answers.

Secrets come over stdin. Each content has a file name of its own, so those of the container before are never touched.
"""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from operations.remote.common import CONTAINERS_LOCK, locked, run

#: Seconds between two looks at a container that is starting.
INTERVAL_S = 0.25

LABEL = "org.gpulab.service"
SECRETS = "/etc/gpulab/secrets"


class Failed(Exception):
    """What went wrong, for stderr."""


def given() -> dict[str, Any]:
    """The order, with what must not be seen in the process list."""
    return {**json.loads(sys.argv[1]), **json.load(sys.stdin)}


def do(order: dict[str, Any], **acts: Callable[[dict[str, Any]], None]) -> int:
    try:
        with locked(CONTAINERS_LOCK):
            acts[order["do"]](order)
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0


class Place:
    """What a service has outside of its container, as it was before: to be prepared, and given back."""

    def __init__(self, order: dict[str, Any]) -> None:
        """
        Raises:
            Failed: a disk is not mounted. No folder was made where it should be.
        """
        for mount in order["mounts"]:
            if not os.path.ismount(mount):
                raise Failed(f"{mount} is not mounted")
        for folder in order["folders"]:
            os.makedirs(folder, mode=0o750, exist_ok=True)
        self.owned = order["owned"]
        self.owners = {folder: ids(folder) for folder in order["owned"]}
        self.kept = f"{SECRETS}/{order['name']}"
        self.had = listed(self.kept)
        self.has = {os.path.basename(secret["source"]) for secret in order["secrets"]}
        for secret in order["secrets"]:
            put(secret)

    def hand_over(self) -> None:
        """While no container runs: the old one may write as another user."""
        for folder, owner in self.owned.items():
            hand_over(folder, *owner)

    def give_back(self) -> None:
        """To the container before."""
        for folder, former in self.owners.items():
            hand_over(folder, *former)
        forget(self.kept, self.had)

    def keep(self) -> None:
        """For the new container alone."""
        forget(self.kept, self.has)


def listed(folder: str) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def put(secret: dict[str, Any]) -> None:
    """A secret's file, there in whole or not at all; the folders are root's alone, the engine binds the file itself."""
    folder, path = os.path.dirname(secret["source"]), secret["source"]
    for each in (os.path.dirname(folder), folder):
        os.makedirs(each, mode=0o700, exist_ok=True)
    descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
    with open(descriptor, "w") as file:
        file.write(secret["content"])
        os.fchmod(descriptor, 0o400)
        os.fchown(descriptor, secret["uid"], secret["gid"])
        file.flush()
        os.fsync(descriptor)
    os.rename(f"{path}.new", path)


def forget(folder: str, wanted: set[str]) -> None:
    """Remove the secrets that no container has any more."""
    for name in listed(folder) - wanted:
        os.unlink(f"{folder}/{name}")
    if os.path.isdir(folder) and not wanted:
        os.rmdir(folder)


def ids(path: str) -> tuple[int, int]:
    """User and group of a file itself, not of what it links to."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def hand_over(folder: str, uid: int, gid: int) -> None:
    """Give a folder and all in it to a user. The folder itself comes last: it says that the rest is done."""
    if ids(folder) == (uid, gid):
        return
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(parent, name)
            if ids(path) != (uid, gid):
                os.chown(path, uid, gid, follow_symlinks=False)
    os.chown(folder, uid, gid, follow_symlinks=False)


def wait(order: dict[str, Any], engine: str, reason: Callable[[str], str]) -> None:
    """Until the container is what was asked for; `reason` says what it still lacks, and raises when it never will be.

    Raises:
        Failed: it is not by its deadline.
    """
    name, deadline = order["name"], time.monotonic() + order["deadline_s"]
    while True:
        lacks = reason(name) or silent(order["probe"])
        if not lacks and order["gpu"]:
            status, output, error = run(engine, "exec", name, "nvidia-smi", "-L", timeout=30)
            if status != 0:
                raise Failed(f"{name} does not see the GPU: {(output + error).strip()}")
        if not lacks:
            look(order)
            return
        if time.monotonic() >= deadline:
            raise Failed(f"{name} is not ready after {order['deadline_s']:.0f} s: {lacks}")
        time.sleep(INTERVAL_S)


def look(order: dict[str, Any]) -> None:
    """Have the order's own check, where it has one, look at the service that answers: its words, and its seconds.

    Raises:
        Failed: the check did.
    """
    if "check" in order:
        status, output, error = run(*order["check"]["words"], timeout=order["check"]["seconds"])
        if status != 0:
            raise Failed(f"{order['name']}: {(error or output).strip()}")


def silent(probe: str) -> str:
    """Why the service does not answer, empty when it does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        if probe:
            opener.open(probe, timeout=5).close()
    except (OSError, ValueError) as error:
        return f"{probe}: {error}"
    return ""


def last_lines(engine: str, name: str) -> str:
    _, output, error = run(engine, "logs", "--tail", "15", name)
    return f"Its last lines:\n{(output + error).rstrip()}" if (output + error).strip() else "It has logged nothing."
