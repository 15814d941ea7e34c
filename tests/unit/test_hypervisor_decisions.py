# SPDX-License-Identifier: MIT
"""What the hypervisor operations decide, from a node's state alone."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from inventory import GpulabError
from inventory.cards import RTX_A4000
from inventory.schema import Node
from operations import hypervisor
from operations.files import File
from operations.hypervisor import boot, devices, goal, passthrough, restart
from operations.hypervisor.boot import Pending
from operations.hypervisor.devices import Device, Wanted
from operations.hypervisor.facts import (
    BIND_SCRIPT,
    GRUB_SNIPPET,
    INITRAMFS_HOOK,
    KERNEL_CMDLINE,
    KERNEL_PIN,
    MODPROBE,
    MODULES_LOAD,
    BootPartition,
    HostedGuest,
    Kernel,
    NodeState,
    PciFunction,
)
from operations.hypervisor.goal import Goal, Loader, boot_loader

A4000 = Device("a4000", "0000:01:00", RTX_A4000.functions, iommu_group=14)
WANTED = Wanted([A4000])

GPU = PciFunction("0000:01:00.0", "10de:24b0", "10de:14ad", "0300", "nouveau", None, 14, False, False)
AUDIO = PciFunction("0000:01:00.1", "10de:228b", "10de:14ad", "0403", "snd_hda_intel", None, 14, False, False)
PORT = PciFunction("0000:00:01.0", "8086:460d", "0000:0000", "0604", "pcieport", None, 14, False, True)
DUMMY = PciFunction("0000:00:01.1", "1022:1482", "0000:0000", "0600", None, None, 14, False, False)
ISA = PciFunction("0000:00:1f.0", "8086:7a83", "1028:0aa1", "0601", "lpc_ich", None, 14, False, False)
TWIN = dataclasses.replace(GPU, address="0000:02:00.0", iommu_group=15)
FRESH_PCI = (PORT, GPU, AUDIO)
BOUND_PCI = (
    PORT,
    *(dataclasses.replace(function, driver="vfio-pci", driver_override="vfio-pci") for function in (GPU, AUDIO)),
)

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


def aim(state: NodeState, wanted: Wanted = WANTED) -> Goal:
    return goal.as_declared("pve1", state, wanted)


def pending(state: NodeState, wanted: Wanted = WANTED) -> Pending:
    return boot.pending("pve1", state, aim(state, wanted))


def configured(state: NodeState, wanted: Wanted = WANTED, mtime: float = 3000.0) -> NodeState:
    """The node with every file of ours written, and nothing else done."""
    written = {
        path: {"content": base64.b64encode(file.content.encode()).decode(), "mode": file.mode, "mtime": mtime}
        for path, file in aim(state, wanted).files.items()
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
    state = node(cpu_vendor=vendor, kernel="6.17.1-1-pve", kernels=(Kernel(kernel, vfio=True),))

    assert goal.phrases(state, WANTED) == words


def test_no_word_is_wanted_without_iommu_pt() -> None:
    assert goal.phrases(node(), dataclasses.replace(WANTED, iommu_pt=False)) == []


def test_kernel_that_is_pinned_decides_the_words() -> None:
    """Not the running one: the words are for the next boot."""
    state = node(kernels=(Kernel("6.5.13-6-pve", vfio=True), Kernel("6.14.8-2-pve", vfio=True)))

    assert goal.next_kernel(state, WANTED) == "6.14.8-2-pve"
    assert "intel_iommu=on" in goal.phrases(state, dataclasses.replace(WANTED, kernel="6.5.13-6-pve"))


def test_newest_kernel_is_told_by_number() -> None:
    kernels = tuple(Kernel(version, vfio=True) for version in ("6.8.12-9-pve", "6.8.12-10-pve", "6.8.4-3-pve"))
    assert goal.next_kernel(node(kernels=kernels)) == "6.8.12-10-pve"


# The boot loader


@pytest.mark.parametrize(
    ("changes", "loader"),
    [
        ({"efi_directory": False, "efibootmgr": None}, Loader.GRUB_BIOS),
        ({"efi_directory": True, "efibootmgr": "EFI variables are not supported on this system."}, Loader.GRUB_BIOS),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0004")}, Loader.SYSTEMD_BOOT),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0005")}, Loader.SHIM),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0006")}, Loader.GRUB_UEFI),
        ({**UEFI, "loader_info": "systemd-boot 257.9-1", "efibootmgr": EFIBOOTMGR}, Loader.SYSTEMD_BOOT),
        (
            {**UEFI, "loader_info": "GRUB 2.12-9+pmx2", "efibootmgr": EFIBOOTMGR.format(current="0000")},
            Loader.GRUB_UEFI,
        ),
        ({**UEFI, "efibootmgr": EFIBOOTMGR.format(current="0000"), "boot_tool_managed": False}, Loader.GRUB_UEFI),
        ({**UEFI, "boot_tool_status": TOOL.format("uefi (versions: 6.8.4, 6.14.8)")}, Loader.SYSTEMD_BOOT),
        ({**UEFI, "boot_tool_status": TOOL.format("grub (versions: 6.8.4, 6.14.8)")}, Loader.GRUB_UEFI),
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


def kept(original: str | None, *written: str | None, current: str | None = None, touched: float = 3000.0) -> Any:
    """What is kept of a file; without `current` it is as it was written last."""
    one = {"original": None if original is None else text(original), "touched": touched}
    versions = [None if version is None else text(version) for version in written]
    found = [one["original"], *versions[:-1]]
    return {**one, "written": versions, "found": found, "current": versions[-1] if current is None else text(current)}


def test_node_without_options_gets_no_file_for_them() -> None:
    files = aim(node(), dataclasses.replace(WANTED, iommu_pt=False)).files

    assert files[GRUB_SNIPPET] is None
    assert files[MODPROBE] is None
    assert KERNEL_PIN not in files


def test_script_names_the_functions_that_are_there() -> None:
    script = aim(node(pci=(PORT, GPU))).files[BIND_SCRIPT]

    assert script is not None
    assert "if declared 0000:01:00.0 10de:24b0 && alone 0000:01:00; then" in script.content
    assert "0000:01:00.1" not in script.content.split("# a4000")[1]


def test_shared_group_that_is_accepted_is_not_looked_at_by_the_script() -> None:
    shared = dataclasses.replace(A4000, allow_shared_group=True)
    script = aim(node(), Wanted([shared])).files[BIND_SCRIPT]

    assert script is not None and "alone 0000" not in script.content


def test_missing_kernel_cmdline_starts_from_the_running_one() -> None:
    state = node(**UEFI, loader_info="systemd-boot 257", cmdline="initrd=\\EFI\\proxmox\\x root=ZFS=rpool boot=zfs")

    assert aim(state).files[KERNEL_CMDLINE] == File("root=ZFS=rpool boot=zfs iommu=pt\n")


@pytest.mark.parametrize(
    ("before", "line"),
    [("root=ZFS=rpool quiet\n", "root=ZFS=rpool quiet\n"), ("root=ZFS=rpool iommu=pt quiet\n", None)],
)
def test_undeclared_word_leaves_the_kernel_cmdline_unless_it_was_there_before(before: str, line: str | None) -> None:
    current = "root=ZFS=rpool iommu=pt quiet\n"
    record = kept(before, current)
    files = {KERNEL_CMDLINE: text(current)}
    state = node(**UEFI, loader_info="systemd-boot 257", files=files, kept={KERNEL_CMDLINE: record})

    wanted = dataclasses.replace(WANTED, iommu_pt=False)
    assert aim(state, wanted).files[KERNEL_CMDLINE] == File(line or current)


def test_phrase_that_changes_replaces_its_old_words() -> None:
    current = "root=ZFS=rpool iommu=pt hugepagesz=1G hugepages=8 quiet\n"
    record = kept(
        "root=ZFS=rpool quiet\n", "root=ZFS=rpool quiet iommu=pt hugepagesz=1G hugepages=8\n", current=current
    )
    files = {KERNEL_CMDLINE: text(current)}
    state = node(**UEFI, loader_info="systemd-boot 257", files=files, kept={KERNEL_CMDLINE: record})

    wanted = dataclasses.replace(WANTED, hugepages=("1G", 16))
    assert aim(state, wanted).files[KERNEL_CMDLINE] == File(
        "root=ZFS=rpool quiet iommu=pt hugepagesz=1G hugepages=16\n"
    )


@pytest.mark.parametrize("before", [None, "6.8.12-9-pve\n"])
def test_pin_of_ours_that_is_no_longer_declared_gives_way_to_what_was_before(before: str | None) -> None:
    state = node(kept={KERNEL_PIN: kept(before, "6.14.8-2-pve\n")}, files={KERNEL_PIN: text("6.14.8-2-pve\n")})

    assert aim(state).files[KERNEL_PIN] == (File(before) if before else None)


def test_pin_of_somebody_else_stays() -> None:
    state = node(files={KERNEL_PIN: text("6.8.12-9-pve\n")})

    assert KERNEL_PIN not in aim(state).files
    assert goal.next_kernel(state) == "6.8.12-9-pve"


# What is due on disk


def test_fresh_node_needs_everything() -> None:
    due = pending(node())

    assert set(due.files) == {MODULES_LOAD, INITRAMFS_HOOK, BIND_SCRIPT, GRUB_SNIPPET}
    assert due.initramfs and due.entries


def test_run_killed_after_the_files_is_finished_from_their_times() -> None:
    due = pending(configured(node()))

    assert (due.files, due.initramfs, due.entries) == ({}, True, True)


def test_run_killed_after_a_file_was_removed_is_finished_too() -> None:
    """A file that is gone has no time; its kept versions have."""
    gone = {**kept(None, "options vfio_pci disable_idle_d3=1\n", None, touched=5000.0), "current": None}
    state = dataclasses.replace(configured(node()), initrds={"/boot/initrd.img-a": (3001.0, 1)}, grub_mtime=3001.0)

    due = pending(dataclasses.replace(state, kept={MODPROBE: gone}))

    assert (due.files, due.initramfs, due.entries) == ({}, True, False)


def test_nothing_is_due_after_a_finished_run() -> None:
    state = dataclasses.replace(configured(node()), initrds={"/boot/initrd.img-a": (3001.0, 1)}, grub_mtime=3001.0)

    assert not pending(state)


def test_grub_alone_is_made_anew_when_only_the_words_change() -> None:
    state = dataclasses.replace(configured(node()), initrds={"/boot/initrd.img-a": (3001.0, 1)}, grub_mtime=3001.0)

    due = pending(state, dataclasses.replace(WANTED, iommu_pt=False))

    assert (due.files, due.initramfs, due.entries) == ({GRUB_SNIPPET: None}, False, True)


def test_stamp_is_all_that_tells_of_a_refresh_with_systemd_boot() -> None:
    """Its entries lie on partitions that are not mounted."""
    files = {KERNEL_CMDLINE: text("root=ZFS=rpool\n")}
    state = configured(node(**UEFI, loader_info="systemd-boot 257", files=files))
    state = dataclasses.replace(state, initrds={"/boot/initrd.img-a": (3001.0, 1)}, grub_mtime=9000.0)

    assert pending(state).entries
    assert not pending(dataclasses.replace(state, stamp_mtime=3001.0))


@pytest.mark.parametrize(
    ("changes", "commands"),
    [
        ({}, ["update-initramfs -u -k all", "update-grub"]),
        (
            {**UEFI, "loader_info": "systemd-boot 257", "files": {KERNEL_CMDLINE: text("root=ZFS=rpool\n")}},
            ["update-initramfs -u -k all", "proxmox-boot-tool refresh"],
        ),
        # GRUB through shim on ZFS: its kernels lie on the EFI partitions as well.
        (
            {**UEFI, "loader_info": "GRUB 2.12", "files": {KERNEL_CMDLINE: text("root=ZFS=rpool\n")}},
            ["update-initramfs -u -k all", "update-grub", "proxmox-boot-tool refresh"],
        ),
    ],
)
def test_refresh_reaches_what_the_loader_reads(changes: dict[str, Any], commands: list[str]) -> None:
    state = node(**changes)
    assert boot.refresh_commands(state, aim(state), pending(state)) == commands


def test_pin_that_is_taken_back_is_unpinned_by_pves_tool() -> None:
    state = node(kept={KERNEL_PIN: kept(None, "6.14.8-2-pve\n")}, files={KERNEL_PIN: text("6.14.8-2-pve\n")})
    state = configured(state)

    commands = boot.refresh_commands(state, aim(state), pending(state))

    assert "proxmox-boot-tool kernel unpin" in commands


# The reboot

IDLE = Pending(Loader.GRUB_BIOS, {}, False, False)
RUNNING = "root=/dev/mapper/pve-root ro quiet iommu=pt"


def test_fresh_node_reboots_for_words_and_drivers() -> None:
    assert restart.needed(node(), aim(node()), pending(node())) == [
        "iommu=pt is not on the running command line",
        "0000:01:00.0 is bound to nouveau, not to vfio-pci",
        "0000:01:00.1 is bound to snd_hda_intel, not to vfio-pci",
    ]


def test_node_that_runs_as_configured_is_not_rebooted_for_a_file() -> None:
    """A blacklist that grows changes files and nothing that runs."""
    state = node(pci=BOUND_PCI, cmdline=RUNNING)
    wanted = dataclasses.replace(WANTED, blacklist=["nvidia"])
    due = pending(configured(state), wanted)

    assert due.files
    assert restart.needed(state, aim(state, wanted), due) == []


def test_reboot_that_would_not_help_is_not_done() -> None:
    """Booted after everything was made: it would loop, deploy after deploy."""
    state = node(boot_time=4000.0, grub_mtime=3100.0, stamp_mtime=3000.0)

    assert restart.differences(state, aim(state), IDLE)
    assert restart.needed(state, aim(state), IDLE) == []
    assert restart.needed(dataclasses.replace(state, stamp_mtime=4001.0), aim(state), IDLE)


SNIPPET = 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT iommu=pt"\n'


@pytest.mark.parametrize(
    ("grub_cmdline", "due", "ours", "stays"),
    [
        ("vmlinuz ro quiet", IDLE, True, False),
        ("vmlinuz ro quiet iommu=pt", IDLE, True, True),
        ("vmlinuz ro quiet iommu=pt", Pending(Loader.GRUB_BIOS, {}, False, True), True, False),
        # The user's own word is nothing that gpulab would take away.
        ("vmlinuz ro quiet iommu=pt", Pending(Loader.GRUB_BIOS, {}, False, True), False, True),
    ],
)
def test_undeclared_word_needs_a_reboot_unless_the_user_set_it(
    grub_cmdline: str, due: Pending, ours: bool, stays: bool
) -> None:
    state = node(pci=BOUND_PCI, cmdline=RUNNING, grub_cmdline=grub_cmdline)
    if ours:
        state = dataclasses.replace(state, kept={GRUB_SNIPPET: kept(None, SNIPPET)})

    lines = restart.differences(state, aim(state, dataclasses.replace(WANTED, iommu_pt=False)), due)

    assert lines == ([] if stays else ["iommu=pt is still on the running command line"])


def test_device_that_is_no_longer_declared_is_given_back_by_a_reboot() -> None:
    twin = dataclasses.replace(TWIN, driver="vfio-pci", driver_override="vfio-pci")
    state = node(pci=(*BOUND_PCI, twin), cmdline=RUNNING)
    script = kept(None, "if declared 0000:02:00.0 10de:24b0; then\n    give 0000:02:00.0\nfi\n")

    assert restart.differences(state, aim(state), IDLE) == []
    state = dataclasses.replace(state, kept={BIND_SCRIPT: script})
    assert restart.differences(state, aim(state), IDLE) == ["0000:02:00.0 is still given to vfio-pci"]


def test_options_and_kernel_that_do_not_run_need_a_reboot() -> None:
    state = node(pci=BOUND_PCI, cmdline=RUNNING, parameters={"vfio_pci.disable_idle_d3": "N"})
    wanted = dataclasses.replace(
        WANTED, disable_idle_d3=True, allow_unsafe_interrupts=True, hugepages=("1G", 4), kernel="6.8.12-9-pve"
    )

    assert restart.differences(state, aim(state, wanted), IDLE) == [
        "hugepagesz=1G hugepages=4 is not on the running command line",
        "vfio_pci.disable_idle_d3 is N, not Y",
        "vfio_iommu_type1.allow_unsafe_interrupts is not loaded, not Y",
        "kernel 6.14.8-2-pve runs, not 6.8.12-9-pve",
    ]


def test_guests_are_cut_off_by_a_reboot_only_when_that_is_allowed() -> None:
    """Our own as well: somebody works in them."""
    guests = (
        HostedGuest("VM", 101, "gpu01", ("gpulab",), True, ("0000:01:00",)),
        HostedGuest("VM", 102, "", (), False),
    )
    state = node(guests=guests)

    problem = restart.guests_problem("pve1", state, ["why"], allow_guest_shutdown=False)
    assert problem is not None and problem.brief == (
        "pve1 needs a reboot: why; it would cut off VM 101 (gpu01) with 0000:01:00"
    )
    assert restart.guests_problem("pve1", state, ["why"], allow_guest_shutdown=True) is None
    assert restart.guests_problem("pve1", node(), ["why"], allow_guest_shutdown=False) is None


def test_preflight_refuses_cut_off_guests_only_when_a_reboot_would_come() -> None:
    guests = (HostedGuest("VM", 101, "gpu01", ("gpulab",), True),)
    state = node(guests=guests)

    def told(state: NodeState, **allowed: bool) -> list[str]:
        return briefs(passthrough.preflight_problems("pve1", state, WANTED, **allowed))

    assert len(told(state)) == 1
    assert told(state, allow_guest_shutdown=True) == told(state, allow_reboot=False) == []
    ready = dataclasses.replace(
        configured(state), pci=BOUND_PCI, cmdline=RUNNING, stamp_mtime=4000.0, grub_mtime=4000.0, boot_time=5000.0
    )
    assert told(ready) == []


# Devices


def test_group_of_functions_and_bridges_is_the_devices_own() -> None:
    """AMD's dummy host bridges stand in the group of the port behind them."""
    assert devices.group_problems("pve1", node(pci=(PORT, DUMMY, GPU, AUDIO)), WANTED) == []


