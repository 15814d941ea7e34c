# SPDX-License-Identifier: MIT
"""What the inventory declares of a node, looked up in what was observed of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inventory import Node
from inventory.schema import PassthroughDevice
from verify.observations import Observation
from verify.verdicts import Broken, not_run

#: The word on a kernel's command line that leaves all cards to the host for that boot.
OFF = "gpulab_vfio=off"
#: From this release on the kernel turns Intel's IOMMU on by itself.
INTEL_ON_BY_DEFAULT = (6, 8)

#: PCI classes that a GPU shares its group with in practice (pci.ids).
KINDS = {
    "0106": "SATA storage controller",
    "0107": "SAS storage controller",
    "0108": "NVMe storage controller",
    "01": "storage controller",
    "0200": "Ethernet network controller",
    "02": "network controller",
    "03": "display controller",
    "0403": "audio device",
    "0601": "ISA bridge",
    "06": "bridge",
    "0c03": "USB controller",
    "0c05": "SMBus controller",
}


@dataclass(frozen=True)
class Placed:
    """A declared device where it was found: domain, bus and device, and its functions by address, function 0 first."""

    device: PassthroughDevice
    slot: str
    functions: Mapping[str, dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """Function 0, which is the card itself."""
        return self.functions[f"{self.slot}.0"]


def slot(node: Node, hypervisor: Observation, device: PassthroughDevice) -> str:
    """Domain, bus and device of a declared device.

    Raises:
        Broken: it is declared without `address`, and the node has none or several cards of its `id`.
    """
    if device.address is not None:
        return device.address
    cards = [name for name, function in hypervisor["devices"].items() if function["id"] == device.id]
    found = sorted(name.removesuffix(".0") for name in cards if name.endswith(".0"))
    if len(found) != 1:
        what = f"{len(found)} cards {device.id} ({', '.join(found)})" if found else f"no card {device.id}"
        raise Broken(
            f"{node.name}: {what}, expected one: {device.name} ({device.card.name}) is declared without `address`",
            f"`address` of {device.name} in {{lab}}: see lspci -nn on {node.name}",
        )
    return found[0]


def functions(hypervisor: Observation, place: str) -> dict[str, dict[str, Any]]:
    """The functions that the node has at domain:bus:device."""
    return {name: hypervisor["devices"][name] for name in sorted(hypervisor["devices"]) if name.startswith(f"{place}.")}


def placed(node: Node, hypervisor: Observation) -> list[Placed]:
    """The declared devices; the check is not run when one of them is absent."""
    found = []
    for device in node.passthrough.devices:
        try:
            place = slot(node, hypervisor, device)
        except Broken as error:
            not_run(str(error))
        there = functions(hypervisor, place)
        if f"{place}.0" not in there:
            not_run(f"{node.name} has nothing at {place}")
        found.append(Placed(device, place, there))
    return found


def lacking(node: Node, cmdline: str, kernel: str | None, cpu: str | None) -> list[str]:
    """The declared phrases that a kernel's command line has not. The words of a phrase stand side by side."""
    words = " ".join(cmdline.split())
    return [phrase for phrase in phrases(node, kernel, cpu) if f" {phrase} " not in f" {words} "]


def phrases(node: Node, kernel: str | None, cpu: str | None) -> list[str]:
    """What has to be on the command line of that kernel."""
    declared = node.passthrough
    release = re.match(r"(\d+)\.(\d+)", kernel or "")
    old = release is not None and (int(release[1]), int(release[2])) < INTEL_ON_BY_DEFAULT
    pages = declared.hugepages
    wanted = [
        "intel_iommu=on" if cpu == "GenuineIntel" and old else None,
        "iommu=pt" if declared.iommu_pt else None,
        f"pcie_acs_override={declared.pcie_acs_override}" if declared.pcie_acs_override else None,
        f"initcall_blacklist={','.join(declared.initcall_blacklist)}" if declared.initcall_blacklist else None,
        f"hugepagesz={pages.size} hugepages={pages.count}" if pages else None,
    ]
    return [phrase for phrase in wanted if phrase]


def vfio_options(node: Node) -> dict[str, bool]:
    """Parameter of the vfio modules to whether it is declared to be on."""
    return {
        "vfio_pci.disable_idle_d3": node.passthrough.disable_idle_d3,
        "vfio_iommu_type1.allow_unsafe_interrupts": node.passthrough.allow_unsafe_interrupts,
    }


def kind(class_: str) -> str:
    """What sort of device a PCI class is, in words."""
    return KINDS.get(class_) or KINDS.get(class_[:2]) or f"class {class_}"
