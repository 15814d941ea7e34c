# SPDX-License-Identifier: MIT
"""What the front needs from whatever runs a VM and from the node's hardware; in memory here, containers elsewhere."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rehearsal.pve.errors import TaskError
from rehearsal.pve.state import Volume


@dataclass(frozen=True)
class PciDevice:
    """A host PCI function as `GET hardware/pci` shows it; ids are hex digits without 0x, group -1 is no IOMMU."""

    address: str
    pci_class: str
    vendor: str
    device: str
    subsystem_vendor: str = ""
    subsystem_device: str = ""
    iommu_group: int = -1
    name: str = ""
    vendor_name: str = ""
    is_bridge: bool = False


@dataclass(frozen=True)
class GuestStart:
    """All that starting a VM means outside the API. Disks are `(slot, volume)`; `seed` is the NoCloud files."""

    node: str
    vmid: int
    name: str
    system: Volume | None
    data: Sequence[tuple[str, Volume]]
    seed: Mapping[str, str]
    address: str
    gateway: str
    gpus: Sequence[PciDevice]
    memory_mib: int
    agent: bool
    link_up: bool = True


class Power(Protocol):
    """Runs VMs. Methods raise `TaskError` with the text that ends the task."""

    def running(self, vmid: int) -> bool: ...

    def start(self, guest: GuestStart) -> None: ...

    def stop(self, vmid: int) -> None: ...

    def shutdown(self, vmid: int, timeout: float) -> bool:
        """Ask the guest to power off; False when it still runs after `timeout` seconds."""

    def agent_runs(self, vmid: int) -> bool: ...

    def run(self, vmid: int, argv: Sequence[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]: ...

    def attach(self, vmid: int, slot: str, volume: Volume) -> None:
        """Plug a data disk into a running guest."""

    def resize(self, vmid: int, volume: Volume) -> None:
        """The volume has a new size; a running guest sees it."""

    def create_volume(self, volume: Volume) -> None: ...

    def remove_volume(self, volume: Volume) -> None: ...

    def rename_volume(self, old: Volume, new: Volume) -> None: ...

    def freeze(self, vmid: int) -> None:
        """The guest's file systems take no writes until `thaw`, as the agent's fsfreeze makes them."""

    def thaw(self, vmid: int) -> None: ...

    def pack(self, target: Path, volumes: Mapping[str, Volume]) -> None:
        """Write an archive of these volumes, by drive."""

    def unpack(self, source: Path, volumes: Mapping[str, Volume]) -> None:
        """Fill these volumes, new ones, from the archive's drives of the same keys."""

    def snippet(self, volume_path: str) -> str | None:
        """A file of the `local` storage on the node, by its path there; None when there is none."""

    def reboot_node(self) -> None: ...


class Hardware(Protocol):
    """The node's PCI tree as it booted."""

    def pci(self) -> Sequence[PciDevice]: ...

    def iommu(self) -> bool: ...


A4000 = (
    PciDevice(
        "0000:01:00.0", "0x030000", "10de", "24b0", "10de", "14ad", 14, "GA104GL [RTX A4000]", "NVIDIA Corporation"
    ),
    PciDevice(
        "0000:01:00.1",
        "0x040300",
        "10de",
        "228b",
        "10de",
        "14ad",
        14,
        "GA104 High Definition Audio Controller",
        "NVIDIA Corporation",
    ),
)
ROOT_PORT = PciDevice(
    "0000:00:01.0",
    "0x060400",
    "8086",
    "4c01",
    iommu_group=14,
    name="Root Port",
    vendor_name="Intel Corporation",
    is_bridge=True,
)
IGPU = PciDevice("0000:00:02.0", "0x030000", "8086", "4c8a", "1043", "8694", 0, "UHD Graphics 750", "Intel Corporation")


@dataclass
class MemoryHardware:
    """A PCI tree in memory; by default one A4000 behind its root port, and an iGPU."""

    devices: list[PciDevice] = field(default_factory=lambda: [ROOT_PORT, IGPU, *A4000])
    iommu_on: bool = True

    def pci(self) -> Sequence[PciDevice]:
        return self.devices

    def iommu(self) -> bool:
        return self.iommu_on


class MemoryPower:
    """Power without machines: VMs run by being in a set. For tests of what talks to the API."""

    def __init__(self) -> None:
        self.started: dict[int, GuestStart] = {}
        self.agents: set[int] = set()
        self.snippets: dict[str, str] = {}
        # (argv) -> (exit status, stdout), for agent commands; anything else exits 0 in silence.
        self.answers: dict[tuple[str, ...], tuple[int, bytes]] = {}
        self.commands: list[tuple[int, tuple[str, ...]]] = []
        self.fail_start = ""
        # Guests that ignore a shutdown, and those whose agent never answers.
        self.stubborn: set[int] = set()
        self.mute: set[int] = set()
        self.node_reboots = 0
        # What freezing and thawing was asked for, in order: ("freeze", VM) and ("thaw", VM).
        self.freezes: list[tuple[str, int]] = []
        # Text with which the next packing or unpacking ends.
        self.fail_copy = ""
        # Held by a test to keep a start from finishing.
        self.start_gate = threading.Event()
        self.start_gate.set()

    def running(self, vmid: int) -> bool:
        return vmid in self.started

    def start(self, guest: GuestStart) -> None:
        self.start_gate.wait(60)
        if self.fail_start:
            raise TaskError(self.fail_start)
        self.started[guest.vmid] = guest
        if guest.agent:
            self.agents.add(guest.vmid)

    def stop(self, vmid: int) -> None:
        self.started.pop(vmid, None)
        self.agents.discard(vmid)

    def shutdown(self, vmid: int, timeout: float) -> bool:
        if vmid in self.stubborn:
            return False
        self.stop(vmid)
        return True

    def agent_runs(self, vmid: int) -> bool:
        return vmid in self.agents - self.mute

    def run(self, vmid: int, argv: Sequence[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
        self.commands.append((vmid, tuple(argv)))
        status, output = self.answers.get(tuple(argv), (0, b""))
        return subprocess.CompletedProcess(list(argv), status, output, b"")

    def attach(self, vmid: int, slot: str, volume: Volume) -> None: ...

    def resize(self, vmid: int, volume: Volume) -> None: ...

    def create_volume(self, volume: Volume) -> None: ...

    def remove_volume(self, volume: Volume) -> None: ...

    def rename_volume(self, old: Volume, new: Volume) -> None: ...

    def freeze(self, vmid: int) -> None:
        self.freezes.append(("freeze", vmid))

    def thaw(self, vmid: int) -> None:
        self.freezes.append(("thaw", vmid))

    def pack(self, target: Path, volumes: Mapping[str, Volume]) -> None:
        target.write_text("".join(f"{key} {volume.content_id}\n" for key, volume in sorted(volumes.items())))
        self._copied()

    def unpack(self, source: Path, volumes: Mapping[str, Volume]) -> None:
        self._copied()

    def _copied(self) -> None:
        if failure := self.fail_copy:
            self.fail_copy = ""
            raise TaskError(failure)

    def snippet(self, volume_path: str) -> str | None:
        return self.snippets.get(volume_path)

    def reboot_node(self) -> None:
        self.node_reboots += 1
        self.started.clear()
        self.agents.clear()
