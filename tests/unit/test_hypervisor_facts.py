# SPDX-License-Identifier: MIT
"""The script that reads a node, run for real on a folder laid out as a node's /sys, /proc, /boot and /etc."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from operations.hypervisor.facts import MODPROBE, NodeFacts, NodeState

EFI_VARIABLE = "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"


class FakeNode:
    """A folder with a node's files, and its commands as scripts."""

    def __init__(self, root: Path) -> None:
        self.root = root / "root"
        self.bin = root / "bin"
        self.bin.mkdir()
        started = float(Path("/proc/uptime").read_text().split()[0]) - 100
        for path, text in {
            "proc/cmdline": "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/mapper/pve-root ro quiet iommu=pt\n",
            "proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: x\n",
            "proc/uptime": Path("/proc/uptime").read_text(),
            "proc/1/stat": f"1 (sys) (temd) S {' '.join(18 * ['0'])} {int(started * os.sysconf('SC_CLK_TCK'))} 0 0\n",
            "proc/sys/kernel/osrelease": "6.14.8-2-pve\n",
            "proc/sys/kernel/random/boot_id": "0f0f0f0f-0000-4000-8000-000000000001\n",
            "boot/initrd.img-6.14.8-2-pve": "initrd",
            "boot/grub/grub.cfg": "menuentry 'PVE' {\n\tlinux\t/boot/vmlinuz-6.14.8-2-pve root=/dev/sda2 ro\n"
            "}\nmenuentry 'recovery' {\n\tlinux\t/boot/vmlinuz-6.14.8-2-pve single\n}\n",
            "sys/class/iommu/dmar0/uevent": "",
            MODPROBE[1:]: "options vfio-pci ids=10de:24b0\n",
        }.items():
            self.write(path, text)
        self.pci("0000:00:01.0", "8086:460d", "0x060400", "0000:0000", "pcieport", 14, bridge=True)
        self.pci("0000:00:02.0", "8086:4680", "0x030000", "1028:0aa1", "i915", 1, boot_vga=True)
        self.pci("0000:01:00.0", "10de:24b0", "0x030000", "10de:14ad", "vfio-pci", 14, boot_vga=False)
        self.pci("0000:01:00.1", "10de:228b", "0x040300", "10de:14ad", None, None)
        self.command("dpkg-query", "printf 'pve-manager\\t9.1.2\\tinstalled\\n'")
        self.command("efibootmgr", "echo 'EFI variables are not supported on this system.' >&2; exit 2")

    def write(self, path: str, content: str | bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    def command(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def pci(
        self,
        address: str,
        id: str,
        pci_class: str,
        subsystem: str,
        driver: str | None,
        group: int | None,
        bridge: bool = False,
        boot_vga: bool | None = None,
    ) -> None:
        folder = f"sys/bus/pci/devices/{address}"
        words = {"class": pci_class}
        words["vendor"], words["device"] = (f"0x{word}" for word in id.split(":"))
        words["subsystem_vendor"], words["subsystem_device"] = (f"0x{word}" for word in subsystem.split(":"))
        if boot_vga is not None:
            words["boot_vga"] = str(int(boot_vga))
        for name, word in words.items():
            self.write(f"{folder}/{name}", word + "\n")
        if driver is not None:
            (self.root / folder / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
        if group is not None:
            (self.root / folder / "iommu_group").symlink_to(f"../../../kernel/iommu_groups/{group}")
        if bridge:
            (self.root / folder / "pci_bus").mkdir()

    def read(self) -> NodeState:
        argument = {"root": str(self.root), "stamp": "/var/lib/gpulab/boot-refreshed", "files": [MODPROBE, "/etc/none"]}
        # Only the node's commands: a tool of this machine must not answer for it.
        done = subprocess.run(
            [sys.executable, "-c", NodeFacts.script, json.dumps(argument)],
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
            check=True,
        )
        found: Any = NodeFacts().process(done.stdout.splitlines())
        return NodeState.of(found)


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def test_reads_what_the_node_is_and_runs(node: FakeNode) -> None:
    state = node.read()

    assert (state.pve_version, state.kernel, state.cpu_vendor) == ("9.1.2", "6.14.8-2-pve", "GenuineIntel")
    assert "iommu=pt" in state.words
    assert state.iommu
    assert state.boot_id == "0f0f0f0f-0000-4000-8000-000000000001"
    assert abs(time.time() - 100 - state.boot_time) < 30


def test_reads_the_pci_tree(node: FakeNode) -> None:
    state = node.read()

    port, graphics, gpu, audio = state.pci
    assert (port.bridge, port.pci_class, port.driver) == (True, "0604", "pcieport")
    assert graphics.boot_vga
    assert (gpu.id, gpu.subsystem, gpu.driver, gpu.iommu_group) == ("10de:24b0", "10de:14ad", "vfio-pci", 14)
    assert (audio.driver, audio.iommu_group, audio.boot_vga) == (None, None, False)
    assert state.functions_of("0000:01:00") == [gpu, audio]
    assert state.group(14) == [port, gpu]


def test_reads_how_the_next_boot_will_be(node: FakeNode) -> None:
    os.utime(node.root / "boot/initrd.img-6.14.8-2-pve", (1000, 1000))
    node.write("var/lib/gpulab/boot-refreshed", "")

    state = node.read()

    assert state.initrds == {"/boot/initrd.img-6.14.8-2-pve": [1000, len("initrd")]}
    assert state.grub_cmdline == "/boot/vmlinuz-6.14.8-2-pve root=/dev/sda2 ro"
    assert state.stamp_mtime is not None
    assert state.boot_free_bytes > 0
    assert base64.b64decode(state.files[MODPROBE]["content"]) == b"options vfio-pci ids=10de:24b0\n"
    assert state.files["/etc/none"] is None


def test_legacy_boot_has_no_efi_variables(node: FakeNode) -> None:
    state = node.read()

    assert not state.efi_directory
    assert state.efibootmgr == "EFI variables are not supported on this system."
    assert (state.loader_info, state.boot_tool_status) == (None, None)


def test_efi_boot_reads_the_loaders_own_variable(node: FakeNode) -> None:
    node.write(EFI_VARIABLE, b"\x06\0\0\0" + "systemd-boot 257.9-1\0".encode("utf-16-le"))
    node.write("etc/kernel/proxmox-boot-uuids", "8D4D-B8B1\n")
    node.command("efibootmgr", "echo BootCurrent: 0004")
    node.command("proxmox-boot-tool", "echo '8D4D-B8B1 is configured with: uefi (versions: 6.14.8-2-pve)'")

    state = node.read()

    assert (state.efi_directory, state.efibootmgr) == (True, "BootCurrent: 0004")
    assert state.loader_info == "systemd-boot 257.9-1"
    assert state.boot_tool_status == "8D4D-B8B1 is configured with: uefi (versions: 6.14.8-2-pve)"


def test_pve_is_asked_itself_when_dpkg_does_not_know_it(node: FakeNode) -> None:
    node.command("dpkg-query", "echo 'dpkg-query: no packages found matching pve-manager' >&2; exit 1")
    node.command("pveversion", "echo 'pve-manager/8.4.1/2a5fa54a8503f96d (running kernel: 6.8.12-9-pve)'")

    assert node.read().pve_version == "8.4.1"


def test_a_machine_without_pve_is_seen_as_such(node: FakeNode) -> None:
    (node.bin / "dpkg-query").unlink()
    (node.bin / "efibootmgr").unlink()

    state = node.read()

    assert (state.pve_version, state.efibootmgr) == (None, None)


def test_running_guests_carry_their_names_and_tags(node: FakeNode) -> None:
    node.write("proc/4711/comm", "kvm")
    node.write("run/qemu-server/101.pid", "4711\n")
    node.write(
        "etc/pve/qemu-server/101.conf",
        "#note: not a key\nname: gpu01\ntags: gpulab;prod\n\n[before]\nname: old\ntags: other\n",
    )
    node.write("run/qemu-server/102.pid", "4712\n")  # its process is gone
    node.write("sys/fs/cgroup/lxc/300/cgroup.events", "populated 1\nfrozen 0\n")
    node.write("sys/fs/cgroup/lxc/301/cgroup.events", "populated 0\nfrozen 0\n")
    node.write("etc/pve/lxc/300.conf", "hostname: dns\n")

    vm, container = node.read().guests

    assert (str(vm), vm.tags) == ("VM 101 (gpu01)", ["gpulab", "prod"])
    assert (str(container), container.tags) == ("CT 300 (dns)", [])