def test_isa_bridge_in_the_group_is_foreign() -> None:
    problems = devices.group_problems("pve1", node(pci=(ISA, GPU, AUDIO)), WANTED)

    assert briefs(problems) == [
        "pve1: IOMMU group 14 of 0000:01:00 (a4000) also holds 0000:00:1f.0 8086:7a83 (ISA bridge, lpc_ich)"
    ]


def test_shared_group_can_be_accepted() -> None:
    device = dataclasses.replace(A4000, allow_shared_group=True)
    assert devices.group_problems("pve1", node(pci=(ISA, GPU, AUDIO)), Wanted([device])) == []


def test_groups_are_not_judged_without_iommu() -> None:
    state = node(iommus=(), pci=tuple(dataclasses.replace(function, iommu_group=None) for function in FRESH_PCI))
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
    usb = PciFunction("0000:01:00.2", "10de:1ad8", "10de:14ad", "0c03", "xhci_hcd", None, 14, False, False)
    assert briefs(devices.identity_problems("pve1", node(pci=(GPU, AUDIO, usb)), WANTED)) == [
        "pve1: 0000:01:00 (a4000) has functions that the card table does not know: "
        "0000:01:00.2 10de:1ad8 (USB controller, xhci_hcd)"
    ]


def test_twin_that_is_not_declared_stays_with_the_node() -> None:
    """Binding is by address: the script does not name it."""
    state = node(pci=(GPU, AUDIO, TWIN))
    script = aim(state).files[BIND_SCRIPT]

    assert devices.identity_problems("pve1", state, WANTED) == []
    assert script is not None and "0000:02:00" not in script.content


