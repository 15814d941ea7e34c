# SPDX-License-Identifier: MIT
"""Does a keeper VM hold this guest's data disks? Then nobody but `destroy=1` may make or start the guest's VM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inventory import GpulabError, Guest
from operations.proxmox import keeper
from operations.proxmox.client import Client


def find(client: Client, guest: Guest) -> tuple[int, Mapping[str, Any]] | None:
    """The id and configuration of the guest's keeper; None when there is none.

    Raises:
        GpulabError: there are several.
    """
    vms = ("nodes", client.node.name, "qemu")
    found = []
    for entry in client.get(*vms):
        if keeper.looks_like(guest, entry):
            config = client.get(*vms, entry["vmid"], "config")
            if keeper.is_keeper_of(guest, config):
                found.append((int(entry["vmid"]), config))
    if len(found) > 1:
        raise GpulabError(
            f"{guest.name}: VMs {', '.join(str(vmid) for vmid, _ in found)} on {client.node.name} are its keepers",
            "Expected at most one. Nothing was done.",
            "see which one holds disks; move them to it, then remove the other by hand",
        )
    return found[0] if found else None


def refuse(client: Client, guest: Guest, config: Mapping[str, Any] | None) -> None:
    """`config`: that of the guest's VM; None when there is none.

    Raises:
        GpulabError: a keeper holds its data disks, or may: a new VM would get a new and empty one.
    """
    found = find(client, guest)
    if found is None:
        return
    vmid, kept = found
    noted = keeper.note(kept)
    lacking = sorted(set(noted.disks if noted else ()) - set(config or ()))
    held = sorted(keeper.holds(kept).values()) or _own_volumes(client, vmid, noted)
    if config is not None and not held and not lacking:
        return
    raise GpulabError(
        f"{guest.name}: its data disk lies with the keeper VM {vmid} on {client.node.name}: a destroy=1 was cut off",
        f"It holds {', '.join(held) or 'no disk'}; VM {guest.vmid} lacks {', '.join(lacking) or 'none'}. "
        "Nothing was done.",
        f"`pyinfra inventory/lab.py rebuild.py --limit {guest.name} --data destroy=1` goes on from there",
    )


def _own_volumes(client: Client, vmid: int, noted: keeper.Note | None) -> list[str]:
    """Volumes of the keeper that it does not name: a move that was killed leaves one."""
    storages = {volid.partition(":")[0] for volid, _ in (noted.disks.values() if noted else ())}
    found = []
    for storage in sorted(storages):
        content = ("nodes", client.node.name, "storage", storage, "content")
        found += [str(item["volid"]) for item in client.get(*content, content="images", vmid=vmid)]
    return sorted(volid for volid in found if noted is None or volid not in noted.kept)
