# SPDX-License-Identifier: MIT
"""The script that reads a node, run for real on a folder laid out as a node's /sys, /proc, /boot and /etc."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from operations import files
from operations.files import File
from operations.hypervisor.facts import MODPROBE, SHUT_DOWN, STAMP, BootPartition, Kernel, NodeFacts, NodeState

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
            "proc/meminfo": "MemTotal:       65536000 kB\nMemFree: 1 kB\n",
            "proc/modules": "vfio_pci 16384 0 - Live 0x0\ni915 4096 1 - Live 0x0\n",
            "proc/uptime": Path("/proc/uptime").read_text(),
            "proc/1/stat": f"1 (sys) (temd) S {' '.join(18 * ['0'])} {int(started * os.sysconf('SC_CLK_TCK'))} 0 0\n",
            "proc/sys/kernel/osrelease": "6.14.8-2-pve\n",
            "proc/sys/kernel/random/boot_id": "0f0f0f0f-0000-4000-8000-000000000001\n",
            "boot/initrd.img-6.14.8-2-pve": "initrd",
            "boot/vmlinuz-6.14.8-2-pve": "kernel",
            "usr/lib/modules/6.14.8-2-pve/modules.dep": "kernel/drivers/vfio/pci/vfio-pci.ko: kernel/x.ko\n",
            "boot/grub/grub.cfg": "menuentry 'PVE' {\n\tlinux\t/boot/vmlinuz-6.14.8-2-pve root=/dev/sda2 ro\n"
            "}\nmenuentry 'recovery' {\n\tlinux\t/boot/vmlinuz-6.14.8-2-pve single\n}\n",
            "sys/class/iommu/dmar0/uevent": "",
            MODPROBE[1:]: "blacklist nvidia\n",
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
        argument = {"root": str(self.root), "stamp": STAMP, "shut_down": SHUT_DOWN, "files": [MODPROBE, "/etc/none"]}
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
    assert state.memory_mib == 64000
    assert "iommu=pt" in state.words
    assert state.iommus == ("dmar0",) and state.iommu
    assert state.modules_loaded == ("i915", "vfio_pci")
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


def test_reads_what_sysfs_tells_of_a_function(node: FakeNode) -> None:
    none = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
    for name, content in {
        "driver_override": "vfio-pci\n",
        "reset_method": "flr bus\n",
        "resource": "0x0000000080000000 0x0000000080ffffff 0x0000000000040200\n"
        f"0x0000004000000000 0x000000400fffffff 0x000000000014220c\n{4 * none}"
        # The expansion ROM is no base address register.
        "0x00000000fb000000 0x00000000fb07ffff 0x0000000000046200\n",
        "current_link_speed": "2.5 GT/s PCIe\n",
        "current_link_width": "16\n",
        "max_link_speed": "16.0 GT/s PCIe\n",
        "max_link_width": "16\n",
    }.items():
        node.write(f"sys/bus/pci/devices/0000:01:00.0/{name}", content)
    node.write("sys/bus/pci/devices/0000:01:00.1/driver_override", "(null)\n")

    _, graphics, gpu, audio = node.read().pci

    assert (gpu.driver_override, gpu.reset_methods) == ("vfio-pci", ("flr", "bus"))
    assert gpu.bars == (16 * 2**20, 256 * 2**20)
    assert (gpu.link, gpu.max_link) == (("2.5 GT/s PCIe", 16), ("16.0 GT/s PCIe", 16))
    assert (audio.driver_override, graphics.link, graphics.bars) == (None, None, ())
    assert str(gpu) == "0000:01:00.0 10de:24b0 (VGA display controller, vfio-pci)"


def test_reads_how_the_next_boot_will_be(node: FakeNode) -> None:
    os.utime(node.root / "boot/initrd.img-6.14.8-2-pve", (1000, 1000))
    node.write("var/lib/gpulab/boot-refreshed", "")

    state = node.read()

    assert state.initrds == {"/boot/initrd.img-6.14.8-2-pve": [1000, len("initrd")]}
    assert state.grub_cmdline == "/boot/vmlinuz-6.14.8-2-pve root=/dev/sda2 ro"
    assert state.stamp_mtime is not None
    assert state.boot_free_bytes > 0
    assert base64.b64decode(state.files[MODPROBE]["content"]) == b"blacklist nvidia\n"
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


def test_guests_carry_their_names_tags_and_devices(node: FakeNode) -> None:
    node.write("proc/4711/comm", "kvm")
    node.write("run/qemu-server/101.pid", "4711\n")
    node.write("etc/pve/nodes/pve1/x", "")
    (node.root / "etc/pve/local").symlink_to("nodes/pve1")
    node.write(
        "etc/pve/mapping/pci.cfg",
        "a4000\n\tmap id=10de:24b0,iommugroup=14,node=pve2,path=0000:81:00,subsystem-id=10de:14ad\n"
        "\tmap id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad\n",
    )
    node.write(
        "etc/pve/qemu-server/101.conf",
        "#note: not a key\nname: gpu01\ntags: gpulab;prod\nhostpci0: mapping=a4000,pcie=1\n"
        "cicustom: vendor=local:snippets/gpulab.yaml\n\n[before]\nname: old\ntags: other\n",
    )
    node.write("run/qemu-server/102.pid", "4712\n")  # its process is gone
    node.write(
        "etc/pve/qemu-server/102.conf", "name: win\nhostpci0: 02:00;0000:03:00.1,pcie=1\nhostpci1: host=04:00.0\n"
    )
    node.write("sys/fs/cgroup/lxc/300/cgroup.events", "populated 1\nfrozen 0\n")
    node.write("sys/fs/cgroup/lxc/301/cgroup.events", "populated 0\nfrozen 0\n")
    node.write("etc/pve/lxc/300.conf", "hostname: dns\n")
    node.write("etc/pve/lxc/301.conf", "hostname: off\n")

    vm, win, container, off = node.read().guests

    assert (str(vm), vm.tags, vm.devices) == ("VM 101 (gpu01)", ("gpulab", "prod"), ("0000:01:00",))
    assert vm.uses_snippet == ("local:snippets/gpulab.yaml",)
    assert win.devices == ("0000:02:00", "0000:03:00.1", "0000:04:00.0")
    assert (str(container), container.tags) == ("CT 300 (dns)", ())
    assert [guest.running for guest in (vm, win, container, off)] == [True, False, True, False]
    assert [guest.vmid for guest in node.read().running_guests] == [101, 300]


def test_kernels_are_told_with_and_without_vfio(node: FakeNode) -> None:
    node.write("boot/vmlinuz-6.8.12-9-pve", "kernel")
    node.write("boot/vmlinuz-6.17.1-1-pve", "kernel")
    node.write("usr/lib/modules/6.17.1-1-pve/modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko\n")

    assert node.read().kernels == (
        Kernel("6.14.8-2-pve", vfio=True),
        Kernel("6.17.1-1-pve", vfio=True),
        Kernel("6.8.12-9-pve", vfio=False),
    )


def test_command_line_of_the_next_boot_is_the_pinned_kernels(node: FakeNode) -> None:
    node.write("etc/kernel/proxmox-boot-pin", "6.8.12-9-pve\n")
    newest = "\tlinux /boot/vmlinuz-6.14.8-2-pve root=/dev/sda2 ro\n"
    node.write("boot/grub/grub.cfg", f"{newest}\tlinux /boot/vmlinuz-6.8.12-9-pve root=/dev/sda2 debug\n")

    assert node.read().grub_cmdline == "/boot/vmlinuz-6.8.12-9-pve root=/dev/sda2 debug"


def test_firmware_and_parameters_and_huge_pages_are_read(node: FakeNode) -> None:
    node.write("sys/firmware/acpi/tables/DMAR", b"DMAR")
    node.write("sys/module/vfio_pci/parameters/disable_idle_d3", "Y\n")
    node.write("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "8\n")
    node.write("etc/modules", "# one a line\nloop max_loop=64\n")
    node.write("etc/modules-load.d/own.conf", "vfio_pci\n; remark\n")

    state = node.read()

    assert state.firmware_iommu == ("DMAR",)
    assert state.parameters == {"vfio_pci.disable_idle_d3": "Y"}
    assert state.hugepages == {"1048576": 8}
    assert state.modules_configured == ("loop", "vfio_pci")


def test_guests_that_wait_for_the_end_of_a_reboot_are_read(node: FakeNode) -> None:
    assert node.read().shut_down_guests == ()
    node.write(SHUT_DOWN[1:], "101,300\n")
    assert node.read().shut_down_guests == (101, 300)


def test_free_space_of_an_unmounted_efi_partition(node: FakeNode) -> None:
    """Against a real FAT32 and a real tool's own count; it is never mounted."""
    for tool in ("mkfs.vfat", "mdir"):
        if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            pytest.skip(f"{tool} is not installed: python -m rehearsal packages")
    image = node.root / "dev/disk/by-uuid/8D4D-B8B1"
    image.parent.mkdir(parents=True)
    subprocess.run(["truncate", "-s", "300M", image], check=True)
    subprocess.run(["mkfs.vfat", "-F", "32", image], check=True, capture_output=True, env=TOOLS)
    (node.root / "kernel").write_bytes(os.urandom(50 * 2**20))
    subprocess.run(["mcopy", "-i", image, node.root / "kernel", "::kernel"], check=True, env=TOOLS)
    node.write("etc/kernel/proxmox-boot-uuids", "8D4D-B8B1\n0A0A-0B0B\n")

    found, absent = node.read().boot_partitions

    listing = subprocess.run(["mdir", "-i", image, "::"], check=True, capture_output=True, text=True, env=TOOLS).stdout
    counted = re.search(r"([\d ]+) bytes free", listing)
    assert counted is not None
    assert found == BootPartition("8D4D-B8B1", int(counted[1].replace(" ", "")))
    assert absent == BootPartition("0A0A-0B0B", None)


