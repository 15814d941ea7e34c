# SPDX-License-Identifier: MIT
"""A VM's configuration: what is declared, what PVE reads back, and the difference. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from inventory import GpulabError, Guest, Node
from inventory.schema import Network, NumaNode

TAG = "gpulab"
#: Families that are wholly ours: a member that is not declared goes.
OURS = re.compile(r"^(hostpci|net|ipconfig)[0-9]+$")
#: Ours too, where the inventory says anything about NUMA.
NUMA = re.compile(r"^numa[0-9]+$")
#: Wholly ours, but no token may set them.
ROOT_OURS = re.compile(r"^(affinity|hugepages)$")
#: The disks' places in the VM.
SYSTEM_DISK = "scsi0"
DATA_DISK = "scsi1"
#: Where the guest finds the data disk: QEMU names the disk on scsi1 so.
DATA_DISK_ID = "scsi-0QEMU_QEMU_HARDDISK_drive-scsi1"
#: Cloud-init vendor data, a file on the node's image storage.
VENDOR_SNIPPET = "gpulab-vendor.yaml"
#: A line of the description with this first word is a rebuild's note of its progress, no part of what is declared.
MARKER = "gpulab-rebuild"

#: Keys that a running VM takes at once, or that only cloud-init reads (notes: PVE 8.4 and 9.2). PVE may take network
#: cards at once as well, depending on what changes; a plan says rather a restart too many than one too few.
_LIVE = re.compile(
    r"^(agent|description|name|onboot|protection|startup|tags"
    r"|cicustom|ciupgrade|ciuser|ipconfig[0-9]+|nameserver|searchdomain|sshkeys)$"
)
#: What a key means that is not there.
_ABSENT = {
    "agent": "0",
    "bios": "seabios",
    "ciupgrade": "1",
    "cores": "1",
    "description": "",
    "memory": "512",
    "numa": "0",
    "onboot": "0",
    "protection": "0",
}
#: Families whose values are `a=b,c=d`, with the option that a bare word stands for.
_BARE_WORD = {
    "agent": "enabled",
    "boot": "legacy",
    "cicustom": "",
    "cpu": "cputype",
    "hostpciN": "host",
    "ipconfigN": "",
    "machine": "type",
    "memory": "current",
    "netN": "model",
    "numaN": "",
    "scsiN": "file",
    "startup": "order",
    "vga": "type",
}
#: Options that mean the same absent and with this value.
_OPTION_DEFAULTS = {
    "agent": {"freeze-fs": "1", "freeze-fs-on-backup": "1", "fstrim_cloned_disks": "0", "type": "virtio"},
    "cpu": {"hidden": "0"},
    "hostpciN": {"driver": "vfio", "legacy-igd": "0", "pcie": "0", "rombar": "1", "x-vga": "0"},
    "netN": {"firewall": "0", "link_down": "0"},
    "scsiN": {"backup": "1", "cache": "none", "discard": "ignore", "iothread": "0", "ssd": "0"},
}
#: What our disks have, each on a controller of its own (`virtio-scsi-single`).
_DISK_OPTIONS = {"discard": "on", "iothread": "1", "ssd": "1"}
#: The only one of a disk's options that we declare and a running VM takes.
_LIVE_OPTIONS = {"backup"}
_MODELS = ("virtio", "e1000", "e1000e", "rtl8139", "vmxnet3")


def declared(guest: Guest, node: Node) -> dict[str, str]:
    """The keys of the VM's configuration that the token sets and keeps, without its volumes."""
    keys = {
        "name": guest.name,
        "machine": guest.machine,
        "bios": "ovmf",
        "cpu": guest.cpu_type,
        "cores": str(guest.cores),
        "memory": str(guest.memory_mib),
        # Passthrough pins all memory: ballooning could only fail.
        "balloon": "0",
        "scsihw": "virtio-scsi-single",
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
        "tags": ";".join(sorted({TAG, *guest.tags})),
        "boot": "order=scsi0",
        "protection": str(int(guest.protection)),
        **_network(guest),
        **_numa(guest),
    }
    if guest.description is not None:
        keys["description"] = guest.description.rstrip()
    if guest.gpu is not None:
        keys["hostpci0"] = f"mapping={guest.gpu},pcie=1"
    return keys


