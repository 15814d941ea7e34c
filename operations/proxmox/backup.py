# SPDX-License-Identifier: MIT
"""Backups of a guest: the job in PVE's own scheduler, one taken now, and what a storage holds of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyinfra import context, logger
from pyinfra.api import Host

import inventory
from inventory import GpulabError, Guest, Node
from inventory.schema import Backup
from operations import step
from operations.plan import key_diff
from operations.proxmox import access, vm
from operations.proxmox.client import Client
from operations.proxmox.node_shell import NodeShell

#: Seconds for one backup, and for the wait until other backups of the node have ended: PVE takes one at a time.
BACKUP_S = 12 * 3600.0
#: What chooses other VMs than ours, or none: a job has exactly one of them.
_OTHER_CHOICES = ("all", "exclude", "exclude-path", "pool")


@dataclass(frozen=True)
class Archive:
    """One backup on a storage. `began`: Unix seconds, by the node's clock."""

    volid: str
    began: int
    size: int


# Pure.


def job_id(guest: Guest) -> str:
    return f"gpulab-{guest.name}"


def retention(backup: Backup) -> str:
    """PVE's property string: `keep-daily=7,keep-weekly=4`."""
    return ",".join(f"{name}={count}" for name, count in backup.keep.options.items())


def job(guest: Guest, node: Node, backup: Backup) -> dict[str, str]:
    """The declared keys of the guest's job."""
    return {
        "comment": f"gpulab: {guest.name}",
        "compress": "zstd",
        "enabled": "1",
        "mode": backup.mode,
        # Jobs are the cluster's; every node would look for the VM.
        "node": node.name,
        "prune-backups": retention(backup),
        "schedule": backup.schedule,
        "storage": backup.storage,
        "vmid": str(guest.vmid),
    }


def canonical(key: str, value: object) -> object:
    """A job's value as PVE means it: property strings are read back in any order, or as objects."""
    match key:
        case "prune-backups":
            pairs = value.items() if isinstance(value, Mapping) else _pairs(str(value))
            # Nothing kept by a rule, and the rule not there, is the same.
            return {str(name): int(count) for name, count in pairs if str(count).isdigit() and int(count)}
        case "enabled":
            return str(value).lower() in ("1", "on", "yes", "true")
        case "schedule":
            return " ".join(str(value).lower().split())
    return str(value).strip()


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(name.strip(), count.strip()) for name, _, count in (part.partition("=") for part in text.split(","))]


def difference(found: Mapping[str, Any] | None, wanted: Mapping[str, str]) -> dict[str, str | None]:
    """The keys of a job that differ, with their new value; None for one that goes. Keys of others stay."""
    current = {**({"enabled": "1", "compress": "0", "mode": "snapshot"} if found else {}), **(found or {})}
    changing: dict[str, str | None] = {
        key: value
        for key, value in wanted.items()
        if key not in current or canonical(key, current[key]) != canonical(key, value)
    }
    # `all: 0` chooses nothing.
    return changing | {key: None for key in _OTHER_CHOICES if str(current.get(key, "0")) not in ("0", "")}


def shown(found: Mapping[str, Any] | None) -> dict[str, str | None]:
    """A job's keys as one writes them."""
    return {
        key: ",".join(f"{name}={count}" for name, count in value.items()) if isinstance(value, Mapping) else str(value)
        for key, value in (found or {}).items()
    }


def archives(content: Iterable[Mapping[str, Any]], vmid: int) -> list[Archive]:
    """The usable backups of a VM in a storage's list, the newest first. An empty file or a failed check is none."""
    found = [
        Archive(str(item["volid"]), int(item.get("ctime", 0)), int(item.get("size", 0)))
        for item in content
        if int(item.get("vmid", 0)) == vmid
        and int(item.get("size", 0)) > 0
        and (item.get("verification") or {}).get("state") != "failed"
    ]
    return sorted(found, key=lambda each: (each.began, each.volid), reverse=True)


# Reading.


def declared(guest: Guest) -> Backup:
    """
    Raises:
        GpulabError: none is declared.
    """
    if guest.backup is None:
        raise GpulabError(
            f"{guest.name}: backup: not declared; nothing was done",
            resolution="give the guest a `backup`, such as {'storage': 'local', 'spare_vmid': 901}, and deploy",
        )
    return guest.backup


def read_archives(client: Client, guest: Guest, node: Node) -> list[Archive]:
    """The usable backups of the guest on its declared storage, the newest first."""
    where = ("nodes", node.name, "storage", declared(guest).storage, "content")
    return archives(client.get(*where, content="backup", vmid=guest.vmid), guest.vmid)


def _jobs(shell: NodeShell) -> dict[str, Mapping[str, Any]]:
    answer = shell.output("pvesh", "get", "/cluster/backup", "--output-format", "json")
    try:
        return {str(each["id"]): each for each in json.loads(answer)}
    except (ValueError, TypeError, KeyError):
        raise GpulabError(f"{shell.node.name}: pvesh get /cluster/backup gave no list: {answer[:120]!r}") from None


