# SPDX-License-Identifier: MIT
"""Runs on the guest: put a container in the place of the one of its name, and put that one back when it fails."""

import json
import sys
from typing import Any

from operations.containers.remote.service import LABEL, SECRETS, Failed, Place, do, forget, given, last_lines, wait
from operations.remote.common import run


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
    place = Place(order)
    if exists(new):
        docker("rm", "--force", new)
    try:
        network(order["network"], name)
        docker("create", "--pull", "never", "--name", new, *order["create"])
    except Failed:
        place.give_back()
        raise
    if exists(name):
        if exists(previous):
            docker("rm", "--force", previous)
        docker("stop", "--time", str(order["stop_s"]), name, timeout=order["stop_s"] + 60)
        docker("rename", name, previous)
    docker("rename", new, name)
    try:
        place.hand_over()
        start(order)
    except (Failed, OSError) as failed:
        words = f"{failed}\n{last_lines('docker', name)}"
        docker("rm", "--force", name)
        place.give_back()
        raise Failed(f"{words}\n{put_back(name, previous)}".rstrip()) from None
    if exists(previous):
        docker("rm", "--force", previous)
    place.keep()


def network(name: str, service: str) -> None:
    """Make a network when it is missing. It stays when its first container fails: another may use it by then."""
    if name and run("docker", "network", "inspect", "--format", "{{.Id}}", name)[0] != 0:
        docker("network", "create", "--label", f"{LABEL}={service}", name)


def networks(name: str) -> list[str]:
    """Those that a container is connected to; it would start without one that it was taken from."""
    return list(json.loads(docker("inspect", "--format", "{{json .}}", name))["NetworkSettings"]["Networks"] or {})


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
    docker("start", order["name"])
    wait(order, "docker", unready)


def start_again(order: dict[str, Any]) -> None:
    """Start one that was stopped. One that can't be started, or has lost its network, is made anew."""
    try:
        if order["network"] and order["network"] not in networks(order["name"]):
            raise Failed(f"{order['name']} is not connected to {order['network']}")
        docker("start", order["name"])
    except Failed as failed:
        print(f"{failed}; it is made anew", file=sys.stderr)
        replace(order)
    else:
        wait(order, "docker", unready)


def unready(name: str) -> str:
    """Why the container is not ready yet, empty when it is. One that keeps ending never will be."""
    state = json.loads(docker("inspect", "--format", "{{json .}}", name))
    health = (state["State"].get("Health") or {}).get("Status", "healthy")
    if state["RestartCount"] > 2 or state["State"]["Status"] in ("exited", "dead"):
        raise Failed(f"{name} ended with status {state['State']['ExitCode']} {state['State']['Error']}".rstrip())
    if state["State"]["Status"] != "running":
        return f"it is {state['State']['Status']}"
    # One that was unhealthy may still become healthy until the deadline.
    return "" if health == "healthy" else f"its health check says {health}"


def remove(order: dict[str, Any]) -> None:
    """Take services away with their networks and secrets, and nothing of their data."""
    for name in order["names"]:
        stop_s = str(order["stop_s"])
        for each in (name, f"{name}.new", f"{name}.previous"):
            if exists(each):
                docker("stop", "--time", stop_s, each, timeout=order["stop_s"] + 60)
                docker("rm", "--force", each)
        # Anonymous volumes and whatever else may hold data stay. A network that is still used, too.
        found = docker("network", "ls", "--quiet", "--filter", f"label={LABEL}={name}")
        for identity in found.split():
            run("docker", "network", "rm", identity)
        forget(f"{SECRETS}/{name}", set())


def main() -> int:
    return do(given(), replace=replace, start=start_again, remove=remove)


if __name__ == "__main__":
    sys.exit(main())