def _network(guest: Guest) -> dict[str, str]:
    keys = {}
    for number, card in enumerate(guest.cards):
        keys[f"net{number}"] = _card(card)
        gateway = f",gw={card.gateway}" if card.gateway is not None else ""
        # Said, not left out: an absent ipconfig means DHCP too, but looks like a mistake.
        keys[f"ipconfig{number}"] = f"ip={card.address}{gateway}" if card.address is not None else "ip=dhcp"
    if guest.nameserver:
        keys["nameserver"] = " ".join(str(server) for server in guest.nameserver)
    if guest.searchdomain is not None:
        keys["searchdomain"] = guest.searchdomain
    return keys


def _card(card: Network) -> str:
    options = {"bridge": card.bridge, "mtu": card.mtu, "tag": card.vlan}
    model = f"virtio={card.mac.upper()}" if card.mac is not None else "virtio"
    return ",".join([model, *(f"{key}={value}" for key, value in options.items() if value is not None)])


def _numa(guest: Guest) -> dict[str, str]:
    if guest.numa is None and not guest.numa_nodes:
        return {}
    keys = {"numa": str(int(guest.numa is not False))}
    return keys | {f"numa{number}": _numa_node(each) for number, each in enumerate(guest.numa_nodes)}


def _numa_node(each: NumaNode) -> str:
    # PVE separates by `;` within an option.
    value = f"cpus={each.cpus.replace(',', ';')},memory={each.memory_mib}"
    if each.host_nodes is not None:
        value += f",hostnodes={each.host_nodes.replace(',', ';')},policy={each.policy}"
    return value


def root_declared(guest: Guest) -> dict[str, str]:
    """The keys that go over the node's SSH connection: no token may set two of them, the third's right sits on `/`."""
    keys = {}
    if guest.affinity is not None:
        keys["affinity"] = guest.affinity
    if guest.hugepages is not None:
        keys["hugepages"] = {"2M": "2", "1G": "1024", "any": "any"}[guest.hugepages]
    if guest.startup is not None:
        values = {"order": guest.startup.order, "up": guest.startup.up_s, "down": guest.startup.down_s}
        keys["startup"] = ",".join(f"{key}={value}" for key, value in values.items() if value is not None)
    return keys


def volumes(guest: Guest, node: Node) -> dict[str, str]:
    """The disks of a new VM. No pre-enrolled keys: Secure Boot would refuse modules that DKMS built."""
    return {
        SYSTEM_DISK: _with_options(f"{guest.disk_storage}:0,import-from={image_volume(guest, node)}", _DISK_OPTIONS),
        DATA_DISK: _with_options(f"{guest.disk_storage}:{guest.data_disk.size_gib}", _data_disk_options(guest)),
        "efidisk0": f"{guest.disk_storage}:0,efitype=4m,pre-enrolled-keys=0",
        "ide2": f"{guest.disk_storage}:cloudinit",
    }


def image_volume(guest: Guest, node: Node) -> str:
    """The volume id of the guest's image on the node."""
    return f"{node.image_storage}:import/{guest.image.filename}"


def is_ours(config: Mapping[str, Any]) -> bool:
    """Does the VM carry our tag? Nothing without it is ever changed."""
    return TAG in re.split(r"[;, ]+", str(config.get("tags", "")))


