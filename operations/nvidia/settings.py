# SPDX-License-Identifier: MIT
"""What the card is set to: persistence, accounting, power limit, clocks, ECC and compute mode.

None but ECC survives a boot, so a unit of ours sets them at each one, before MPS and the containers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import files, step
from operations.files import File, render
from operations.nvidia import library
from operations.nvidia.facts import SettingsFacts
from operations.nvidia.remote.settings import SETTINGS, differing, refused
from operations.nvidia.units import PROGRAMS, installed, restart
from operations.reboot import reboot_and_wait
from operations.units import as_wanted

UNIT = "gpulab-gpu-settings.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
PROGRAM = f"{PROGRAMS}/gpu-settings"
#: Keeps the driver initialised: without it, limits and modes are lost when the last client leaves.
PERSISTENCED = "nvidia-persistenced.service"
FILES = (SETTINGS, UNIT_FILE, PROGRAM)

# The steps that follow must not find units of the new boot that are still to come up.
_BOOTED = """
timeout 120 systemctl is-system-running --wait > /dev/null
systemctl start "$1"
"""

Declared = dict[str, Any]


@dataclass(frozen=True)
class Actions:
    """What has to happen. `apply`: why the unit has to run, empty when it need not."""

    library: bool = False
    files: Mapping[str, File | None] = field(default_factory=dict)
    persistenced: bool = False
    apply: tuple[str, ...] = ()

    def any(self) -> bool:
        return bool(self.library or self.files or self.persistenced or self.apply)


def read() -> dict[str, Any]:
    """The card's settings; empty for a guest that does not exist yet."""
    found: dict[str, Any] = step.read(SettingsFacts, paths=list(FILES), unit_names=[PERSISTENCED, UNIT])
    return found


def wanted_files(declared: Declared) -> dict[str, File | None]:
    return {
        PROGRAM: installed("settings"),
        UNIT_FILE: File(render("nvidia/gpulab-gpu-settings.service.j2", program=PROGRAM)),
        SETTINGS: File(json.dumps(declared, indent=2) + "\n"),
    }


def library_digest() -> str:
    """SHA-256 of NVML's module as it should be on the guest."""
    (file,) = library.nvml().values()
    return hashlib.sha256(file.content.encode()).hexdigest() if file else ""


def persistenced_fits(found: Mapping[str, Any], enabled: bool) -> bool:
    """Is the daemon enabled (or static) and running, or neither?"""
    unit = found.get("units", {}).get(PERSISTENCED, {})
    if not enabled:
        return unit.get("enabled") != "enabled" and unit.get("active") != "active"
    return unit.get("enabled") in ("enabled", "static", "alias", "indirect") and unit.get("active") == "active"


def require_possible(found: Mapping[str, Any], declared: Declared) -> None:
    """
    Raises:
        GpulabError: a card's own answer is that it cannot do what is declared.
    """
    problems = [problem for gpu in found.get("gpus", ()) for problem in refused(gpu, declared)]
    if problems:
        raise GpulabError(problems[0], "\n".join(problems[1:]), "change it in the inventory; nothing was set")


def differences(found: Mapping[str, Any], declared: Declared) -> tuple[str, ...]:
    """What each card is set to otherwise: `subject: seen -> wanted`."""
    gpus = found.get("gpus", [])
    return tuple(
        f"{gpu['bus'] + ' ' if len(gpus) > 1 else ''}{subject}: {seen} -> {wanted}"
        for gpu in gpus
        for subject, (seen, wanted) in differing(gpu, declared, found["locked"], gpu["lowered_mw"]).items()
    )


def ecc_due(found: Mapping[str, Any], declared: Declared) -> str:
    """Why a reboot is due for ECC, empty when it is not. Of a card that can't be read yet: it may be."""
    if declared["ecc"] is None:
        return ""
    word = "on" if declared["ecc"] else "off"
    if not found.get("gpus"):
        return f"ECC {word}, if the card has it otherwise"
    due = [gpu for gpu in found["gpus"] if gpu["ecc"] is not None and bool(gpu["ecc"][0]) != declared["ecc"]]
    return f"ECC {word} of {due[0]['name']}" if due else ""


def decide(found: Mapping[str, Any], declared: Declared) -> Actions:
    """What has to happen for the card to be set as declared, now and at each boot."""
    changing = files.differing(found.get("files", {}), wanted_files(declared))
    why = list(differences(found, declared))
    if not why:
        if not as_wanted(found.get("units", {}).get(UNIT, {})):
            why = [f"{UNIT} is not up"]
        elif found["error"]:
            why = [f"NVML: {found['error']}"]
        elif changing:
            why = ["its files change"]
    return Actions(
        library=found.get("library") != library_digest(),
        files=changing,
        persistenced=not persistenced_fits(found, declared["persistence"]),
        apply=tuple(why),
    )


