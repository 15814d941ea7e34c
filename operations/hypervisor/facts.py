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
GRUB_SNIPPET = "/etc/default/grub.d/gpulab.cfg"
KERNEL_CMDLINE = "/etc/kernel/cmdline"

#: Its modification time says up to which moment of our files the boot loader and the initramfs were brought.
STAMP = "/var/lib/gpulab/boot-refreshed"


class NodeFacts(JsonFact):
    """A node as `NodeState` holds it: see `remote/node.py`."""

    script = program(__file__, "node")

    def command(self) -> StringCommand:
        files = [MODULES_LOAD, MODPROBE, GRUB_SNIPPET, KERNEL_CMDLINE]
        return super().command(root="/", stamp=STAMP, files=files)


@dataclass(frozen=True)
class PciFunction:
    """One function of the PCI tree. `pci_class`: class and subclass, four hex digits (`0300` is VGA)."""

    address: str
    id: str
    subsystem: str
    pci_class: str
    driver: str | None
    iommu_group: int | None
    boot_vga: bool
    bridge: bool

    @property
    def slot(self) -> str:
        """Domain, bus and device, which all functions of a device share."""
        return self.address.rpartition(".")[0]

    def __str__(self) -> str:
        return f"{self.address} {self.id} ({self.driver or 'no driver'})"


@dataclass(frozen=True)
class RunningGuest:
    """A running VM (`kind` VM) or container (`CT`) of the node."""

    kind: str
    vmid: int
    name: str
    tags: list[str]

    def __str__(self) -> str:
        return f"{self.kind} {self.vmid}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class NodeState:
    """A node as it is.

    Times are seconds since the epoch. `cmdline` is the running kernel's, `grub_cmdline` the first `linux` line of
    grub.cfg, `initrds` path to (modification time, bytes), `files` our own files as `operations.files` reads them.
    `boot_tool_managed`: proxmox-boot-tool looks after the EFI partitions.
    """

    pve_version: str | None
    machine: str
    kernel: str
    cpu_vendor: str | None
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
    boot_free_bytes: int
    iommu: bool
    pci: tuple[PciFunction, ...]
    guests: tuple[RunningGuest, ...]
    files: Mapping[str, Any]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> NodeState:
        values = {field.name: found[field.name] for field in fields(cls)}
        values["pci"] = tuple(PciFunction(**function) for function in found["pci"])
        values["guests"] = tuple(RunningGuest(**guest) for guest in found["guests"])
        return cls(**values)

    def functions_of(self, slot: str) -> list[PciFunction]:
        """The functions of the device at domain:bus:device, function 0 first."""
        return [function for function in self.pci if function.slot == slot]

    def group(self, number: int) -> list[PciFunction]:
        """The members of an IOMMU group."""
        return [function for function in self.pci if function.iommu_group == number]

    @property
    def words(self) -> list[str]:
        """The words of the running kernel's command line."""
        return self.cmdline.split()


def read() -> NodeState:
    """This host's state, one remote command.

    Raises:
        GpulabError: the node did not answer or its answer could not be understood.
    """
    return NodeState.of(step.read(NodeFacts))