def test_device_is_found_by_its_id_when_no_other_has_it() -> None:
    by_id = Wanted([dataclasses.replace(A4000, address="")])

    assert devices.located("pve1", node(), by_id) == WANTED
    with pytest.raises(GpulabError, match=r"pve1: 2 PCI devices 10de:24b0: 0000:01:00, 0000:02:00"):
        devices.located("pve1", node(pci=(GPU, AUDIO, TWIN)), by_id)
    with pytest.raises(GpulabError, match=r"pve1: no PCI device 10de:24b0 \(a4000\)"):
        devices.located("pve1", node(pci=(PORT,)), by_id)


def test_storage_and_network_in_the_group_are_named_as_such() -> None:
    sata = PciFunction("0000:00:17.0", "8086:7ae2", "1043:8882", "0106", "ahci", None, 14, False, False)
    network = PciFunction("0000:02:00.0", "8086:15f3", "1043:87d2", "0200", "igc", None, 14, False, False)

    (problem,) = devices.group_problems("pve1", node(pci=(PORT, GPU, AUDIO, sata, network)), WANTED)

    assert problem.brief.endswith(
        "also holds 0000:00:17.0 8086:7ae2 (SATA storage controller, ahci), "
        "0000:02:00.0 8086:15f3 (Ethernet network controller, igc)"
    )


