# SPDX-License-Identifier: MIT
"""Does the guest run the driver that is declared, and will it stay on it?"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from inventory import Guest
from inventory.packages import TOOLKIT
from verify.observations import Observation

pytestmark = pytest.mark.on("gpus")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: apt's priority of a package that nobody pinned.
UNPINNED = 500


@pytest.mark.critical
@pytest.mark.promise("nvidia.driver.loaded", fix=DEPLOY)
def test_driver_is_loaded(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    loaded = nvidia["loaded"]
    assert loaded is not None, f"{guest.name}: the kernel has no nvidia module loaded, expected R{guest.nvidia.branch}"
    seen(f"{loaded} is loaded")


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.versions", fix=DEPLOY)
def test_loaded_driver_is_the_installed_one(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    versions = {"module on disk": nvidia["on_disk"], "user space": userspace(guest, nvidia)}
    if nvidia["loaded"] is not None:
        versions["loaded module"] = nvidia["loaded"]
    told = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    assert len(set(versions.values())) == 1 and None not in versions.values(), (
        f"{guest.name}: {told}; expected one version: "
        "a driver was upgraded under a loaded module, or DKMS did not build for the running kernel"
    )
    seen(told)


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.branch", fix=DEPLOY)
def test_installed_driver_is_of_the_declared_branch(guest: Guest, nvidia: Observation) -> None:
    installed, wanted = userspace(guest, nvidia), guest.nvidia.version
    assert installed is not None, f"{guest.name}: {guest.packages.driver[0]} is not installed"
    assert installed.split(".")[0] == guest.nvidia.branch, (
        f"{guest.name}: driver {installed}, expected branch {guest.nvidia.branch}"
    )
    assert wanted is None or installed == wanted, f"{guest.name}: driver {installed}, expected {wanted}"


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.pin", fix=DEPLOY)
def test_apt_stays_on_the_branch(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    branch = guest.nvidia.branch
    for name in guest.packages.driver:
        policy = nvidia["policy"][name]
        candidate = policy["candidate"]
        assert candidate is not None, f"{guest.name}: apt knows no {name}; is the repository gone?"
        version = upstream(candidate) or ""
        assert version.split(".")[0] == branch, (
            f"{guest.name}: apt's next {name} would be {candidate}, expected branch {branch}"
        )
        assert guest.nvidia.version is None or version == guest.nvidia.version, (
            f"{guest.name}: apt's next {name} would be {candidate}, expected {guest.nvidia.version}"
        )
        priority = policy["priorities"].get(candidate, 0)
        assert priority > UNPINNED, (
            f"{guest.name}: {name} {candidate} has apt priority {priority}, expected a pin above {UNPINNED}: "
            "a newer branch in the repository would replace it"
        )
        seen(f"{candidate} at priority {priority}")


@pytest.mark.major
@pytest.mark.promise("nvidia.toolkit.version", fix=DEPLOY)
def test_container_toolkit_is_of_the_declared_version(guest: Guest, nvidia: Observation) -> None:
    wanted = guest.nvidia.toolkit_version
    wrong = [
        f"{name} {nvidia['policy'][name]['installed'] or 'absent'}"
        for name in TOOLKIT
        if nvidia["policy"][name]["installed"] != wanted
    ]
    assert not wrong, f"{guest.name}: {', '.join(wrong)}; expected {wanted}"


@pytest.mark.minor
@pytest.mark.promise("nvidia.repository.signed", fix=DEPLOY)
def test_repositories_are_checked_against_their_own_keys(guest: Guest, nvidia: Observation) -> None:
    for url, sources in nvidia["sources"].items():
        assert sources, f"{guest.name}: apt has no source below {url}"
        for source in sources:
            assert source["signed_by"] and not source["trusted"], (
                f"{guest.name}: /etc/apt/…/{source['file']} trusts {url} "
                f"{'unseen' if source['trusted'] else 'by any key of apt'}, expected signed-by"
            )


def upstream(version: str | None) -> str | None:
    """`580.95.05` of the package version `1:580.95.05-1`."""
    found = re.search(r"(?:^|:)([0-9]+(?:\.[0-9]+)+)", version or "")
    return found[1] if found else None


def userspace(guest: Guest, nvidia: Observation) -> str | None:
    """The driver version of the installed user space package."""
    return upstream(nvidia["policy"][guest.packages.driver[0]]["installed"])
