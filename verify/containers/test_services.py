# SPDX-License-Identifier: MIT
"""What is promised of every service alike: it runs as declared, with its GPU, its data and no right too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest, sharing
from verify.containers.running import existing, running
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("services")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
RECREATE = "docker rm -f {service} on {host}; then " + DEPLOY
LOOPBACK = ("127.", "0000:0000:0000:0000:0000:0000:0000:0001", "0000:0000:0000:0000:0000:ffff:7f")
#: The one program that may listen on the guest's own address, where the inventory declares `access`.
PROXY = "nginx"


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.{service}.running", "services.{service}.image", fix=DEPLOY)
def test_service_runs(guest: Guest, service: str, containers: Observation, seen: Callable[[str], None]) -> None:
    found = existing(containers, service)
    assert found["exists"], f"{guest.name}: there is no container {service}"
    assert found["running"], f"{guest.name}: container {service} is {found['status']}, expected running"
    assert found["health"] != "unhealthy", f"{guest.name}: container {service} runs and calls itself unhealthy"
    seen(", ".join(filter(None, (found["status"], found["health"]))))


@pytest.mark.critical
@pytest.mark.promise("containers.{service}.image", "services.{service}.image", fix=DEPLOY)
def test_service_is_of_the_declared_image(
    guest: Guest, service: str, containers: Observation, seen: Callable[[str], None]
) -> None:
    found = there(containers, service)
    digest = guest.services.served()[service].image.partition("@")[2]
    digests = [item.partition("@")[2] for item in found["digests"]]
    assert digest in digests, (
        f"{guest.name}: container {service} is of {', '.join(digests) or 'no digest'}, expected {digest}"
    )
    seen(digest)


@pytest.mark.critical
@pytest.mark.on("gpus")
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.{service}.gpu_visible", "gpu", fix=RECREATE)
def test_gpu_is_visible_in_the_container(
    guest: Guest, service: str, containers: Observation, seen: Callable[[str], None]
) -> None:
    found = running(containers, service)
    said = " ".join(found["nvidia_smi"].split())[:200] or "nothing"
    assert found["gpus"], f"{guest.name}: nvidia-smi in container {service} says: {said}; expected a GPU"
    seen(said)


@pytest.mark.major
@pytest.mark.promise("containers.{service}.storage", "data_disk.mount", fix=RECREATE)
def test_data_lies_on_the_data_disk(
    guest: Guest, service: str, containers: Observation, seen: Callable[[str], None]
) -> None:
    folder = there(containers, service)["storage"]
    assert folder["on_data_disk"], (
        f"{guest.name}: {service}'s data in {folder['inside']} lies "
        f"{'in ' + folder['outside'] if folder['outside'] else 'inside the container'}, "
        f"expected on the disk at {guest.data_disk.mount}: a rebuild would lose it"
    )
    seen(folder["outside"])


@pytest.mark.major
@pytest.mark.promise("containers.{service}.loopback", "services.{service}.port", fix=DEPLOY)
def test_service_is_not_open_to_the_network(
    guest: Guest,
    service: str,
    reach: Observation,
    containers: Observation,
    ports: Observation,
    seen: Callable[[str], None],
) -> None:
    found, declared = running(containers, service), guest.services.served()[service]
    wide = [where for where in found["published"] if not where.startswith("127.")]
    assert not wide, f"{guest.name}: {service} is published on {', '.join(wide)}, expected 127.0.0.1 only"
    behind_proxy = {declared.port} if guest.access else set()
    reached = [port for port in declared.ports() if port not in behind_proxy and ports[str(port)]]
    assert not reached, (
        f"{guest.name}: {guest.ssh_hostname}:{', '.join(map(str, reached))} answers from here, expected a closed port: "
        f"{service} is for the guest alone"
    )
    open_ = [each for each in found["listens"] if not each["address"].startswith(LOOPBACK)]
    foreign = [each for each in open_ if each["program"] != PROXY or each["port"] not in behind_proxy]
    assert not foreign, (
        f"{guest.name}: {', '.join(map(listener, foreign))} beside the proxy, expected 127.0.0.1 only: "
        f"{service} must not be reached without a token"
    )
    silent = [port for port in declared.ports() if port not in {each["port"] for each in found["listens"]}]
    assert not silent, f"{guest.name}: nothing listens on 127.0.0.1:{', '.join(map(str, silent))}"
    seen(", ".join(found["published"]))


def listener(each: dict[str, Any]) -> str:
    return f"{each['program'] or 'an unknown program'} listens on {each['address']}, port {each['port']}"


@pytest.mark.major
@pytest.mark.promise("containers.{service}.hardening", "services.{service}.host_memory_mib", fix=RECREATE)
def test_container_has_no_right_too_many(
    guest: Guest, service: str, containers: Observation, seen: Callable[[str], None]
) -> None:
    """As the kernel has it of the container's first process, whatever the engine was told."""
    found = running(containers, service)
    rights, limits = found["privileges"], found["limits"]
    if rights is None:
        not_run(f"container {service} has no process")
    client = sharing.client(guest) if guest.gpu else sharing.Client()
    network = f"gpulab-{service}"
    uid = int(client.user.partition(":")[0]) if client.user else rights["uid"]
    wrong = {
        "it is privileged": rights["privileged"],
        "its image's files can be written, expected a read-only root": not rights["read_only"],
        f"it may have the capabilities {rights['capabilities']:#x}, expected none": rights["capabilities"],
        "its processes may gain privileges, expected no-new-privileges": not rights["no_new_privileges"],
        "seccomp is off, expected the engine's profile": rights["unconfined"],
        f"it runs as uid {rights['uid']}, expected {uid}": rights["uid"] != uid,
        f"its IPC namespace is {rights['ipc']}, expected {client.ipc or 'own'}": rights["ipc"] != (client.ipc or "own"),
        f"its networks are {', '.join(rights['networks']) or 'none'}, expected {network} alone": (
            rights["networks"] != [network]
        ),
    }
    memory = guest.services.served()[service].host_memory_mib
    wrong[f"its main memory is limited to {limits['memory_mib'] or 'no'} MiB, expected {memory}"] = (
        memory is not None and limits["memory_mib"] != memory
    )
    told = [words for words, is_so in wrong.items() if is_so]
    assert not told, f"{guest.name}: container {service}: {'; '.join(told)}"
    memory_words, pids = limits["memory_mib"], limits["pids"]
    seen(
        f"uid {rights['uid']}, no capability, read-only root, network {network}, IPC {rights['ipc']}, "
        f"memory {f'{memory_words} MiB' if memory_words else 'unlimited'}, processes {pids or 'unlimited'}"
    )


def there(containers: Observation, service: str) -> dict[str, Any]:
    """The state of a container that exists; else the check is not run."""
    found = existing(containers, service)
    if not found["exists"]:
        not_run(f"there is no container {service}")
    return found