@pytest.mark.parametrize(("found", "wrong"), [(("flr", "bus"), False), (("bus",), True), ((), True)])
def test_declared_reset_methods_must_be_offered(found: tuple[str, ...], wrong: bool) -> None:
    state = node(pci=(dataclasses.replace(GPU, reset_methods=found),))
    declared = Wanted([dataclasses.replace(A4000, reset_methods=("flr", "bus"))])

    assert bool(devices.reset_problems("pve1", state, declared)) is wrong
    assert devices.reset_problems("pve1", state, WANTED) == []


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
                "devices": [
                    {"address": "0000:01:00", "iommu_group": 14, "allow_shared_group": True, "reset_methods": ["flr"]}
                ],
                "blacklist": ["nouveau"],
                "iommu_pt": False,
                "headroom_gib": 1.5,
                "pcie_acs_override": "downstream",
                "initcall_blacklist": ["sysfb_init"],
                "disable_idle_d3": True,
                "allow_unsafe_interrupts": True,
                "hugepages": {"size": "1G", "count": 8},
                "kernel": "6.14.8-2-pve",
            },
        }
    )

    device = Device("a4000", "0000:01:00", ("10de:24b0", "10de:228b"), 14, ("flr",), allow_shared_group=True)
    wanted = hypervisor.wanted(declared)

    assert wanted == Wanted(
        [device],
        iommu_pt=False,
        headroom_mib=1536,
        blacklist=["nouveau"],
        pcie_acs_override="downstream",
        initcall_blacklist=["sysfb_init"],
        disable_idle_d3=True,
        allow_unsafe_interrupts=True,
        hugepages=("1G", 8),
        kernel="6.14.8-2-pve",
    )
    assert wanted.hugepages_mib == 8192


