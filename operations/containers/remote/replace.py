# SPDX-License-Identifier: MIT
"""Runs on the guest: put a container in the place of the one of its name, and put that one back when it fails.

Secrets come over stdin. Each content has a file name of its own, so those of the container before are never touched.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from operations.remote.common import CONTAINERS_LOCK, locked, run

#: Seconds between two looks at a container that is starting.
INTERVAL_S = 0.25

LABEL = "org.gpulab.service"
SECRETS = "/etc/gpulab/secrets"


class Failed(Exception):
    """What went wrong, for stderr."""


def docker(*words: str, timeout: float = 120) -> str:
    status, output, error = run("docker", *words, timeout=timeout)
    if status != 0:
        raise Failed(f"docker {words[0]}: {(error or output).strip()}")
    return output.strip()


def exists(name: str) -> bool:
    return run("docker", "container", "inspect", "--format", "{{.Id}}", name)[0] == 0


def replace(order: dict[str, Any]) -> None:
    """Create first, then stop the old one: a declaration that the engine refuses costs nobody anything."""
    name = order["name"]
    new, previous = f"{name}.new", f"{name}.previous"
    for mount in order["mounts"]:
        if not os.path.ismount(mount):
            raise Failed(f"{mount} is not mounted")
    for folder in order["folders"]:
        os.makedirs(folder, mode=0o750, exist_ok=True)
    before = {folder: ids(folder) for folder in order["owned"]}
    kept = f"{SECRETS}/{name}"
    secrets = set(os.listdir(kept)) if os.path.isdir(kept) else set()
    if exists(new):
        docker("rm", "--force", new)
    for secret in order["secrets"]:
        put(secret)
    network(order["network"], name)
    docker("create", "--pull", "never", "--name", new, *order["create"])
    if exists(name):
        if exists(previous):
            docker("rm", "--force", previous)
        docker("stop", "--time", str(order["stop_s"]), name, timeout=order["stop_s"] + 60)
        docker("rename", name, previous)
    docker("rename", new, name)
    try:
        # While neither runs: the old one may write as another user.
        for folder, owner in order["owned"].items():
            hand_over(folder, *owner)
        start(order)
    except (Failed, OSError) as failed:
        words = f"{failed}\n{last_lines(name)}"
        docker("rm", "--force", name)
        for folder, former in before.items():
            hand_over(folder, *former)
        forget(kept, secrets)
        raise Failed(f"{words}\n{put_back(name, previous)}".rstrip()) from None
    if exists(previous):
        docker("rm", "--force", previous)
    forget(kept, {os.path.basename(secret["source"]) for secret in order["secrets"]})


def network(name: str, service: str) -> None:
    """Make a network when it is missing. It stays when its first container fails: another may use it by then."""
    if name and run("docker", "network", "inspect", "--format", "{{.Id}}", name)[0] != 0:
        docker("network", "create", "--label", f"{LABEL}={service}", name)


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
    for name in set(os.listdir(folder)) - wanted if os.path.isdir(folder) else ():
        os.unlink(f"{folder}/{name}")


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


def put_back(name: str, previous: str) -> str:
    """Start the container that was stopped, if there was one; what came of it."""
    if not exists(previous):
        return ""
    try:
        docker("rename", previous, name)
        docker("start", name)
    except Failed as failed:
        return f"The previous container does not start either: {failed}"
    return "The previous container runs again."


def start(order: dict[str, Any]) -> None:
    """Start it and wait until it is what was asked for."""
    name, deadline = order["name"], time.monotonic() + order["deadline_s"]
    docker("start", name)
    while True:
        reason = unready(order)
        if not reason:
            return
        if time.monotonic() >= deadline:
            raise Failed(f"{name} is not ready after {order['deadline_s']:.0f} s: {reason}")
        time.sleep(INTERVAL_S)


def unready(order: dict[str, Any]) -> str:
    """Why the container is not ready yet, empty when it is. One that keeps ending never will be."""
    name = order["name"]
    state = json.loads(docker("inspect", "--format", "{{json .}}", name))
    health = (state["State"].get("Health") or {}).get("Status", "healthy")
    if state["RestartCount"] > 2 or state["State"]["Status"] in ("exited", "dead"):
        raise Failed(f"{name} ended with status {state['State']['ExitCode']} {state['State']['Error']}".rstrip())
    if state["State"]["Status"] != "running":
        return f"it is {state['State']['Status']}"
    if health != "healthy":
        return f"its health check says {health}"
    if order["probe"]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            opener.open(order["probe"], timeout=5).close()
        except (OSError, ValueError) as error:
            return f"{order['probe']}: {error}"
    if order["gpu"]:
        status, output, error_words = run("docker", "exec", name, "nvidia-smi", "-L", timeout=30)
        if status != 0:
            raise Failed(f"{name} does not see the GPU: {(output + error_words).strip()}")
    return ""


def last_lines(name: str) -> str:
    _, output, error = run("docker", "logs", "--tail", "15", name)
    return f"Its last lines:\n{(output + error).rstrip()}" if (output + error).strip() else "It has logged nothing."


def main() -> int:
    order = {**json.loads(sys.argv[1]), "secrets": json.load(sys.stdin)}
    try:
        # A start is a replacement that was done already.
        with locked(CONTAINERS_LOCK):
            {"replace": replace, "start": start}[order["do"]](order)
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
