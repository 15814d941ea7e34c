# SPDX-License-Identifier: MIT
"""A VM's configuration: what is declared, what PVE reads back, and the difference. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from inventory import GpulabError, Guest, Node

TAG = "gpulab"
#: Families that are wholly ours: a member that is not declared goes.
OURS = re.compile(r"^(hostpci|net|ipconfig)[0-9]+$")
#: Where the guest finds the data disk: QEMU names the disk on scsi1 so.
DATA_DISK_ID = "scsi-0QEMU_QEMU_HARDDISK_drive-scsi1"
#: Cloud-init vendor data, a file on the node's image storage.
VENDOR_SNIPPET = "gpulab-vendor.yaml"


def declared(guest: Guest, node: Node) -> dict[str, str]:
    """The keys of the VM's configuration that gpulab sets and keeps, without its volumes."""
    prefix = guest.address.network.prefixlen
    keys = {
        "name": guest.name,
        "machine": "q35",
        "bios": "ovmf",
        "cpu": "host",
        "cores": str(guest.cores),
        "memory": str(guest.memory_mib),
        # Passthrough pins all memory: ballooning could only fail.
        "balloon": "0",
        "scsihw": "virtio-scsi-single",
        "net0": f"virtio,bridge={guest.bridge}",
        "ipconfig0": f"ip={guest.address.ip}/{prefix},gw={guest.gateway}",
        "ciuser": guest.ssh_user,
        "sshkeys": quote(guest.public_key() + "\n", safe=""),
        # PVE's default upgrades every package at the first boot, before the driver's pin exists.
        "ciupgrade": "0",
        "cicustom": f"vendor={node.image_storage}:snippets/{VENDOR_SNIPPET}",
        "agent": "enabled=1",
        "serial0": "socket",
        "vga": "serial0",
        "ostype": "l26",
        "onboot": str(int(guest.onboot)),
        "tags": TAG,
        "boot": "order=scsi0",
        # PVE then refuses to destroy the VM or to delete its disks.
        "protection": "1",
    }
    if guest.nameserver is not None:
        keys["nameserver"] = str(guest.nameserver)
    if guest.gpu is not None:
        keys["hostpci0"] = f"mapping={guest.gpu},pcie=1"
    return keys


def volumes(guest: Guest, node: Node) -> dict[str, str]:
    """The disks of a new VM. No pre-enrolled keys: Secure Boot would refuse modules that DKMS built."""
    return {
        "scsi0": f"{guest.disk_storage}:0,import-from={image_volume(guest, node)},discard=on,iothread=1,ssd=1",
        "scsi1": f"{guest.disk_storage}:{guest.data_disk.size_gib},discard=on,iothread=1,ssd=1",
        "efidisk0": f"{guest.disk_storage}:0,efitype=4m,pre-enrolled-keys=0",
        "ide2": f"{guest.disk_storage}:cloudinit",
    }


def image_volume(guest: Guest, node: Node) -> str:
    """The volume id of the guest's image on the node."""
    return f"{node.image_storage}:import/{guest.image.filename}"


def is_ours(config: Mapping[str, Any]) -> bool:
    """Does the VM carry our tag? Nothing without it is ever changed."""
    return TAG in re.split(r"[;, ]+", str(config.get("tags", "")))


def difference(current: Mapping[str, Any], wanted: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What a change of the configuration has to send: keys to set, keys to delete."""
    setting = {
        key: value
        for key, value in wanted.items()
        if key not in current or canonical(key, str(current[key])) != canonical(key, value)
    }
    # A network card keeps its MAC address, which PVE made up when the VM was created.
    for key in setting:
        if key.startswith("net") and (mac := re.match(r"(?:model=)?\w+=([0-9A-Fa-f:]{17})", str(current.get(key, "")))):
            setting[key] = setting[key].replace("virtio,", f"virtio={mac[1]},", 1)
    deleting = [key for key in current if OURS.match(key) and key not in wanted]
    return setting, sorted(deleting)


def canonical(key: str, value: str) -> object:
    """A value as PVE means it, whatever the order and form in which it reads it back (notes of PVE 8.4 and 9.2)."""
    if key == "sshkeys":
        return unquote(value).strip()
    if key == "tags":
        return tuple(sorted(tag.lower() for tag in re.split(r"[;, ]+", value) if tag))
    if key.startswith("net"):
        options = _options(value, "model")
        model = next((name for name in ("virtio", "e1000", "vmxnet3", "rtl8139") if name in options), None)
        if model is not None:
            options.pop(model)
            options["model"] = model
        options.pop("macaddr", None)
        return options
    if key == "agent":
        return _options(value, "enabled")
    if key == "machine":
        return _options(value, "type")
    if key.startswith(("hostpci", "ipconfig", "boot", "cpu", "vga", "cicustom")):
        default = {"h": "host", "b": "legacy", "c": "cputype", "v": "type"}.get(key[0], "")
        return _options(value, default)
    return value.strip()


def _options(value: str, default: str) -> dict[str, str]:
    """`a,b=1` as a mapping; a bare word is the value of the default key. on/yes/true are 1, off/no/false 0."""
    words = {"on": "1", "yes": "1", "true": "1", "off": "0", "no": "0", "false": "0"}
    options = {}
    for part in value.split(","):
        name, separator, text = part.partition("=")
        if not separator:
            name, text = (default, name) if default not in options else (name, "")
        options[name] = words.get(text, text)
    return options


def growth(current: Mapping[str, Any], guest: Guest) -> dict[str, str]:
    """Disks that have to grow, with their new size (`64G`).

    Raises:
        GpulabError: a declared size is below the disk's: PVE cannot shrink disks.
    """
    growing = {}
    for key, wanted in (("scsi0", guest.system_disk_gib), ("scsi1", guest.data_disk.size_gib)):
        size = _size_gib(str(current.get(key, "")))
        if size is None or size == wanted:
            continue
        if size > wanted:
            field = "system_disk_gib" if key == "scsi0" else "data_disk.size_gib"
            raise GpulabError(
                f"{guest.name}: {field} = {wanted}: the disk on {key} has {size:g} GiB already",
                "Expected at least that: PVE cannot shrink a disk.",
            )
        growing[key] = f"{wanted}G"
    return growing


def _size_gib(volume: str) -> float | None:
    """The size in GiB that PVE states for a volume, None when it states none."""
    found = re.search(r"(?:^|,)size=([0-9]+)([KMGT]?)", volume)
    if found is None:
        return None
    factor = {"": 1 / 2**30, "K": 1 / 2**20, "M": 1 / 2**10, "G": 1, "T": 2**10}[found[2]]
    return int(found[1]) * factor