# Preflight and the end


@pytest.mark.parametrize("version", ["7.4-17", "10.0.1"])
def test_unknown_pve_version_is_refused(version: str) -> None:
    assert briefs(passthrough.host_problems("pve1", node(pve_version=version))) == [f"pve1: Proxmox VE {version}"]


def test_arm_machine_is_refused() -> None:
    assert briefs(passthrough.host_problems("pve1", node(machine="aarch64"))) == ["pve1: a aarch64 machine"]


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"cmdline": "quiet intel_iommu=off"}, "take intel_iommu=off off the kernel command line"),
        ({"firmware_iommu": ()}, "turn VT-d (Intel) or AMD-Vi, also called IOMMU (AMD), on in the firmware setup"),
        ({}, "`dmesg | grep -e DMAR -e IOMMU -e AMD-Vi` says why; a newer firmware often helps"),
    ],
)
def test_iommu_that_is_off_is_refused_with_its_reason(changes: dict[str, Any], hint: str) -> None:
    state = node(iommus=(), **changes)
    problem = passthrough.iommu_problem("pve1", state, aim(state))

    assert problem is not None and (problem.brief, problem.resolution) == ("pve1: the IOMMU is off", hint)


def test_word_that_is_still_to_come_turns_the_iommu_on_only_if_the_firmware_has_it() -> None:
    old = {"iommus": (), "kernels": (Kernel("6.5.13-6-pve", vfio=True),)}

    assert passthrough.iommu_problem("pve1", node(**old), aim(node(**old))) is None
    off = node(**old, firmware_iommu=())
    assert passthrough.iommu_problem("pve1", off, aim(off)) is not None


