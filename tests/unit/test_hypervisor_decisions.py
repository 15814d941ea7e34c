# SPDX-License-Identifier: MIT
"""What the hypervisor operations decide, from a node's state alone."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from inventory import GpulabError
from inventory.cards import RTX_A4000
from inventory.schema import Node
from operations import hypervisor
from operations.files import File
from operations.hypervisor import boot, devices, passthrough, restart
from operations.hypervisor.boot import Loader, Pending, boot_loader, command_line_words, edit_command_line
from operations.hypervisor.devices import Device, Wanted
from operations.hypervisor.facts import GRUB_SNIPPET, KERNEL_CMDLINE, MODPROBE, MODULES_LOAD, NodeState, PciFunction
from operations.proxmox.config import TAG

A4000 = Device("a4000", "0000:01:00", RTX_A4000.functions, iommu_group=14)
WANTED = Wanted([A4000], ["nouveau"])

GPU = PciFunction("0000:01:00.0", "10de:24b0", "10de:14ad", "0300", "nouveau", 14, False, False)
AUDIO = PciFunction("0000:01:00.1", "10de:228b", "10de:14ad", "0403", "snd_hda_intel", 14, False, False)
PORT = PciFunction("0000:00:01.0", "8086:460d", "0000:0000", "0604", "pcieport", 14, False, True)
DUMMY = PciFunction("0000:00:01.1", "1022:1482", "0000:0000", "0600", None, 14, False, False)
ISA = PciFunction("0000:00:1f.0", "8086:7a83", "1028:0aa1", "0601", "lpc_ich", 14, False, False)
TWIN = dataclasses.replace(GPU, address="0000:02:00.0", iommu_group=15)
FRESH_PCI = (PORT, GPU, AUDIO)
BOUND_PCI = (PORT, *(dataclasses.replace(function, driver="vfio-pci") for function in (GPU, AUDIO)))

UEFI = {"efi_directory": True, "efibootmgr": "", "boot_tool_managed": True}
EFIBOOTMGR = """BootCurrent: {current}
Timeout: 1 seconds
BootOrder: 0004,0005,0000
Boot0000* UEFI OS\tHD(2,GPT,0f0f)/File(\\EFI\\BOOT\\BOOTX64.EFI)
Boot0004* Linux Boot Manager\tHD(2,GPT,0f0f)/File(\\EFI\\systemd\\systemd-bootx64.efi)
Boot0005* proxmox\tHD(2,GPT,0f0f)/\\EFI\\proxmox\\shimx64.efi
Boot0006* proxmox\tHD(2,GPT,0f0f)/File(\\EFI\\proxmox\\grubx64.efi)
"""
TOOL = "System currently booted with uefi\n8D4D-B8B1 is configured with: {}\n"


def node(**changes: Any) -> NodeState:
    """A fresh node (tests/hosts/pve1.yaml), with changes."""
    found = yaml.safe_load((Path(__file__).parent.parent / "hosts/pve1.yaml").read_text())
    state = NodeState.of(found)
    return dataclasses.replace(state, **{"pci": FRESH_PCI, **changes})


def configured(state: NodeState, wanted: Wanted = WANTED, mtime: float = 3000.0) -> NodeState:
    """The node with every file of ours written, and nothing else done."""
    written = {
        path: {"content": base64.b64encode(file.content.encode()).decode(), "mode": file.mode, "mtime": mtime}
        for path, file in boot.wanted_files("pve1", state, wanted).items()
        if file is not None
    }
    return dataclasses.replace(state, files={**state.files, **written})


def text(content: str, mtime: float = 1000.0) -> dict[str, Any]:
    return {"content": base64.b64encode(content.encode()).decode(), "mode": 0o644, "mtime": mtime}


def briefs(problems: list[GpulabError]) -> list[str]:
    return [problem.brief for problem in problems]


# The kernel's command line


@pytest.mark.parametrize(
    ("vendor", "kernel", "words"),
    [
        ("GenuineIntel", "6.5.13-6-pve", ["intel_iommu=on", "iommu=pt"]),
        ("GenuineIntel", "6.8.4-2-pve", ["iommu=pt"]),
        ("GenuineIntel", "6.14.8-2-pve", ["iommu=pt"]),
        ("AuthenticAMD", "6.5.13-6-pve", ["iommu=pt"]),
    ],
)
def test_only_intel_before_kernel_6_8_needs_a_word_for_the_iommu(vendor: str, kernel: str, words: list[str]) -> None:
    assert command_line_words(node(cpu_vendor=vendor, kernel=kernel), WANTED) == words


def test_no_word_is_wanted_without_iommu_pt() -> None:
    assert command_line_words(node(), dataclasses.replace(WANTED, iommu_pt=False)) == []


word = st.text(st.characters(codec="ascii", exclude_characters='"', categories=["L", "N", "P", "S"]), min_size=1)
quoted = word.map(lambda value: f'module.option="{value} {value}"')
OURS = ["intel_iommu=on", "iommu=pt"]
line = st.lists(st.one_of(word, quoted, st.sampled_from(OURS))).map(" ".join)


@given(line, st.lists(st.sampled_from(OURS)), st.lists(st.sampled_from(OURS)), st.sampled_from(["", "\n"]))
def test_command_line_keeps_the_words_of_others_and_settles(
    text: str, add: list[str], drop: list[str], end: str
) -> None:
    edited = edit_command_line(text + end, add, drop)

    assert len(edited.splitlines()) <= 1
    others = [word for word in text.split(" ") if word and word not in OURS]
    assert [word for word in edited.split() if word not in OURS] == " ".join(others).split()
    assert set(add) <= set(edited.split())
    assert not (set(drop) - set(add)) & set(edited.split())
    assert edit_command_line(edited, add, drop) == edited


def test_command_line_that_is_right_stays_byte_for_byte() -> None:
    assert edit_command_line("root=ZFS=rpool  iommu=pt", ["iommu=pt"]) == "root=ZFS=rpool  iommu=pt"


def test_command_line_of_several_lines_becomes_one() -> None:
    """Only the first line of /etc/kernel/cmdline would count."""
    assert edit_command_line("root=/dev/sda2\nquiet\n", []) == "root=/dev/sda2 quiet\n"


# The boot loader


@pytest.mark.parametrize(
    ("changes", "loader"),
    [
        ({"efi_directory": False, "efibootmgr": None}, Loader.GRUB),
        ({"efi_directory": True, "efibootmgr": "EFI variables are not supported on this system."}, Loader.GRUB),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0004")}, Loader.SYSTEMD_BOOT),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0005")}, Loader.GRUB),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0006")}, Loader.GRUB),
        ({**UEFI, "loader_info": "systemd-boot 257.9-1", "efibootmgr": EFIBOOTMGR}, Loader.SYSTEMD_BOOT),
        ({**UEFI, "loader_info": "GRUB 2.12-9+pmx2", "efibootmgr": EFIBOOTMGR.format(current="0000")}, Loader.GRUB),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0000"), "boot_tool_managed": False}, Loader.GRUB),
        ({**UEFI, "boot_tool_status": TOOL.format("uefi (versions: 6.8.4, 6.14.8)")}, Loader.SYSTEMD_BOOT),
        ({**UEFI, "boot_tool_status": TOOL.format("grub (versions: 6.8.4, 6.14.8)")}, Loader.GRUB),
    ],
)
def test_boot_loader_is_the_one_that_really_started_the_node(changes: dict[str, Any], loader: Loader) -> None:
    """Whether /etc/kernel/cmdline exists plays no part: GRUB installations on ZFS have it as well."""
    files = {KERNEL_CMDLINE: text("root=ZFS=rpool/ROOT/pve-1 boot=zfs\n")}
    assert boot_loader("pve1", node(files=files, **changes)) is loader


def test_boot_loader_that_cannot_be_told_is_not_guessed() -> None:
    status = TOOL.format("uefi (versions: 6.14.8), grub (versions: 6.14.8)")
    state = node(**UEFI | {"efibootmgr": EFIBOOTMGR.format(current="0000"), "boot_tool_status": status})

    with pytest.raises(GpulabError, match="pve1: cannot tell which boot loader started it"):
        boot_loader("pve1", state)


# Files


def test_files_of_a_node_without_words_for_grub() -> None:
    files = boot.wanted_files("pve1", node(), Wanted([A4000], [], iommu_pt=False))

    snippet = files[GRUB_SNIPPET]
    assert snippet is not None and "GRUB_CMDLINE_LINUX_DEFAULT" not in snippet.content
    modprobe = files[MODPROBE]
    assert modprobe is not None and "blacklist" not in modprobe.content


def test_two_equal_cards_are_named_once() -> None:
    second = dataclasses.replace(A4000, name="a4000-2", address="0000:02:00")
    assert Wanted([A4000, second]).ids == ["10de:24b0", "10de:228b"]


def test_missing_kernel_cmdline_starts_from_the_running_one() -> None:
    state = node(**UEFI, loader_info="systemd-boot 257", cmdline="initrd=\\EFI\\proxmox\\x root=ZFS=rpool boot=zfs")

    assert boot.wanted_files("pve1", state, WANTED)[KERNEL_CMDLINE] == File("root=ZFS=rpool boot=zfs iommu=pt\n")


def test_iommu_pt_leaves_the_kernel_cmdline_when_undeclared() -> None:
    files = {KERNEL_CMDLINE: text("root=ZFS=rpool iommu=pt quiet\n")}
    state = node(**UEFI, loader_info="systemd-boot 257", files=files)

    wanted = dataclasses.replace(WANTED, iommu_pt=False)
    assert boot.wanted_files("pve1", state, wanted)[KERNEL_CMDLINE] == File("root=ZFS=rpool quiet\n")


# What is due on disk


def test_fresh_node_needs_everything() -> None:
    due = boot.pending("pve1", node(), WANTED)

    assert set(due.files) == {MODULES_LOAD, MODPROBE, GRUB_SNIPPET}
    assert due.initramfs and due.entries


def test_run_killed_after_the_files_is_finished_from_their_times() -> None:
    due = boot.pending("pve1", configured(node()), WANTED)

    assert (due.files, due.initramfs, due.entries) == ({}, True, True)


def test_nothing_is_due_after_a_finished_run() -> None:
    state = dataclasses.replace(configured(node()), initrds={"/boot/initrd.img-a": (3001.0, 1)}, grub_mtime=3001.0)

    assert not boot.pending("pve1", state, WANTED)


def test_grub_alone_is_made_anew_when_only_the_words_change() -> None:
    state = dataclasses.replace(configured(node()), initrds={"/boot/initrd.img-a": (3001.0, 1)}, grub_mtime=3001.0)

    due = boot.pending("pve1", state, dataclasses.replace(WANTED, iommu_pt=False))

    assert (set(due.files), due.initramfs, due.entries) == ({GRUB_SNIPPET}, False, True)


def test_stamp_is_all_that_tells_of_a_refresh_with_systemd_boot() -> None:
    """Its entries lie on partitions that are not mounted."""
    files = {KERNEL_CMDLINE: text("root=ZFS=rpool\n")}
    state = configured(node(**UEFI, loader_info="systemd-boot 257", files=files))
    state = dataclasses.replace(state, initrds={"/boot/initrd.img-a": (3001.0, 1)}, grub_mtime=9000.0)

    assert boot.pending("pve1", state, WANTED).entries
    assert not boot.pending("pve1", dataclasses.replace(state, stamp_mtime=3001.0), WANTED)


# The reboot

IDLE = Pending(Loader.GRUB, {}, False, False)
RUNNING = "root=/dev/mapper/pve-root ro quiet iommu=pt"


def test_fresh_node_reboots_for_words_and_drivers() -> None:
    due = boot.pending("pve1", node(), WANTED)

    assert restart.needed(node(), WANTED, due) == [
        "iommu=pt is not on the running command line",
        "0000:01:00.0 is bound to nouveau, not to vfio-pci",
        "0000:01:00.1 is bound to snd_hda_intel, not to vfio-pci",
    ]


def test_node_that_runs_as_configured_is_not_rebooted_for_a_file() -> None:
    """A blacklist that grows changes files and nothing that runs."""
    state = node(pci=BOUND_PCI, cmdline=RUNNING)
    due = boot.pending("pve1", configured(state), Wanted([A4000], ["nouveau", "nvidia"]))

    assert due.files
    assert restart.needed(state, WANTED, due) == []


def test_reboot_that_would_not_help_is_not_done() -> None:
    """Booted after everything was made: it would loop, deploy after deploy."""
    state = node(boot_time=4000.0, grub_mtime=3100.0, stamp_mtime=3000.0)

    assert restart.differences(state, WANTED, IDLE)
    assert restart.needed(state, WANTED, IDLE) == []
    assert restart.needed(dataclasses.replace(state, stamp_mtime=4001.0), WANTED, IDLE)


@pytest.mark.parametrize(
    ("grub_cmdline", "due", "snippet", "stays"),
    [
        ("vmlinuz ro quiet", IDLE, "", False),
        ("vmlinuz ro quiet iommu=pt", IDLE, "", True),
        ("vmlinuz ro quiet iommu=pt", Pending(Loader.GRUB, {}, False, True), "iommu=pt", False),
        ("vmlinuz ro quiet iommu=pt", Pending(Loader.GRUB, {}, False, True), "", True),
        ("vmlinuz ro quiet iommu=pt", Pending(Loader.SYSTEMD_BOOT, {}, False, False), "", False),
    ],
)
def test_undeclared_iommu_pt_needs_a_reboot_unless_the_user_set_it(
    grub_cmdline: str, due: Pending, snippet: str, stays: bool
) -> None:
    files = {GRUB_SNIPPET: text(snippet)}
    state = node(pci=BOUND_PCI, cmdline=RUNNING, grub_cmdline=grub_cmdline, files=files)

    lines = restart.differences(state, dataclasses.replace(WANTED, iommu_pt=False), due)

    assert lines == ([] if stays else ["iommu=pt is still on the running command line"])


def test_own_tag_is_the_vm_builders() -> None:
    assert restart.OWN_TAG == TAG


# Devices


def test_group_of_functions_and_bridges_is_the_devices_own() -> None:
    """AMD's dummy host bridges stand in the group of the port behind them."""
    assert devices.group_problems("pve1", node(pci=(PORT, DUMMY, GPU, AUDIO)), WANTED) == []


