# SPDX-License-Identifier: MIT
"""A VM's configuration as text: what PVE makes of what was declared, and what a running VM takes at once.

Pure functions. Rules and wording follow requests that were made to real nodes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from rehearsal.pve.errors import bad_parameters
from rehearsal.pve.state import GIB, MIB, Config, ConfigValue

DISK_KEY = re.compile(r"(?:ide[0-3]|sata[0-5]|scsi(?:[12]?\d|30)|virtio(?:\d|1[0-5])|efidisk0|tpmstate0)")
UNUSED_KEY = re.compile(r"unused\d+")
HOSTPCI_KEY = re.compile(r"hostpci(?:\d|1[0-5])")
NEW_DISK = re.compile(r"(?P<storage>[a-zA-Z][\w.-]*):(?P<size>\d+(?:\.\d+)?)")

INTEGER_KEYS = frozenset(
    [
        "acpi",
        "autostart",
        "balloon",
        "ciupgrade",
        "cores",
        "cpuunits",
        "freeze",
        "keephugepages",
        "kvm",
        "localtime",
        "migrate_speed",
        "numa",
        "onboot",
        "protection",
        "reboot",
        "shares",
        "smp",
        "sockets",
        "tablet",
        "tdf",
        "template",
        "vcpus",
    ]
)
BOOLEAN_KEYS = frozenset(
    [
        "acpi",
        "autostart",
        "ciupgrade",
        "freeze",
        "keephugepages",
        "kvm",
        "localtime",
        "numa",
        "onboot",
        "protection",
        "reboot",
        "tablet",
        "tdf",
        "template",
        "start",
        "purge",
        "force",
        "forceStop",
        "skiplock",
        "destroy-unreferenced-disks",
        "verify-certificates",
        "privsep",
        "current",
        "propagate",
        "enable",
        "decode",
        "delete-disk",
    ]
)
_CLOUD_INIT_KEYS = frozenset(
    ["cicustom", "cipassword", "citype", "ciupgrade", "ciuser", "nameserver", "searchdomain", "sshkeys"]
)
# Taken by a running VM at once; everything else of a running VM is pending until its next start.
_LIVE_KEYS = _CLOUD_INIT_KEYS | frozenset(
    [
        "agent",
        "autostart",
        "description",
        "hookscript",
        "lock",
        "meta",
        "name",
        "onboot",
        "protection",
        "startup",
        "tags",
    ]
)
_PRIVILEGE_OF = {
    "VM.Config.CPU": "cores cpu cpulimit cpuunits numa smp sockets vcpus",
    "VM.Config.Memory": "balloon memory shares",
    "VM.Config.HWType": "acpi audio0 hotplug kvm machine rng0 scsihw smbios1 tablet vga watchdog",
    "VM.Config.Options": "agent autostart bios description keyboard localtime migrate_downtime migrate_speed name "
    "onboot ostype protection reboot spice_enhancements startdate startup tags tdf template",
    "VM.Config.Disk": "boot bootdisk vmstatestorage",
    "VM.PowerMgmt": "freeze",
}
_PRIVILEGE_BY_KEY = {key: privilege for privilege, keys in _PRIVILEGE_OF.items() for key in keys.split()}
_DISK_BOOLEANS = frozenset(
    ["backup", "iothread", "pre-enrolled-keys", "replicate", "ro", "shared", "snapshot", "ssd", "writeback"]
)
_NET_MODELS = frozenset(
    [
        "e1000",
        "e1000-82540em",
        "e1000-82544gc",
        "e1000-82545em",
        "e1000e",
        "i82551",
        "i82557b",
        "i82559er",
        "ne2k_isa",
        "ne2k_pci",
        "pcnet",
        "rtl8139",
        "virtio",
        "vmxnet3",
    ]
)
_HOST_ADDRESS = re.compile(r"(?:[a-f0-9]{4,}:)?[a-f0-9]{2}:[a-f0-9]{2}(?:\.[a-f0-9])?")
_HOSTPCI_OPTIONS: dict[str, str] = {
    "host": rf"{_HOST_ADDRESS.pattern}(?:;{_HOST_ADDRESS.pattern})*",
    "mapping": r"[A-Za-z][\w-]+",
    "pcie": "(?i:0|1|no|yes|off|on|false|true)",
    "rombar": "(?i:0|1|no|yes|off|on|false|true)",
    "x-vga": "(?i:0|1|no|yes|off|on|false|true)",
    "legacy-igd": "(?i:0|1|no|yes|off|on|false|true)",
    "romfile": r"[^,;]+",
    "mdev": r"[^/\.:]+",
    "vendor-id": "0x[0-9a-fA-F]{4}",
    "device-id": "0x[0-9a-fA-F]{4}",
    "sub-vendor-id": "0x[0-9a-fA-F]{4}",
    "sub-device-id": "0x[0-9a-fA-F]{4}",
    "driver": "vfio|keep",
}


def parse_properties(text: str, default_key: str = "") -> dict[str, str]:
    """`first,key=value,…` as a dictionary in the order given; a value without a key goes to `default_key`."""
    parsed: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if part:
            parsed[key if equals else default_key] = value if equals else part
    return parsed


def parse_disk(value: ConfigValue) -> tuple[str, dict[str, str]]:
    """(volume, options) of a drive; `file=` may name the volume too."""
    options = parse_properties(str(value), "file")
    return options.pop("file", ""), options


def disk_text(volume: str, options: Mapping[str, str]) -> str:
    """A drive as PVE stores it: the volume, then the options sorted, booleans as 1 and 0, no format or import."""
    kept = {key: value for key, value in options.items() if key not in ("format", "import-from")}
    parts = [f"{key}={_zero_one(value) if key in _DISK_BOOLEANS else value}" for key, value in sorted(kept.items())]
    return ",".join([volume, *parts])


def size_text(size: int) -> str:
    """Bytes as PVE writes a disk's size: in the largest unit that divides it."""
    for unit, factor in (("T", 1024 * GIB), ("G", GIB), ("M", MIB), ("K", 1024)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def parse_size(text: str) -> int:
    """`10G`, `512M`, `1.5T` or a number of bytes, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    factor = {"": 1, "K": 1024, "M": MIB, "G": GIB, "T": 1024 * GIB}[match[2]]
    return int(float(match[1]) * factor)


def is_cdrom(value: ConfigValue) -> bool:
    volume, options = parse_disk(value)
    return options.get("media") == "cdrom" or volume == "cdrom" or volume.endswith(":cloudinit")


def disks(config: Mapping[str, ConfigValue]) -> dict[str, tuple[str, dict[str, str]]]:
    """Drives that hold data, CD-ROMs left out: `{key: (volume, options)}` in key order."""
    return {
        key: parse_disk(config[key]) for key in sorted(config) if DISK_KEY.fullmatch(key) and not is_cdrom(config[key])
    }


def volumes(config: Mapping[str, ConfigValue]) -> dict[str, str]:
    """Every volume a configuration names, unused and CD-ROM drives included: `{volume: key}`."""
    keys = [key for key in config if DISK_KEY.fullmatch(key) or UNUSED_KEY.fullmatch(key)]
    named = {parse_disk(config[key])[0]: key for key in keys}
    return {volume: key for volume, key in named.items() if ":" in volume}


def normalised(key: str, value: ConfigValue, mac: str) -> ConfigValue | None:
    """What PVE stores for a key that is no drive; None where an empty value means absent. `mac` fills a NIC's."""
    text = str(value)
    if key in INTEGER_KEYS:
        return int(text)
    if key == "tags":
        return tags_text(text) or None
    if key == "description":
        return text.rstrip() or None
    if re.fullmatch(r"net\d+", key):
        return net_text(text, mac)
    if key == "boot":
        return text or " "
    if key == "cipassword":
        return "**********" if text else None
    return text


def tags_text(text: str) -> str:
    """Tags as PVE keeps them: lower case, sorted, each once, joined by `;`."""
    return ";".join(sorted({tag for tag in re.split(r"[;,\s]+", text.lower()) if tag}))


def net_text(text: str, mac: str) -> str:
    """A NIC as PVE keeps it: `model=MAC` first, the rest sorted; a given MAC keeps its case."""
    options = parse_properties(text, "model")
    model = options.pop("model", "")
    address = options.pop("macaddr", "")
    for key in [key for key in options if key in _NET_MODELS]:
        model, address = key, options.pop(key)
    return ",".join([f"{model}={address or mac}", *(f"{key}={value}" for key, value in sorted(options.items()))])


def privilege_for(key: str) -> str | None:
    """The privilege on /vms/ID that setting a key takes, alternatives joined by `|`; None: only root may set it.

    Drives, PCI devices, serial ports and USB depend on the value too and are not answered here.
    """
    if key in _CLOUD_INIT_KEYS or re.fullmatch(r"ipconfig\d+", key):
        return "VM.Config.Cloudinit|VM.Config.Network"
    if re.fullmatch(r"net\d+", key):
        return "VM.Config.Network"
    if re.fullmatch(r"numa\d+", key):
        return "VM.Config.CPU"
    return _PRIVILEGE_BY_KEY.get(key)


def check_hostpci(key: str, value: str, release: str) -> dict[str, str]:
    """The options of a hostpciN; 400 in PVE's words where its grammar is broken (fakepve does not check it)."""
    known = {name for name in _HOSTPCI_OPTIONS if name != "driver" or not release.startswith("8.")}
    options = parse_properties(value, "host")
    for name in options:
        if name not in known:
            bad_parameters({key: f"invalid format - invalid key in comma-separated list property: {name}\n"})
    wrong = [name for name, text in options.items() if not re.fullmatch(_HOSTPCI_OPTIONS[name], text)]
    if wrong:
        lines = "".join(f"{key}.{name}: value does not match the regex pattern\n" for name in sorted(wrong))
        bad_parameters({key: f"invalid format - format error\n{lines}"})
    if not {"host", "mapping"} & set(options):
        bad_parameters({key: "one of 'host' or 'mapping' must be set\n"})
    return options


def live(key: str, hotplug: str, value: ConfigValue | None, old: ConfigValue | None) -> bool:
    """True when a running VM takes the change at once (`value` None: removal). `hotplug` is the VM's own key."""
    if key in _LIVE_KEYS or re.fullmatch(r"ipconfig\d+", key) or UNUSED_KEY.fullmatch(key):
        return True
    if re.fullmatch(r"(?:scsi|virtio)\d+", key):
        # A new disk is plugged in; one that goes away, or changes options that QEMU was started with, is left for the
        # next start. Whether it is part of backups, QEMU does not know.
        if value is None or "disk" not in hotplug:
            return False
        return old is None or _without_backup(str(old)) == _without_backup(str(value))
    return is_cdrom(value or old or "")


def _without_backup(disk: str) -> set[str]:
    return {part for part in disk.split(",") if not part.startswith(("backup=", "size="))}


def digest(config: Config, pending: Mapping[str, ConfigValue | None]) -> str:
    """The checksum of the configuration file, pending section included."""
    lines = [f"{key}: {config[key]}" for key in sorted(config)]
    lines += [f"pending {key}: {pending[key]}" for key in sorted(pending)]
    return hashlib.sha1("\n".join(lines).encode(), usedforsecurity=False).hexdigest()


def free_number(prefix: str, taken: Iterable[str]) -> str:
    """The first free key of a numbered family, e.g. `unused0`."""
    used = set(taken)
    return next(f"{prefix}{n}" for n in range(256) if f"{prefix}{n}" not in used)


def switched_off(options: Mapping[str, str], name: str) -> bool:
    """True where a boolean option says no; one that is absent does not."""
    return _zero_one(options.get(name, "1")) == "0"


def agent_enabled(config: Mapping[str, ConfigValue]) -> bool:
    enabled = parse_properties(str(config.get("agent", "0")), "enabled").get("enabled", "0")
    return enabled.lower() in ("1", "on", "yes", "true")


def link_up(config: Mapping[str, ConfigValue]) -> bool:
    """True unless the first NIC's cable is pulled (`link_down=1`)."""
    nics = sorted((key for key in config if re.fullmatch(r"net\d+", key)), key=lambda key: int(key[3:]))
    return not nics or _zero_one(parse_properties(str(config[nics[0]])).get("link_down", "0")) == "0"


def memory_mib(config: Mapping[str, ConfigValue]) -> int:
    return int(parse_properties(str(config.get("memory", "512")), "current")["current"])


def cpus(config: Mapping[str, ConfigValue]) -> int:
    return int(config.get("cores", 1)) * int(config.get("sockets", 1))


def _zero_one(text: str) -> str:
    return {"on": "1", "yes": "1", "true": "1", "off": "0", "no": "0", "false": "0"}.get(text.lower(), text)
