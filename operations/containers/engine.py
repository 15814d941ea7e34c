# SPDX-License-Identifier: MIT
"""The container engine: Docker with CDI, bounded logs and the registries' own CAs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyinfra.api import StringCommand

from inventory import GpulabError
from operations import apt, files, step
from operations.containers.facts import EngineFacts
from operations.containers.spec import SERVICE
from operations.files import File, render
from operations.plan import file_diff

DAEMON = "/etc/docker/daemon.json"
UNIT = "gpulab-containers.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
PROGRAM = "/usr/local/libexec/gpulab/start-containers"
#: The unit that stops our containers when the data disk goes.
GUARD = "gpulab-data-disk.service"
GUARD_FILE = f"/etc/systemd/system/{GUARD}"
GUARD_PROGRAM = "/usr/local/libexec/gpulab/stop-containers"
UNITS = {UNIT: UNIT_FILE, GUARD: GUARD_FILE}

#: What we need of the engine; other keys of daemon.json stay as they are.
SETTINGS: Mapping[str, Any] = {
    "features": {"cdi": True},
    # Containers outlive a restart of the engine.
    "live-restore": True,
    "log-driver": "local",
    "log-opts": {"max-size": "20m", "max-file": "5"},
}


@dataclass(frozen=True)
class Actions:
    """What has to happen. `restart`: why the engine has to be restarted, empty when it has not."""

    install: tuple[str, ...] = ()
    files: Mapping[str, File | None] = field(default_factory=dict)
    reload: bool = False
    enable: tuple[str, ...] = ()
    restart: str = ""

    def any(self) -> bool:
        return bool(self.install or self.files or self.enable or self.restart)


def daemon_settings(text: str | None) -> str:
    """daemon.json with our settings put into what is there.

    Raises:
        GpulabError: the file that is there is not a JSON object.
    """
    try:
        current = json.loads(text) if text and text.strip() else {}
    except ValueError as error:
        raise GpulabError(f"{DAEMON} is not JSON: {error}", resolution="mend or remove it in the guest") from None
    if not isinstance(current, dict):
        raise GpulabError(f"{DAEMON} is not a JSON object", resolution="mend or remove it in the guest")
    for key, value in SETTINGS.items():
        # `log-opts` belong to one log driver and go with it.
        merge = key == "features" and isinstance(current.get(key), dict)
        current[key] = {**current[key], **value} if merge else value
    return json.dumps(current, indent=2, sort_keys=True) + "\n"


def mount_unit(path: str) -> str:
    """systemd's name of the unit for a mount point (systemd-escape --path)."""
    parts = [part for part in path.split("/") if part]
    escaped = "-".join(
        "".join(
            char if re.fullmatch(r"[A-Za-z0-9:_.]", char) and not (number == place == 0 and char == ".") else _hex(char)
            for place, char in enumerate(part)
        )
        for number, part in enumerate(parts)
    )
    return f"{escaped or '-'}.mount"


def _hex(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())


def decide(found: Mapping[str, Any], packages: Sequence[str], registry_ca: Mapping[str, str], data: str) -> Actions:
    """What has to happen for the engine to be as declared."""
    texts = found.get("files", {})
    disk = {"data": data, "mount_unit": mount_unit(data)}
    wanted = {
        DAEMON: File(daemon_settings(texts.get(DAEMON))),
        UNIT_FILE: File(
            render("containers/gpulab-containers.service.j2", program=PROGRAM, guard=GUARD, **disk),
        ),
        PROGRAM: File(render("containers/start-containers.sh.j2", label=SERVICE), mode=0o755),
        GUARD_FILE: File(render("containers/gpulab-data-disk.service.j2", program=GUARD_PROGRAM, **disk)),
        GUARD_PROGRAM: File(render("containers/stop-containers.sh.j2", label=SERVICE), mode=0o755),
    }
    changing: dict[str, File | None] = {
        path: file for path, file in wanted.items() if not same_settings(path, texts.get(path), file.content)
    }
    for registry, certificate in registry_ca.items():
        if found.get("registry_ca", {}).get(registry) != certificate:
            changing[f"/etc/docker/certs.d/{registry}/ca.crt"] = File(certificate)
    absent = apt.missing(found.get("packages", {}), packages)
    units = found.get("units", {})
    enable = tuple(
        unit
        for unit in ("docker.service", *UNITS)
        # What wants a unit of ours stands in its file.
        if UNITS.get(unit) in changing
        or (units.get(unit, {}).get("enabled"), units.get(unit, {}).get("active")) != ("enabled", "active")
    )
    info = found.get("info")
    restart = ""
    if not absent and info is not None:
        if DAEMON in changing:
            restart = f"{DAEMON} changes"
        elif not (info["cdi"] and info["live_restore"] and info["log_driver"] == SETTINGS["log-driver"]):
            # A run that was killed between the file and the restart.
            restart = f"it does not run with {DAEMON}"
    return Actions(tuple(absent), changing, not changing.keys().isdisjoint(UNITS.values()), enable, restart)