def test_isa_bridge_in_the_group_is_foreign() -> None:
    problems = devices.group_problems("pve1", node(pci=(ISA, GPU, AUDIO)), WANTED)

    assert briefs(problems) == [
        "pve1: IOMMU group 14 of 0000:01:00 (a4000) also holds 0000:00:1f.0 8086:7a83 (lpc_ich)"
    ]


def test_shared_group_can_be_accepted() -> None:
    device = dataclasses.replace(A4000, allow_shared_group=True)
    assert devices.group_problems("pve1", node(pci=(ISA, GPU, AUDIO)), Wanted([device])) == []


def test_groups_are_not_judged_without_iommu() -> None:
    state = node(iommu=False, pci=tuple(dataclasses.replace(function, iommu_group=None) for function in FRESH_PCI))
    assert devices.group_problems("pve1", state, WANTED) == []


def test_device_without_a_group_is_refused() -> None:
    state = node(pci=(dataclasses.replace(GPU, iommu_group=None),))
    assert briefs(devices.group_problems("pve1", state, WANTED)) == ["pve1: 0000:01:00 (a4000) is in no IOMMU group"]


def test_boot_screen_can_be_given_away() -> None:
    """A headless node with one card has nothing else."""
    state = node(pci=(dataclasses.replace(GPU, boot_vga=True), AUDIO))
    assert devices.identity_problems("pve1", state, Wanted([dataclasses.replace(A4000, allow_boot_vga=True)])) == []