@step.step
def settings(
    persistence: bool,
    accounting: bool,
    compute_mode: str,
    allow_reboot: bool,
    reboot_timeout_s: int,
    power_limit_w: int | None = None,
    clocks: tuple[int, int] | None = None,
    ecc: bool | None = None,
) -> step.Commands:
    """
    Ensure that the card is set as declared, now and after each boot, and that it says so when it is read back.

    What is not declared is the card's own: a power limit or a lock of clocks that was declared before goes away.
    **Reboot**: only for a change of ECC; where the guest may not be rebooted, ECC waits for its next boot.

    + persistence: keep the driver initialised without a client?
    + accounting: record memory and time of each process?
    + compute_mode: `DEFAULT` or `EXCLUSIVE_PROCESS`
    + allow_reboot: may the guest be rebooted?
    + reboot_timeout_s: seconds until SSH must answer again
    + power_limit_w: watts; None: the card's default
    + clocks: lowest and highest graphics clock, MHz; None: the card's own affair
    + ecc: on or off; None: left as it is
    """
    declared = {
        "persistence": persistence,
        "accounting": accounting,
        "power_limit_w": power_limit_w,
        "clocks": None if clocks is None else list(clocks),
        "ecc": ecc,
        "compute_mode": compute_mode,
    }
    found = read()
    require_possible(found, declared)
    actions, ecc_word = decide(found, declared), ecc_due(found, declared)
    if ecc_word and not allow_reboot:
        step.waits(f"a reboot of the guest: {ecc_word}", ("allow_reboot is false",))
    rebooting = bool(ecc_word) and allow_reboot
    if not actions.any() and not rebooting:
        step.noop(f"the GPU is set as declared{f'; {ecc_word}: waits for a reboot' if ecc_word else ''}")
        return
    _record(found, actions, persistence)
    if rebooting:
        step.reboots(ecc_word)
    if actions.library:
        yield files.write(library.nvml())
    if actions.persistenced:
        yield StringCommand("systemctl", "enable" if persistence else "disable", "--now", PERSISTENCED)
    if not found.get("gpus"):
        # Only now can the card be asked: nothing of what it refuses may be left for the next boot.
        yield step.call(check_possible, declared)
    if actions.files:
        yield files.write(actions.files)
    if UNIT_FILE in actions.files:
        yield StringCommand("systemctl", "daemon-reload")
    if actions.apply:
        yield StringCommand("systemctl", "enable", UNIT)
        yield restart(UNIT)
    yield step.call(check, declared)
    if rebooting:
        yield step.call(reboot_for_ecc, declared, reboot_timeout_s)
        yield StringCommand("sh", "-c", QuoteString(_BOOTED.strip()), "booted", UNIT)


def _record(found: Mapping[str, Any], actions: Actions, persistence: bool) -> None:
    if actions.library:
        step.changes(f"file {library.PATH} (nvidia-ml-py)")
    if actions.persistenced:
        step.changes(f"{'enable' if persistence else 'disable'} {PERSISTENCED}")
    for path, file in actions.files.items():
        if path == PROGRAM:
            step.changes(f"file {path}")
        else:
            files.record(found.get("files", {}), {path: file})
    if actions.apply:
        step.changes("set the card", actions.apply)


def check_possible(declared: Declared) -> None:
    """
    Raises:
        GpulabError: NVML does not answer, or a card cannot do what is declared.
    """
    found = read()
    if not found["gpus"]:
        raise silent(found)
    require_possible(found, declared)


def silent(found: Mapping[str, Any]) -> GpulabError:
    return GpulabError(
        "NVML has no answer about the card", found["error"] or "It knows no GPU.", "`nvidia-smi` in the guest says more"
    )


def check(declared: Declared) -> None:
    """
    Raises:
        GpulabError: the card reads otherwise than it was set.
    """
    found = read()
    if not found["gpus"]:
        raise silent(found)
    lines = differences(found, declared)
    if lines or not as_wanted(found["units"][UNIT]) or not persistenced_fits(found, declared["persistence"]):
        raise GpulabError(
            "The card is not set as declared",
            "\n".join([*lines, *(f"{name}: {unit['active']}" for name, unit in found["units"].items())]),
            f"`journalctl -u {UNIT}` in the guest",
        )


def reboot_for_ecc(declared: Declared, timeout_s: int) -> None:
    """Reboot where the card has ECC otherwise than declared, and see that it then has it so.

    Raises:
        GpulabError: the guest does not come back, or the card keeps its mode.
    """
    found = read()
    if not ecc_due(found, declared):
        return
    reboot_and_wait(host._get_module(), found["boot_id"], timeout_s)
    found = read()
    if why := ecc_due(found, declared):
        raise GpulabError(f"{why}: not in force after a reboot", found["error"], f"`journalctl -u {UNIT}` in the guest")
