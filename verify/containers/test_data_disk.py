# SPDX-License-Identifier: MIT
"""Do the services stand and fall with the data disk?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Guest
from verify.containers.running import answering
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("docker")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: What lies here is made anew at each boot, such as MPS' sockets: there is nothing to lose.
VOLATILE = ("/run/",)


@pytest.mark.critical
@pytest.mark.promise(
    "containers.data_disk.required", "data_disk.mount", fix="docker stop the named containers on {host}; then " + DEPLOY
)
def test_no_container_of_ours_runs_without_the_data_disk(
    guest: Guest, containers: Observation, seen: Callable[[str], None]
) -> None:
    answering(containers)
    running = [item["name"] for item in containers["data"]["containers"] if item["running"]]
    assert containers["data"]["mounted"] or not running, (
        f"{guest.name}: {', '.join(running)} runs while nothing is mounted at {guest.data_disk.mount}, expected stopped"
    )
    seen(f"running: {', '.join(running) or 'none'}")


@pytest.mark.critical
@pytest.mark.promise("containers.data_disk.folders", "data_disk.mount", fix=DEPLOY)
def test_what_services_write_lies_on_the_data_disk(
    guest: Guest, containers: Observation, seen: Callable[[str], None]
) -> None:
    answering(containers)
    mount = guest.data_disk.mount
    if not containers["data"]["mounted"]:
        not_run(f"nothing is mounted at {mount}")
    elsewhere = [
        f"{item['name']}: {folder['source']}"
        for item in containers["data"]["containers"]
        for folder in item["folders"]
        if folder["written"] and not folder["on_data_disk"] and not folder["source"].startswith(VOLATILE)
    ]
    assert not elsewhere, (
        f"{guest.name}: not on the disk at {mount}: {', '.join(elsewhere)}; expected there, or read-only: "
        "a rebuild would lose it"
    )
    # The engine would start it at boot, disk or no disk.
    free = [
        item["name"]
        for item in containers["data"]["containers"]
        if not any(folder["on_data_disk"] for folder in item["folders"])
    ]
    assert not free, f"{guest.name}: {', '.join(free)} has no folder on the disk at {mount}, and would start without it"
    seen(", ".join(item["name"] for item in containers["data"]["containers"]) or "no container")


@pytest.mark.major
@pytest.mark.promise("containers.data_disk.bound", "data_disk.mount", fix=DEPLOY)
def test_services_are_stopped_when_the_data_disk_goes(
    guest: Guest, containers: Observation, seen: Callable[[str], None]
) -> None:
    answering(containers)
    if not containers["data"]["mounted"]:
        not_run(f"nothing is mounted at {guest.data_disk.mount}")
    bound = containers["data"]["bound"]
    assert "gpulab-data-disk.service" in bound, (
        f"{guest.name}: no active unit that stops the services is bound to the mount of {guest.data_disk.mount}; "
        f"bound: {', '.join(bound) or '(none)'}"
    )
    seen(", ".join(bound))
