# SPDX-License-Identifier: MIT
"""Security upgrades that the guest installs by itself, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyinfra.api import StringCommand

from operations import apt, files, step
from operations.files import File, render
from operations.plan import file_diff
from operations.system.facts import UpgradesFacts

PACKAGE = "unattended-upgrades"
#: Behind the distribution's 20auto-upgrades and 50unattended-upgrades, which stay as they are.
FILE = "/etc/apt/apt.conf.d/52gpulab-upgrades"
TIMERS = ("apt-daily.timer", "apt-daily-upgrade.timer")


@dataclass(frozen=True)
class Actions:
    """What has to happen. `file`: its new text, None when it is right."""

    install: bool = False
    file: str | None = None
    enable: tuple[str, ...] = ()

    def any(self) -> bool:
        return self.install or self.file is not None or bool(self.enable)


def decide(found: Mapping[str, Any], enabled: bool) -> Actions:
    """What has to happen for the guest to upgrade itself, or not to."""
    wanted = render("system/52gpulab-upgrades.j2", enabled=enabled)
    file = None if found.get("file") == wanted else wanted
    if not enabled:
        # Without the package there is nothing to switch off.
        there = found.get("package") is not None or found.get("file") is not None
        return Actions(file=file if there else None)
    timers = found.get("timers", {})
    return Actions(
        install=found.get("package") is None,
        file=file,
        # A masked timer was masked by somebody.
        enable=tuple(name for name in TIMERS if timers.get(name, {}).get("enabled") == "disabled"),
    )


def masked(found: Mapping[str, Any]) -> str:
    """A remark on timers that somebody masked."""
    names = [name for name in TIMERS if found.get("timers", {}).get(name, {}).get("load") == "masked"]
    return f"; but {', '.join(names)} masked: nothing starts them" if names else ""


@step.step
def upgrades(enabled: bool) -> step.Commands:
    """
    Ensure that the guest installs security upgrades by itself, and nothing else, or that it installs none.

    **Reboot**: never; a new kernel waits for the deploy that has checked it.

    + enabled: should it?
    """
    found = step.read(UpgradesFacts, package=PACKAGE, path=FILE, timers=list(TIMERS))
    actions = decide(found, enabled)
    if not actions.any():
        step.noop(f"security upgrades install themselves{masked(found)}" if enabled else "nothing installs itself")
        return
    if actions.file is not None:
        step.changes(f"file {FILE}", file_diff(found.get("file"), actions.file))
    if actions.install:
        step.changes(f"install {PACKAGE}")
    if actions.enable:
        step.changes(f"enable {', '.join(actions.enable)}")
    # The file first: the package starts with it.
    if actions.file is not None:
        yield files.write({FILE: File(actions.file)})
    if actions.install:
        yield apt.install([PACKAGE])
    if actions.enable:
        yield StringCommand("systemctl", "enable", "--now", *actions.enable)
