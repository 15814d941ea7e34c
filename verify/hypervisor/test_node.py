# SPDX-License-Identifier: MIT
"""Is the node booted as declared, and does it hand its GPUs over?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Node
from verify.hypervisor.declared import OFF, functions, kind, lacking, placed, slot, vfio_options
from verify.observations import Observation
from verify.verdicts import Broken, not_run

pytestmark = pytest.mark.on("nodes")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
SUPPORTED = ("8", "9")
#: Size of huge pages in KiB, as sysfs names it.
PAGE_KIB = {"2M": "2048", "1G": "1048576"}


@pytest.mark.critical
@pytest.mark.promise("hypervisor.reachable", "ssh_hostname", fix="make bootstrap LAB={lab}")
def test_node_answers_ssh_with_its_pinned_key(reach: Observation, seen: Callable[[str], None]) -> None:
    if reach["error"]:
        raise Broken(reach["error"], reach["fix"])
    seen("it answers")


@pytest.mark.minor
@pytest.mark.promise("hypervisor.pve_version", fix="upgrade the node to Proxmox VE 8 or 9")
def test_node_runs_a_supported_proxmox_ve(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    words = hypervisor["pve_version"].split("/")
    version = words[1] if len(words) > 1 else ""
    assert version.split(".")[0] in SUPPORTED, f"{node.name}: Proxmox VE {version or '(none found)'}, expected 8 or 9"
    seen(f"Proxmox VE {version}")


@pytest.mark.critical
@pytest.mark.promise(
    "hypervisor.iommu.on", "passthrough.devices", fix=DEPLOY + "; then VT-d or AMD-Vi in the firmware's setup"
)
def test_iommu_is_on(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    units, groups = hypervisor["iommus"], hypervisor["groups"]
    assert units, f"{node.name}: /sys/class/iommu is empty, expected an IOMMU; is it off in the firmware?"
    assert groups, f"{node.name}: no IOMMU groups, expected some; the kernel does not use {', '.join(units)}"
    seen(f"{', '.join(units)}; {len(groups)} groups")


@pytest.mark.major
@pytest.mark.promise(
    "hypervisor.cmdline",
    "passthrough.iommu_pt",
    "passthrough.pcie_acs_override",
    "passthrough.initcall_blacklist",
    "passthrough.hugepages",
    fix=DEPLOY,
)
def test_kernel_was_booted_with_the_declared_options(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    missing = lacking(node, hypervisor["cmdline"], hypervisor["kernel"], hypervisor["cpu"])
    assert not missing, (
        f"{node.name}: booted with `{hypervisor['cmdline']}`, expected {', '.join(missing)} in it; "
        "was the boot loader's configuration written and the node rebooted since?"
    )
    types = {number: type_ for number, type_ in hypervisor["groups"].items() if number in host_groups(hypervisor)}
    if node.passthrough.iommu_pt and any(types.values()):
        assert "identity" in types.values(), (
            f"{node.name}: booted with iommu=pt, but no IOMMU group of the host's own devices is of the type identity: "
            + ", ".join(f"group {number} {type_}" for number, type_ in types.items())
        )
    seen(hypervisor["cmdline"])


@pytest.mark.major
@pytest.mark.promise("hypervisor.kernel", "passthrough.kernel", fix=DEPLOY)
def test_declared_kernel_runs(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    wanted, running = node.passthrough.kernel, hypervisor["kernel"]
    assert wanted in (None, running), f"{node.name}: kernel {running} runs, expected {wanted}"
    seen(running if wanted else f"{running}; none declared")


@pytest.mark.critical
@pytest.mark.promise(
    "hypervisor.device",
    "passthrough.devices.address",
    "passthrough.devices.id",
    fix="`address` and `id` of the device in {lab}: see lspci -nn on {host}",
)
def test_declared_cards_are_where_they_are_declared(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    told = []
    for device in node.passthrough.devices:
        place = slot(node, hypervisor, device)
        found = [function["id"] for function in functions(hypervisor, place).values()]
        assert found, f"{node.name}: nothing at {place}, expected {device.card.name} ({device.name})"
        assert found[0] == device.id, f"{node.name}: {place}.0 is {found[0]}, expected {device.id}"
        strange = [id_ for id_ in found if id_ not in device.card.functions]
        assert not strange, (
            f"{node.name}: {place} has a function {', '.join(strange)}, "
            f"expected only {', '.join(device.card.functions)}"
        )
        told.append(f"{device.card.name} at {place}")
    seen(", ".join(told))


@pytest.mark.critical
@pytest.mark.promise("hypervisor.vfio.bound", "passthrough.devices.address", fix=DEPLOY)
def test_vfio_pci_drives_every_function_of_the_cards(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    wrong = [
        f"{name} by {function['driver'] or 'no driver'}"
        for card in placed(node, hypervisor)
        for name, function in card.functions.items()
        if function["driver"] != "vfio-pci"
    ]
    message = f"{node.name}: driven {', '.join(wrong)}; expected all by vfio-pci"
    if wrong and OFF in hypervisor["cmdline"].split():
        raise Broken(f"{message}: this boot was told {OFF}", "reboot {host}")
    assert not wrong, f"{message}; `dmesg | grep gpulab` on the node says what the initramfs did"
    seen(", ".join(name for card in placed(node, hypervisor) for name in card.functions))


@pytest.mark.critical
@pytest.mark.promise(
    "hypervisor.iommu.group",
    "passthrough.devices.iommu_group",
    "passthrough.devices.allow_shared_group",
    fix="another slot for the card, or `allow_shared_group` in {lab}",
)
def test_cards_are_alone_in_their_iommu_groups(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    if not hypervisor["groups"]:
        not_run(f"{node.name} has no IOMMU groups")
    pretended = [word for word in hypervisor["cmdline"].split() if word.startswith("pcie_acs_override=")]
    if pretended and node.passthrough.pcie_acs_override is None:
        raise Broken(
            f"{node.name}: booted with {pretended[0]}, which is not declared: its groups only pretend to be isolated",
            "take it off the kernel's command line of {host}, or declare `pcie_acs_override` in {lab}",
        )
    told = []
    for card in placed(node, hypervisor):
        place, device = card.slot, card.device
        groups = sorted({str(function["group"]) for function in card.functions.values()})
        assert len(groups) == 1, f"{node.name}: {place} is in IOMMU groups {', '.join(groups)}, expected one"
        assert device.iommu_group is None or groups[0] == str(device.iommu_group), (
            f"{node.name}: {place} is in IOMMU group {groups[0]}, expected {device.iommu_group}; "
            "hardware that was added or a kernel option can move it"
        )
        others = [
            f"{name} {other['id']} ({kind(other['class'])}, {other['driver'] or 'no driver'})"
            for name, other in hypervisor["devices"].items()
            if other["group"] == groups[0] and name not in card.functions and not other["bridge"]
        ]
        assert not others or device.allow_shared_group, (
            f"{node.name}: IOMMU group {groups[0]} of {place} also holds {', '.join(others)}, "
            "expected only functions of the card: the guest would get them too"
        )
        shared = f" with {', '.join(others)}" if others else ""
        told.append(f"{device.name} in group {groups[0]}{shared}")
    seen(", ".join([*told, *(f"isolation pretended by {word}" for word in pretended)]))


@pytest.mark.major
@pytest.mark.promise(
    "hypervisor.reset",
    "passthrough.devices.reset_methods",
    fix="`reset_methods` of the device in {lab}: see reset_method of it on {host}",
)
def test_cards_can_be_reset_as_declared(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    told = []
    for card in placed(node, hypervisor):
        wanted, found = card.device.reset_methods, card.first["reset_methods"]
        shown = "(none)" if not found else " ".join(found)
        assert wanted in (None, found or []), (
            f"{node.name}: the kernel resets {card.slot}.0 by {shown}, expected {' '.join(wanted or []) or '(none)'}"
        )
        told.append(f"{card.device.name}: {shown}" + ("" if wanted is not None else "; none declared"))
    seen(", ".join(told))


@pytest.mark.major
@pytest.mark.promise(
    "hypervisor.options", "passthrough.disable_idle_d3", "passthrough.allow_unsafe_interrupts", fix=DEPLOY
)
def test_vfio_runs_with_the_declared_options(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    wanted, found = vfio_options(node), hypervisor["parameters"]
    shown = ", ".join(f"{name} {found[name] or '(not loaded)'}" for name in wanted)
    off = [name for name, value in wanted.items() if value and found[name] not in ("Y", "1")]
    assert not off, f"{node.name}: {shown}; expected {', '.join(off)} to be Y"
    on = [name for name, value in wanted.items() if not value and found[name] in ("Y", "1")]
    if on:
        keys = ", ".join(f"`{name.partition('.')[2]}`" for name in on)
        raise Broken(
            f"{node.name}: {shown}; {', '.join(on)} is not declared, expected N",
            f"declare {keys} in {{lab}}, or take it out of modprobe.d and the command line of {{host}} and reboot it",
        )
    seen(shown)


@pytest.mark.major
@pytest.mark.promise("hypervisor.blacklist", "passthrough.blacklist", fix=DEPLOY)
def test_blacklisted_drivers_stay_out(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    wanted = {name.replace("-", "_") for name in node.passthrough.blacklist}
    missing = sorted(wanted - set(hypervisor["modprobe"]["blacklist"]))
    assert not missing, f"{node.name}: not blacklisted for modprobe: {', '.join(missing)}"
    loaded = sorted(wanted & set(hypervisor["modules"]))
    assert not loaded, f"{node.name}: loaded though blacklisted: {', '.join(loaded)}"
    seen(", ".join(sorted(wanted)) or "none declared")


@pytest.mark.major
@pytest.mark.promise(
    "hypervisor.hugepages", "passthrough.hugepages", fix=DEPLOY + "; huge pages are only reliably had at a boot"
)
def test_huge_pages_are_set_aside(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    wanted = node.passthrough.hugepages
    if wanted is None:
        seen("none declared")
        return
    found = hypervisor["hugepages"].get(PAGE_KIB[wanted.size], 0)
    assert found >= wanted.count, (
        f"{node.name}: {found} huge pages of {wanted.size}, expected {wanted.count}; "
        "the kernel sets aside what it finds in one piece: is there enough memory?"
    )
    seen(f"{found} of {wanted.size}")


def host_groups(hypervisor: Observation) -> set[str]:
    """The IOMMU groups of devices that drivers of the host use, and vfio-pci none of."""
    devices = [device for device in hypervisor["devices"].values() if device["group"] and not device["bridge"]]
    own = {device["group"] for device in devices if device["driver"]}
    return own - {device["group"] for device in devices if device["driver"] == "vfio-pci"}