def test_other_card_at_the_address_is_refused() -> None:
    state = node(pci=(dataclasses.replace(GPU, id="10de:2230"),))
    (problem,) = devices.identity_problems("pve1", state, WANTED)

    assert problem.brief == "pve1: 0000:01:00 (a4000) is not the declared card"
    assert problem.details == "Expected 10de:24b0, found 10de:2230."


def test_function_that_no_table_knows_is_refused() -> None:
    usb = PciFunction("0000:01:00.2", "10de:1ad8", "10de:14ad", "0c03", "xhci_hcd", 14, False, False)
    assert briefs(devices.identity_problems("pve1", node(pci=(GPU, AUDIO, usb)), WANTED)) == [
        "pve1: 0000:01:00 (a4000) has functions that the card table does not know: 0000:01:00.2 10de:1ad8 (xhci_hcd)"
    ]


def test_undeclared_twin_in_use_by_the_node_is_refused() -> None:
    """vfio-pci takes ids: it would take both."""
    (problem,) = devices.identity_problems("pve1", node(pci=(GPU, AUDIO, TWIN)), WANTED)

    assert problem.brief == (
        "pve1: 0000:02:00.0 has the id 10de:24b0 of a declared device and would be bound to vfio-pci with it"
    )
    assert problem.resolution == "declare 0000:02:00 in `passthrough.devices` too; no guest has to be given it"


