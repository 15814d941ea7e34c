# SPDX-License-Identifier: MIT
"""What a guest says of its system and its data disk."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfra.api import StringCommand

from operations.facts import JsonFact
from operations.remote import program


class DataDisk(JsonFact):
    """The disk named `by_id`, what lies on it and what is mounted at `mount`: see `remote/disk.py`."""

    script = program(__file__, "disk")

    def command(self, by_id: str, mount: str) -> StringCommand:
        return super().command(by_id=by_id, mount=mount)


class GuestFacts(JsonFact):
    """The guest's distribution, kernel, packages, units and clock: see `remote/guest.py`."""

    script = program(__file__, "guest")

    def command(self, package_names: Sequence[str], unit_names: Sequence[str]) -> StringCommand:
        return super().command(package_names=list(package_names), unit_names=list(unit_names))


class UpgradesFacts(JsonFact):
    """Whether the guest upgrades itself: see `remote/upgrades.py`."""

    script = program(__file__, "upgrades")

    def command(self, package: str, path: str, timers: Sequence[str]) -> StringCommand:
        return super().command(package=package, path=path, timers=list(timers))