def test_what_was_written_is_kept_and_read(node: FakeNode) -> None:
    """The program that writes files and the one that reads what it kept, one after the other."""
    write(node, {"/etc/kernel/cmdline": None, MODPROBE: "blacklist a\n"})
    write(node, {MODPROBE: "blacklist b\n"})
    write(node, {MODPROBE: None})
    write(node, {MODPROBE: "blacklist nvidia\n"}, ours=False)
    write(node, {MODPROBE: None}, ours=False)

    kept = node.read().kept[MODPROBE]

    assert files.text_of(kept["original"]) == "blacklist nvidia\n"
    assert [files.text_of(one) for one in kept["written"]] == ["blacklist a\n", "blacklist b\n", None]
    assert kept["current"] is None
    assert kept["touched"] > time.time() - 60
    assert node.read().kept["/etc/kernel/cmdline"]["original"] is None


def test_bytes_that_are_no_text_come_back_as_they_were(node: FakeNode) -> None:
    odd = b"root=x caf\xe9\n"
    node.write("etc/kernel/cmdline", odd)
    write(node, {"/etc/kernel/cmdline": "root=x\n"})

    original = files.kept_file(node.read().kept["/etc/kernel/cmdline"]["original"])
    assert original is not None
    write(node, {"/etc/kernel/cmdline": original.content})

    assert (node.root / "etc/kernel/cmdline").read_bytes() == odd


TOOLS = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK": "1"}


def write(node: FakeNode, contents: dict[str, str | None], ours: bool = True) -> None:
    """Run the program behind `operations.files.write` on the node's folder."""
    command = files.write({path: None if text is None else File(text) for path, text in contents.items()}, ours)
    script, stdin = command.bits[2].obj, command.connector_arguments["_stdin"]
    argument = json.dumps({**json.loads(command.bits[3].obj), "root": str(node.root)})
    subprocess.run([sys.executable, "-c", script, argument], input=stdin, text=True, check=True)
