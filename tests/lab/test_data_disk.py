# SPDX-License-Identifier: MIT
"""The data disk goes: the services stop, nothing is written in its place, verify says so, and a deploy heals it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from inventory import GpulabError

#: A container of ours without GPU, which the engine starts by itself at its own start. The other one it does not.
PROBE = "probe"
#: What verify says while the disk is away: the proxy lets tenants in to nobody, and no job has a place to lie.
AWAY = {
    "system.data_disk",
    *(f"containers.{service}.{name}" for service in ("milvus", "ollama") for name in ("running", "storage")),
    *("containers.ollama.token.accepted", "containers.pytorch.job"),
}
#: And while nobody looks after the services.
UNHEALED = AWAY | {"containers.healing"}


def running(deployed: Any) -> list[str]:
    """Our containers that run."""
    listing = deployed.on("gpu01", "docker", "ps", "--format", "{{.Names}}", "--filter", "label=org.gpulab.service")
    return sorted(str(listing).split())


def eventually(deployed: Any, expected: list[str]) -> None:
    deadline = time.monotonic() + 60
    while (seen := running(deployed)) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    assert seen == expected


def models(deployed: Any) -> list[tuple[str, str]]:
    """Ollama's models with their digests."""
    # One that has just been started may not answer yet.
    words = ["curl", "-s", "--retry", "30", "--retry-delay", "1", "--retry-all-errors"]
    answer = json.loads(deployed.on("gpu01", *words, "http://127.0.0.1:11434/api/tags"))
    return [(model["name"], model["digest"]) for model in answer["models"]]


def failed(deployed: Any) -> set[str]:
    found: set[str] = deployed.verify("--limit", "gpu01")[1]
    return {each.removesuffix("[gpu01]") for each in found}


def nothing_lies_in_its_place(deployed: Any) -> None:
    """The folder is empty, and root cannot make anything in it."""
    script = "ls -A /srv/data; mkdir /srv/data/ollama 2>/dev/null && echo made; mountpoint -q /srv/data && echo mounted"
    assert deployed.on("gpu01", "sh", "-c", f"{script}; true") == ""


def qm(deployed: Any, verb: str, *words: str) -> str:
    return str(deployed.on("pve1", "qm", verb, "101", *words))


def start(deployed: Any) -> None:
    """Power on, and wait until the guest has booted and its engine has tried whatever it would."""
    qm(deployed, "start")
    # In the first moments of a boot there is no init to ask, and it says `offline`.
    wait = "systemctl is-system-running --wait | grep -E 'running|degraded' && docker ps"
    deadline = time.monotonic() + 120
    while True:
        try:
            deployed.on("gpu01", "sh", "-c", wait)
            return
        except (AssertionError, GpulabError):
            assert time.monotonic() < deadline
            time.sleep(0.5)


@pytest.fixture
def probe(deployed: Any) -> Iterator[str]:
    """Runs beside Ollama, of the same image."""
    image = deployed.on("gpu01", "docker", "inspect", "ollama", "--format", "{{.Image}}").strip()
    deployed.on("gpu01", "mkdir", "-p", "/srv/data/probe")
    words = ["--name", PROBE, "--label", f"org.gpulab.service={PROBE}", "--restart=unless-stopped"]
    # Ollama's program alone would not heed the usual one as a container's first process.
    words += ["--mount=type=bind,source=/srv/data/probe,target=/data", "--stop-signal=SIGKILL"]
    deployed.on("gpu01", "docker", "run", "--detach", *words, image)
    yield PROBE
    deployed.on("gpu01", "docker", "rm", "--force", PROBE)


@pytest.fixture
def unhealed(deployed: Any) -> Iterator[None]:
    """Nobody looks after the services: with the unit of a look systemd mounts the disk, as with any unit."""
    ended = "until [ $(systemctl show --property=ActiveState --value gpulab-heal.service) != activating ]"
    deployed.on("gpu01", "sh", "-c", f"systemctl stop gpulab-heal.timer; {ended}; do sleep 0.2; done")
    yield
    deployed.on("gpu01", "systemctl", "start", "gpulab-heal.timer")


