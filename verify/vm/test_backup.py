# SPDX-License-Identifier: MIT
"""Does PVE back the guest up as declared, and is there a backup young enough to be worth something?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

from inventory import Guest
from inventory.schema import Backup
from verify.observations import Observation
from verify.verdicts import Broken, not_run

pytestmark = pytest.mark.on("backups")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
TAKE = "pyinfra {lab} -y --limit {host} operations.proxmox.backup.taken name='Take a backup'"


@pytest.mark.major
@pytest.mark.promise("vm.backup.job", "backup.schedule", "backup.storage", "backup.mode", "backup.keep", fix=DEPLOY)
def test_backups_are_scheduled_as_declared(guest: Guest, backup: Observation, seen: Callable[[str], None]) -> None:
    wanted, name = declared(guest), f"gpulab-{guest.name}"
    job = backup["job"]
    assert job is not None, f"{guest.name}: the cluster of {guest.node} has no backup job {name}"
    assert str(job.get("enabled", 1)) == "1", f"{guest.name}: backup job {name} is disabled"
    everything = str(job.get("all", 0)) == "1" or job.get("pool")
    vmids = re.split(r"[;, ]+", str(job.get("vmid", "")))
    assert everything or str(guest.vmid) in vmids, (
        f"{guest.name}: backup job {name} is for {job.get('vmid', 'no VM')}, expected {guest.vmid}"
    )
    assert job.get("node") in (None, guest.node), (
        f"{guest.name}: backup job {name} runs on {job.get('node')} alone, expected {guest.node}"
    )
    schedule = " ".join(str(job.get("schedule", "none")).lower().split())
    for what, found, expected in (
        ("schedule", schedule, wanted.schedule),
        ("storage", job.get("storage", "none"), wanted.storage),
        ("mode", job.get("mode", "snapshot"), wanted.mode),
        ("retention", kept(job.get("prune-backups", "")), wanted.keep.options),
    ):
        assert found == expected, f"{guest.name}: backup job {name}: {what} {found}, expected {expected}"
    seen(f"{schedule} to {wanted.storage}")


@pytest.mark.major
@pytest.mark.promise("vm.backup.age", "backup.max_age_h", fix=TAKE)
def test_newest_backup_is_young_enough(guest: Guest, backup: Observation, seen: Callable[[str], None]) -> None:
    wanted = declared(guest)
    if backup["error"]:
        raise Broken(f"{guest.name}: storage {wanted.storage}: {backup['error']}", "look at the storage on {node}")
    limit = f"{wanted.max_age_h:g} h"
    usable = [each for each in backup["backups"] if each["size"] > 0 and each["verification"] != "failed"]
    damaged = len(backup["backups"]) - len(usable)
    besides = f" ({damaged} damaged or empty)" if damaged else ""
    if not usable:
        if backup["meta"] is None:
            not_run(f"VM {guest.vmid} does not exist")
        made = re.search(r"(?:^|,)ctime=([0-9]+)", backup["meta"])
        age_h = (backup["now"] - int(made[1])) / 3600 if made else None
        told = f"{guest.name}: {wanted.storage} has no backup of VM {guest.vmid}{besides}"
        assert age_h is not None and age_h < wanted.max_age_h and not damaged, f"{told}, expected one within {limit}"
        seen(f"no backup yet: the VM is {age_h:.1f} h old")
        return
    newest = max(usable, key=lambda each: each["ctime"])
    age_h = (backup["now"] - newest["ctime"]) / 3600
    assert age_h <= wanted.max_age_h, (
        f"{guest.name}: the newest backup {newest['volid']} is {age_h:.1f} h old{besides}, expected at most {limit}"
    )
    seen(f"{newest['volid']}, {age_h:.1f} h old{besides}")


def declared(guest: Guest) -> Backup:
    """The guest's backup; a check of this file is for guests that declare one."""
    assert guest.backup is not None
    return guest.backup


def kept(value: object) -> dict[str, int]:
    """PVE's retention, a property string or an object, without the rules that keep nothing."""
    pairs = (
        value.items() if isinstance(value, Mapping) else [part.partition("=")[::2] for part in str(value).split(",")]
    )
    return {str(name): int(count) for name, count in pairs if str(count).isdigit() and int(count)}
