# SPDX-License-Identifier: MIT
"""The simulated boot of a node: from its configuration files to the drivers that its devices get."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from rehearsal import node
from rehearsal.node import hardware
from rehearsal.node.hardware import boot, lay_out, module_config, read_boot

GPU, AUDIO, NIC, IGPU = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0", "0000:00:02.0"
MACHINE = hardware.read_machine(node.MACHINE.read_text())
QUIET = "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/mapper/pve-root ro quiet"
IDS = "options vfio-pci ids=10de:24b0,10de:228b\n"
SOFTDEPS = "softdep nouveau pre: vfio-pci\nsoftdep snd_hda_intel pre: vfio-pci\n"


def booted(modprobe: str = "", load: str = "", cmdline: str = QUIET, machine: hardware.Machine = MACHINE):
    files = {"etc/modprobe.d/gpulab.conf": modprobe, "etc/modules-load.d/gpulab.conf": load}
    return boot(machine, cmdline, module_config(files, cmdline))


def test_without_configuration_the_host_drivers_take_the_card():
    drivers = booted().drivers
    assert (drivers[GPU], drivers[AUDIO], drivers[NIC]) == ("nouveau", "snd_hda_intel", "igc")


def test_softdeps_hand_both_functions_to_vfio():
    drivers = booted(IDS + SOFTDEPS).drivers
    assert (drivers[GPU], drivers[AUDIO]) == ("vfio-pci", "vfio-pci")
    assert drivers[IGPU] == "i915"


def test_loading_vfio_late_is_too_late_without_softdep():
    assert booted(IDS, "vfio_pci\n").drivers[GPU] == "nouveau"


def test_blacklist_alone_leaves_the_card_without_driver():
    assert GPU not in booted("blacklist nouveau\nblacklist nvidiafb\n").drivers


def test_blacklist_does_not_keep_the_audio_driver_from_function_1():
    """What fidpa's guide warns of: `blacklist nouveau` with a late vfio-pci frees the GPU, not its audio."""
    drivers = booted(IDS + "blacklist nouveau\nblacklist nvidiafb\n", "vfio-pci\n").drivers
    assert (drivers[GPU], drivers[AUDIO]) == ("vfio-pci", "snd_hda_intel")


def test_softdep_loads_a_blacklisted_module():
    """A blacklist holds for aliases only."""
    drivers = booted("blacklist vfio-pci\n" + IDS + SOFTDEPS).drivers
    assert drivers[GPU] == "vfio-pci"


def test_install_false_keeps_a_module_out():
    assert "nouveau" not in booted("install nouveau /bin/false\n").modules


def test_ids_on_the_command_line_count_too():
    drivers = booted(SOFTDEPS, cmdline=f"{QUIET} vfio-pci.ids=10de:24b0 modprobe.blacklist=snd_hda_intel").drivers
    assert drivers[GPU] == "vfio-pci"
    assert AUDIO not in drivers


def test_vfio_refuses_a_device_without_iommu():
    without = booted(IDS + SOFTDEPS, cmdline=f"{QUIET} intel_iommu=off")
    assert not without.iommu
    assert without.drivers[GPU] == "nouveau"
    assert without.vfio_groups == []


@pytest.mark.parametrize(
    ("kernel", "iommu", "words", "expected"),
    [
        ("6.14.8-2-pve", "intel", "", True),
        ("6.5.13-1-pve", "intel", "", False),
        ("6.5.13-1-pve", "intel", "intel_iommu=on", True),
        ("6.5.13-1-pve", "intel", "intel_iommu=on,sm_on", True),
        ("6.5.13-1-pve", "amd", "", True),
        ("6.14.8-2-pve", "amd", "amd_iommu=off", False),
        ("6.14.8-2-pve", "intel", "iommu=off", False),
        ("6.14.8-2-pve", "absent", "intel_iommu=on", False),
    ],
)
def test_iommu_is_on_as_the_kernel_decides(kernel, iommu, words, expected):
    machine = replace(MACHINE, kernel=kernel, iommu=iommu)
    assert hardware.iommu_in_use(machine, f"{QUIET} {words}") is expected


def test_passthrough_domain_follows_the_command_line():
    assert hardware.domain_type(QUIET) == "DMA-FQ"
    assert hardware.domain_type(f"{QUIET} iommu=pt") == "identity"


def test_file_in_etc_hides_one_of_the_same_name_in_usr():
    files = {"usr/lib/modprobe.d/a.conf": "blacklist igc\n", "etc/modprobe.d/a.conf": "blacklist i915\n"}
    assert module_config(files, "").blacklist == {"i915"}


def test_continued_line_and_comment_are_read_as_modprobe_does():
    config = module_config({"etc/modprobe.d/a.conf": "# options x a=1\noptions vfio-pci \\\n ids=1:2\n"}, "")
    assert config.options == {"vfio_pci": ["ids=1:2"]}


def test_two_cards_of_one_kind_are_both_caught_by_ids():
    twin = [
        replace(device, address=device.address.replace("01:00", "03:00"), group=20) for device in MACHINE.devices[4:6]
    ]
    two = replace(MACHINE, devices=(*MACHINE.devices, *twin))
    outcome = booted(IDS + SOFTDEPS, machine=two)
    assert outcome.drivers["0000:03:00.0"] == "vfio-pci"
    assert outcome.vfio_groups == [14, 20]