def same_settings(path: str, current: str | None, wanted: str) -> bool:
    """Is the file as wanted? The order and spacing of daemon.json's keys are whoever's wrote it."""
    if current is None or path != DAEMON:
        return current == wanted
    try:
        return bool(json.loads(current) == json.loads(wanted))
    except ValueError:
        return False


@step.step
def engine(packages: Sequence[str], data: str, registry_ca: Mapping[str, str] | None = None) -> step.Commands:
    """
    Ensure that Docker is installed, runs with CDI and bounded logs, and trusts the declared registries' CAs.

    Its containers of ours are started at boot by a unit of ours, since Docker 26.1 does not start those with a GPU.
    Units of ours are bound to the data disk's mount: it goes, and they are stopped; it comes back, and they start.

    + packages: the engine's packages
    + data: mount point of the data disk
    + registry_ca: `host:port` to the PEM text of the CA that signed the registry's certificate
    """
    found = step.read(
        EngineFacts,
        package_names=list(packages),
        unit_names=["docker.service", *UNITS],
        files=[DAEMON, UNIT_FILE, PROGRAM, GUARD_FILE, GUARD_PROGRAM],
    )
    actions = decide(found, packages, registry_ca or {}, data)
    if not actions.any():
        step.noop(f"Docker {found['info']['version']} runs with CDI")
        return
    if actions.install:
        step.changes(f"install {', '.join(actions.install)}")
    for path, file in actions.files.items():
        if file is not None:
            before = found.get("files", {}).get(path)
            step.changes(f"file {path}", file_diff(before, file.content))
    if actions.restart:
        kept = "; its containers go on running" if found["info"]["live_restore"] else ", and with it its containers"
        step.changes(f"restart Docker{kept}", (actions.restart,))
    for unit in actions.enable:
        step.changes(f"enable {unit}")
    # The files first: a fresh engine starts with them.
    if actions.files:
        yield files.write(actions.files)
    if actions.install:
        yield apt.install(actions.install)
    if actions.reload:
        yield StringCommand("systemctl", "daemon-reload")
    if actions.restart:
        yield StringCommand("systemctl", "restart", "docker.service")
    if actions.enable:
        # Enabled anew, one whose file changed is wanted by what it says now and by nothing else.
        yield StringCommand("systemctl", "reenable", *actions.enable)
        yield StringCommand("systemctl", "start", *actions.enable)
    if actions.install or actions.restart:
        yield step.call(check, list(packages))


def check(packages: Sequence[str]) -> None:
    """
    Raises:
        GpulabError: the engine does not answer, or does not read CDI specifications.
    """
    found = step.read(EngineFacts, package_names=list(packages))
    if found["info"] is None:
        raise GpulabError("Docker does not answer", found["error"], "`journalctl -u docker` in the guest says why")
    if not found["info"]["cdi"]:
        raise GpulabError(
            f"Docker {found['info']['version']} does not read CDI specifications",
            "Expected 26.1 or newer, with features.cdi in /etc/docker/daemon.json.",
        )
