# SPDX-License-Identifier: MIT
"""Does the node boot as declared, and does it hand its GPUs over?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Node
from inventory.schema import PassthroughDevice
from verify.observations import Observation
from verify.verdicts import Broken, inconclusive, not_run

pytestmark = pytest.mark.on("nodes")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
SUPPORTED = ("8", "9")


@pytest.mark.critical
@pytest.mark.promise("hypervisor.reachable", fix="make bootstrap LAB={lab}")
def test_node_answers_ssh_with_its_pinned_key(reach: Observation) -> None:
    if reach["error"]:
        raise Broken(reach["error"], reach["fix"])


@pytest.mark.minor
@pytest.mark.promise("hypervisor.pve_version", fix="upgrade the node to Proxmox VE 8 or 9")
def test_node_runs_a_supported_proxmox_ve(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    words = hypervisor["pve_version"].split("/")
    version = words[1] if len(words) > 1 else ""
    assert version.split(".")[0] in SUPPORTED, f"{node.name}: Proxmox VE {version or '(none found)'}, expected 8 or 9"
    seen(f"Proxmox VE {version}")


@pytest.mark.critical
@pytest.mark.promise("hypervisor.iommu.on", fix=DEPLOY + "; then VT-d or AMD-Vi in the firmware's setup")
def test_iommu_is_on(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    units, groups = hypervisor["iommus"], hypervisor["groups"]
    assert units, f"{node.name}: /sys/class/iommu is empty, expected an IOMMU; is it off in the firmware?"
    assert groups, f"{node.name}: no IOMMU groups, expected some; the kernel does not use {', '.join(units)}"
    seen(f"{', '.join(units)}; {len(groups)} groups")


@pytest.mark.major
@pytest.mark.promise("hypervisor.cmdline", fix=DEPLOY)
def test_kernel_was_booted_with_the_declared_options(node: Node, hypervisor: Observation) -> None:
    words = hypervisor["cmdline"].split()
    if node.passthrough.iommu_pt:
        assert "iommu=pt" in words, (
            f"{node.name}: booted with `{hypervisor['cmdline']}`, expected iommu=pt in it; "
            "was the boot loader's configuration written and the node rebooted since?"
        )


@pytest.mark.critical
@pytest.mark.promise("hypervisor.device", fix="`address` and `id` of the device in {lab}: see lspci -nn on {host}")
def test_declared_cards_are_where_they_are_declared(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    for device in node.passthrough.devices:
        found = [hypervisor["devices"][name]["id"] for name in functions(hypervisor, device)]
        assert found, f"{node.name}: nothing at {device.address}, expected {device.card.name} ({device.name})"
        assert found[0] == device.id, f"{node.name}: {device.address}.0 is {found[0]}, expected {device.id}"
        strange = [id_ for id_ in found if id_ not in device.card.functions]
        assert not strange, (
            f"{node.name}: {device.address} has a function {', '.join(strange)}, "
            f"expected only {', '.join(device.card.functions)}"
        )
    seen(", ".join(f"{device.card.name} at {device.address}" for device in node.passthrough.devices))


@pytest.mark.critical
@pytest.mark.promise("hypervisor.vfio.bound", fix=DEPLOY)
def test_vfio_pci_drives_every_function_of_the_cards(node: Node, hypervisor: Observation) -> None:
    wrong = [
        f"{name} by {hypervisor['devices'][name]['driver'] or 'no driver'}"
        for device in present(node, hypervisor)
        for name in functions(hypervisor, device)
        if hypervisor["devices"][name]["driver"] != "vfio-pci"
    ]
    assert not wrong, f"{node.name}: driven {', '.join(wrong)}; expected all by vfio-pci"


@pytest.mark.critical
@pytest.mark.promise("hypervisor.iommu.group", fix="another slot for the card, or `allow_shared_group` in {lab}")
def test_cards_are_alone_in_their_iommu_groups(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    if not hypervisor["groups"]:
        not_run(f"{node.name} has no IOMMU groups")
    told = []
    for device in present(node, hypervisor):
        own = functions(hypervisor, device)
        groups = sorted({str(hypervisor["devices"][name]["group"]) for name in own})
        assert len(groups) == 1, f"{node.name}: {device.address} is in IOMMU groups {', '.join(groups)}, expected one"
        assert device.iommu_group is None or groups[0] == str(device.iommu_group), (
            f"{node.name}: {device.address} is in IOMMU group {groups[0]}, expected {device.iommu_group}; "
            "hardware that was added or a kernel option can move it"
        )
        others = [
            f"{name} ({other['id']})"
            for name, other in hypervisor["devices"].items()
            if other["group"] == groups[0] and name not in own and not other["bridge"]
        ]
        assert not others or device.allow_shared_group, (
            f"{node.name}: IOMMU group {groups[0]} of {device.address} also holds {', '.join(others)}, "
            "expected only functions of the card: the guest would get them too"
        )
        told.append(f"{device.name} in group {groups[0]}")
    seen(", ".join(told))


@pytest.mark.major
@pytest.mark.promise("hypervisor.modprobe", fix=DEPLOY)
def test_modprobe_gives_the_cards_to_vfio_pci(node: Node, hypervisor: Observation) -> None:
    missing = sorted(wanted_ids(node) - set(hypervisor["modprobe"]["vfio_ids"]))
    assert not missing, (
        f"{node.name}: modprobe's files give vfio-pci the ids "
        f"{', '.join(hypervisor['modprobe']['vfio_ids']) or '(none)'}, expected {', '.join(missing)} among them; "
        "was a file in /etc/modprobe.d edited by hand?"
    )


@pytest.mark.major
@pytest.mark.promise("hypervisor.blacklist", fix=DEPLOY)
def test_host_drivers_are_kept_off_the_cards(node: Node, hypervisor: Observation) -> None:
    wanted = {name.replace("-", "_") for name in node.passthrough.blacklist}
    missing = sorted(wanted - set(hypervisor["modprobe"]["blacklist"]))
    assert not missing, f"{node.name}: not blacklisted for modprobe: {', '.join(missing)}"


@pytest.mark.major
@pytest.mark.promise("hypervisor.initramfs.current", fix="update-initramfs -u -k all on {host}")
def test_next_boot_gives_the_cards_to_vfio_pci(node: Node, hypervisor: Observation) -> None:
    inside = hypervisor["initramfs"]
    if "error" in inside:
        inconclusive(f"{node.name}: {inside['path']} cannot be read: {inside['error']}")
    missing = sorted(wanted_ids(node) - set(inside["vfio_ids"]))
    assert not missing, (
        f"{node.name}: {inside['path']} gives vfio-pci the ids {', '.join(inside['vfio_ids']) or '(none)'}, expected "
        f"also {', '.join(missing)}: it is older than modprobe's files, and the next boot would follow it"
    )


def wanted_ids(node: Node) -> set[str]:
    """Ids that vfio-pci has to take: all functions of all declared cards."""
    return {id_ for device in node.passthrough.devices for id_ in device.card.functions}


def functions(hypervisor: Observation, device: PassthroughDevice) -> list[str]:
    """Addresses of the functions that the node has at a declared address."""
    return sorted(name for name in hypervisor["devices"] if name.startswith(f"{device.address}."))


def present(node: Node, hypervisor: Observation) -> list[PassthroughDevice]:
    """The declared devices; the check is not run when one of them is absent."""
    for device in node.passthrough.devices:
        if not functions(hypervisor, device):
            not_run(f"{node.name} has nothing at {device.address}")
    return node.passthrough.devices
