# SPDX-License-Identifier: MIT
"""The thermal policy: a daemon of ours that lowers the power limit of a card that gets too hot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyinfra.api import StringCommand

from inventory import GpulabError
from operations import files, step
from operations.files import File, render
from operations.nvidia.facts import ThermalFacts
from operations.nvidia.remote.thermal import POLICY
from operations.nvidia.units import PROGRAMS, installed, restart
from operations.units import as_wanted, present, withdraw

UNIT = "gpulab-gpu-thermal.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
PROGRAM = f"{PROGRAMS}/gpu-thermal"
FILES = (POLICY, UNIT_FILE, PROGRAM)


def read() -> dict[str, Any]:
    """The daemon's state; empty for a guest that does not exist yet."""
    found: dict[str, Any] = step.read(ThermalFacts, paths=list(FILES), unit=UNIT)
    return found


def wanted_files(policy: Mapping[str, Any] | None) -> dict[str, File | None]:
    if policy is None:
        return dict.fromkeys(FILES)
    return {
        PROGRAM: installed("thermal"),
        UNIT_FILE: File(render("nvidia/gpulab-gpu-thermal.service.j2", program=PROGRAM)),
        POLICY: File(json.dumps(dict(policy), indent=2) + "\n"),
    }


@step.step
def thermal(policy: Mapping[str, Any] | None) -> step.Commands:
    """
    Ensure that the thermal policy is watched by its daemon, or that nobody watches.

    The daemon logs a line for each thing it does. It works on top of `settings`: what it lowers goes back to the
    declared limit.

    + policy: `warning_c`, `critical_c`, `action` (`lower-power` or `log`), `step_w`, `hysteresis_c` and `interval_s`;
      None: the card alone looks after itself
    """
    found = read()
    changing = files.differing(found.get("files", {}), wanted_files(policy))
    unit = found.get("unit", {})
    if policy is None:
        if not changing and not present(unit):
            step.noop("no thermal policy is declared, and none is watched")
            return
        # The daemon gives the card its declared limit back when it ends.
        yield from withdraw(UNIT, unit, found.get("files", {}), changing)
        return
    if not changing and as_wanted(unit):
        step.noop(f"{UNIT} watches from {policy['warning_c']} °C")
        return
    for path, file in changing.items():
        if path == PROGRAM:
            step.changes(f"file {path}")
        else:
            files.record(found.get("files", {}), {path: file})
    step.changes(f"start {UNIT}")
    if changing:
        yield files.write(changing)
    if UNIT_FILE in changing:
        yield StringCommand("systemctl", "daemon-reload")
    yield StringCommand("systemctl", "enable", UNIT)
    yield restart(UNIT)
    yield step.call(check)


def check() -> None:
    """
    Raises:
        GpulabError: the daemon does not run.
    """
    unit = read()["unit"]
    if not as_wanted(unit):
        raise GpulabError(f"{UNIT} is {unit['active']}", resolution=f"`journalctl -u {UNIT}` in the guest")
