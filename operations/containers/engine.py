# SPDX-License-Identifier: MIT
"""The container engine: Docker with CDI, bounded logs and the registries' own CAs, or Podman with Quadlet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import apt, files, step
from operations.containers import podman
from operations.containers.facts import EngineFacts
from operations.containers.quadlet import mount_unit
from operations.containers.settings import DAEMON, daemon_settings, log_driver, parsed, same
from operations.containers.spec import AFTER, SERVICE
from operations.facts import python
from operations.files import File, render
from operations.plan import file_diff
from operations.remote import program

DOCKER = "docker.service"
SOCKET = "docker.socket"
UNIT = "gpulab-containers.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
PROGRAM = "/usr/local/libexec/gpulab/start-containers"
#: The unit that stops our containers when the data disk goes.
GUARD = "gpulab-data-disk.service"
GUARD_FILE = f"/etc/systemd/system/{GUARD}"
GUARD_PROGRAM = "/usr/local/libexec/gpulab/stop-containers"
UNITS = {UNIT: UNIT_FILE, GUARD: GUARD_FILE}

#: The folder in which Docker looks for registries' CAs.
CERTIFICATES = "/etc/docker/certs.d"

#: The lowest version that reads the CDI specifications of the container toolkit (schema 0.7.0).
LEAST = (26, 1)

#: The package of Docker's repository and that of the distribution: one takes the other's place.
RIVALS = {"docker-ce": "docker.io", "docker.io": "docker-ce"}

_SETTINGS = program(__file__, "settings")
_QUADLET = program(__file__, "service", "quadlet")


@dataclass(frozen=True)
class Actions:
    """What has to happen. `restart`: why the engine has to be restarted, empty when it has not."""

    install: tuple[str, ...] = ()
    #: The engine's package of the other source, which goes.
    remove: str = ""
    files: Mapping[str, File | None] = field(default_factory=dict)
    reload: bool = False
    #: Containers of ours to stop, and units to disable, for the other engine.
    stop: tuple[str, ...] = ()
    #: Services of ours in Podman, which go for Docker's.
    retire: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    enable: tuple[str, ...] = ()
    restart: str = ""

    def any(self) -> bool:
        return bool(
            self.install or self.files or self.stop or self.retire or self.disable or self.enable or self.restart
        )


def decide(
    found: Mapping[str, Any], packages: Sequence[str], registry_ca: Mapping[str, str], data: str, sharing: str = ""
) -> Actions:
    """What has to happen for Docker to be as declared.

    Raises:
        GpulabError: its settings can't be used, an engine is in the way, or it runs and does not answer.
    """
    texts = found.get("files", {})
    settings = daemon_settings(texts.get(DAEMON), sharing)
    disk = {"data": data, "mount_unit": mount_unit(data)}
    wanted: dict[str, File | None] = {
        UNIT_FILE: File(render("containers/gpulab-containers.service.j2", program=PROGRAM, guard=GUARD, **disk)),
        PROGRAM: File(render("containers/start-containers.sh.j2", label=SERVICE, after=AFTER), mode=0o755),
        GUARD_FILE: File(render("containers/gpulab-data-disk.service.j2", program=GUARD_PROGRAM, **disk)),
        GUARD_PROGRAM: File(render("containers/stop-containers.sh.j2", label=SERVICE), mode=0o755),
        **dict.fromkeys(podman.settings()),
    }
    changing = _differing(texts, wanted) | _certificates(found, registry_ca, CERTIFICATES)
    if not same(texts.get(DAEMON), settings):
        changing[DAEMON] = File(settings)
    remove = replaced(found, packages)
    install = _install(found, packages)
    units, info = found.get("units", {}), found.get("info")
    enable = tuple(
        unit
        for unit in (DOCKER, *UNITS)
        # What wants a unit of ours stands in its file.
        if UNITS.get(unit) in changing
        or (units.get(unit, {}).get("enabled"), units.get(unit, {}).get("active")) != ("enabled", "active")
    )
    fresh = packages[0] in install
    restart = "" if fresh else _restart(found, changing, settings)
    if not fresh and not restart and info is None:
        raise GpulabError("Docker runs and does not answer", found["error"], "`journalctl -u docker` in the guest")
    reload = not changing.keys().isdisjoint(UNITS.values())
    retire = tuple(sorted((found.get("podman") or {}).get("containers", {})))
    return Actions(install, remove, changing, reload, retire=retire, enable=enable, restart=restart)


def _restart(found: Mapping[str, Any], changing: Mapping[str, File | None], settings: str) -> str:
    """Why an installed Docker has to be (re)started, empty when it has not."""
    info = found.get("info")
    if DAEMON in changing:
        return f"{DAEMON} changes"
    if info is None:
        state = found["units"].get(DOCKER, {}).get("active")
        return "" if state == "active" else f"it is {state or 'absent'}"
    if not (info["cdi"] and info["live_restore"] and info["log_driver"] == log_driver(parsed(settings))):
        # A run that was killed between the file and the restart.
        return f"it does not run with {DAEMON}"
    return ""


def _install(found: Mapping[str, Any], packages: Sequence[str]) -> tuple[str, ...]:
    """The packages to install: those that are absent, all of them where the engine is too old."""
    info = found.get("info")
    if info is not None and podman.version(info["version"]) < LEAST:
        return tuple(packages)
    return tuple(apt.missing(found.get("packages", {}), packages))


def rival(packages: Sequence[str]) -> str:
    """The engine's package of the other source; empty: the declared packages hold none of Docker's."""
    return next((RIVALS[name] for name in packages if name in RIVALS), "")


def replaced(found: Mapping[str, Any], packages: Sequence[str]) -> str:
    """The installed engine of the other source, whose place the declared one takes; empty when there is none.

    Docker's own packages take the place of an older docker.io when that holds no containers but ours: it keeps
    /var/lib/docker, but all its containers stop. Never the other way: an older engine can't be counted on to read
    what a newer one has written.

    Raises:
        GpulabError: it must not be replaced.
    """
    other = rival(packages)
    version = found.get("packages", {}).get(other)
    if version is None:
        return ""
    if other == "docker-ce":
        raise GpulabError(
            f"docker-ce {version} is installed, and the distribution's own Docker is declared",
            "An older engine does not read for sure what a newer one has written below /var/lib/docker.",
            "save what its volumes hold, `apt-get purge docker-ce docker-ce-cli containerd.io` and empty "
            "/var/lib/docker in the guest, then deploy again",
        )
    if found["info"] is None:
        raise GpulabError(
            f"{other} {version} is installed and does not answer, so nobody knows whose containers it holds",
            found["error"],
            f"`systemctl start docker` in the guest, or `apt-get remove {other}`, which keeps /var/lib/docker",
        )
    if found["foreign"]:
        raise GpulabError(
            f"{other} {version} holds containers that are not gpulab's: {', '.join(sorted(found['foreign']))}",
            "It is too old to be given a GPU, and all its containers stop when Docker's own packages take its place.",
            f"`docker rm` those in the guest, or replace it by hand when it suits: `apt-get install {packages[0]}`",
        )
    return other


def _differing(texts: Mapping[str, str | None], wanted: Mapping[str, File | None]) -> dict[str, File | None]:
    return {path: file for path, file in wanted.items() if texts.get(path) != (file and file.content)}


def _certificates(found: Mapping[str, Any], registry_ca: Mapping[str, str], folder: str) -> dict[str, File | None]:
    """The registries' CAs that are not there yet."""
    wanted = {f"{folder}/{registry}/ca.crt": certificate for registry, certificate in registry_ca.items()}
    there = found.get("certificates", {})
    return {path: File(text) for path, text in wanted.items() if there.get(path) != text}