def test_layout_has_what_lspci_and_the_deploy_read(tmp_path):
    lay_out(tmp_path, booted(IDS + SOFTDEPS, cmdline=f"{QUIET} iommu=pt"))
    gpu = tmp_path / "sys/bus/pci/devices" / GPU
    assert (gpu / "vendor").read_text() == "0x10de\n"
    assert (gpu / "class").read_text() == "0x030000\n"
    assert (gpu / "boot_vga").read_text() == "0\n"
    assert (gpu / "config").read_bytes()[:4] == bytes.fromhex("de10b024")
    assert (gpu / "driver").resolve() == tmp_path / "sys/bus/pci/drivers/vfio-pci"
    group = (gpu / "iommu_group").resolve()
    assert group == tmp_path / "sys/kernel/iommu_groups/14"
    assert (group / "type").read_text() == "identity\n"
    assert sorted(os.listdir(group / "devices")) == ["0000:00:01.0", GPU, AUDIO]
    assert (tmp_path / "sys/bus/pci/devices/0000:00:01.0/pci_bus/0000:01").is_dir()
    assert (tmp_path / "sys/class/iommu/dmar0").is_dir()
    assert "vfio_pci 16384 0 - Live" in (tmp_path / "proc/modules").read_text()


def test_layout_without_iommu_has_no_groups(tmp_path):
    lay_out(tmp_path, booted(cmdline=f"{QUIET} iommu=off"))
    assert not (tmp_path / "sys/bus/pci/devices" / GPU / "iommu_group").is_symlink()
    assert list((tmp_path / "sys/class/iommu").iterdir()) == []


def test_next_layout_replaces_the_previous_one(tmp_path):
    lay_out(tmp_path, booted(IDS + SOFTDEPS))
    lay_out(tmp_path, booted())
    assert (tmp_path / "sys/bus/pci/devices" / GPU / "driver").readlink().name == "nouveau"


def test_grub_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no `linux` line"):
        hardware.kernel_command_line("set timeout=5\n")


def test_initrd_is_read_as_it_was_written():
    files = {"etc/modprobe.d/a.conf": "blacklist x\n", "etc/empty": "", "conf/modules": "ä\n"}
    assert hardware.unpack_initrd(hardware.pack_initrd(files)) == files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node's file system, as far as its boot reads it."""
    for path, (text, mode) in node.files("192.0.2.1:18006").items():
        target = tmp_path / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)
    update(tmp_path, "update-initramfs", "-c", "-k", "all")
    update(tmp_path, "grub-mkconfig", "-o", "/boot/grub/grub.cfg")
    return tmp_path


def update(root: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the node's stand-ins on a root file system."""
    environment = {**os.environ, "LAB_ROOT": str(root)}
    return subprocess.run(
        [root / "usr/sbin" / command, *words], env=environment, capture_output=True, text=True, check=False
    )


def test_edited_files_change_nothing_until_they_are_brought_into_the_boot(root):
    (root / "etc/modprobe.d/gpulab.conf").write_text(IDS + SOFTDEPS)
    (root / "etc/default/grub.d/gpulab.cfg").write_text(
        'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT iommu=pt"\n'
    )
    before = read_boot(root)
    assert (before.cmdline, before.drivers[GPU]) == (QUIET, "nouveau")

    done = update(root, "update-initramfs", "-u", "-k", "all")
    assert "simulated" in done.stdout
    assert read_boot(root).drivers[GPU] == "vfio-pci"
    assert read_boot(root).domain == "DMA-FQ"

    done = update(root, "grub-mkconfig", "-o", "/boot/grub/grub.cfg")
    assert "simulated" in done.stderr
    assert read_boot(root).cmdline == f"{QUIET} iommu=pt"


def test_broken_grub_snippet_keeps_the_old_grub_cfg(root):
    (root / "etc/default/grub.d/broken.cfg").write_text('GRUB_CMDLINE_LINUX_DEFAULT="quiet\n')
    assert update(root, "grub-mkconfig", "-o", "/boot/grub/grub.cfg").returncode != 0
    assert read_boot(root).cmdline == QUIET


def test_failing_hook_keeps_the_old_initramfs(root):
    hook = root / "etc/initramfs-tools/hooks/broken"
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\nexit 3\n")
    hook.chmod(0o755)
    (root / "etc/modprobe.d/gpulab.conf").write_text(IDS + SOFTDEPS)
    done = update(root, "update-initramfs", "-u", "-k", "all")
    assert done.returncode == 1
    assert done.stderr.endswith("hooks/broken failed with return 3.\n")
    assert read_boot(root).drivers[GPU] == "nouveau"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "all"], "you must specify at least one of -c, -u, or -d."),
        (["-u", "-k", "5.4.0"], "there is no kernel 5.4.0 in /boot"),
    ],
)
def test_update_initramfs_refuses(root, words, message):
    done = update(root, "update-initramfs", *words)
    assert done.returncode == 1
    assert message in done.stderr


def test_every_stand_in_says_simulated():
    for folder in ("usr/sbin", "usr/bin"):
        for path in (node.ROOT / folder).iterdir():
            if path.name not in ("update-grub", "lsinitramfs"):
                assert "simulated" in path.read_text(), path.name


def test_default_machine_says_simulated():
    assert json.loads(node.MACHINE.read_text())["simulated"] is True
