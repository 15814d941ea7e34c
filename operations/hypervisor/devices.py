# SPDX-License-Identifier: MIT
"""The GPUs that a node hands to guests, and what can be wrong with each of them. Pure: no host is asked here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from inventory import GpulabError, Node
from operations.hypervisor.facts import NodeState, PciFunction

VFIO = "vfio-pci"
#: Host and PCI-to-PCI bridges: no guest is given one and vfio does not count them. An ISA bridge (0601) does count.
_BRIDGES = ("0600", "0604")


@dataclass(frozen=True)
class Device:
    """A GPU as declared.

    `address`: domain:bus:device, empty for the node's only card of that id. `functions`: the PCI ids of function 0
    and up.
    """

    name: str
    address: str
    functions: tuple[str, ...]
    iommu_group: int | None = None
    reset_methods: tuple[str, ...] | None = None
    allow_shared_group: bool = False
    allow_boot_vga: bool = False

    def __str__(self) -> str:
        return f"{self.address} ({self.name})"


@dataclass(frozen=True)
class Wanted:
    """What the inventory says of a node's boot. Each key as in `inventory.schema.Passthrough`.

    `hugepages`: size (`2M`, `1G`) and number. `kernel`: the one to boot.
    """

    devices: list[Device]
    iommu_pt: bool = True
    headroom_mib: int = 0
    blacklist: list[str] = field(default_factory=list)
    pcie_acs_override: str | None = None
    initcall_blacklist: list[str] = field(default_factory=list)
    disable_idle_d3: bool = False
    allow_unsafe_interrupts: bool = False
    hugepages: tuple[str, int] | None = None
    kernel: str | None = None

    @property
    def hugepages_mib(self) -> int:
        size, count = self.hugepages or ("2M", 0)
        return count * {"2M": 2, "1G": 1024}[size]


def wanted(node: Node) -> Wanted:
    """The node's part of the inventory as this package takes it."""
    declared = node.passthrough
    return Wanted(
        devices=[
            Device(
                name=device.name,
                address=device.address or "",
                functions=device.card.functions,
                iommu_group=device.iommu_group,
                reset_methods=None if device.reset_methods is None else tuple(device.reset_methods),
                allow_shared_group=device.allow_shared_group,
                allow_boot_vga=device.allow_boot_vga,
            )
            for device in declared.devices
        ],
        iommu_pt=declared.iommu_pt,
        headroom_mib=round(declared.headroom_gib * 1024),
        blacklist=list(declared.blacklist),
        pcie_acs_override=declared.pcie_acs_override,
        initcall_blacklist=list(declared.initcall_blacklist),
        disable_idle_d3=declared.disable_idle_d3,
        allow_unsafe_interrupts=declared.allow_unsafe_interrupts,
        hugepages=(declared.hugepages.size, declared.hugepages.count) if declared.hugepages else None,
        kernel=declared.kernel,
    )


def located(host: str, state: NodeState, wanted: Wanted) -> Wanted:
    """`wanted` with the address of every device that is declared by its id alone.

    Raises:
        GpulabError: the node has no card of that id, or several.
    """
    return replace(wanted, devices=[_located(host, state, device) for device in wanted.devices])


def _located(host: str, state: NodeState, device: Device) -> Device:
    if device.address:
        return device
    card = device.functions[0]
    slots = [function.slot for function in state.pci if function.id == card]
    if len(slots) == 1:
        return replace(device, address=slots[0])
    if not slots:
        raise GpulabError(
            f"{host}: no PCI device {card} ({device.name})",
            f"NVIDIA devices of the node: {_nvidia(state)}.",
            "correct its `id` in the inventory, or see whether the card is seated and powered",
        )
    raise GpulabError(
        f"{host}: {len(slots)} PCI devices {card}: {', '.join(slots)}",
        f"Expected one, since {device.name} has no `address`.",
        f"declare the `address` of {device.name}; a card that is not declared stays with the host",
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
    return [problem for device in wanted.devices for problem in _identity(host, state, device)]


def _identity(host: str, state: NodeState, device: Device) -> list[GpulabError]:
    found = state.functions_of(device.address)
    if not found:
        return [
            GpulabError(
                f"{host}: no PCI device {device}",
                f"NVIDIA devices of the node: {_nvidia(state)}.",
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


def _nvidia(state: NodeState) -> str:
    return _list([function for function in state.pci if function.id.startswith("10de:")]) or "none"


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


def reset_problems(host: str, state: NodeState, wanted: Wanted) -> list[GpulabError]:
    """Does the kernel offer the declared reset methods?"""
    return [
        GpulabError(
            f"{host}: {device} can be reset by {' '.join(found.reset_methods) or 'no method'}",
            f"Expected {' '.join(device.reset_methods)}.",
            f"a kernel update may change them: correct `reset_methods` of {device.name}, or leave it out",
        )
        for device in wanted.devices
        if device.reset_methods is not None
        for found in state.functions_of(device.address)[:1]
        if found.reset_methods != device.reset_methods
    ]


def _list(functions: list[PciFunction]) -> str:
    return ", ".join(str(function) for function in functions)
