# SPDX-License-Identifier: MIT
"""What a node's kernel would show after its boot (simulated): command line, PCI tree, drivers, IOMMU groups, modules.

Runs inside the node at boot, so it needs nothing but the standard library. What it decides comes from the booted files
alone, as on a real machine: the default entry of grub.cfg (only update-grub writes it) and the module configuration
and scripts inside the initramfs (only update-initramfs does). An edited file that was not brought into these changes
nothing, however often the node reboots.

`boot()` is pure; `lay_out()` writes its result below a folder; `read_boot()` boots a node's file system, for which it
runs the scripts of its initramfs (`initramfs.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rehearsal.node import grub, initramfs

HARDWARE = "/etc/gpulab-lab.d/hardware.json"
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
#: Parameters that sysfs shows of a loaded module, with the kernel's own values.
PARAMETERS = {
    "vfio_pci": {"disable_idle_d3": "N", "disable_vga": "N", "nointxmask": "N"},
    "vfio_iommu_type1": {"allow_unsafe_interrupts": "N", "disable_hugepages": "N"},
}
#: From this release on the kernel switches Intel's IOMMU on by itself.
INTEL_DEFAULT_ON = (6, 8)
#: Sizes of huge pages in KiB, as the command line names them.
PAGE_SIZES = {"2M": 2048, "1G": 1048576}


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
    #: Sizes in bytes of the base address registers that are there.
    bars: tuple[int, ...] = ()
    #: In the order in which the kernel would use them; none: the device cannot be reset.
    reset_methods: tuple[str, ...] = ()
    #: Speed and width of the PCIe link, (`16.0 GT/s PCIe`, 16), as it is and as it could be.
    link: tuple[str, int] | None = None
    max_link: tuple[str, int] | None = None

    @property
    def slot(self) -> str:
        """Domain, bus and device, which all functions of a device share."""
        return self.address.rpartition(".")[0]

    @property
    def is_bridge(self) -> bool:
        return self.secondary_bus is not None

    @property
    def is_vga(self) -> bool:
        return self.pci_class.startswith("0300")


@dataclass(frozen=True)
class Machine:
    """What is screwed into the node, and the kernels that are installed on it.

    `kernel`: the one that is booted. `iommu`: intel, amd, or absent (off in the firmware). `cpu`: intel or amd.
    `memory_mib`: None for that of the machine that the node really runs on.
    """

    kernel: str
    iommu: str
    devices: tuple[Device, ...]
    kernels: tuple[str, ...] = ()
    cpu: str = "intel"
    memory_mib: int | None = None

    @property
    def firmware_tables(self) -> list[str]:
        """The ACPI tables with which the firmware hands an IOMMU to the kernel."""
        return {"intel": ["DMAR"], "amd": ["IVRS"]}.get(self.iommu, [])


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


@dataclass(frozen=True)
class InitTop:
    """What the scripts of the initramfs have done before udev starts there.

    `overrides`: PCI address to what its driver_override says. `messages`: the lines of the kernel's log. `options`:
    those that a script gave to modprobe itself.
    """

    overrides: Mapping[str, str] = field(default_factory=dict)
    drivers: Mapping[str, str] = field(default_factory=dict)
    modules: Sequence[str] = ()
    messages: Sequence[str] = ()
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass
class Booted:
    """The outcome of a boot. `machine`: with the IOMMU groups that this command line makes of it."""

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
    overrides: dict[str, str] = field(default_factory=dict)
    #: Lines of the kernel's log.
    messages: list[str] = field(default_factory=list)

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
    kernel, iommu = described["kernel"], described["iommu"]
    return Machine(
        kernel=kernel,
        iommu=iommu,
        devices=tuple(_device(entry) for entry in described["devices"]),
        kernels=tuple(described.get("kernels", [kernel])),
        cpu=described.get("cpu", "amd" if iommu == "amd" else "intel"),
        memory_mib=described.get("memory_mib"),
    )


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
        bars=tuple(entry.get("bars", ())),
        reset_methods=tuple(entry.get("reset_methods", ())),
        link=_link(entry.get("link")),
        max_link=_link(entry.get("max_link", entry.get("link"))),
    )


def _link(described: Sequence[Any] | None) -> tuple[str, int] | None:
    return (described[0], described[1]) if described else None


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


def boot(machine: Machine, cmdline: str, config: ModuleConfig, init_top: InitTop | None = None) -> Booted:
    """Boot: go on from what the initramfs did first, load what it lists, probe the devices in order, then load what the
    real root lists.
    """
    running = Kernel(machine, cmdline, config)
    if init_top is not None:
        running.go_on_from(init_top)
    for name in config.early:
        running.load(name)
    for device in machine.devices:
        for driver in device.drivers:
            # udev asks by the device's alias, and a blacklist holds for aliases only.
            if driver not in BUILT_IN and driver not in config.blacklist:
                running.load(driver)
    for name in config.late:
        running.load(name)
    return running.booted(init_top.messages if init_top is not None else [])


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


def iommu_groups(machine: Machine, cmdline: str) -> Machine:
    """The machine with the groups that pcie_acs_override makes of those of its hardware.

    Simplified from the patch that PVE's kernels carry: with `downstream` or `multifunction`, whichever, each device
    (all functions of a slot) gets a group of its own, also where the two would differ; `id:…` does nothing.
    """
    settings = [word.partition("=")[2] for word in cmdline.split() if word.startswith("pcie_acs_override=")]
    if not {"downstream", "multifunction"} & {part for setting in settings for part in setting.split(",")}:
        return machine
    groups: dict[str, int] = {}
    following = max((device.group for device in machine.devices), default=0) + 1
    for device in machine.devices:
        if device.slot not in groups:
            free = device.group not in groups.values()
            groups[device.slot] = device.group if free else following
            following += not free
    split = tuple(replace(device, group=groups[device.slot]) for device in machine.devices)
    return replace(machine, devices=split)


def huge_pages(machine: Machine, cmdline: str) -> dict[int, int]:
    """Size of a huge page in KiB to the number of pages that the kernel set aside; no more than the memory holds."""
    size = PAGE_SIZES["2M"]
    pages = dict.fromkeys(PAGE_SIZES.values(), 0)
    for word in cmdline.split():
        key, _, value = word.partition("=")
        if key in ("default_hugepagesz", "hugepagesz"):
            size = PAGE_SIZES.get(value, 0)
        elif key == "hugepages" and value.isdigit() and size:
            fitting = int(value) if machine.memory_mib is None else machine.memory_mib * 1024 // size
            pages[size] = min(int(value), fitting)
            # Each `hugepagesz` is for one `hugepages`; the kernel warns of a second one and ignores it.
            size = 0
    return pages


class Kernel:
    """Loads modules as modprobe does; a loaded driver takes every device that it matches and that has no driver.

    `available`: the modules that can be loaded (in an initramfs); None: all.
    """

    def __init__(
        self, machine: Machine, cmdline: str, config: ModuleConfig, available: Collection[str] | None = None
    ) -> None:
        self.machine = iommu_groups(machine, cmdline)
        self.cmdline = cmdline
        self.config = config
        self.options = {name: list(given) for name, given in config.options.items()}
        self.iommu = iommu_in_use(machine, cmdline)
        self.modules: list[str] = []
        self.drivers: dict[str, str] = {}
        #: PCI address to what driver_override says; a device that is not in it has none.
        self.overrides: dict[str, str] = {}
        self._available = available
        self._loading: set[str] = set()
        for device in machine.devices:
            for driver in device.drivers:
                if driver in BUILT_IN:
                    self.drivers.setdefault(device.address, driver)

    def go_on_from(self, init_top: InitTop) -> None:
        self.modules = list(init_top.modules)
        self.drivers |= init_top.drivers
        self.overrides = dict(init_top.overrides)
        self.options |= {name: list(given) for name, given in init_top.options.items()}

    def booted(self, messages: Iterable[str] = ()) -> Booted:
        """What stands at this moment."""
        return Booted(
            machine=self.machine,
            cmdline=self.cmdline,
            modules=self.modules,
            drivers=self.drivers,
            iommu=self.iommu,
            domain=domain_type(self.cmdline),
            options=self.options,
            overrides=self.overrides,
            messages=list(messages),
        )

    def load(self, name: str) -> bool:
        """Is the module loaded now?"""
        if name in self.modules or name in self._loading:
            return True
        if re.match(r"(/usr)?/bin/(true|false)\b", self.config.installs.get(name, "")):
            return False
        if self._available is not None and name not in self._available:
            return False
        self._loading.add(name)
        before, after = self.config.softdeps.get(name, ([], []))
        for other in [*DEPENDS.get(name, []), *before]:
            self.load(other)
        self.modules.append(name)
        for device in self.machine.devices:
            self._offer(device, name)
        for other in after:
            self.load(other)
        return True

    def probe(self, address: str) -> None:
        """Offer a device to every loaded driver, as a write to drivers_probe does.

        Raises:
            KeyError: there is no such device.
        """
        device = {device.address: device for device in self.machine.devices}[address]
        for name in self.modules:
            self._offer(device, name)

    def _offer(self, device: Device, name: str) -> None:
        if device.address not in self.drivers and self._takes(device, name):
            self.drivers[device.address] = driver_of(name)

    def _takes(self, device: Device, name: str) -> bool:
        if name == "vfio_pci" and not self.iommu:
            # vfio-pci refuses a device that no IOMMU isolates.
            return False
        if override := self.overrides.get(device.address):
            return override == driver_of(name)
        return self._vfio_wants(device) if name == "vfio_pci" else name in device.drivers

    def _vfio_wants(self, device: Device) -> bool:
        """Does an entry of the option `ids` (vendor:device[:subvendor[:subdevice[:class[:mask]]]]) match?"""
        own = (device.vendor, device.device, device.subsystem_vendor, device.subsystem_device)
        for option in self.options.get("vfio_pci", []):
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


def driver_of(module: str) -> str:
    """The name under /sys/bus/pci/drivers of the driver that a module brings."""
    return "vfio-pci" if module == "vfio_pci" else module


def lay_out(folder: Path, booted: Booted) -> None:
    """Write `proc/` and `sys/` below `folder` as the kernel would show them; links lead where they lead there."""
    for name in ("proc", "sys"):
        shutil.rmtree(folder / name, ignore_errors=True)
    proc, sys_ = folder / "proc", folder / "sys"
    machine = booted.machine
    _write(proc / "cmdline", booted.cmdline)
    _write(proc / "sys/kernel/osrelease", machine.kernel)
    _write(proc / "modules", "".join(_proc_modules(booted)), end="")
    _write(proc / "cpuinfo", _cpuinfo(Path("/proc/cpuinfo").read_text(), machine), end="")
    _write(proc / "meminfo", _meminfo(Path("/proc/meminfo").read_text(), machine), end="")
    _write(proc / "kmsg", "".join(f"{line}\n" for line in booted.messages), end="")
    for name in ("bus/pci/devices", "bus/pci/drivers", "bus/pci/slots", "kernel/iommu_groups", "class/iommu", "module"):
        (sys_ / name).mkdir(parents=True)
    resources = _resources(machine.devices)
    for device in machine.devices:
        _lay_out_device(sys_, device, booted, resources[device.address])
    if booted.iommu:
        unit = "dmar0" if machine.iommu == "intel" else "ivhd0"
        (sys_ / "class/iommu" / unit / "devices").mkdir(parents=True)
        for group in {device.group for device in machine.devices}:
            _write(sys_ / "kernel/iommu_groups" / str(group) / "type", booted.domain)
    (sys_ / "firmware/acpi/tables").mkdir(parents=True)
    for table in machine.firmware_tables:
        _write(sys_ / "firmware/acpi/tables" / table, f"{table}: simulated")
    for size, count in huge_pages(machine, booted.cmdline).items():
        _write(sys_ / f"kernel/mm/hugepages/hugepages-{size}kB/nr_hugepages", str(count))
    for name in booted.modules:
        _lay_out_module(sys_, name, booted)


def _lay_out_module(sys_: Path, name: str, booted: Booted) -> None:
    module = sys_ / "module" / name
    (module / "holders").mkdir(parents=True)
    for key, value in (("refcnt", "0"), ("coresize", "16384"), ("initstate", "live")):
        _write(module / key, value)
    known = PARAMETERS.get(name, {})
    parameters = dict(known)
    for option in booted.options.get(name, []):
        key, equals, value = option.partition("=")
        # A boolean's name alone switches it on, and sysfs shows it as Y or N.
        parameters[key] = _boolean(value if equals else "1") if key in known else value
    for key, value in parameters.items():
        _write(module / "parameters" / key, value)
    if name == "vfio_pci" or any(name in device.drivers for device in booted.machine.devices):
        (sys_ / "bus/pci/drivers" / driver_of(name)).mkdir(exist_ok=True)


def _boolean(value: str) -> str:
    return "Y" if value.lower() in ("1", "y", "yes", "t", "true", "on") else "N"


def _resources(devices: Iterable[Device]) -> dict[str, str]:
    """PCI address to its file `resource`: 13 lines of start, end and flags, of which six are base address registers.

    The addresses are invented, but no two overlap. A size tells the kind: up to 256 bytes are I/O ports, from 32 MiB on
    it is 64-bit prefetchable memory (which takes two registers), the rest is 32-bit memory.

    Raises:
        ValueError: a device has more than six registers.
    """
    following = {"io": 0x3000, "low": 0x80000000, "high": 0x4000000000}
    files = {}
    for device in devices:
        lines: list[str] = []
        for size in device.bars:
            kind = "io" if size <= 256 else "high" if size >= 32 << 20 else "low"
            start = (following[kind] + size - 1) // size * size
            following[kind] = start + size
            flags = {"io": 0x40101, "low": 0x40200, "high": 0x14220C}[kind]
            lines += [_resource(start, start + size - 1, flags), *([_resource(0, 0, 0)] if kind == "high" else [])]
        if len(lines) > 6:
            raise ValueError(f"{device.address}: more than six base address registers: {list(device.bars)}")
        files[device.address] = "\n".join(lines + [_resource(0, 0, 0)] * (13 - len(lines)))
    return files


def _resource(start: int, end: int, flags: int) -> str:
    return f"0x{start:016x} 0x{end:016x} 0x{flags:016x}"


def _lay_out_device(sys_: Path, device: Device, booted: Booted, resource: str) -> None:
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
        "driver_override": booted.overrides.get(device.address, "(null)"),
        "resource": resource,
        "modalias": _modalias(device),
    }
    if device.is_vga:
        values["boot_vga"] = "1" if device.boot_vga else "0"
    if device.reset_methods:
        # The kernel has no such file for a device that it cannot reset.
        values["reset_method"] = " ".join(device.reset_methods)
    for prefix, link in (("current", device.link), ("max", device.max_link)):
        if link is not None:
            values |= {f"{prefix}_link_speed": link[0], f"{prefix}_link_width": str(link[1])}
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
        show_driver(sys_, device.address, driver)


def show_driver(sys_: Path, address: str, driver: str) -> None:
    """The links between a device and the driver that has it."""
    registered = sys_ / "bus/pci/drivers" / driver
    registered.mkdir(exist_ok=True)
    (registered / address).symlink_to(f"../../devices/{address}")
    (sys_ / "bus/pci/devices" / address / "driver").symlink_to(f"../../drivers/{driver}")


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


def _cpuinfo(text: str, machine: Machine) -> str:
    """The control machine's processors under the maker of the node's."""
    maker = "AuthenticAMD" if machine.cpu == "amd" else "GenuineIntel"
    return re.sub(r"(?m)^(vendor_id\s*:).*$", rf"\1 {maker}", text)


def _meminfo(text: str, machine: Machine) -> str:
    """The control machine's memory under the node's total."""
    if machine.memory_mib is None:
        return text
    return re.sub(r"(?m)^(MemTotal:\s*)\d+ kB$", rf"\g<1>{machine.memory_mib * 1024} kB", text)


def kernel_files(version: str) -> dict[str, str]:
    """Path to text of what an installed kernel leaves on the node, as far as anything here reads it."""
    return {
        f"/boot/vmlinuz-{version}": "simulated: stands for the kernel of Proxmox VE; nothing boots it\n",
        f"/usr/lib/modules/{version}/modules.dep": _MODULES_DEP,
    }


_MODULES_DEP = """\
kernel/drivers/vfio/vfio.ko:
kernel/drivers/vfio/vfio_iommu_type1.ko: kernel/drivers/vfio/vfio.ko
kernel/drivers/vfio/pci/vfio-pci-core.ko: kernel/drivers/vfio/vfio.ko
kernel/drivers/vfio/pci/vfio-pci.ko: kernel/drivers/vfio/pci/vfio-pci-core.ko kernel/drivers/vfio/vfio.ko
kernel/drivers/gpu/drm/nouveau/nouveau.ko:
kernel/sound/pci/hda/snd-hda-intel.ko:
"""


def read_boot(root: Path) -> Booted:
    """Boot the node whose file system is at `root`, from what its boot loader and its initramfs hold.

    Raises:
        ValueError: grub.cfg boots no kernel.
        FileNotFoundError: the kernel that it boots has no initramfs.
        initramfs.NotRun: the initramfs has scripts to run, and this machine does not allow what that takes.
    """
    entry = grub.default_entry((root / "boot/grub/grub.cfg").read_text())
    machine = replace(read_machine((root / HARDWARE.lstrip("/")).read_text()), kernel=entry.kernel)
    files = initramfs.unpack((root / "boot" / f"initrd.img-{entry.kernel}").read_bytes())
    config = module_config(files, entry.cmdline)
    init_top = run_init_top(machine, entry.cmdline, files) if initramfs.scripts(files) else None
    return boot(machine, entry.cmdline, config, init_top)


def run_init_top(machine: Machine, cmdline: str, files: Mapping[str, str]) -> InitTop:
    """Run the scripts of scripts/init-top of an initramfs (path to text) on the machine, as it is before udev starts.

    Raises:
        initramfs.NotRun: this machine does not allow what that takes.
    """
    with tempfile.TemporaryDirectory(prefix="gpulab-initramfs-") as folder:
        described = {"machine": asdict(machine), "cmdline": cmdline, "files": dict(files), "folder": folder}
        return InitTop(**initramfs.in_namespace("rehearsal.node.init_top", described))
