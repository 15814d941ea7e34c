# SPDX-License-Identifier: MIT
"""Podman with Quadlet: no daemon; containers are systemd units that Podman's generator makes of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inventory import GpulabError
from operations.files import File, render

#: The folder in which Podman looks for registries' CAs.
CERTIFICATES = "/etc/containers/certs.d"
SETTINGS = "/etc/containers/containers.conf.d/gpulab.conf"
#: What Quadlet adds to every unit that it makes of a `.container` file.
ORDER = "/etc/containers/systemd/container.d/gpulab.conf"

#: The lowest version that reads the CDI specifications of the container toolkit (schema 0.7.0).
LEAST = (5, 1)


def settings() -> dict[str, File | None]:
    """Our files, by path."""
    return {
        SETTINGS: File(render("containers/gpulab-podman.conf.j2")),
        ORDER: File(render("containers/gpulab-quadlet.conf.j2")),
    }


def leftovers(found: Mapping[str, Any], units: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is left of Docker when Podman takes its place: containers of ours to stop, units to disable.

    + found: an `EngineFacts` fact
    + units: Docker's units and those of ours that go with them

    Raises:
        GpulabError: containers of somebody else run in Docker, or it does not say which do.
    """
    on = [
        unit
        for unit in units
        if (state := found.get("units", {}).get(unit))
        and (state["enabled"] == "enabled" or state["active"] in ("active", "activating"))
    ]
    if not on:
        return [], []
    if found["info"] is None:
        # Its socket starts it when it is asked, so one that is merely stopped has answered.
        raise GpulabError(
            "Docker does not answer, and Podman is to take its place",
            f"{found['error']}\nWith live-restore its containers go on without it, and nothing would manage them.",
            "`systemctl start docker` in the guest; or, if it has none, `systemctl disable --now docker.socket docker`",
        )
    foreign = [name for name, runs in sorted(found["foreign"].items()) if runs]
    if foreign:
        raise GpulabError(
            f"Containers that are not gpulab's run in Docker: {', '.join(foreign)}",
            "Podman is to take Docker's place, and with live-restore they would go on without an engine.",
            f"`docker stop {' '.join(foreign)}` in the guest; their data stays",
        )
    ours = [name for name, container in sorted(found["containers"].items()) if container["status"] == "running"]
    return ours, on


def unfit(found: Mapping[str, Any]) -> GpulabError | None:
    """Why the installed Podman can't be used, None when it can."""
    podman = found["podman"]
    if podman is None or podman["version"] is None:
        said = podman["error"] if podman else "it is not installed"
        return GpulabError("Podman does not answer", said, "`podman info` in the guest says it in full")
    if version(podman["version"]) < LEAST:
        return GpulabError(
            f"Podman {podman['version']} does not read the toolkit's CDI specifications",
            f"Expected {'.'.join(map(str, LEAST))} or newer.",
            "`apt-cache policy podman` in the guest shows what apt would take",
        )
    if not podman["quadlet"]:
        return GpulabError(
            f"Podman {podman['version']} has no Quadlet",
            "Expected /usr/lib/systemd/system-generators/podman-system-generator.",
            "apt-get install --reinstall podman",
        )
    return None


def version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version: `26.1.5+dfsg1` is 26.1."""
    numbers = text.replace("+", ".").replace("-", ".").split(".")[:2]
    return tuple(int(number) if number.isdigit() else 0 for number in numbers)