def test_full_boot_partition_is_refused_before_the_initramfs() -> None:
    due = Pending(Loader.GRUB_BIOS, {}, True, False)
    partitions = (BootPartition("8D4D-B8B1", 30 * 2**20), BootPartition("0A0A-0B0B", None))
    state = node(boot_free_bytes=40 * 2**20, boot_partitions=partitions)

    assert briefs(passthrough.space_problems("pve1", state, due)) == [
        "pve1: /boot has 40 MiB free",
        "pve1: the EFI partition 8D4D-B8B1 has 30 MiB free",
    ]
    assert passthrough.space_problems("pve1", state, IDLE) == []


def test_kernel_of_the_next_boot_must_be_there_with_vfio() -> None:
    kernels = (Kernel("6.14.8-2-pve", vfio=True), Kernel("6.17.1-1-pve", vfio=False))

    assert briefs(passthrough.kernel_problems("pve1", node(kernels=kernels), WANTED)) == [
        "pve1: the next boot's kernel 6.17.1-1-pve has no vfio-pci"
    ]
    pinned = dataclasses.replace(WANTED, kernel="6.8.4-2-pve")
    assert briefs(passthrough.kernel_problems("pve1", node(), pinned)) == [
        "pve1: the next boot's kernel 6.8.4-2-pve is not installed"
    ]


