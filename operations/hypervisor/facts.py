# SPDX-License-Identifier: MIT
"""What a node is, how it was booted and how it will boot: everything of this package, from one remote command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pyinfra.api import StringCommand

from operations import step
from operations.facts import JsonFact
from operations.remote import program

MODULES_LOAD = "/etc/modules-load.d/gpulab-vfio.conf"
MODPROBE = "/etc/modprobe.d/gpulab-vfio.conf"
#: Puts vfio-pci into every initramfs, and the script that binds there.
INITRAMFS_HOOK = "/etc/initramfs-tools/hooks/gpulab-vfio"
BIND_SCRIPT = "/etc/initramfs-tools/scripts/init-top/gpulab-vfio"
GRUB_SNIPPET = "/etc/default/grub.d/gpulab.cfg"
KERNEL_CMDLINE = "/etc/kernel/cmdline"
#: proxmox-boot-tool's note of the kernel that is to boot; absent: the newest.
KERNEL_PIN = "/etc/kernel/proxmox-boot-pin"

#: All that a node boots from and that gpulab may write or edit.
BOOT_FILES = (MODULES_LOAD, MODPROBE, INITRAMFS_HOOK, BIND_SCRIPT, GRUB_SNIPPET, KERNEL_CMDLINE, KERNEL_PIN)
#: Those of them that an initramfs holds a copy of.
IN_INITRAMFS = (MODULES_LOAD, MODPROBE, INITRAMFS_HOOK, BIND_SCRIPT)

#: Its modification time says up to which moment of our files the boot loader and the initramfs were brought.
STAMP = "/var/lib/gpulab/boot-refreshed"
#: The ids of guests that were shut down for a reboot and are to be started again.
SHUT_DOWN = "/var/lib/gpulab/shut-down-guests"


class NodeFacts(JsonFact):
    """A node as `NodeState` holds it: see `remote/node.py`."""

    script = program(__file__, "node")

    def command(self) -> StringCommand:
        return super().command(root="/", files=list(BOOT_FILES), stamp=STAMP, shut_down=SHUT_DOWN)


@dataclass(frozen=True)
class PciFunction:
    """One function of the PCI tree, as sysfs shows it.

    `pci_class`: class and subclass, four hex digits (`0300` is VGA). `bars`: the sizes in bytes of those base address
    registers that are there. `reset_methods`: in the order in which the kernel would use them. `link` and `max_link`:
    speed and width of the PCIe link as (`16.0 GT/s PCIe`, 16), None for a device without one.
    """

    address: str
    id: str
    subsystem: str
    pci_class: str
    driver: str | None
    driver_override: str | None
    iommu_group: int | None
    boot_vga: bool
    bridge: bool
    reset_methods: tuple[str, ...] = ()
    bars: tuple[int, ...] = ()
    link: tuple[str, int] | None = None
    max_link: tuple[str, int] | None = None

    @property
    def slot(self) -> str:
        """Domain, bus and device, which all functions of a device share."""
        return self.address.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """What sort of device it is, in the words of the PCI class table."""
        return _KINDS.get(self.pci_class) or _KINDS.get(self.pci_class[:2]) or f"class {self.pci_class}"

    def __str__(self) -> str:
        return f"{self.address} {self.id} ({self.kind}, {self.driver or 'no driver'})"


#: PCI classes that a GPU shares its group with in practice (pci.ids).
_KINDS = {
    "0101": "IDE storage controller",
    "0104": "RAID storage controller",
    "0106": "SATA storage controller",
    "0107": "SAS storage controller",
    "0108": "NVMe storage controller",
    "01": "storage controller",
    "0200": "Ethernet network controller",
    "02": "network controller",
    "0300": "VGA display controller",
    "03": "display controller",
    "0403": "audio device",
    "0600": "host bridge",
    "0601": "ISA bridge",
    "0604": "PCI bridge",
    "06": "bridge",
    "0c03": "USB controller",
    "0c05": "SMBus",
    "11": "signal processing controller",
}


@dataclass(frozen=True)
class HostedGuest:
    """A VM (`kind` VM) or container (`CT`) of the node.

    `devices`: what its `hostpciN` keys hand over, as addresses with or without a function; a resource mapping is
    followed to this node's device. `uses_snippet`: the volumes its `cicustom` names.
    """

    kind: str
    vmid: int
    name: str
    tags: tuple[str, ...]
    running: bool
    devices: tuple[str, ...] = ()
    uses_snippet: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.vmid}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class Kernel:
    """An installed kernel. `vfio`: it has vfio-pci, built in or as a module."""

    version: str
    vfio: bool


@dataclass(frozen=True)
class BootPartition:
    """An EFI system partition that proxmox-boot-tool copies kernels to. `free_bytes`: None: not known."""

    name: str
    free_bytes: int | None


@dataclass(frozen=True)
class NodeState:
    """A node as it is.

    Times are seconds since the epoch. `cmdline` is the running kernel's, `grub_cmdline` the first `linux` line of
    grub.cfg, `initrds` path to (modification time, bytes), `files` our own files as `operations.files` reads them.
    `boot_tool_managed`: proxmox-boot-tool looks after the EFI partitions. `iommus`: the IOMMUs in use;
    `firmware_iommu`: what of DMAR (Intel) and IVRS (AMD) the firmware describes. `hugepages`: size in KiB to number.
    `parameters`: `module.parameter` to value. `kept`: what `operations.files` keeps of each file that it wrote, as
    `{current, original, written: […], found: […], touched}`.
    """

    pve_version: str | None
    machine: str
    kernel: str
    cpu_vendor: str | None
    memory_mib: int
    cmdline: str
    boot_id: str
    boot_time: float
    efi_directory: bool
    efibootmgr: str | None
    loader_info: str | None
    boot_tool_managed: bool
    boot_tool_status: str | None
    grub_cmdline: str | None
    grub_mtime: float | None
    stamp_mtime: float | None
    initrds: Mapping[str, tuple[float, int]]
    kernels: tuple[Kernel, ...]
    boot_free_bytes: int
    boot_partitions: tuple[BootPartition, ...]
    iommus: tuple[str, ...]
    firmware_iommu: tuple[str, ...]
    pci: tuple[PciFunction, ...]
    modules_loaded: tuple[str, ...]
    modules_configured: tuple[str, ...]
    parameters: Mapping[str, str]
    hugepages: Mapping[str, int]
    guests: tuple[HostedGuest, ...]
    shut_down_guests: tuple[int, ...]
    files: Mapping[str, Any]
    kept: Mapping[str, Any]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> NodeState:
        values = {field.name: _frozen(found[field.name]) for field in fields(cls)}
        values["pci"] = tuple(_record(PciFunction, entry) for entry in found["pci"])
        values["guests"] = tuple(_record(HostedGuest, entry) for entry in found["guests"])
        values["kernels"] = tuple(_record(Kernel, entry) for entry in found["kernels"])
        values["boot_partitions"] = tuple(_record(BootPartition, entry) for entry in found["boot_partitions"])
        return cls(**values)

    def functions_of(self, slot: str) -> list[PciFunction]:
        """The functions of the device at domain:bus:device, function 0 first."""
        return [function for function in self.pci if function.slot == slot]

    def group(self, number: int) -> list[PciFunction]:
        """The members of an IOMMU group."""
        return [function for function in self.pci if function.iommu_group == number]

    @property
    def iommu(self) -> bool:
        """Is an IOMMU in use?"""
        return bool(self.iommus)

    @property
    def words(self) -> list[str]:
        """The words of the running kernel's command line."""
        return self.cmdline.split()

    @property
    def running_guests(self) -> list[HostedGuest]:
        return [guest for guest in self.guests if guest.running]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _record(kind: type[Any], entry: Mapping[str, Any]) -> Any:
    return kind(**{key: _frozen(value) for key, value in entry.items()})


def read() -> NodeState:
    """This host's state, one remote command.

    Raises:
        GpulabError: the node did not answer or its answer could not be understood.
    """
    return NodeState.of(step.read(NodeFacts))
