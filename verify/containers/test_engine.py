# SPDX-License-Identifier: MIT
"""Does the container engine run, can it hand the GPU to a container, and does that container keep it?"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("gpus")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
KIND = "nvidia.com/gpu"
NAMES = {"docker": "Docker", "podman": "Podman"}
#: The first versions that read the container toolkit's CDI specifications (schema 0.7.0).
LEAST = {"docker": (26, 1), "podman": (5, 1)}
RESTARTED = "docker inspect, and the journal of docker.service, on {host}"


@pytest.mark.critical
@pytest.mark.promise("containers.engine.active", "engine.kind", fix=DEPLOY)
def test_engine_runs(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    engine, name = containers["engine"], NAMES[guest.engine.kind]
    unit = "docker.service" if guest.engine.kind == "docker" else name
    assert engine["active"] == "active", f"{guest.name}: {unit} is {engine['active'] or 'absent'}"
    assert engine["version"], f"{guest.name}: {unit} is active, but the engine does not answer"
    seen(f"{name} {engine['version']}")


@pytest.mark.major
@pytest.mark.promise("containers.engine.version", "engine.kind", fix=DEPLOY)
def test_engine_is_new_enough_for_the_gpu(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    kind = guest.engine.kind
    version = answering(containers)["version"]
    numbers = tuple(int(number) for number in re.findall(r"[0-9]+", version)[:2])
    least = ".".join(map(str, LEAST[kind]))
    assert numbers >= LEAST[kind], f"{guest.name}: {NAMES[kind]} {version}, expected {least} or newer"
    seen(f"{NAMES[kind]} {version}")


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.cdi", "gpu", fix=DEPLOY)
def test_engine_knows_the_gpu_as_cdi_device(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    engine = answering(containers)
    assert engine["cdi_folders"], f"{guest.name}: CDI is off in Docker {engine['version']}"
    devices = devices_of(containers)
    assert devices, (
        f"{guest.name}: no device {KIND} in {', '.join(engine['cdi_folders'])}; "
        "nvidia-cdi-refresh writes it when driver and GPU are there"
    )
    seen(", ".join(devices))


@pytest.mark.major
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.cdi.fresh", "gpu", fix=DEPLOY)
def test_specification_fits_the_driver(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    found, loaded = containers["specifications"], containers["loaded"]
    if not found or loaded is None:
        not_run("no specification of the GPU" if loaded else "no driver is loaded")
    for device in sorted({device for each in found.values() for device in each["devices"]}):
        told = [path for path, each in found.items() if device in each["devices"]]
        assert len({found[path]["digest"] for path in told}) == 1, (
            f"{guest.name}: {' and '.join(told)} describe {KIND}={device} differently, expected one specification"
        )
    for path, each in found.items():
        assert each["versions"] in ([], [loaded]), (
            f"{guest.name}: {path} names driver {', '.join(each['versions'])}, loaded is {loaded}"
        )
        assert not each["missing"], f"{guest.name}: {path} names {each['missing'][0]}, which is not there"
    seen(f"driver {loaded} in {', '.join(found)}")


@pytest.mark.major
@pytest.mark.on("gpu_containers")
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.gpu.daemon_reload", "gpu", fix=DEPLOY)
def test_container_keeps_the_gpu_over_a_daemon_reload(
    guest: Guest, containers: Observation, daemon_reload: Observation, seen: Callable[[str], None]
) -> None:
    """The failure that Ollama hides: it goes on, on the CPU."""
    knowing_the_gpu(containers)
    keeps_the_gpu(guest, daemon_reload, "systemctl daemon-reload")
    seen(daemon_reload["after"]["output"])


@pytest.mark.major
@pytest.mark.on("docker")
@pytest.mark.promise("containers.gpu.engine_restart", "gpu", fix=DEPLOY)
def test_gpu_containers_can_outlive_the_engine(
    guest: Guest, containers: Observation, seen: Callable[[str], None]
) -> None:
    """What can be seen without a restart; containers.gpu.engine_restart.real does it."""
    engine = answering(containers)
    assert engine["live_restore"], f"{guest.name}: live-restore is off in Docker: its containers stop with it"
    hooked = [each["name"] for each in containers["data"]["containers"] if each["running"] and each["gpu"] == "hook"]
    assert not hooked, (
        f"{guest.name}: {', '.join(hooked)} was given the GPU by a hook, expected a CDI device: "
        "the engine does not know of it, and loses it"
    )
    seen("live-restore is on, and no container has the GPU by a hook")


@pytest.mark.major
@pytest.mark.disruptive
@pytest.mark.on("ollama")
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.gpu.engine_restart.real", "gpu", fix=RESTARTED)
def test_container_keeps_the_gpu_over_a_restart_of_the_engine(
    guest: Guest, containers: Observation, engine_restart: Observation, seen: Callable[[str], None]
) -> None:
    knowing_the_gpu(containers)
    keeps_the_gpu(guest, engine_restart, "systemctl restart docker")
    assert engine_restart["same"], f"{guest.name}: containers were restarted with Docker, expected the same processes"
    seen(engine_restart["after"]["output"])


def keeps_the_gpu(guest: Guest, found: Observation, disturbance: str) -> None:
    """A container of verify's own saw the GPU before and sees it after."""
    assert not found["error"], f"{guest.name}: {found['error']}"
    for when in ("before", "after"):
        said = found[when]
        assert said["status"] == 0 and "GPU " in said["output"], (
            f"{guest.name}: nvidia-smi in a container says {when} `{disturbance}`: {said['output'] or 'nothing'}"
        )


def answering(containers: Observation) -> dict[str, Any]:
    """The engine; the check is not run when it does not answer."""
    engine: dict[str, Any] = containers["engine"]
    if not engine["version"]:
        not_run("the container engine does not answer")
    return engine


def devices_of(containers: Observation) -> list[str]:
    """The GPU's devices in CDI specifications."""
    return [name for name in containers["cdi"] if name.startswith(f"{KIND}=")]


def knowing_the_gpu(containers: Observation) -> None:
    """The check is not run when the engine can hand no GPU to a container."""
    if not answering(containers)["cdi_folders"] or not devices_of(containers):
        not_run("the engine knows no GPU: see containers.cdi")