@pytest.mark.parametrize(
    ("guests_mib", "hugepages", "wrong"),
    [(59_000, None, False), (61_000, None, True), (0, ("1G", 58), False), (0, ("1G", 60), True)],
)
def test_headroom_is_kept_from_guests_and_huge_pages(
    guests_mib: int, hugepages: tuple[str, int] | None, wrong: bool
) -> None:
    wanted = dataclasses.replace(WANTED, headroom_mib=4096, hugepages=hugepages)

    assert bool(passthrough.memory_problem("pve1", node(memory_mib=64_000), wanted, guests_mib)) is wrong


def test_everything_that_does_not_run_as_declared_is_named() -> None:
    wanted = dataclasses.replace(WANTED, disable_idle_d3=True, hugepages=("1G", 4), kernel="6.8.12-9-pve")
    state = node(pci=BOUND_PCI, hugepages={"1048576": 3})

    problems = passthrough.running_problems("pve1", state, wanted, aim(state, wanted))

    assert briefs(problems) == [
        "pve1: booted without iommu=pt",
        "pve1: booted without hugepagesz=1G hugepages=4",
        "pve1: vfio_pci.disable_idle_d3 is not there",
        "pve1: runs kernel 6.14.8-2-pve",
        "pve1: 3 huge pages of 1G",
    ]
    assert problems[0].resolution.startswith("it is configured for GRUB (BIOS): see `efibootmgr -v`")


# The way back


def back(path: str, record: Any) -> File | None:
    return goal.as_before(node(kept={path: record})).files[path]


def test_word_that_somebody_added_between_two_writes_is_not_ours() -> None:
    first, second = "root=x iommu=pt\n", "root=x iommu=pt debug hugepagesz=1G hugepages=8\n"
    record = kept("root=x\n", first, second)
    record["found"][1] = text("root=x iommu=pt debug\n")
    state = node(
        kept={KERNEL_CMDLINE: record}, files={KERNEL_CMDLINE: text(second)}, **UEFI, loader_info="systemd-boot"
    )

    assert goal.words_ever(state) == ["iommu=pt", "hugepagesz=1G", "hugepages=8"]
    assert goal.by_hand(state) == [KERNEL_CMDLINE]
    assert goal.as_before(state).files[KERNEL_CMDLINE] == File("root=x debug\n")
    wanted = dataclasses.replace(WANTED, iommu_pt=False)
    assert aim(state, wanted).files[KERNEL_CMDLINE] == File("root=x debug\n")