def decide_podman(found: Mapping[str, Any], packages: Sequence[str], registry_ca: Mapping[str, str]) -> Actions:
    """What has to happen for Podman to be as declared, and Docker out of its way with all its data.

    Raises:
        GpulabError: Docker can't be stopped, or the installed Podman can't be used.
    """
    changing = _differing(found.get("files", {}), podman.settings())
    changing |= _certificates(found, registry_ca, podman.CERTIFICATES)
    install = apt.missing(found.get("packages", {}), packages)
    if found and not install and podman.unfit(found) is not None:
        install = list(packages)
    stop, disable = podman.leftovers(found, (*UNITS, SOCKET, DOCKER)) if found else ([], [])
    return Actions(
        tuple(install), files=changing, reload=podman.ORDER in changing, stop=tuple(stop), disable=tuple(disable)
    )


@step.step
def engine(
    packages: Sequence[str],
    data: str,
    registry_ca: Mapping[str, str] | None = None,
    kind: Literal["docker", "podman"] = "docker",
    sharing: str = "",
) -> step.Commands:
    """
    Ensure that the container engine is installed, reads CDI specifications and trusts the declared registries' CAs.

    Docker's containers of ours are started at boot by a unit of ours, since Docker 26.1 does not start those with a
    GPU. Units of ours are bound to the data disk's mount: it goes, and they are stopped; it comes back, and they start.

    Docker that does not start with the settings written here gets its previous ones back. With Podman, Docker and our
    units are stopped and disabled; nothing of it is removed. With Docker, our services in Podman are stopped and their
    units removed; Podman stays. Their data stay in any case.

    + packages: the engine's packages, the engine itself first
    + data: mount point of the data disk
    + registry_ca: `host:port` to the PEM text of the CA that signed the registry's certificate
    + kind: `docker` or `podman`
    + sharing: how the GPU is shared; empty: there is none
    """
    ours = [UNIT_FILE, PROGRAM, GUARD_FILE, GUARD_PROGRAM, *podman.settings()]
    other = rival(packages)
    found = step.read(
        EngineFacts,
        package_names=[*packages, *([other] if other else [])],
        unit_names=[DOCKER, SOCKET, *UNITS],
        files=[DAEMON, *ours],
    )
    if kind == "podman":
        actions = decide_podman(found, packages, registry_ca or {})
    else:
        actions = decide(found, packages, registry_ca or {}, data, sharing)
    if not actions.any():
        version = found["podman"]["version"] if kind == "podman" else found["info"]["version"]
        step.noop(f"{kind.capitalize()} {version} runs with CDI")
        return
    _record(found, actions)
    yield from _apply(actions)
    if actions.install or actions.restart:
        yield step.call(check, kind, list(packages))


