# SPDX-License-Identifier: MIT
"""Would the node's next boot hand its GPUs over? Asked before it, so that a kernel upgrade shows what it brings."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from inventory import Node
from verify.hypervisor.declared import OFF, lacking, phrases, placed, vfio_options
from verify.observations import Observation
from verify.verdicts import Broken, inconclusive, not_run

pytestmark = pytest.mark.on("nodes")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: What the boot loader says of itself, or says in its own words.
LOADER = ("BOOT_IMAGE=", "initrd=")
#: What only the boot loader's entries say, not the settings that they are made from.
ROOT = re.compile(r"(root|boot)=|r[ow]$")


@pytest.mark.major
@pytest.mark.promise("hypervisor.next_boot.kernel", "passthrough.kernel", fix=DEPLOY)
def test_next_boot_loads_a_kernel_with_vfio_pci(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    after = hypervisor["next_boot"]
    kernel, wanted, pinned = after["kernel"], node.passthrough.kernel, after["pinned"]
    assert kernel, f"{node.name}: there is no kernel in /boot"
    assert wanted in (None, kernel), f"{node.name}: {kernel} boots next ({after['by']}), expected {wanted}"
    if pinned not in (None, kernel):
        raise Broken(
            f"{node.name}: {pinned} is pinned, but {after['by']} boots {kernel}",
            f"proxmox-boot-tool kernel pin {pinned} on {{host}}",
        )
    if not after["installed"]:
        raise Broken(
            f"{node.name}: {kernel} boots next ({after['by']}), and /boot has no such kernel",
            f"apt install proxmox-kernel-{kernel} on {{host}}, or another pin",
        )
    if not after["vfio"]:
        raise Broken(
            f"{node.name}: {kernel} boots next ({after['by']}), and it has no vfio-pci",
            "proxmox-boot-tool kernel pin on {host}, of a kernel that has it",
        )
    seen(f"{kernel} ({after['by']}); vfio-pci {after['vfio']}")


@pytest.mark.major
@pytest.mark.promise(
    "hypervisor.next_boot.cmdline",
    "passthrough.iommu_pt",
    "passthrough.pcie_acs_override",
    "passthrough.initcall_blacklist",
    "passthrough.hugepages",
    fix=DEPLOY,
)
def test_next_boot_has_the_declared_options(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    after = hypervisor["next_boot"]
    shown = f"{node.name}: the next boot has `{after['cmdline']}` ({after['cmdline_source']})"
    missing = lacking(node, after["cmdline"], after["kernel"], hypervisor["cpu"])
    assert not missing, f"{shown}, expected {', '.join(missing)} in it"
    if OFF in after["cmdline"].split():
        raise Broken(
            f"{shown}: with {OFF} the host keeps the cards",
            f"take {OFF} out of {after['cmdline_source']} on {{host}}",
        )
    seen(f"{after['cmdline']} ({after['cmdline_source']})")


@pytest.mark.major
@pytest.mark.promise(
    "hypervisor.next_boot.initramfs",
    "passthrough.devices.address",
    "passthrough.blacklist",
    fix=DEPLOY + "; then update-initramfs -u -k all on {host}",
)
def test_next_boot_gives_the_cards_to_vfio_pci(
    node: Node, hypervisor: Observation, seen: Callable[[str], None]
) -> None:
    after = hypervisor["next_boot"]
    inside = after["initramfs"]
    if not after["kernel"]:
        not_run(f"{node.name} has no kernel in /boot")
    if "error" in inside:
        assert not inside["missing"], f"{node.name}: there is no {inside['path']}, which boots next"
        inconclusive(f"{node.name}: {inside['path']} cannot be read: {inside['error']}")
    lacks = ["the module vfio-pci"] if after["vfio"] == "module" and not inside["vfio"] else []
    for card in placed(node, hypervisor):
        for name, function in card.functions.items():
            claimed = inside["claims"].get(name)
            if function["id"] not in card.device.card.functions or card.first["id"] != card.device.id:
                not_run(f"{node.name}: {card.slot} is not the declared card")
            if claimed != function["id"]:
                instead = f" ({claimed} is expected there, found {function['id']})" if claimed else ""
                lacks.append(f"a script that gives {name} to vfio-pci{instead}")
    wanted = [name for name, on in vfio_options(node).items() if on]
    lacks += [f"the option {name}=1" for name in wanted if not is_on(inside["options"], name)]
    blacklist = {name.replace("-", "_") for name in node.passthrough.blacklist}
    lacks += [f"the blacklist entry {name}" for name in sorted(blacklist - set(inside["blacklist"]))]
    assert not lacks, f"{node.name}: {inside['path']}, which boots next, lacks {', '.join(lacks)}"
    seen(inside["path"] + ("; its copies on the EFI partitions were not read" if after["copied"] else ""))


@pytest.mark.minor
@pytest.mark.promise("hypervisor.reboot_pending", fix="reboot {host} when it suits")
def test_node_runs_what_it_would_boot(node: Node, hypervisor: Observation, seen: Callable[[str], None]) -> None:
    """What is declared has its own checks for both boots: here is all the rest."""
    after = hypervisor["next_boot"]
    declared = node.passthrough
    news = []
    if declared.kernel is None and after["kernel"] not in (None, hypervisor["kernel"]):
        news.append(f"kernel {after['kernel']} in place of {hypervisor['kernel']}")
    ours = {OFF}
    for kernel in (hypervisor["kernel"], after["kernel"]):
        ours |= {word for phrase in phrases(node, kernel, hypervisor["cpu"]) for word in phrase.split()}
    running, coming = comparable(hypervisor["cmdline"]), comparable(after["cmdline"])
    if after["cmdline_source"] == "/etc/default/grub":
        running, coming = ([word for word in words if not ROOT.match(word)] for words in (running, coming))
    news += [f"{word} on the command line" for word in coming if word not in running and word not in ours]
    news += [f"no {word} on the command line" for word in running if word not in coming and word not in ours]
    assert not news, f"{node.name}: a reboot is outstanding, it would bring {', '.join(news)}"
    seen("it would change nothing but what has checks of its own")


def is_on(options: dict[str, dict[str, str]], name: str) -> bool:
    """Do modprobe's files turn that parameter on?"""
    module, _, key = name.partition(".")
    return options.get(module, {}).get(key) in ("1", "y", "Y", "")


def comparable(cmdline: str) -> list[str]:
    """The words of a command line, without what the boot loader adds, quotes, and variables that only it knows."""
    words = cmdline.translate(str.maketrans("", "", "\"'")).split()
    return [word for word in words if not word.startswith(LOADER) and "$" not in word]