@pytest.mark.usefixtures("unhealed")
def test_services_stop_when_the_disk_is_unmounted_and_start_when_it_is_back(deployed: Any, probe: str) -> None:
    kept = models(deployed)
    assert kept
    deployed.on("gpu01", "umount", "--lazy", "/srv/data")
    eventually(deployed, [])
    nothing_lies_in_its_place(deployed)
    assert failed(deployed) == UNHEALED

    # No hand brings one back. (Starting any unit would: systemd mounts what local-fs.target wants, and the disk is
    # there.)
    deployed.on("gpu01", "sh", "-c", f"docker start {probe} 2>&1 | grep 'bind source path does not exist'")
    assert running(deployed) == []

    deployed.on("gpu01", "systemctl", "start", "srv-data.mount")
    eventually(deployed, ["milvus", "ollama", probe])
    assert models(deployed) == kept


@pytest.mark.usefixtures("unhealed")
def test_deploy_heals_an_unmounted_disk(deployed: Any) -> None:
    kept = models(deployed)
    deployed.on("gpu01", "systemctl", "stop", "srv-data.mount")
    eventually(deployed, [])

    done = deployed.deploy()
    assert done.status == 0, done.output[-3000:]
    assert failed(deployed) == set()
    assert models(deployed) == kept
    assert deployed.deploy().status == 0
    assert deployed.changed() == []


def test_disk_that_is_missing_at_boot_keeps_the_services_down(deployed: Any, probe: str) -> None:
    """The power fails and the VM loses its disk: the engine would start anew whatever ran then."""
    kept = models(deployed)
    entry = next(line for line in qm(deployed, "config").splitlines() if line.startswith("scsi1: "))
    volume, _, options = entry.removeprefix("scsi1: ").partition(",")
    words = ",".join(word for word in options.split(",") if not word.startswith("size="))
    qm(deployed, "stop")
    qm(deployed, "set", "--protection", "0")
    qm(deployed, "set", "--delete", "scsi1")
    assert "scsi1:" not in qm(deployed, "config")
    try:
        start(deployed)
        assert running(deployed) == []
        nothing_lies_in_its_place(deployed)
        assert failed(deployed) == AWAY | {"vm.disks", "vm.protection"}

        done = deployed.deploy("--limit", "gpu01")
        assert done.status == 1
        assert "no such disk in the guest" in done.output
        assert running(deployed) == []
    finally:
        qm(deployed, "stop")
        qm(deployed, "set", "--scsi1", f"{volume},{words}")

    done = deployed.deploy()
    assert done.status == 0, done.output[-3000:]
    assert failed(deployed) == set()
    assert models(deployed) == kept
    assert probe in running(deployed)


@pytest.mark.usefixtures("unhealed")
def test_container_that_was_started_without_the_disk_is_named(deployed: Any) -> None:
    """By somebody who made room for it, on purpose."""
    image = deployed.on("gpu01", "docker", "inspect", "ollama", "--format", "{{.Image}}").strip()
    deployed.on("gpu01", "systemctl", "stop", "srv-data.mount")
    eventually(deployed, [])
    deployed.on("gpu01", "chattr", "-i", "/srv/data")
    deployed.on("gpu01", "mkdir", "/srv/data/x")
    words = ["--name", PROBE, "--label", f"org.gpulab.service={PROBE}", "--volume=/srv/data/x:/data"]
    deployed.on("gpu01", "docker", "run", "--detach", *words, image)
    try:
        assert failed(deployed) == UNHEALED | {"system.data_disk.beneath", "containers.data_disk.required"}
        done = deployed.deploy("--limit", "gpu01")
        assert done.status == 1
        assert "/srv/data is not empty, and mounting the data disk would hide what is in it" in done.output
    finally:
        deployed.on("gpu01", "docker", "rm", "--force", PROBE)
        deployed.on("gpu01", "rmdir", "/srv/data/x")

    assert deployed.deploy().status == 0
    assert failed(deployed) == set()