def _record(found: Mapping[str, Any], actions: Actions) -> None:
    """Put what has to happen into the plan."""
    for name in actions.stop:
        step.changes(f"stop container {name}")
    for name in actions.retire:
        step.changes(f"stop {name} in Podman and remove its unit; its data stay")
    for unit in actions.disable:
        step.changes(f"stop and disable {unit}")
    if actions.remove:
        version = found["packages"][actions.remove]
        step.changes(f"replace {actions.remove} {version} by {actions.install[0]}; /var/lib/docker stays")
    if actions.install:
        step.changes(f"install {', '.join(actions.install)}")
    for path, file in actions.files.items():
        before = found.get("files", {}).get(path)
        step.changes(
            f"file {path}" if file else f"remove file {path}", file_diff(before, file.content if file else None)
        )
    if actions.restart and found["info"] is None:
        step.changes("start Docker", (actions.restart,))
    elif actions.restart:
        kept = "; its containers go on running" if found["info"]["live_restore"] else ", and with it its containers"
        step.changes(f"restart Docker{kept}", (actions.restart,))
    for unit in actions.enable:
        step.changes(f"enable {unit}")


def _apply(actions: Actions) -> step.Commands:
    """The commands. The files come before the packages: a fresh engine starts with them."""
    if actions.stop:
        yield StringCommand("docker", "stop", "--time", "30", *[QuoteString(name) for name in actions.stop])
    if actions.retire:
        order = {"do": "remove", "names": list(actions.retire), "stop_s": 30, "secrets_too": False}
        yield python(_QUADLET, order, _stdin="{}")
    if actions.disable:
        yield StringCommand("systemctl", "disable", "--now", *actions.disable)
    if actions.files:
        yield files.write(actions.files)
    if actions.install:
        gone = [f"{actions.remove}-"] if actions.remove else []
        yield apt.install([*actions.install, *gone])
    if actions.reload:
        yield StringCommand("systemctl", "daemon-reload")
    if actions.restart:
        order = {"path": DAEMON, "versions": files.VERSIONS, "written": DAEMON in actions.files, "followers": [UNIT]}
        yield python(_SETTINGS, order)
    if actions.enable:
        # Enabled anew, one whose file changed is wanted by what it says now and by nothing else.
        yield StringCommand("systemctl", "reenable", *actions.enable)
        yield StringCommand("systemctl", "start", *actions.enable)


def check(kind: str, packages: Sequence[str]) -> None:
    """
    Raises:
        GpulabError: the engine does not answer, is too old, or does not read CDI specifications.
    """
    found = step.read(EngineFacts, package_names=list(packages))
    if kind == "podman":
        if error := podman.unfit(found):
            raise error
        return
    info = found["info"]
    if info is None:
        raise GpulabError("Docker does not answer", found["error"], "`journalctl -u docker` in the guest says why")
    if podman.version(info["version"]) < LEAST:
        raise GpulabError(
            f"Docker {info['version']} does not read the container toolkit's CDI specifications",
            f"Expected {'.'.join(map(str, LEAST))} or newer; it is the newest that apt has.",
            f"`apt-cache policy {packages[0]}` in the guest shows where it comes from and what holds it back",
        )
    if not info["cdi"]:
        raise GpulabError(
            f"Docker {info['version']} does not read CDI specifications",
            f"Expected features.cdi in {DAEMON}.",
            f"look for a second configuration file in the unit: `systemctl cat {DOCKER}` in the guest",
        )