def test_twin_that_is_declared_or_passed_through_already_is_fine() -> None:
    declared = Wanted([A4000, Device("second", "0000:02:00", RTX_A4000.functions)])
    assert devices.identity_problems("pve1", node(pci=(GPU, AUDIO, TWIN)), declared) == []
    passed = dataclasses.replace(TWIN, driver="vfio-pci")
    assert devices.identity_problems("pve1", node(pci=(GPU, AUDIO, passed)), WANTED) == []


def test_several_problems_are_told_at_once() -> None:
    with pytest.raises(GpulabError) as caught:
        devices.refuse([GpulabError("pve1: one", resolution="mend it"), GpulabError("pve1: two")], "pve1")

    assert str(caught.value) == "pve1: 2 things are wrong\npve1: one\nhint: mend it\npve1: two"


def test_wanted_is_the_inventorys() -> None:
    declared = Node.model_validate(
        {
            "name": "pve1",
            "ssh_hostname": "192.0.2.11",
            "passthrough": {
                "devices": [{"address": "0000:01:00", "iommu_group": 14, "allow_shared_group": True}],
                "blacklist": ["nouveau"],
                "iommu_pt": False,
            },
        }
    )

    device = Device("a4000", "0000:01:00", ("10de:24b0", "10de:228b"), 14, allow_shared_group=True)
    assert hypervisor.wanted(declared) == Wanted([device], ["nouveau"], iommu_pt=False)


