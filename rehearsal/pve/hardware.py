# SPDX-License-Identifier: MIT
"""The node's PCI tree as its last boot laid it out, read from the control machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rehearsal import host
from rehearsal.pve.power import PciDevice

# The node's boot writes here what the kernel would show under /sys; lab-hardware.service binds it there.
_FOLDER = "/var/lib/lab-hardware"
_DEVICES = "sys/bus/pci/devices"
_IOMMU = "sys/class/iommu"
_NAMES = {
    "10de:24b0": ("NVIDIA Corporation", "GA104GL [RTX A4000]"),
    "10de:228b": ("NVIDIA Corporation", "GA104 High Definition Audio Controller"),
}


@dataclass(frozen=True)
class NodeHardware:
    """The hardware of a node of the lab; empty while the node is down."""

    node: str

    def pci(self) -> Sequence[PciDevice]:
        folder = self._path(_DEVICES)
        return [_device(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []

    def iommu(self) -> bool:
        """PVE's own test: is there anything in /sys/class/iommu?"""
        folder = self._path(_IOMMU)
        return folder.is_dir() and any(folder.iterdir())

    def _path(self, part: str) -> Path:
        return host.inside(host.root(self.node), f"{_FOLDER}/{part}")


def _device(path: Path) -> PciDevice:
    def field(name: str) -> str:
        file = path / name
        return file.read_text().strip().removeprefix("0x") if file.is_file() else ""

    group = path / "iommu_group"
    vendor, device, pci_class = field("vendor"), field("device"), field("class")
    vendor_name, name = _NAMES.get(f"{vendor}:{device}", ("", ""))
    return PciDevice(
        address=path.name,
        pci_class=f"0x{pci_class}",
        vendor=vendor,
        device=device,
        subsystem_vendor=field("subsystem_vendor"),
        subsystem_device=field("subsystem_device"),
        # A link to …/iommu_groups/N; it leads nowhere on the control machine, its last part is what counts.
        iommu_group=int(Path(group.readlink()).name) if group.is_symlink() else -1,
        name=name,
        vendor_name=vendor_name,
        is_bridge=pci_class.startswith("06"),
    )
