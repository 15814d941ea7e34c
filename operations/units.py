# SPDX-License-Identifier: MIT
"""systemd units of ours: is one as it should be, and how it goes when nobody declares it any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinfra.api import StringCommand

from operations import files, step
from operations.files import File


def as_wanted(unit: Mapping[str, Any]) -> bool:
    """Is it enabled, and has it come up?"""
    return (unit.get("enabled"), unit.get("active")) == ("enabled", "active")


def present(unit: Mapping[str, Any]) -> bool:
    """Does it run, or would it at the next boot?"""
    return unit.get("active") == "active" or unit.get("enabled") == "enabled"


def withdraw(
    name: str, unit: Mapping[str, Any], found: Mapping[str, Any], leftover: Mapping[str, File | None]
) -> step.Commands:
    """Disable a unit that is present, and remove the files of it that are there.

    + unit, found: what facts say of the unit and of its files
    + leftover: the files to be removed
    """
    if present(unit):
        step.changes(f"disable {name}")
    files.record(found, leftover)
    if present(unit):
        yield StringCommand("systemctl", "disable", "--now", name)
    if leftover:
        yield files.write(leftover)
        yield StringCommand("systemctl", "daemon-reload")