# Preflight and the end


@pytest.mark.parametrize("version", ["7.4-17", "10.0.1"])
def test_unknown_pve_version_is_refused(version: str) -> None:
    assert briefs(passthrough.host_problems("pve1", node(pve_version=version))) == [f"pve1: Proxmox VE {version}"]


def test_arm_machine_is_refused() -> None:
    assert briefs(passthrough.host_problems("pve1", node(machine="aarch64"))) == ["pve1: a aarch64 machine"]


def test_iommu_that_the_user_turned_off_is_named() -> None:
    problem = passthrough.iommu_problem("pve1", node(iommu=False, cmdline="quiet intel_iommu=off"), WANTED)

    assert problem is not None and problem.resolution == "take intel_iommu=off off the kernel command line"


def test_full_boot_partition_is_refused_before_the_initramfs() -> None:
    due = Pending(Loader.GRUB, {}, True, False)
    problem = passthrough.space_problem("pve1", node(boot_free_bytes=40 * 2**20), due)

    assert problem is not None and problem.brief == "pve1: /boot has 40 MiB free"
    assert passthrough.space_problem("pve1", node(boot_free_bytes=40 * 2**20), IDLE) is None


def test_boot_without_our_words_says_what_to_look_at() -> None:
    (problem,) = passthrough.running_problems("pve1", node(pci=BOUND_PCI), WANTED)

    assert problem.brief == "pve1: booted without iommu=pt"
    assert problem.resolution.startswith("it is configured for GRUB: see `efibootmgr -v`")