@dataclass(frozen=True)
class Change:
    """What separates a VM from its declaration: keys by the way they are sent, disks by their new size (`64G`)."""

    setting: Mapping[str, str]
    deleting: tuple[str, ...]
    root_setting: Mapping[str, str]
    root_deleting: tuple[str, ...]
    growing: Mapping[str, str]
    #: Disks with other options: the same volume and what else their value holds.
    disks: Mapping[str, str]
    #: Those of them whose options a running VM does not take.
    waiting_disks: tuple[str, ...]

    @property
    def keys(self) -> dict[str, str | None]:
        """Each key with its new value, None for one that goes."""
        gone = dict.fromkeys((*self.deleting, *self.root_deleting))
        return {**self.setting, **self.root_setting, **self.disks, **gone}

    @property
    def restart(self) -> list[str]:
        """Keys that a running VM does not take."""
        keys = {key for key in self.keys if key not in self.disks and not _LIVE.match(key)}
        return sorted(keys | set(self.waiting_disks))

    def __bool__(self) -> bool:
        return bool(self.keys or self.growing)


def change(current: Mapping[str, Any], guest: Guest, node: Node) -> Change:
    """What has to be done to a VM whose configuration, pending values included, reads `current`.

    Raises:
        GpulabError: a disk would have to shrink.
    """
    setting, deleting = difference(current, declared(guest, node))
    root_setting, root_deleting = _difference(current, root_declared(guest), ROOT_OURS)
    disks = _disk_options(current, guest)
    waiting_disks = tuple(disk for disk, value in disks.items() if not _taken_live(str(current[disk]), value))
    growing = growth(current, guest)
    return Change(setting, tuple(deleting), root_setting, tuple(root_deleting), growing, disks, waiting_disks)


def _data_disk_options(guest: Guest) -> dict[str, str]:
    return _DISK_OPTIONS if guest.data_disk.backup else {**_DISK_OPTIONS, "backup": "0"}


def _disk_options(current: Mapping[str, Any], guest: Guest) -> dict[str, str]:
    """The disks whose options are not as declared, with the value to send: the volume stays, and so does every option
    that nobody declares."""
    changing = {}
    for key, wanted in ((SYSTEM_DISK, _DISK_OPTIONS), (DATA_DISK, _data_disk_options(guest))):
        value = str(current.get(key, ""))
        found = _options(value, "file")
        if not found.get("file") or found["file"] == "none" or found.get("media") == "cdrom":
            continue
        # Part of the backups is what PVE makes every disk; whoever declares none may have taken it out.
        back = {"backup": "1"} if key == DATA_DISK and guest.backup is not None and guest.data_disk.backup else {}
        defaults = _OPTION_DEFAULTS["scsiN"]
        other = {
            name: text
            for name, text in {**wanted, **back}.items()
            if found.get(name, defaults[name]) != _options(f"{name}={text}", "")[name]
        }
        if other:
            parts = [part for part in value.split(",") if part.partition("=")[0] not in other]
            changing[key] = _with_options(",".join(parts), {k: v for k, v in other.items() if k not in back})
    return changing


def _with_options(value: str, options: Mapping[str, str]) -> str:
    return ",".join([value, *(f"{name}={text}" for name, text in options.items())])


def _taken_live(found: str, wanted: str) -> bool:
    """Does a running VM take this change of a disk's options at once?"""
    before, after = _meaning("scsiN", found), _meaning("scsiN", wanted)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= _LIVE_OPTIONS


