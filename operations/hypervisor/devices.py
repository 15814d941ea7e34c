# SPDX-License-Identifier: MIT
"""The GPUs that a node hands to guests, and what can be wrong with each of them. Pure: no host is asked here."""

from __future__ import annotations

from dataclasses import dataclass, field

from inventory import GpulabError, Node
from operations.hypervisor.facts import NodeState, PciFunction

VFIO = "vfio-pci"
#: Host and PCI-to-PCI bridges: no guest is given one and vfio does not count them. An ISA bridge (0601) does count.
_BRIDGES = ("0600", "0604")


@dataclass(frozen=True)
class Device:
    """A GPU as declared. `address`: domain:bus:device; `functions`: the PCI ids of function 0 and up."""

    name: str
    address: str
    functions: tuple[str, ...]
    iommu_group: int | None = None
    allow_shared_group: bool = False
    allow_boot_vga: bool = False

    def __str__(self) -> str:
        return f"{self.address} ({self.name})"


@dataclass(frozen=True)
class Wanted:
    """What the inventory says of a node's boot: its devices, the drivers kept from them, `iommu=pt` or not."""

    devices: list[Device]
    blacklist: list[str] = field(default_factory=list)
    iommu_pt: bool = True

    @property
    def ids(self) -> list[str]:
        """The PCI ids of all functions, each once."""
        return list(dict.fromkeys(id for device in self.devices for id in device.functions))


def wanted(node: Node) -> Wanted:
    """The node's part of the inventory as this package takes it."""
    declared = node.passthrough
    return Wanted(
        devices=[
            Device(
                name=device.name,
                address=device.address,
                functions=device.card.functions,
                iommu_group=device.iommu_group,
                allow_shared_group=device.allow_shared_group,
                allow_boot_vga=device.allow_boot_vga,
            )
            for device in declared.devices
        ],
        blacklist=list(declared.blacklist),
        iommu_pt=declared.iommu_pt,
    )


def refuse(problems: list[GpulabError], host: str) -> None:
    """
    Raises:
        GpulabError: there are problems; the message has all of them, since each may cost a reboot to find.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise GpulabError(f"{host}: {len(problems)} things are wrong", "\n".join(str(problem) for problem in problems))


def identity_problems(host: str, state: NodeState, wanted: Wanted) -> list[GpulabError]:
    """Is each declared device there, the declared card, and nobody's boot screen?"""
    problems = [problem for device in wanted.devices for problem in _identity(host, state, device)]
    # Beside a wrong address, the card itself would look like its own twin.
    return problems or _twins(host, state, wanted)


def _identity(host: str, state: NodeState, device: Device) -> list[GpulabError]:
    found = state.functions_of(device.address)
    if not found:
        nvidia = [str(function) for function in state.pci if function.id.startswith("10de:")]
        return [
            GpulabError(
                f"{host}: no PCI device {device}",
                f"NVIDIA devices of the node: {', '.join(nvidia) or 'none'}.",
                "correct its `address` in the inventory (domain:bus:device); "
                "addresses shift when cards are added or moved",
            )
        ]
    if found[0].id != device.functions[0]:
        return [
            GpulabError(
                f"{host}: {device} is not the declared card",
                f"Expected {device.functions[0]}, found {found[0].id}.",
                "correct `address` or `id` of the device in the inventory",
            )
        ]
    problems = []
    unknown = [function for function in found if function.id not in device.functions]
    if unknown:
        problems.append(
            GpulabError(
                f"{host}: {device} has functions that the card table does not know: {_list(unknown)}",
                f"Expected only {', '.join(device.functions)}.",
                "add the ids to `functions` of this card in inventory/cards.py",
            )
        )
    if any(function.boot_vga for function in found) and not device.allow_boot_vga:
        problems.append(
            GpulabError(
                f"{host}: {device} drives the boot screen",
                "Expected another display device to be the boot VGA.",
                "make the onboard graphics the primary display in the firmware setup, "
                f"or set `allow_boot_vga` of {device.name}: the node then has no console on this card",
            )
        )
    return problems


def _twins(host: str, state: NodeState, wanted: Wanted) -> list[GpulabError]:
    """vfio-pci is given ids, not addresses: an undeclared card of the same id would be taken from the host too."""
    slots = [device.address for device in wanted.devices]
    cards = {device.functions[0] for device in wanted.devices}
    twins = [
        function
        for function in state.pci
        if function.id in cards and function.slot not in slots and function.driver != VFIO
    ]
    return [
        GpulabError(
            f"{host}: {twin.address} has the id {twin.id} of a declared device and would be bound to vfio-pci with it",
            f"Expected no other card of that id in use by the node, found {twin}.",
            f"declare {twin.slot} in `passthrough.devices` too; no guest has to be given it",
        )
        for twin in twins
    ]


def group_problems(host: str, state: NodeState, wanted: Wanted) -> list[GpulabError]:
    """Is each device in the group that is declared, and alone there? Only a running IOMMU can tell."""
    return [problem for device in wanted.devices for problem in _group(host, state, device)] if state.iommu else []


def _group(host: str, state: NodeState, device: Device) -> list[GpulabError]:
    found = state.functions_of(device.address)
    if not found:
        return []
    problems = []
    number = found[0].iommu_group
    if number is None:
        return [
            GpulabError(
                f"{host}: {device} is in no IOMMU group",
                "Expected one: the IOMMU is on.",
                "move the card to another slot, or turn the firmware's `Above 4G decoding` and ACS settings on",
            )
        ]
    if device.iommu_group is not None and number != device.iommu_group:
        problems.append(
            GpulabError(
                f"{host}: {device} is in another IOMMU group than declared",
                f"Expected group {device.iommu_group}, found {number}.",
                f"groups move with the hardware and the kernel: set `iommu_group` of {device.name} to {number}, "
                "or leave it out",
            )
        )
    foreign = [
        function
        for function in state.group(number)
        if function.slot != device.address and not function.bridge and function.pci_class not in _BRIDGES
    ]
    if foreign and not device.allow_shared_group:
        problems.append(
            GpulabError(
                f"{host}: IOMMU group {number} of {device} also holds {_list(foreign)}",
                f"Expected a group with only functions of {device.address} and bridges.",
                "move the card to a slot behind its own root port, "
                f"or set `allow_shared_group` of {device.name}: the node then loses those devices as well",
            )
        )
    return problems


def unbound(state: NodeState, wanted: Wanted) -> list[PciFunction]:
    """The functions of declared devices that vfio-pci does not have."""
    return [
        function
        for device in wanted.devices
        for function in state.functions_of(device.address)
        if function.driver != VFIO
    ]


def _list(functions: list[PciFunction]) -> str:
    return ", ".join(str(function) for function in functions)
