# SPDX-License-Identifier: MIT
"""The persistence daemon: without it, limits and modes are lost when the last client leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinfra.api import StringCommand

from inventory import GpulabError
from operations import step
from operations.nvidia.facts import PersistenceFacts

UNIT = "nvidia-persistenced.service"


def as_declared(found: Mapping[str, Any], enabled: bool) -> bool:
    """Is the daemon enabled (or static) and running, or neither? A driver that keeps its state says so itself."""
    unit = found.get("unit", {})
    if not enabled:
        return unit.get("enabled") != "enabled" and unit.get("active") != "active"
    started = unit.get("enabled") in ("enabled", "static", "alias", "indirect") and unit.get("active") == "active"
    return started and "Disabled" not in found["mode"]


@step.step
def persistence(enabled: bool) -> step.Commands:
    """
    Ensure that nvidia-persistenced runs now and after each boot, or does not.

    + enabled: should it?
    """
    found = step.read(PersistenceFacts, unit=UNIT)
    if as_declared(found, enabled):
        step.noop(f"{UNIT} is {'enabled and running' if enabled else 'off'}")
        return
    step.changes(f"{'enable' if enabled else 'disable'} {UNIT}")
    yield StringCommand("systemctl", "enable" if enabled else "disable", "--now", UNIT)
    if enabled:
        # A daemon that was already running without persistence mode takes it from this.
        yield StringCommand("nvidia-smi", "-pm", "1")
        yield step.call(check, enabled)


def check(enabled: bool) -> None:
    """
    Raises:
        GpulabError: the daemon does not run, or the driver says that persistence mode is off.
    """
    found = step.read(PersistenceFacts, unit=UNIT)
    if not as_declared(found, enabled):
        mode = ", ".join(found["mode"]) or "unknown"
        raise GpulabError(
            f"{UNIT} is {found['unit']['active'] or 'absent'}, persistence mode: {mode}",
            resolution=f"`journalctl -u {UNIT}` in the guest",
        )