# Changing.


def back_up(client: Client, guest: Guest, node: Node) -> str:
    """Take a backup now and return its volume id. PVE waits until the node's other backups have ended.

    What is old goes by the declared retention where the token may say so (Datastore.Allocate on the storage), and
    else by the storage's own, until the job next runs.

    Raises:
        GpulabError: none is declared, somebody else is at work on the VM, or the backup failed.
    """
    backup = declared(guest)
    vm.await_idle(client, guest, node)
    before = {each.volid for each in read_archives(client, guest, node)}
    _warn_of_space(client, guest, node, backup)
    granted = client.get("access", "permissions")
    may = access.has(granted, f"/storage/{backup.storage}", "Datastore.Allocate")
    # Not `remove=0`: a storage with a retention of its own then refuses one backup more.
    keeping = {"prune-backups": retention(backup)} if may else {}
    client.run_task(
        "POST",
        *("nodes", node.name, "vzdump"),
        task="vzdump",
        deadline_s=BACKUP_S,
        vmid=guest.vmid,
        storage=backup.storage,
        mode=backup.mode,
        compress="zstd",
        protected=0,
        **{"notes-template": "gpulab: {{guestname}}"},
        **keeping,
    )
    new = [each for each in read_archives(client, guest, node) if each.volid not in before]
    if not new:
        raise GpulabError(
            f"{guest.name}: the backup of VM {guest.vmid} ended well, and {backup.storage} lists no new one",
            f"Seen before: {', '.join(sorted(before)) or 'none'}.",
            f"look at {backup.storage} on {node.name}: a full or unmounted storage, or a wrong clock",
        )
    return new[0].volid


def _warn_of_space(client: Client, guest: Guest, node: Node, backup: Backup) -> None:
    """Compressed, a backup is smaller than its disks, and nobody knows by how much: said, not refused."""
    free = int(client.get("nodes", node.name, "storage", backup.storage, "status").get("avail", 0))
    kept = guest.data_disk.size_gib if guest.data_disk.backup else 0
    whole = (guest.system_disk_gib + kept) * 2**30
    if free < whole:
        logger.warning(
            f"{guest.name}: {backup.storage} on {node.name} has {free / 2**30:.0f} GiB free, the disks have "
            f"{whole / 2**30:.0f} GiB: the backup fits if it compresses well"
        )


def _here() -> tuple[Guest, Node, Client, NodeShell]:
    host: Host = context.ctx_host.get()
    state = context.ctx_state.get()
    lab = inventory.of_run(state)
    guest = lab.guests[host.name]
    node = lab.node_of(guest)
    return guest, node, Client(node, host=host), NodeShell(state, node)


@step.step
def scheduled() -> step.Commands:
    """
    Ensure that PVE's scheduler takes backups of the guest as declared, or that there is no job of ours for it.

    Jobs need rights on `/`, which the token has not: they are read and written over the node's SSH connection, with
    one command when nothing changes. Keys that nobody declared stay; jobs of other names are not looked at.
    """
    guest, node, _, shell = _here()
    name, found = job_id(guest), _jobs(shell).get(job_id(guest))
    if guest.backup is None:
        if found is None:
            step.noop(f"no backup is declared for {guest.name}, and there is no job {name}")
            return
        step.changes(f"remove backup job {name} of {node.cluster_name}; the backups stay")
        yield step.call(shell.run, ("pvesh", "delete", f"/cluster/backup/{name}"))
        return
    wanted = job(guest, node, guest.backup)
    changing = difference(found, wanted)
    if not changing:
        step.noop(f"backup job {name} is as declared: {guest.backup.schedule} to {guest.backup.storage}")
        return
    step.changes(f"{'change' if found else 'make'} backup job {name}", key_diff(shown(found), changing))
    # All of ours: PVE checks a job as a whole.
    words = [word for key, value in wanted.items() for word in (f"--{key}", value)]
    if found is None:
        yield step.call(shell.run, ("pvesh", "create", "/cluster/backup", "--id", name, *words))
        return
    gone = [key for key, value in changing.items() if value is None]
    deleting = ["--delete", ",".join(gone)] if gone else []
    yield step.call(shell.run, ("pvesh", "set", f"/cluster/backup/{name}", *words, *deleting))


@step.step
def taken() -> step.Commands:
    """Take a backup of the guest now, to the declared storage."""
    guest, node, client, _ = _here()
    backup = declared(guest)
    step.changes(f"back VM {guest.vmid} up to {backup.storage}", (f"mode {backup.mode}, {retention(backup)}",))
    yield step.call(_take, client, guest, node)


def _take(client: Client, guest: Guest, node: Node) -> None:
    logger.info(f"{guest.name}: backed up to {back_up(client, guest, node)}")