def test_file_that_gpulab_made_goes_and_one_that_it_edited_comes_back() -> None:
    assert back(MODPROBE, kept(None, "options a b=1\n", "options a b=2\n")) is None
    line = "root=ZFS=rpool  boot=zfs"
    assert back(KERNEL_CMDLINE, kept(line, "root=ZFS=rpool boot=zfs iommu=pt\n")) == File(line)


def test_killed_write_is_no_change_by_hand() -> None:
    """The version was kept, the file was not replaced any more."""
    record = kept(None, "options a b=1\n", "options a b=2\n", current="options a b=1\n")

    assert goal.by_hand(node(kept={MODPROBE: record})) == []
    assert back(MODPROBE, record) is None


@pytest.mark.parametrize(
    ("path", "original", "written", "current", "left"),
    [
        (KERNEL_CMDLINE, "root=x\n", "root=x iommu=pt\n", "root=x iommu=pt debug\n", "root=x debug\n"),
        (GRUB_SNIPPET, None, "# ours\n" + SNIPPET, "# ours\n" + SNIPPET.replace("iommu=pt", "iommu=pt debug"),
         SNIPPET.replace("iommu=pt", "debug")),
        (GRUB_SNIPPET, None, "# ours\n" + SNIPPET, "# ours\n" + SNIPPET + "GRUB_TIMEOUT=9\n", "GRUB_TIMEOUT=9\n"),
        (MODPROBE, None, "# ours\noptions a b=1\n", "# ours\noptions a b=1 c=2\n", "options a c=2\n"),
        (MODULES_LOAD, None, "vfio\n", "vfio\nloop\n", "loop\n"),
        (KERNEL_PIN, None, "6.14.8-2-pve\n", "6.8.4-2-pve\n", "6.8.4-2-pve\n"),
        # A script is one piece.
        (BIND_SCRIPT, None, "#!/bin/sh\ngive a\n", "#!/bin/sh\ngive a\ngive b\n", None),
        ("/var/lib/vz/snippets/x.yaml", None, "a: 1\n", "a: 1\nb: 2\n", "b: 2\n"),
    ],
)  # fmt: skip
def test_of_a_file_that_was_changed_by_hand_only_our_words_go(
    path: str, original: str | None, written: str, current: str, left: str | None
) -> None:
    record = kept(original, written, current=current)

    assert goal.by_hand(node(kept={path: record})) == [path]
    assert back(path, record) == (None if left is None else File(left))


def test_what_is_left_of_a_file_by_hand_is_left_again() -> None:
    """The second look of a rollback, after its own write: nothing is ours any more."""
    record = kept(None, "# ours\noptions a b=1\n", current="options snd_hda_intel power_save=1\n")

    assert back(MODPROBE, record) == File("options snd_hda_intel power_save=1\n")


def test_file_that_somebody_removed_stays_away() -> None:
    assert back(KERNEL_CMDLINE, {**kept("root=x\n", "root=x iommu=pt\n"), "current": None}) is None


def test_file_that_gpulab_removed_comes_back() -> None:
    removed = {**kept("options a b=1\n", "options a c=1\n", None), "current": None}
    assert back(MODPROBE, removed) == File("options a b=1\n")


def test_node_that_runs_with_our_words_is_rebooted_on_the_way_back() -> None:
    script = kept(None, "    give 0000:01:00.0\n    give 0000:01:00.1\n")
    state = node(
        pci=BOUND_PCI,
        cmdline=RUNNING,
        grub_cmdline=RUNNING,
        kept={GRUB_SNIPPET: kept(None, SNIPPET), BIND_SCRIPT: script},
    )
    way_back = goal.as_before(state)
    due = boot.pending("pve1", state, way_back)

    assert boot.refresh_commands(state, way_back, due) == ["update-initramfs -u -k all", "update-grub"]
    assert restart.needed(state, way_back, due) == [
        "iommu=pt is still on the running command line",
        "0000:01:00.0 is still given to vfio-pci",
        "0000:01:00.1 is still given to vfio-pci",
    ]
