#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""What a node's kernel would show after its boot (simulated): command line, PCI tree, drivers, IOMMU groups, modules.

Runs inside the node at boot, from a copy in /usr/lib/gpulab-lab, so it needs nothing but the standard library. What it
decides comes from the booted files alone, as on a real machine: the `linux` line of grub.cfg (only update-grub writes
it) and the module configuration inside the initramfs (only update-initramfs does). An edited file that was not brought
into these changes nothing, however often the node reboots.

`boot()` is pure; `lay_out()` writes its result below a folder; `main()` shows that to the node by bind mounts.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

HARDWARE = "/etc/gpulab-lab.d/hardware.json"
#: What was laid out at this boot; the control machine reads it too.
LAID_OUT = "/var/lib/lab-hardware"
#: Modules that load others first (modules.dep), for those that matter here.
DEPENDS = {
    "vfio_pci": ["vfio_pci_core", "vfio_iommu_type1"],
    "vfio_pci_core": ["vfio"],
    "vfio_iommu_type1": ["vfio"],
    "nouveau": ["drm_ttm_helper", "gpu_sched"],
    "snd_hda_intel": ["snd_hda_codec"],
}
#: Drivers that are part of the kernel: always there, and never in /proc/modules.
BUILT_IN = {"pcieport"}
#: Misc device 196 is /dev/vfio/vfio (devices.txt). The groups' major is dynamic on a real machine; this one is of the
#: range for local and experimental use, where no driver of the control machine answers.
VFIO_CONTAINER = (10, 196)
VFIO_GROUP_MAJOR = 120
#: From this release on the kernel switches Intel's IOMMU on by itself.
INTEL_DEFAULT_ON = (6, 8)


@dataclass(frozen=True)
class Device:
    """One PCI function: ids in hex without 0x, `pci_class` six digits, `drivers` in the order of modules.alias."""

    address: str
    vendor: str
    device: str
    pci_class: str
    subsystem_vendor: str
    subsystem_device: str
    group: int
    drivers: tuple[str, ...] = ()
    boot_vga: bool = False
    #: The bus behind a bridge, two hex digits.
    secondary_bus: str | None = None

    @property
    def is_bridge(self) -> bool:
        return self.secondary_bus is not None

    @property
    def is_vga(self) -> bool:
        return self.pci_class.startswith("0300")


@dataclass(frozen=True)
class Machine:
    """What is screwed into the node. `iommu`: intel, amd, or absent (off in the firmware)."""

    kernel: str
    iommu: str
    devices: tuple[Device, ...]


@dataclass
class ModuleConfig:
    """modprobe.d and the lists of modules, as one boot sees them. Names have underscores, as in the kernel."""

    options: dict[str, list[str]] = field(default_factory=dict)
    blacklist: set[str] = field(default_factory=set)
    softdeps: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    installs: dict[str, str] = field(default_factory=dict)
    #: Loaded in the initramfs, before devices are probed.
    early: list[str] = field(default_factory=list)
    #: Loaded in the real root, after devices were probed.
    late: list[str] = field(default_factory=list)


@dataclass
class Booted:
    """The outcome of a boot."""

    machine: Machine
    cmdline: str
    #: Loaded modules in order.
    modules: list[str]
    #: PCI address to driver (its name under /sys/bus/pci/drivers).
    drivers: dict[str, str]
    #: Is the IOMMU in use?
    iommu: bool
    #: `identity` (pass-through for the host's own devices) or `DMA-FQ`.
    domain: str
    options: dict[str, list[str]]

    @property
    def vfio_groups(self) -> list[int]:
        """IOMMU groups with a function that is bound to vfio-pci."""
        bound = {device.group for device in self.machine.devices if self.drivers.get(device.address) == "vfio-pci"}
        return sorted(bound)


def read_machine(text: str) -> Machine:
    """The machine that hardware.json describes.

    Raises:
        KeyError, ValueError: it is not of that form.
    """
    described = json.loads(text)
    return Machine(described["kernel"], described["iommu"], tuple(_device(entry) for entry in described["devices"]))


def _device(entry: Mapping[str, Any]) -> Device:
    vendor, device = entry["id"].split(":")
    subsystem_vendor, subsystem_device = entry["subsystem"].split(":")
    return Device(
        address=entry["address"],
        vendor=vendor,
        device=device,
        pci_class=entry["class"],
        subsystem_vendor=subsystem_vendor,
        subsystem_device=subsystem_device,
        group=entry["group"],
        drivers=tuple(entry.get("drivers", ())),
        boot_vga=entry.get("boot_vga", False),
        secondary_bus=entry.get("secondary_bus"),
    )