def difference(current: Mapping[str, Any], wanted: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What a change of the configuration has to send: keys to set, keys to delete."""
    return _difference(current, wanted, re.compile(f"{OURS.pattern}|{NUMA.pattern}") if "numa" in wanted else OURS)


def _difference(
    current: Mapping[str, Any], wanted: Mapping[str, str], ours: re.Pattern[str]
) -> tuple[dict[str, str], list[str]]:
    setting = {
        key: _keeping(key, value, str(current.get(key, "")))
        for key, value in wanted.items()
        if not _same(key, current.get(key), value)
    }
    return setting, sorted(key for key in current if ours.match(key) and key not in wanted)


def _same(key: str, found: object, wanted: str) -> bool:
    found = _ABSENT.get(key) if found is None else found
    if found is None or canonical(key, str(found)) != canonical(key, wanted):
        return False
    mac = _mac(wanted) if key.startswith("net") else None
    return mac is None or mac.lower() == (_mac(str(found)) or "").lower()


def _keeping(key: str, value: str, found: str) -> str:
    """The value to send, with what stays of the one that is there: a card's MAC address, a rebuild's marker."""
    if key.startswith("net") and _mac(value) is None and (mac := _mac(found)):
        return value.replace("virtio", f"virtio={mac}", 1)
    if key == "description":
        return "\n".join([value, *(line for line in found.splitlines() if _is_marker(line))])
    return value


def _is_marker(line: str) -> bool:
    return line.strip().partition(" ")[0] == MARKER


def _mac(card: str) -> str | None:
    found = re.search(r"(?:^|,)\w[\w-]*=([0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5})(?:,|$)", card)
    return found[1] if found else None


def canonical(key: str, value: str) -> object:
    """A value as PVE means it, whatever the order and form in which it reads it back (notes of PVE 8.4 and 9.2)."""
    family = re.sub(r"[0-9]+$", "N", key)
    if family in _BARE_WORD:
        return _meaning(family, value)
    match key:
        case "affinity":
            return _cpus(value)
        case "description":
            return "\n".join(line for line in value.splitlines() if not _is_marker(line)).rstrip()
        case "nameserver" | "searchdomain":
            return tuple(re.split(r"[;, ]+", value.strip()))
        case "sshkeys":
            return tuple(line.strip() for line in unquote(value).splitlines() if line.strip())
        case "tags":
            return frozenset(tag for tag in re.split(r"[;, ]+", value) if tag)
    return value.strip()


def _meaning(family: str, value: str) -> dict[str, str]:
    """The options of a property string, without those that say what is so anyway."""
    options = _options(value, _BARE_WORD[family])
    if family == "netN":
        model = next((name for name in _MODELS if name in options), None)
        if model is not None:
            options.pop(model)
            options["model"] = model
        options.pop("macaddr", None)
    defaults = _OPTION_DEFAULTS.get(family, {})
    return {name: text for name, text in options.items() if defaults.get(name) != text}


def _options(value: str, default: str) -> dict[str, str]:
    """`a,b=1` as a mapping; a bare word is the value of the default key. on/yes/true are 1, off/no/false 0."""
    words = {"on": "1", "yes": "1", "true": "1", "off": "0", "no": "0", "false": "0"}
    options = {}
    for part in value.strip().split(","):
        name, separator, text = part.partition("=")
        if not separator:
            name, text = (default, name) if default not in options else (name, "")
        options[name] = words.get(text.lower(), text)
    return options


def _cpus(value: str) -> object:
    """`0-2,5` as the set of its numbers; anything else as it is."""
    numbers: set[int] = set()
    for part in value.strip().split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        if found is None or int(found[2] or found[1]) > 2**16:
            return value.strip()
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(numbers)


def waiting(items: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of PVE's list of pending values that something else waits for than what is in force."""
    keys = []
    for item in items:
        key = str(item["key"])
        gone = bool(item.get("delete")) and "value" in item
        changed = "pending" in item and not _same(key, item.get("value"), str(item["pending"]))
        if gone or changed:
            keys.append(key)
    return sorted(keys)


def own_disks_waiting(items: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of the pending values those of our disks that keep their volume: options, which we declare."""
    return sorted(
        str(item["key"])
        for item in items
        if item["key"] in (SYSTEM_DISK, DATA_DISK)
        and "pending" in item
        and volume(str(item.get("value", ""))) == volume(str(item["pending"]))
        and not _same(str(item["key"]), item.get("value"), str(item["pending"]))
    )


def volume(disk: str) -> str:
    """The volume id of a disk's value."""
    return _options(disk, "file").get("file", "")


def is_declared(key: str, guest: Guest, node: Node) -> bool:
    """Is the key set by gpulab, or of a family that is wholly ours?"""
    wanted = {**declared(guest, node), **root_declared(guest)}
    return key in wanted or bool(OURS.match(key) or ROOT_OURS.match(key) or ("numa" in wanted and NUMA.match(key)))


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
