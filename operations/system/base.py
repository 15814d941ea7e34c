# SPDX-License-Identifier: MIT
"""Base packages and the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyinfra.api import StringCommand

from inventory import GpulabError
from operations import apt, step
from operations.system.facts import GuestFacts

TIME_SYNC = "systemd-timesyncd.service"


def clock_is_kept(unit: Mapping[str, Any]) -> bool:
    """Is the time service enabled, and running where systemd lets it? In a container its own condition skips it."""
    return unit.get("enabled") == "enabled" and (unit.get("active") == "active" or bool(unit.get("skipped")))


@step.step
def base(distribution: str, packages: Sequence[str]) -> step.Commands:
    """
    Ensure that the base packages are installed and the clock is synchronized.

    + distribution: `ID` and `VERSION_ID` of the os-release that the packages are meant for: `debian13`
    + packages: package names; `systemd-timesyncd` among them keeps the clock
    """
    found = step.read(GuestFacts, package_names=list(packages), unit_names=[TIME_SYNC])
    if found and found["distribution"] != distribution:
        raise GpulabError(
            f"The guest runs {found['release'] or 'an unknown system'}",
            f"Expected {distribution}, seen {found['distribution'] or 'no os-release'}.",
            "image and distribution of the inventory belong together",
        )
    absent = apt.missing(found.get("packages", {}), packages)
    kept = clock_is_kept(found.get("units", {}).get(TIME_SYNC, {}))
    if not absent and kept:
        step.noop(f"{len(packages)} base packages are installed and {TIME_SYNC} is enabled")
        return
    if absent:
        step.changes(f"install {', '.join(absent)}")
    if not kept:
        step.changes(f"enable {TIME_SYNC}")
    if absent:
        yield apt.install(absent)
    if not kept:
        yield StringCommand("systemctl", "enable", "--now", TIME_SYNC)