def kernel_command_line(grub_cfg: str) -> str:
    """What /proc/cmdline says when GRUB boots the first entry of this file.

    Raises:
        ValueError: no entry boots a kernel.
    """
    for line in grub_cfg.splitlines():
        words = line.split()
        if words and words[0] == "linux":
            return " ".join([f"BOOT_IMAGE={words[1]}", *words[2:]])
    raise ValueError("grub.cfg has no `linux` line")


def unpack_initrd(data: bytes) -> dict[str, str]:
    """Path to text of the files in a gzipped cpio archive of format newc."""
    archive = gzip.decompress(data)
    files: dict[str, str] = {}
    position = 0
    while archive[position : position + 6] == b"070701":
        numbers = [int(archive[position + start : position + start + 8], 16) for start in range(6, 110, 8)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name = archive[position + 110 : position + 110 + name_size - 1].decode()
        start = _padded(position + 110 + name_size)
        if name == "TRAILER!!!":
            break
        if mode & 0o170000 == 0o100000:
            files[name.removeprefix("./")] = archive[start : start + size].decode(errors="replace")
        position = _padded(start + size)
    return files


def pack_initrd(files: Mapping[str, str]) -> bytes:
    """A gzipped cpio archive of format newc with these files (path to text) and the folders that they lie in."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents if str(parent) != "."}
    archive = bytearray()
    for number, path in enumerate([*sorted(folders | set(files)), "TRAILER!!!"], start=1):
        data = files.get(path, "").encode()
        mode = 0o040755 if path in folders else 0o100644 if path in files else 0
        # Inode, mode, owner, group, links, time, size, device and its node's numbers, length of the name, checksum.
        numbers = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path.encode()) + 1, 0]
        archive += b"070701" + "".join(f"{value:08X}" for value in numbers).encode() + path.encode() + b"\0"
        archive += bytes(_padded(len(archive)) - len(archive)) + data
        archive += bytes(_padded(len(archive)) - len(archive))
    return gzip.compress(bytes(archive), compresslevel=1, mtime=0)


def pack(folder: Path, target: Path) -> None:
    """Write the archive of a folder, for update-initramfs."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    target.write_bytes(pack_initrd({str(path.relative_to(folder)): path.read_text() for path in paths}))


def _padded(position: int) -> int:
    return (position + 3) // 4 * 4


def module_config(files: Mapping[str, str], cmdline: str) -> ModuleConfig:
    """The module configuration in an initramfs, with what the kernel's command line adds to it."""
    config = ModuleConfig()
    for text in _in_effect(files, ("etc/modprobe.d", "usr/lib/modprobe.d"), ".conf"):
        _read_modprobe(text, config)
    config.early += _names(files.get("conf/modules", ""))
    for text in _in_effect(files, ("etc/modules-load.d", "usr/lib/modules-load.d"), ".conf"):
        config.late += _names(text)
    config.late += _names(files.get("etc/modules", ""))
    for word in cmdline.split():
        key, _, value = word.partition("=")
        module, _, option = key.partition(".")
        if key in ("modprobe.blacklist", "module_blacklist"):
            config.blacklist |= {_kernel_name(name) for name in value.split(",")}
            if key == "module_blacklist":
                config.installs |= {_kernel_name(name): "/bin/false" for name in value.split(",")}
        elif key == "modules_load":
            config.late += [_kernel_name(name) for name in value.split(",")]
        elif option:
            config.options.setdefault(_kernel_name(module), []).append(f"{option}={value}")
    return config


def _in_effect(files: Mapping[str, str], folders: Iterable[str], suffix: str) -> list[str]:
    """The texts of these drop-in folders in the order of their names; an earlier folder's file hides a later one's."""
    chosen: dict[str, str] = {}
    for folder in folders:
        for path, text in files.items():
            parent, _, name = path.rpartition("/")
            if parent == folder and name.endswith(suffix):
                chosen.setdefault(name, text)
    return [chosen[name] for name in sorted(chosen)]


def _read_modprobe(text: str, config: ModuleConfig) -> None:
    """Add one file of modprobe.d(5)."""
    for line in text.replace("\\\n", " ").splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith("#"):
            continue
        command, name, rest = words[0], _kernel_name(words[1]), words[2:]
        if command == "options":
            config.options.setdefault(name, []).extend(rest)
        elif command == "blacklist":
            config.blacklist.add(name)
        elif command == "install":
            config.installs[name] = " ".join(rest)
        elif command == "softdep":
            before, after = config.softdeps.setdefault(name, ([], []))
            into = before
            for word in rest:
                if word in ("pre:", "post:"):
                    into = before if word == "pre:" else after
                else:
                    into.append(_kernel_name(word))


def _names(text: str) -> list[str]:
    """The modules of a list as modules-load.d(5) has it."""
    lines = [line.strip() for line in text.splitlines()]
    return [_kernel_name(line.split()[0]) for line in lines if line and line[0] not in "#;"]


def _kernel_name(name: str) -> str:
    return name.replace("-", "_")


def boot(machine: Machine, cmdline: str, config: ModuleConfig) -> Booted:
    """Boot: load what the initramfs lists, probe the devices in order, then load what the real root lists."""
    running = _Kernel(machine, config, iommu_in_use(machine, cmdline))
    for device in machine.devices:
        for driver in device.drivers:
            if driver in BUILT_IN:
                running.drivers.setdefault(device.address, driver)
    for name in config.early:
        running.load(name)
    for device in machine.devices:
        for driver in device.drivers:
            # udev asks by the device's alias, and a blacklist holds for aliases only.
            if driver not in BUILT_IN and driver not in config.blacklist:
                running.load(driver)
    for name in config.late:
        running.load(name)
    return Booted(
        machine=machine,
        cmdline=cmdline,
        modules=running.modules,
        drivers=running.drivers,
        iommu=running.iommu,
        domain=domain_type(cmdline),
        options=config.options,
    )


def iommu_in_use(machine: Machine, cmdline: str) -> bool:
    """Does this kernel use the machine's IOMMU with this command line?"""
    words = cmdline.split()
    if machine.iommu == "absent" or "iommu=off" in words:
        return False
    if machine.iommu == "amd":
        return "amd_iommu=off" not in words
    settings = [word.removeprefix("intel_iommu=") for word in words if word.startswith("intel_iommu=")]
    chosen = [part for setting in settings for part in setting.split(",") if part in ("on", "off")]
    if chosen:
        return chosen[-1] == "on"
    found = re.match(r"(\d+)\.(\d+)", machine.kernel)
    return found is not None and (int(found[1]), int(found[2])) >= INTEL_DEFAULT_ON


def domain_type(cmdline: str) -> str:
    """The type of a group's default domain, as /sys/kernel/iommu_groups/N/type says it."""
    words = cmdline.split()
    return "identity" if "iommu=pt" in words or "iommu.passthrough=1" in words else "DMA-FQ"


class _Kernel:
    """Loads modules as modprobe does; a loaded driver takes every device that it matches and that has no driver."""

    def __init__(self, machine: Machine, config: ModuleConfig, iommu: bool) -> None:
        self.machine = machine
        self.config = config
        self.iommu = iommu
        self.modules: list[str] = []
        self.drivers: dict[str, str] = {}
        self._loading: set[str] = set()

    def load(self, name: str) -> None:
        if name in self.modules or name in self._loading:
            return
        if re.match(r"(/usr)?/bin/(true|false)\b", self.config.installs.get(name, "")):
            return
        self._loading.add(name)
        before, after = self.config.softdeps.get(name, ([], []))
        for other in [*DEPENDS.get(name, []), *before]:
            self.load(other)
        self.modules.append(name)
        self._probe(name)
        for other in after:
            self.load(other)

    def _probe(self, name: str) -> None:
        for device in self.machine.devices:
            if device.address in self.drivers:
                continue
            if name == "vfio_pci":
                # vfio-pci refuses a device that no IOMMU isolates.
                if self.iommu and self._vfio_wants(device):
                    self.drivers[device.address] = "vfio-pci"
            elif name in device.drivers:
                self.drivers[device.address] = name

    def _vfio_wants(self, device: Device) -> bool:
        """Does an entry of the option `ids` (vendor:device[:subvendor[:subdevice[:class[:mask]]]]) match?"""
        own = (device.vendor, device.device, device.subsystem_vendor, device.subsystem_device)
        for option in self.config.options.get("vfio_pci", []):
            key, _, value = option.partition("=")
            if key != "ids":
                continue
            for entry in value.strip('"').split(","):
                words = entry.lower().removeprefix("0x").split(":")
                wanted = [word.removeprefix("0x") for word in words[:4]]
                if len(wanted) >= 2 and all(
                    word in ("ffffffff", "") or int(word, 16) == int(is_, 16)
                    for word, is_ in zip(wanted, own, strict=False)
                ):
                    return True
        return False


def lay_out(folder: Path, booted: Booted) -> None:
    """Write `proc/` and `sys/` below `folder` as the kernel would show them; links lead where they lead there."""
    for name in ("proc", "sys"):
        shutil.rmtree(folder / name, ignore_errors=True)
    proc, sys_ = folder / "proc", folder / "sys"
    _write(proc / "cmdline", booted.cmdline)
    _write(proc / "osrelease", booted.machine.kernel)
    _write(proc / "modules", "".join(_proc_modules(booted)), end="")
    for name in ("bus/pci/devices", "bus/pci/drivers", "bus/pci/slots", "kernel/iommu_groups", "class/iommu", "module"):
        (sys_ / name).mkdir(parents=True)
    for device in booted.machine.devices:
        _lay_out_device(sys_, device, booted)
    if booted.iommu:
        unit = "dmar0" if booted.machine.iommu == "intel" else "ivhd0"
        (sys_ / "class/iommu" / unit / "devices").mkdir(parents=True)
        for group in {device.group for device in booted.machine.devices}:
            _write(sys_ / "kernel/iommu_groups" / str(group) / "type", booted.domain)
    for name in booted.modules:
        module = sys_ / "module" / name
        (module / "holders").mkdir(parents=True)
        for key, value in (("refcnt", "0"), ("coresize", "16384"), ("initstate", "live")):
            _write(module / key, value)
        for option in booted.options.get(name, []):
            key, _, value = option.partition("=")
            _write(module / "parameters" / key, value)


def _lay_out_device(sys_: Path, device: Device, booted: Booted) -> None:
    folder = sys_ / "bus/pci/devices" / device.address
    folder.mkdir()
    values = {
        "vendor": f"0x{device.vendor}",
        "device": f"0x{device.device}",
        "subsystem_vendor": f"0x{device.subsystem_vendor}",
        "subsystem_device": f"0x{device.subsystem_device}",
        "class": f"0x{device.pci_class}",
        "revision": "0xa1" if device.vendor == "10de" else "0x05",
        "irq": "0",
        "enable": "1",
        "numa_node": "-1",
        "driver_override": "(null)",
        "resource": "\n".join(["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * 13),
        "modalias": _modalias(device),
    }
    if device.is_vga:
        values["boot_vga"] = "1" if device.boot_vga else "0"
    if device.vendor == "10de":
        values |= {
            "max_link_speed": "16.0 GT/s PCIe",
            "max_link_width": "16",
            "current_link_speed": "16.0 GT/s PCIe",
            "current_link_width": "16",
        }
    for name, value in values.items():
        _write(folder / name, value)
    (folder / "config").write_bytes(_configuration_space(device, booted.machine.devices))
    if device.secondary_bus is not None:
        (folder / "pci_bus" / f"{device.address[:4]}:{device.secondary_bus}").mkdir(parents=True)
    if booted.iommu:
        group = sys_ / "kernel/iommu_groups" / str(device.group)
        (group / "devices").mkdir(parents=True, exist_ok=True)
        (group / "devices" / device.address).symlink_to(f"../../../../bus/pci/devices/{device.address}")
        (folder / "iommu_group").symlink_to(f"../../../../kernel/iommu_groups/{device.group}")
    if driver := booted.drivers.get(device.address):
        registered = sys_ / "bus/pci/drivers" / driver
        registered.mkdir(exist_ok=True)
        (registered / device.address).symlink_to(f"../../devices/{device.address}")
        (folder / "driver").symlink_to(f"../../drivers/{driver}")


def _modalias(device: Device) -> str:
    ids = f"v{device.vendor:0>8}d{device.device:0>8}sv{device.subsystem_vendor:0>8}sd{device.subsystem_device:0>8}"
    code = device.pci_class
    return f"pci:{ids}bc{code[:2]}sc{code[2:4]}i{code[4:]}".upper().replace("PCI:V", "pci:v")


def _configuration_space(device: Device, devices: Iterable[Device]) -> bytes:
    """256 bytes, as far as lspci reads them: ids, class, header type, a bridge's buses."""
    space = bytearray(256)
    struct.pack_into("<HH", space, 0x00, int(device.vendor, 16), int(device.device, 16))
    # Interface, subclass, class.
    space[0x09:0x0C] = bytes.fromhex(device.pci_class)[::-1]
    slot = device.address.rpartition(".")[0]
    functions = sum(other.address.startswith(f"{slot}.") for other in devices)
    space[0x0E] = 0x80 if functions > 1 else 0x00
    if device.secondary_bus is not None:
        space[0x0E] |= 0x01
        bus = int(device.secondary_bus, 16)
        space[0x18:0x1B] = bytes([int(device.address[5:7], 16), bus, bus])
    else:
        struct.pack_into("<HH", space, 0x2C, int(device.subsystem_vendor, 16), int(device.subsystem_device, 16))
    return bytes(space)


def _proc_modules(booted: Booted) -> list[str]:
    """Lines of /proc/modules, newest first: name, size, uses, users, state, address."""
    lines = []
    for name in reversed(booted.modules):
        users = [other for other in booted.modules if name in DEPENDS.get(other, [])]
        lines.append(
            f"{name} 16384 {len(users)} {''.join(f'{user},' for user in users) or '-'} Live 0x0000000000000000\n"
        )
    return lines


def _write(path: Path, text: str, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + end)


def read_boot(root: Path) -> Booted:
    """Boot the node whose file system is at `root`, from what its boot loader and its initramfs hold."""
    machine = read_machine((root / HARDWARE.lstrip("/")).read_text())
    cmdline = kernel_command_line((root / "boot/grub/grub.cfg").read_text())
    initrd = root / "boot" / f"initrd.img-{machine.kernel}"
    files = unpack_initrd(initrd.read_bytes())
    return boot(machine, cmdline, module_config(files, cmdline))


def main() -> None:
    if not Path("/boot/grub/grub.cfg").exists():
        # The first boot: what the installer would have left.
        for command in (["update-initramfs", "-c", "-k", "all"], ["update-grub"]):
            subprocess.run(command, check=True)
    booted = read_boot(Path("/"))
    folder = Path(LAID_OUT)
    lay_out(folder, booted)
    _write(folder / "proc/cpuinfo", _cpuinfo(Path("/proc/cpuinfo").read_text(), booted.machine), end="")
    _show(folder)
    _make_vfio_nodes(booted)
    print(f"simulated: booted {booted.machine.kernel} with: {booted.cmdline}")
    for device in booted.machine.devices:
        driver = booted.drivers.get(device.address, "no driver")
        print(f"simulated: {device.address} {device.vendor}:{device.device} {driver}")


def _cpuinfo(text: str, machine: Machine) -> str:
    """The control machine's processors under the maker that the machine's IOMMU belongs to."""
    maker = "AuthenticAMD" if machine.iommu == "amd" else "GenuineIntel"
    return re.sub(r"(?m)^(vendor_id\s*:).*$", rf"\1 {maker}", text)


def _show(folder: Path) -> None:
    """Bind what was laid out over what the container's kernel shows."""
    if not Path("/sys/module").exists():
        # The container's /sys is a small read-only tmpfs with the real folders mounted in it.
        _mount("-o", "remount,rw", "/sys")
        Path("/sys/module").mkdir()
        _mount("-o", "remount,ro", "/sys")
    for name in ("bus/pci", "kernel/iommu_groups", "class/iommu", "module"):
        _mount("--bind", str(folder / "sys" / name), f"/sys/{name}")
    shown = {"cmdline": "cmdline", "cpuinfo": "cpuinfo", "osrelease": "sys/kernel/osrelease", "modules": "modules"}
    for name, target in shown.items():
        # A kernel without loadable modules has no /proc/modules to bind over; lsmod's stand-in reads ours either way.
        if Path("/proc", target).exists():
            _mount("--bind", str(folder / "proc" / name), f"/proc/{target}")
    _make_module_index(Path("/usr/lib/modules", os.uname().release))


def _make_module_index(folder: Path) -> None:
    """An empty index for the kernel that really runs: lspci and modprobe complain where there is none."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        (folder / name).touch()
    subprocess.run(["depmod"], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _make_vfio_nodes(booted: Booted) -> None:
    if "vfio" not in booted.modules:
        return
    Path("/dev/vfio").mkdir(exist_ok=True)
    _make_node("/dev/vfio/vfio", 0o666, VFIO_CONTAINER)
    for group in booted.vfio_groups:
        _make_node(f"/dev/vfio/{group}", 0o600, (VFIO_GROUP_MAJOR, group))


def _make_node(path: str, mode: int, numbers: tuple[int, int]) -> None:
    if not os.path.exists(path):
        os.mknod(path, mode | 0o020000, os.makedev(*numbers))
        os.chmod(path, mode)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pack"]:
        pack(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
