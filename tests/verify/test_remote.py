# SPDX-License-Identifier: MIT
"""What the scripts that run on the hosts make of what they find there."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verify.containers import disturb as disturbance
from verify.containers import milvus_remote
from verify.containers import remote as containers
from verify.hypervisor import remote as hypervisor
from verify.nvidia import remote as nvidia
from verify.system import remote as system
from verify.vm import process_remote as process
from verify.vm import remote as vm
from verify.vm.api import cpus

VFIO = "options vfio-pci disable_idle_d3=1\nblacklist nouveau\n"
OPTIONS = {"vfio_pci": {"disable_idle_d3": "1"}}


def put(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# The node.


def node_tree(root: Path) -> None:
    put(root, "proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/sda1 iommu=pt\n")
    put(root, "proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\nprocessor\t: 1\n")
    (root / "sys/class/iommu/dmar0").mkdir(parents=True)
    for function, device, driver in (("0", "0x24b0", "vfio-pci"), ("1", "0x228b", "snd_hda_intel")):
        folder = root / f"sys/bus/pci/devices/0000:01:00.{function}"
        put(folder, "vendor", "0x10de\n")
        put(folder, "device", f"{device}\n")
        put(folder, "class", "0x030000\n")
        for link, target in (("driver", f"drivers/{driver}"), ("iommu_group", "groups/14")):
            (root / target).mkdir(parents=True, exist_ok=True)
            (folder / link).symlink_to(root / target)
    put(root, "sys/bus/pci/devices/0000:01:00.0/reset_method", "flr bus\n")
    put(root, "sys/bus/pci/devices/0000:00:00.0/class", "0x060000\n")
    put(root, "sys/kernel/iommu_groups/14/type", "identity\n")
    put(root, "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "16\n")
    put(root, "sys/module/vfio_pci/initstate", "live\n")
    put(root, "sys/module/vfio_pci/parameters/disable_idle_d3", "Y\n")
    put(root, "sys/module/kernel_part/parameters/x", "1\n")
    put(root, "etc/modprobe.d/gpulab.conf", VFIO)


def test_node_is_read(tmp_path: Path) -> None:
    node_tree(tmp_path)

    found = hypervisor.observe(tmp_path)

    assert (found["kernel"], found["cpu"]) == ("6.14.8-2-pve", "GenuineIntel")
    assert found["iommus"] == ["dmar0"] and found["groups"] == {"14": "identity"}
    assert found["devices"]["0000:01:00.0"] == {
        "id": "10de:24b0",
        "class": "0300",
        "driver": "vfio-pci",
        "group": "14",
        "bridge": False,
        "reset_methods": ["flr", "bus"],
    }
    assert found["devices"]["0000:01:00.1"]["driver"] == "snd_hda_intel"
    assert found["devices"]["0000:01:00.1"]["reset_methods"] is None
    assert found["devices"]["0000:00:00.0"]["bridge"] is True
    assert found["modules"] == ["vfio_pci"]
    assert found["parameters"] == {"vfio_pci.disable_idle_d3": "Y", "vfio_iommu_type1.allow_unsafe_interrupts": None}
    assert found["hugepages"] == {"1048576": 16}
    assert found["modprobe"] == {"options": OPTIONS, "blacklist": ["nouveau"]}
    assert found["next_boot"]["kernel"] is None


def test_machine_without_anything_is_read(tmp_path: Path) -> None:
    found = hypervisor.observe(tmp_path)

    assert (found["devices"], found["groups"], found["hugepages"], found["cpu"]) == ({}, {}, {}, None)


@pytest.mark.parametrize(
    ("cmdline", "kernel"),
    [
        ("BOOT_IMAGE=/vmlinuz-6.8.12-1-pve root=ZFS=rpool/ROOT/pve-1", "6.8.12-1-pve"),
        (r"initrd=\EFI\proxmox\6.14.8-2-pve\initrd.img-6.14.8-2-pve root=ZFS=rpool", "6.14.8-2-pve"),
    ],
)
def test_booted_kernel_of_both_boot_loaders(cmdline: str, kernel: str) -> None:
    assert hypervisor.booted_kernel(cmdline) == kernel


def test_modprobe_files_hide_those_of_weaker_folders(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/modprobe.d/vfio.conf", "options vfio-pci a=1\n")
    put(tmp_path, "etc/modprobe.d/vfio.conf", "options vfio-pci b=2\n")
    put(tmp_path, "etc/modprobe.d/vfio.conf.bak", "options vfio-pci c=3\n")

    assert hypervisor.effective(hypervisor.modprobe_files(tmp_path))["options"] == {"vfio_pci": {"b": "2"}}


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ({"a.conf": "options vfio_pci a=1 b"}, {"vfio_pci": {"a": "1", "b": ""}}),
        ({"a.conf": "options vfio-pci \\\n  a=1"}, {"vfio_pci": {"a": "1"}}),
        ({"a.conf": "# options vfio-pci a=1"}, {}),
        # The kernel takes the last value of a parameter: a later file wins.
        ({"a.conf": "options vfio-pci a=1 b=1", "z.conf": "options vfio-pci a=2"}, {"vfio_pci": {"a": "2", "b": "1"}}),
    ],
)
def test_effective_options(files: dict[str, str], options: dict[str, Any]) -> None:
    assert hypervisor.effective(files)["options"] == options


# The next boot.

#: As Debian 13's grub-mkconfig writes it, shortened.
GRUB = """\
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
else
   set default="DEFAULT"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    save_env saved_entry
  fi
}
menuentry 'Proxmox VE GNU/Linux' --class proxmox --class os $menuentry_id_option 'gnulinux-simple-1b2c' {
\tload_video
\tif [ "${grub_platform}" = xen ]; then insmod xzio; fi
\techo\t'Loading Linux 6.17.2-1-pve ...'
\tlinux\t/boot/vmlinuz-6.17.2-1-pve root=/dev/mapper/pve-root ro  quiet iommu=pt
\tinitrd\t/boot/initrd.img-6.17.2-1-pve
}
submenu 'Advanced options for Proxmox VE GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1b2c' {
\tmenuentry 'Proxmox VE, with Linux 6.17.2-1-pve' $menuentry_id_option 'gnulinux-6.17.2-1-pve-advanced-1b2c' {
\t\tlinux\t/boot/vmlinuz-6.17.2-1-pve root=/dev/mapper/pve-root ro  quiet iommu=pt
\t}
\tmenuentry 'Proxmox VE, with Linux 6.14.8-2-pve' $menuentry_id_option 'gnulinux-6.14.8-2-pve-advanced-1b2c' {
\t\tlinux\t/boot/vmlinuz-6.14.8-2-pve root=/dev/mapper/pve-root ro  quiet
\t}
}
if [ "$grub_platform" = "efi" ]; then
\tmenuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
\t\tfwsetup
\t}
fi
"""
NEW, OLD = "6.17.2-1-pve", "6.14.8-2-pve"


@pytest.mark.parametrize(
    ("default", "environment", "kernel"),
    [
        ("0", "", NEW),
        ("1>1", "", OLD),
        ("gnulinux-advanced-1b2c>gnulinux-6.14.8-2-pve-advanced-1b2c", "", OLD),
        ("Advanced options for Proxmox VE GNU/Linux>Proxmox VE, with Linux 6.14.8-2-pve", "", OLD),
        ("${saved_entry}", "# GRUB Environment Block\nsaved_entry=1>1\n####", OLD),
        ("${saved_entry}", "", NEW),
        ("0", "next_entry=1>1\n", OLD),
        ("0", "next_entry=\n", NEW),
        # GRUB boots the first entry when there is none of that name.
        ("gnulinux-advanced-1b2c>gnulinux-5.15-advanced-1b2c", "", NEW),
        ("7", "", NEW),
    ],
)
def test_default_entry_of_grub(default: str, environment: str, kernel: str) -> None:
    found = hypervisor.grub_entry(GRUB.replace("DEFAULT", default), environment)

    assert found is not None
    assert found["kernel"] == kernel
    assert found["words"].split()[:2] == ["root=/dev/mapper/pve-root", "ro"]


@pytest.mark.parametrize("config", ["", "menuentry 'Memory test' {\n\tlinux16 /boot/memtest86+.bin\n}\n", "{\n{\n'\n"])
def test_grub_configuration_without_a_kernel(config: str) -> None:
    assert hypervisor.grub_entry(config, "") is None


GRUB_BOOT = "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/mapper/pve-root ro quiet"
SYSTEMD_BOOT = r"initrd=\EFI\proxmox\6.14.8-2-pve\initrd.img-6.14.8-2-pve root=ZFS=rpool/ROOT/pve-1 boot=zfs"


def installed(root: Path, *kernels: str) -> None:
    for kernel in kernels:
        put(root, f"boot/vmlinuz-{kernel}", "")
        put(root, f"usr/lib/modules/{kernel}/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.zst: kernel/x.ko\n")


def test_grub_boots_its_default_entry(tmp_path: Path) -> None:
    installed(tmp_path, OLD, NEW)
    put(tmp_path, "boot/grub/grub.cfg", GRUB.replace("DEFAULT", "1>1"))
    put(tmp_path, "etc/kernel/proxmox-boot-pin", f"{NEW}\n")
    # A file that only systemd-boot follows proves nothing.
    put(tmp_path, "etc/kernel/cmdline", "root=ZFS=rpool/ROOT/pve-1\n")

    found = hypervisor.next_boot(tmp_path, GRUB_BOOT)

    assert (found["kernel"], found["by"], found["pinned"]) == (OLD, "/boot/grub/grub.cfg", NEW)
    assert (found["installed"], found["vfio"]) == (True, "module")
    assert (found["cmdline"].split(), found["cmdline_source"]) == (
        ["root=/dev/mapper/pve-root", "ro", "quiet"],
        "/boot/grub/grub.cfg",
    )
    assert found["initramfs"]["path"].endswith(f"/boot/initrd.img-{OLD}")
    assert found["initramfs"]["missing"] is True


def test_grub_on_an_efi_partition_is_known_by_its_settings(tmp_path: Path) -> None:
    installed(tmp_path, "6.8.12-9-pve", "6.8.12-11-pve", "6.8.12-11-pve.old")
    put(tmp_path, "boot/grub/grub.cfg", GRUB.replace("DEFAULT", "0"))
    put(tmp_path, "etc/kernel/proxmox-boot-uuids", "ABCD-1234\n")
    put(tmp_path, "etc/default/grub", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX="root=ZFS=r"\n')
    add = 'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT iommu=pt"\n'
    put(tmp_path, "etc/default/grub.d/gpulab.cfg", add)

    found = hypervisor.next_boot(tmp_path, GRUB_BOOT)

    assert (found["kernel"], found["by"], found["copied"]) == ("6.8.12-11-pve", "the newest kernel in /boot", True)
    assert (found["cmdline"], found["cmdline_source"]) == ("root=ZFS=r quiet iommu=pt", "/etc/default/grub")


@pytest.mark.parametrize(
    ("pins", "kernel", "by"),
    [
        ({}, NEW, "the newest kernel in /boot"),
        ({"proxmox-boot-pin": OLD}, OLD, "/etc/kernel/proxmox-boot-pin"),
        ({"proxmox-boot-pin": NEW, "next-boot-pin": OLD}, OLD, "/etc/kernel/next-boot-pin"),
    ],
)
def test_systemd_boot_follows_pins_and_its_own_file(tmp_path: Path, pins: dict[str, str], kernel: str, by: str) -> None:
    installed(tmp_path, OLD, NEW)
    put(tmp_path, "boot/grub/grub.cfg", GRUB.replace("DEFAULT", "1>1"))
    put(tmp_path, "etc/kernel/cmdline", "root=ZFS=rpool/ROOT/pve-1 boot=zfs iommu=pt\n")
    for name, pinned in pins.items():
        put(tmp_path, f"etc/kernel/{name}", f"{pinned}\n")

    found = hypervisor.next_boot(tmp_path, SYSTEMD_BOOT)

    assert (found["kernel"], found["by"]) == (kernel, by)
    assert (found["cmdline"], found["cmdline_source"]) == (
        "root=ZFS=rpool/ROOT/pve-1 boot=zfs iommu=pt",
        "/etc/kernel/cmdline",
    )


def test_systemd_boot_without_its_file_boots_with_what_runs(tmp_path: Path) -> None:
    found = hypervisor.next_boot(tmp_path, SYSTEMD_BOOT)

    assert (found["cmdline"], found["cmdline_source"]) == (SYSTEMD_BOOT, "/proc/cmdline")


@pytest.mark.parametrize(
    ("dep", "builtin", "how"),
    [
        ("kernel/drivers/vfio/pci/vfio-pci.ko: kernel/drivers/vfio/vfio.ko\n", "", "module"),
        ("", "kernel/drivers/vfio/pci/vfio-pci.ko\n", "built in"),
        ("kernel/drivers/vfio/pci/vfio-pci-core.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n", "", None),
        ("kernel/net/x.ko: kernel/drivers/vfio/pci/vfio-pci.ko\n", "", None),
    ],
)
def test_how_a_kernel_has_vfio_pci(tmp_path: Path, dep: str, builtin: str, how: str | None) -> None:
    put(tmp_path, "modules.dep", dep)
    put(tmp_path, "modules.builtin", builtin)

    assert hypervisor.vfio_pci(tmp_path) == how


def cpio(files: dict[str, str]) -> bytes:
    """An archive of the kind `newc`."""
    out = io.BytesIO()
    for name, text in {**files, "TRAILER!!!": ""}.items():
        data, raw = text.encode(), name.encode() + b"\0"
        fields = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0]
        for block in (b"070701" + b"".join(b"%08X" % field for field in fields) + raw, data):
            out.write(block + b"\0" * (-len(block) % 4))
    return out.getvalue()


def tar(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


SCRIPT = """\
#!/bin/sh
# 0000:09:00.0 10de:ffff
if declared 0000:01:00.0 10de:24b0 && declared 0000:01:00.1 10de:228b; then
    echo vfio-pci > "/sys/bus/pci/devices/0000:01:00.0/driver_override"
fi
"""
CLAIMS = {"0000:01:00.0": "10de:24b0", "0000:01:00.1": "10de:228b"}
MAIN = {
    "init": "#!/bin/sh",
    "usr/lib/modules/big.ko": "x" * 3_000_001,
    "usr/lib/modules/6.14.8-2-pve/kernel/drivers/vfio/pci/vfio-pci.ko": "",
    "etc/modprobe.d/gpulab.conf": VFIO,
    "scripts/init-top/ORDER": '/scripts/init-top/gpulab-vfio "$@"\n[ -e /conf/param.conf ] && . /conf/param.conf\n',
    "scripts/init-top/gpulab-vfio": SCRIPT,
    "z": "end",
}
EARLY = cpio({"kernel/x86/microcode/GenuineIntel.bin": "y" * 1001}) + b"\0" * 700
#: Debian 13 leaves what is compressed already outside of the packed archive.
UNPACKED = cpio({"usr/lib/modules/6.12/kernel/drivers/vfio/pci/vfio-pci.ko.xz": "x" * 70}) + b"\0" * 300


def packed(tool: str, data: bytes) -> bytes:
    """What a compressor of initramfs-tools makes of an archive; empty when it is not on this machine."""
    if shutil.which(tool) is None:
        return b""
    words = {"lz4": ["-l", "-9"]}.get(tool, [])
    return subprocess.run([tool, *words, "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    "image",
    [
        cpio(MAIN),
        gzip.compress(cpio({f"./{name}": text for name, text in MAIN.items()})),
        EARLY + gzip.compress(cpio(MAIN)),
        EARLY + EARLY + gzip.compress(cpio(MAIN)),
        EARLY
        + UNPACKED
        + gzip.compress(cpio({name: text for name, text in MAIN.items() if "vfio-pci.ko" not in name})),
        EARLY + cpio(MAIN),
        tar(MAIN),
        gzip.compress(tar({f"./{name}": text for name, text in MAIN.items()})),
    ],
    ids=["plain", "packed", "microcode", "two early", "debian 13", "early and plain", "tar", "packed tar"],
)
def test_initramfs_is_read(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(image)

    found = hypervisor.initramfs(path)

    assert found == {
        "path": str(path),
        "vfio": True,
        "claims": CLAIMS,
        "options": OPTIONS,
        "blacklist": ["nouveau"],
    }


@pytest.mark.parametrize("tool", ["zstd", "lz4", "xz", "bzip2"])
def test_initramfs_of_every_compressor(tmp_path: Path, tool: str) -> None:
    path = tmp_path / "initrd.img"
    archive = packed(tool, cpio(MAIN))
    if not archive:
        pytest.skip(f"{tool} is not on this machine")
    path.write_bytes(EARLY + archive)

    assert hypervisor.initramfs(path)["claims"] == CLAIMS


@pytest.mark.parametrize("image", [b"", b"words", EARLY + gzip.compress(cpio(MAIN))[:-2000], cpio(MAIN)[:500]])
def test_damaged_initramfs_is_told(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(image)

    found = hypervisor.initramfs(path)

    assert found.get("error") or found["claims"] == {}
    assert not found.get("missing")


@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("usr/lib/modules/6.12/kernel/drivers/vfio/pci/vfio-pci.ko.xz", True),
        ("lib/modules/6.14.8-2-pve/vfio_pci", True),
        ("usr/lib/modules/6.12/kernel/drivers/vfio/pci/vfio-pci-core.ko.xz", False),
        ("usr/lib/modules/6.12/kernel/drivers/vfio/vfio.ko.xz", False),
        ("etc/modprobe.d/vfio-pci.conf", False),
    ],
)
def test_module_in_an_initramfs(tmp_path: Path, name: str, is_it: bool) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(cpio({name: ""}))

    assert hypervisor.initramfs(path)["vfio"] is is_it


@pytest.mark.parametrize(
    "files",
    [
        {"scripts/init-bottom/gpulab-vfio": SCRIPT},
        # Not executable: initramfs-tools packs it and does not run it.
        {"scripts/init-top/gpulab-vfio": SCRIPT, "scripts/init-top/ORDER": '/scripts/init-top/udev "$@"\n'},
        {"scripts/init-top/other": SCRIPT.replace("vfio-pci", "nvidia")},
    ],
    ids=["too late", "not run", "another driver"],
)
def test_scripts_that_give_vfio_pci_nothing(files: dict[str, str]) -> None:
    assert hypervisor.claims(files) == {}


def test_script_counts_where_no_order_is_written() -> None:
    assert hypervisor.claims({"scripts/init-top/gpulab-vfio": SCRIPT}) == CLAIMS


def test_stronger_folder_of_an_initramfs_wins(tmp_path: Path) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(cpio({"etc/modprobe.d/a.conf": VFIO, "usr/lib/modprobe.d/a.conf": "options vfio-pci ids=9:9"}))

    assert hypervisor.initramfs(path)["options"] == OPTIONS


# The guest.

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 8:16 / /srv/data rw,relatime shared:20 - ext4 /dev/sdb rw
41 22 0:50 / /srv/with\\040space rw - tmpfs tmpfs rw
"""


def test_mounts_by_their_points() -> None:
    assert system.mounted(MOUNTINFO) == {
        "/": ("8:1", "ext4", "/dev/sda1"),
        "/srv/data": ("8:16", "ext4", "/dev/sdb"),
        "/srv/with space": ("0:50", "tmpfs", "tmpfs"),
    }


def test_partition_of_the_system_disk_is_not_separate(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/mountinfo", MOUNTINFO.replace("8:16", "8:2").replace("/dev/sdb", "/dev/sda2"))
    put(tmp_path, "etc/fstab", "UUID=1 / ext4 defaults 0 1\nUUID=2 /srv/data/ ext4 defaults 0 2\n")
    for number, partition in (("8:1", "sda1"), ("8:2", "sda2")):
        put(tmp_path, f"sys/devices/sda/{partition}/partition", "1")
        (tmp_path / "sys/dev/block").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/dev/block" / number).symlink_to(tmp_path / "sys/devices/sda" / partition)

    found = system.data_disk(tmp_path, "/srv/data")

    assert found["separate"] is False
    assert found["fstab"] == "UUID=2"


def test_nothing_mounted(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/mountinfo", MOUNTINFO)
    put(tmp_path, "etc/fstab", "# UUID=2 /srv/other ext4 defaults 0 2\n")

    assert system.data_disk(tmp_path, "/srv/other") == {"fstab": None, "source": None, "beneath": None}


# Driver and GPU.

POLICY = """\
nvidia-driver-cuda:
  Installed: 580.95.05-1
  Candidate: 580.105.08-1
  Version table:
     590.44.01-1 500
        500 https://repo.example/debian13/x86_64  Packages
     580.105.08-1 1000
        500 https://repo.example/debian13/x86_64  Packages
 *** 580.95.05-1 1000
        500 https://repo.example/debian13/x86_64  Packages
        100 /var/lib/dpkg/status
"""


def test_policy_of_apt() -> None:
    assert nvidia.policy(POLICY, "nvidia-driver-cuda") == {
        "installed": "580.95.05-1",
        "candidate": "580.105.08-1",
        "priorities": {"590.44.01-1": 500, "580.105.08-1": 1000, "580.95.05-1": 1000},
    }
    assert nvidia.policy(POLICY + POLICY.replace("nvidia-driver-cuda", "other"), "other")["installed"] == "580.95.05-1"
    assert nvidia.policy("", "nvidia-driver-cuda")["candidate"] is None
    assert nvidia.policy(POLICY.replace("580.95.05-1\n", "(none)\n", 1), "nvidia-driver-cuda")["installed"] is None


@pytest.mark.parametrize(
    ("name", "text", "signed", "trusted"),
    [
        ("a.list", "deb [signed-by=/usr/share/keyrings/k.gpg] https://repo.example/x /\n", True, False),
        ("a.list", "deb https://repo.example/x /\n", False, False),
        ("a.list", "deb [trusted=yes arch=amd64] https://repo.example/x /\n", False, True),
        ("a.sources", "Types: deb\nURIs: https://repo.example/x\nSuites: /\nSigned-By: /k.gpg\n", True, False),
        ("a.sources", "Types: deb\nURIs: https://repo.example/x\nSigned-By:\n -----BEGIN PGP\n .\n abc\n", True, False),
        ("a.sources", "Types: deb\nURIs: https://repo.example/x\nTrusted: yes\n", False, True),
    ],
)
def test_sources_of_apt(tmp_path: Path, name: str, text: str, signed: bool, trusted: bool) -> None:
    put(tmp_path, f"sources.list.d/{name}", text)
    put(tmp_path, "sources.list", "# deb https://repo.example/x /\ndeb https://other.example trixie main\n")

    assert nvidia.sources(tmp_path, "https://repo.example") == [{"file": name, "signed_by": signed, "trusted": trusted}]


@pytest.mark.parametrize("text", ["# deb https://repo.example/x /", "Enabled: no\nURIs: https://repo.example/x\n"])
def test_switched_off_sources_do_not_count(tmp_path: Path, text: str) -> None:
    put(tmp_path, "sources.list.d/a.list" if text.startswith("#") else "sources.list.d/a.sources", text)

    assert nvidia.sources(tmp_path, "https://repo.example") == []


def test_xids_of_the_kernel_log() -> None:
    journal = (
        "NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n"
        "NVRM: Xid (PCI:0000:01:00): 31, pid=7, name=python\nNVRM: Xid (PCI:0000:01:00): 79, again\nother\n"
    )
    assert nvidia.xids(journal) == [31, 79]


#: A module that answers as pynvml does. The class of its error is what the script catches.
PYNVML = """
class NVMLError(Exception): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
NVML_TEMPERATURE_GPU, NVML_TEMPERATURE_THRESHOLD_GPU_MAX, NVML_CLOCK_GRAPHICS = 0, 3, 0
class Struct:
    def __init__(self, **values): vars(self).update(values)
def nvmlInit():
    if ERROR: raise NVMLError(ERROR)
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlSystemGetDriverVersion(): return b"580.95.05"
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetPciInfo(handle): return Struct(pciDeviceId=0x24b010de, busId=b"00000000:01:00.0")
def nvmlDeviceGetName(handle): return "NVIDIA RTX A4000"
def nvmlDeviceGetMemoryInfo(handle): return Struct(total=16376 * 2**20)
def nvmlDeviceGetEccMode(handle): return (0, 1)
def nvmlDeviceGetPowerManagementLimit(handle): return 120000
def nvmlDeviceGetTemperature(handle, sensor): return 47
def nvmlDeviceGetTemperatureThreshold(handle, kind): return {3: 90}[kind]
def nvmlDeviceGetPcieReplayCounter(handle): return 4
def nvmlDeviceGetComputeRunningProcesses(handle): return [Struct(pid=PID, usedGpuMemory=5 << 20)]
def nvmlDeviceGetRemappedRows(handle): return (4, 0, 0, 0)
def nvmlDeviceGetTotalEccErrors(handle, kind, counter): raise AssertionError("not asked while ECC is off")
def nvmlDeviceGetCurrPcieLinkWidth(handle): return 16
def nvmlDeviceGetCurrPcieLinkGeneration(handle): return 1
def nvmlDeviceGetPersistenceMode(handle): raise NVMLError("Not Supported")
"""


def nvml(folder: Path, error: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sys.path", list(os.sys.path))  # type: ignore[attr-defined]
    monkeypatch.delitem(os.sys.modules, "pynvml", raising=False)  # type: ignore[attr-defined]
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    put(folder, "pynvml.py", f"ERROR, PID = {error!r}, {os.getpid()}\n{PYNVML}")
    monkeypatch.setattr(nvidia, "WORK_S", 0.1)
    try:
        return nvidia.read_nvml(str(folder), {})
    finally:
        os.sys.modules.pop("pynvml", None)  # type: ignore[attr-defined]


def test_gpu_as_nvml_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sent"

    name = os.path.basename(Path("/proc/self/cmdline").read_text().partition("\0")[0])
    cgroup = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]

    found = nvml(folder, "", monkeypatch)

    assert found["gpus"] == [
        {
            "name": "NVIDIA RTX A4000",
            "id": "10de:24b0",
            "bus": "00000000:01:00.0",
            "memory_mib": 16376,
            "persistence": None,
            "accounting": None,
            "compute_mode": None,
            "power_limit_w": 120.0,
            "power_enforced_w": None,
            "power_default_w": None,
            "temperature_c": 47,
            "temperature_max_c": 90,
            "ecc": 0,
            "ecc_pending": 1,
            "ecc_uncorrected": None,
            "remapped": [0, 0, 0],
            "replays": [4, 4],
            "processes": [
                {"pid": os.getpid(), "name": name, "uid": os.getuid(), "memory_mib": 5, "cgroup": cgroup},
            ],
            # This process is on the card: its load is the load.
            "work": {
                "by": [name],
                "error": "",
                "generation": 1,
                "width": 16,
                "clock_mhz": None,
                "use": None,
                "reasons": None,
            },
        }
    ]
    assert not folder.exists()


def test_nvml_that_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvml(tmp_path / "sent", "Driver Not Loaded", monkeypatch) == {"error": "Driver Not Loaded", "gpus": []}


def test_gpu_of_the_bus(tmp_path: Path) -> None:
    for address, vendor, class_ in (("0000:01:00.0", "0x10de", "0x030000"), ("0000:01:00.1", "0x10de", "0x040300")):
        put(tmp_path, f"{address}/vendor", f"{vendor}\n")
        put(tmp_path, f"{address}/class", f"{class_}\n")
    put(tmp_path, "0000:02:00.0/vendor", "0x8086\n")

    assert nvidia.on_bus(tmp_path) == ["0000:01:00.0"]
    assert nvidia.on_bus(tmp_path / "absent") == []


def test_parts_of_the_driver_are_read(tmp_path: Path) -> None:
    put(tmp_path, "nvidia/580.95.05/gsp_ga10x.bin", "")
    put(tmp_path, "nvidia/570.1/other.bin", "")
    library = put(tmp_path, "libnvidia-ml.so.580.95.05", "")
    (tmp_path / "libnvidia-ml.so.1").symlink_to(library)
    cache = (
        f"\tlibnvidia-ml.so.1 (libc6) => /lib32/x\n\tlibnvidia-ml.so.1 (libc6,x86-64) => {tmp_path}/libnvidia-ml.so.1\n"
    )

    assert nvidia.firmware(tmp_path / "nvidia") == ["580.95.05"]
    assert nvidia.library(cache) == "580.95.05"
    assert nvidia.library("") is None


@pytest.mark.parametrize(("text", "blacklisted"), [("blacklist nouveau\n", True), ("# blacklist nouveau\n", False)])
def test_nouveau_is_looked_for(tmp_path: Path, text: str, blacklisted: bool) -> None:
    put(tmp_path, "usr/lib/modprobe.d/nvidia.conf", text)
    assert nvidia.nouveau(tmp_path) == {"loaded": False, "blacklisted": blacklisted}
    (tmp_path / "sys/module/nouveau").mkdir(parents=True)
    assert nvidia.nouveau(tmp_path)["loaded"] is True


@pytest.mark.parametrize(("config", "kernel"), [(GRUB.replace("DEFAULT", "1>1"), OLD), (GRUB, NEW), (None, "6.1")])
def test_kernel_of_the_next_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str | None, kernel: str
) -> None:
    asked: list[list[str]] = []

    def modinfo(words: list[str]) -> str:
        asked.append(words)
        return "580.95.05\n"

    monkeypatch.setattr(nvidia, "output", modinfo)
    put(tmp_path, "proc/sys/kernel/osrelease", "6.1\n")
    if config is not None:
        put(tmp_path, "boot/grub/grub.cfg", config)

    assert nvidia.next_kernel(tmp_path) == {"running": "6.1", "kernel": kernel, "module": "580.95.05"}
    assert asked == [["modinfo", "-k", kernel, "-F", "version", "nvidia"]]


#: What `apt-config dump` prints of Debian's files and ours.
APT = """\
APT "";
APT::Periodic "";
APT::Periodic::Unattended-Upgrade "1";
Unattended-Upgrade "";
Unattended-Upgrade::Package-Blacklist "";
Unattended-Upgrade::Package-Blacklist:: ".*nvidia";
Unattended-Upgrade::Package-Blacklist:: "libnv";
Unattended-Upgrade::Automatic-Reboot "TRUE";
"""


def test_configuration_of_unattended_upgrades() -> None:
    assert nvidia.unattended(APT) == {"runs": True, "blacklist": [".*nvidia", "libnv"]}
    assert nvidia.unattended(APT.replace('"1"', '"0"'))["runs"] is False
    assert nvidia.unattended("") == {"runs": False, "blacklist": []}
    found = system.upgrades(APT)
    assert (found["runs"], found["reboots"]) == (True, True)
    assert system.upgrades("")["runs"] is False


def test_packages_on_hold() -> None:
    assert nvidia.held("bash\tinstall\nlibcuda1\thold\nold\tdeinstall\nodd\n") == ["libcuda1"]


def test_dpkg_says_what_is_wanted_of_a_package() -> None:
    said = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package}\t${db:Status-Want}\n", "dpkg"], capture_output=True, text=True
    )
    assert said.stdout in ("dpkg\tinstall\n", "dpkg\thold\n")


def test_profiles_of_tenants_are_read_as_a_shell_does(tmp_path: Path) -> None:
    put(tmp_path, "astro.env", "# Written by gpulab.\nA=1\nexport B='0=4 G'\n")
    put(tmp_path, "README", "A=2")

    assert nvidia.tenants(tmp_path) == {"astro": {"A": "1", "B": "0=4 G"}}
    assert nvidia.tenants(tmp_path / "absent") == {}


#: The control tool: it answers to the folder that it is told to use, refuses in a closed one and hangs in another.
TOOL = """\
#!/bin/sh
read question
case "$CUDA_MPS_PIPE_DIRECTORY/$question" in
/hangs/*) exec sleep 60 ;;
/closed/*) echo "Cannot find MPS control daemon process"; exit 1 ;;
*/get_default_active_thread_percentage) echo 40.0 ;;
*/get_server_list) echo PID; echo nonsense ;;
*) echo 4G ;;
esac
"""


def test_mps_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = put(tmp_path, "bin/nvidia-cuda-mps-control", TOOL.replace("PID", str(os.getpid())))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(nvidia, "ASK_S", 0.5)
    put(tmp_path, "proc/7/cmdline", "/usr/bin/nvidia-cuda-mps-control\0-f\0")
    put(tmp_path, "proc/8/cmdline", "nvidia-cuda-mps-control\0")
    (tmp_path / f"proc/{os.getpid()}").mkdir()

    found = nvidia.read_mps({"pipe": "/open"}, tmp_path)

    assert (found["daemons"], found["percentage"]) == ([7], {"status": 0, "says": "40.0"})
    assert found["memory"]["says"] == "4G"
    assert found["servers"] == [{"pid": os.getpid(), "uid": os.getuid()}]
    assert nvidia.ask({"pipe": "/closed"}, "ps") == {"status": 1, "says": "Cannot find MPS control daemon process"}
    assert nvidia.ask({"pipe": "/hangs"}, "ps")["status"] is None


def test_stranger_asks_as_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can ask as another user")
    asked: dict[str, Any] = {}

    def run(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        asked.update(how)
        return subprocess.CompletedProcess(words, 1, "", "")

    monkeypatch.setattr(nvidia.subprocess, "run", run)
    nvidia.ask({"pipe": "/x"}, "ps", "nobody")

    assert (asked["user"], asked["extra_groups"], asked["group"] != 0) == ("nobody", [], True)


def test_client_of_mps_is_the_service_user() -> None:
    mps = {"clients": True, "user": "nobody", "pipe": "/p", "log": "/l"}

    found = nvidia.client_as(mps)

    assert found["env"]["CUDA_MPS_PIPE_DIRECTORY"] == "/p"
    assert (found["user"] > 0, found["extra_groups"]) == (True, [])
    assert nvidia.client_as({**mps, "clients": False}) == {}
    assert "user" not in nvidia.client_as({**mps, "user": "gpulab-is-not-here"})


# Containers.

SPEC = """\
---
cdiVersion: 0.7.0
containerEdits:
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  hooks:
  - args: [nvidia-ctk, hook, update-ldcache]
    hookName: createContainer
    path: /usr/bin/nvidia-ctk
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: "0"
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: all
kind: nvidia.com/gpu
"""


def test_specifications_are_read(tmp_path: Path) -> None:
    put(tmp_path, "run/nvidia.yaml", SPEC)
    put(tmp_path, "etc/other.json", '{"cdiVersion":"0.5.0","kind":"vendor.example/net","devices":[{"name":"eth"}]}')
    put(tmp_path, "etc/README", "kind: nvidia.com/gpu")

    found = containers.specifications([tmp_path / "etc", tmp_path / "run", tmp_path / "absent"])

    assert {each["kind"]: each["devices"] for each in found.values()} == {
        "nvidia.com/gpu": ["0", "all"],
        "vendor.example/net": ["eth"],
    }


def test_specification_names_its_driver_and_what_is_missing(tmp_path: Path) -> None:
    put(tmp_path, "usr/bin/nvidia-ctk", "")
    library = "  mounts:\n  - hostPath: /usr/lib/libcuda.so.580.95.05\n"

    found = containers.described(tmp_path, {"devices": ["all"], "text": SPEC.replace("  hooks:", f"{library}  hooks:")})

    assert found["versions"] == ["580.95.05"]
    assert found["missing"] == ["/dev/nvidia0", "/usr/lib/libcuda.so.580.95.05"]


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"Runtime": "runc", "DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}]}, "cdi"),
        ({"Runtime": "runc", "DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}, "hook"),
        ({"Runtime": "nvidia", "DeviceRequests": None}, "hook"),
        ({"Runtime": "runc", "DeviceRequests": None}, None),
    ],
)
def test_way_of_the_gpu_into_a_container(settings: dict[str, Any], way: str | None) -> None:
    assert containers.way_of_the_gpu(settings) == way


def test_listening_addresses(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st\n"
    rows = [
        "0100007F:2CAA 00000000:0000 0A 0:0 0:0 0 0 0 1",
        "00000000:2CAA 00000000:0000 0A 0:0 0:0 0 0 0 4711",
        "0100007F:2CAA 0100007F:9999 01 0:0 0:0 0 0 0 4711",
    ]
    put(tmp_path, "proc/net/tcp", head + "".join(f"   {number}: {row}\n" for number, row in enumerate(rows)))
    put(tmp_path, "proc/net/tcp6", head + "   0: 00000000000000000000000001000000:2CAA 0:0 0A\n")

    (tmp_path / "proc/77/fd").mkdir(parents=True)
    put(tmp_path, "proc/77/comm", "nginx\n")
    (tmp_path / "proc/77/fd/5").symlink_to("socket:[4711]")
    (tmp_path / "proc/77/fd/6").symlink_to("/dev/null")

    found = containers.listening(tmp_path)

    assert [(each["address"], each["port"]) for each in found] == [
        ("0.0.0.0", 11434),
        ("0000:0000:0000:0000:0000:0000:0000:0001", 11434),
        ("127.0.0.1", 11434),
    ]
    assert [each["program"] for each in found] == ["nginx", "", ""]


def test_models_folder_is_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = tmp_path / "data", tmp_path / "volume"
    (data / "ollama").mkdir(parents=True)
    other.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(data))
    mounts = [
        {"Destination": "/root", "Source": str(other)},
        {"Destination": "/root/.ollama", "Source": str(data / "ollama")},
    ]

    assert containers.models_folder({}, mounts, str(data)) == {
        "inside": "/root/.ollama/models",
        "outside": str(data / "ollama"),
        "on_data_disk": True,
    }
    assert containers.models_folder({"OLLAMA_MODELS": "/models"}, mounts, str(data))["outside"] is None
    monkeypatch.setattr("os.path.ismount", lambda path: False)
    assert containers.models_folder({}, mounts, str(data))["on_data_disk"] is False


def test_service_that_does_not_answer_is_told() -> None:
    assert "refused" in containers.ask(9, "/api/version", limit_s=2)["error"]


#: A `docker` that answers for one container, as Docker 26 does.
DOCKER = """\
#!/bin/sh
case "$*" in
"info "*) echo '{"ServerVersion": "26.1.5", "CDISpecDirs": []}';;
"inspect --type container ollama") cat <<'END'
[{"Image": "sha256:1", "Config": {"Env": ["HOME=/root", "OLLAMA_HOST=0.0.0.0:11434"]},
  "State": {"Running": true, "Status": "running", "Pid": 77},
  "HostConfig": {"PortBindings": {"11434/tcp": [{"HostIp": "127.0.0.1", "HostPort": "11434"}]}, "Memory": 2097152,
                 "PidsLimit": 64, "SecurityOpt": ["no-new-privileges"]},
  "NetworkSettings": {"Networks": {"gpulab-ollama": {}}},
  "Mounts": [{"Destination": "/root/.ollama", "Source": "/srv/o"}]}]
END
;;
"inspect --type container milvus") cat <<'END'
[{"Image": "sha256:9", "Config": {}, "State": {"Running": false, "Status": "exited", "Pid": 0},
  "HostConfig": {"PortBindings": {"19530/tcp": [{"HostIp": "", "HostPort": "19530"}], "9/udp": null}, "Memory": 0,
                 "PidsLimit": null},
  "Mounts": [{"Destination": "/var/lib/milvus/etcd", "Source": "/srv/milvus/etcd", "RW": true},
             {"Destination": "/var/lib/milvus", "Source": "/srv/milvus", "RW": true},
             {"Destination": "/c", "Source": "/srv", "RW": true}]}]
END
;;
"image inspect sha256:1")
    echo '[{"RepoDigests": ["lab/ollama@sha256:2"], "Config": {"Labels": {"org.gpulab.stand-in": "simulated"}}}]';;
"exec ollama nvidia-smi -L") echo "GPU 0: NVIDIA RTX A4000 (UUID: GPU-1)";;
"ps --all --quiet --no-trunc --filter label=org.gpulab.service") echo "1 2";;
"inspect --type container 1 2") cat <<'END'
[{"Name": "/ollama", "Id": "1", "State": {"Running": true},
  "Config": {"Labels": {"org.gpulab.service": "ollama"}},
  "HostConfig": {"DeviceRequests": [{"Driver": "cdi"}]},
  "Mounts": [{"Type": "bind", "Source": "DATA/ollama", "RW": true}, {"Type": "tmpfs", "Source": "", "RW": true},
             {"Type": "bind", "Source": "/etc/os-release", "RW": false}, {"Type": "bind", "Source": "DATA/gone"}]},
 {"Name": "/web.new", "State": {"Running": false}, "HostConfig": {}, "Mounts": []}]
END
;;
*) echo "Error: No such object" >&2; echo "[]"; exit 1;;
esac
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "bin/docker", DOCKER).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)


def observed(root: Path, name: str, *ports: int, asks: dict[str, str] | None = None) -> dict[str, Any]:
    services = {name: {"ports": list(ports), "asks": asks or {}}}
    return containers.observe({"engine": "docker", "services": services, "mount": "/srv"}, root)


def test_only_settings_are_read_of_a_services_environment(tmp_path: Path) -> None:
    put(tmp_path, "proc/7/environ", "OLLAMA_HOST=a=b\0HOME=/root\0HF_TOKEN=hidden\0CUDA_MPS_LOG_DIRECTORY=/var/log\0")

    assert containers.environment(tmp_path, 7) == {"OLLAMA_HOST": "a=b", "CUDA_MPS_LOG_DIRECTORY": "/var/log"}
    assert containers.environment(tmp_path, 8) == {}


def test_service_is_read(tmp_path: Path, docker: None) -> None:
    found = observed(tmp_path, "ollama", 9, asks={"version": "/api/version"})

    assert found["engine"]["version"] == "26.1.5"
    service = found["services"]["ollama"]
    assert (service["running"], service["health"], service["digests"]) == (True, None, ["lab/ollama@sha256:2"])
    assert service["gpus"] == ["GPU 0: NVIDIA RTX A4000 (UUID: GPU-1)"]
    assert service["storage"]["outside"] == "/srv/o"
    assert service["published"] == ["127.0.0.1:11434"]
    assert "refused" in service["version"]["error"]
    # What the engine was told, where the kernel says nothing.
    assert (service["limits"], service["privileges"]) == ({"memory_mib": 2, "pids": 64}, None)
    assert found["simulated"] == ["the image of ollama"]


def test_rights_of_a_service_are_the_kernels(tmp_path: Path, docker: None) -> None:
    status = "Name:\tollama\nUid:\t850\t850\t850\t850\nCapBnd:\t00000000000000c0\nNoNewPrivs:\t1\n"
    put(tmp_path, "proc/77/status", status)
    root = "1 2 0:3 / / rw,relatime - overlay overlay rw\n2 1 0:4 / / ro,relatime - overlay overlay rw\n"
    put(tmp_path, "proc/77/mountinfo", f"{root}3 2 0:5 / /tmp rw - tmpfs tmpfs rw\n")
    put(tmp_path, "proc/77/cgroup", "0::/docker/1\n")
    put(tmp_path, "sys/fs/cgroup/docker/1/memory.max", "1073741824\n")
    put(tmp_path, "sys/fs/cgroup/docker/1/pids.max", "max\n")
    for pid, inode in ((77, 5), (1, 5)):
        (tmp_path / f"proc/{pid}/ns").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/ns/ipc").symlink_to(f"ipc:[{inode}]")

    service = observed(tmp_path, "ollama", 9)["services"]["ollama"]

    assert service["limits"] == {"memory_mib": 1024, "pids": None}
    assert service["privileges"] == {
        "privileged": False,
        "read_only": True,
        "capabilities": 0xC0,
        "no_new_privileges": True,
        "unconfined": False,
        "uid": 850,
        "ipc": "host",
        "networks": ["gpulab-ollama"],
    }


def test_service_that_has_ended_is_read(tmp_path: Path, docker: None) -> None:
    service = observed(tmp_path, "milvus", 19530, 9091)["services"]["milvus"]

    assert (service["exists"], service["running"], service["status"]) == (True, False, "exited")
    assert service["published"] == ["0.0.0.0:19530"]
    assert (service["storage"]["inside"], service["storage"]["outside"]) == ("/var/lib/milvus", "/srv/milvus")
    assert (service["limits"], service["privileges"]) == ({"memory_mib": None, "pids": None}, None)


def test_absent_service_is_seen_as_absent(tmp_path: Path, docker: None) -> None:
    found = observed(tmp_path, "pytorch", 9)

    assert found["services"]["pytorch"] == {"exists": False, "running": False, "listens": []}


def test_containers_of_ours_are_read_with_the_folders_they_see(
    tmp_path: Path, docker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "ollama").mkdir(parents=True)
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(data))
    tool = tmp_path / "bin/docker"
    tool.write_text(DOCKER.replace("DATA", str(data)))

    ollama, web = containers.ours("docker", str(data))

    assert (ollama["name"], ollama["running"], web["name"], web["running"]) == ("ollama", True, "web.new", False)
    assert (ollama["gpu"], web["gpu"]) == ("cdi", None)
    assert (ollama["id"], ollama["service"], ollama["tenant"]) == ("1", "ollama", "")
    seen = [(folder["source"].rpartition("/")[2], folder["written"]) for folder in ollama["folders"]]
    assert seen == [("ollama", True), ("os-release", False), ("gone", True)]
    # The test's folder and /etc may share a file system; one that is not there lies nowhere.
    assert [folder["on_data_disk"] for folder in ollama["folders"]][::2] == [True, False]
    monkeypatch.setattr("os.path.ismount", lambda path: False)
    assert not any(folder["on_data_disk"] for folder in containers.ours("docker", str(data))[0]["folders"])


def test_podman_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "bin/podman", '#!/bin/sh\n[ "$1" = ps ] || echo \'{"version": {"Version": "5.4.2"}}\'\n').chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    arguments = {"engine": "podman", "services": {}, "mount": "/srv"}

    assert containers.observe(arguments, tmp_path)["engine"]["active"] == "without Quadlet"
    put(tmp_path, "usr/lib/systemd/system-generators/podman-system-generator", "")
    put(tmp_path, "var/run/cdi/nvidia.yaml", SPEC)
    found = containers.observe(arguments, tmp_path)

    assert (found["engine"]["active"], found["engine"]["version"]) == ("active", "5.4.2")
    assert found["cdi"] == ["nvidia.com/gpu=0", "nvidia.com/gpu=all"]


def test_healing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "bin/systemctl", "#!/bin/sh\nprintf 'ActiveState=active\\nUnitFileState=enabled\\n'\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)

    absent = containers.healing(tmp_path)
    put(tmp_path, "var/lib/gpulab/heal/alarm/ollama", "now  it does not answer\n")
    look = put(tmp_path, "var/lib/gpulab/heal/look.json", "{}")
    os.utime(look, (0, time.time() - 90))
    found = containers.healing(tmp_path)

    assert absent == {"active": "active", "enabled": "enabled", "age_s": None, "alarms": {}}
    assert found["alarms"] == {"ollama": "now it does not answer"}
    assert 90 <= found["age_s"] < 120


#: An engine whose container loses its GPU with a daemon-reload, or whose containers do not outlive a restart.
ENGINE = """\
#!/bin/sh
echo "${0##*/} $*" >> "$FOLDER/calls"
case "$*" in
"inspect --type=container --format={{.Image}} gone") exit 1;;
"inspect --type=container"*) echo sha256:1;;
"run "*) touch "$FOLDER/runs"; test -z "$REFUSED" || { echo "unresolvable CDI devices"; exit 125; };;
"exec "*) test -e "$FOLDER/lost" && echo "Unknown Error" && exit 255; echo "GPU 0: simulated";;
"ps --quiet --no-trunc") echo 1;;
"inspect --format="*) echo "/ollama $(cat "$FOLDER/pid" 2>/dev/null || echo 7) now";;
"ps --all --quiet --filter label=org.gpulab.verify") if test -e "$FOLDER/runs"; then echo 2; fi;;
"rm --force 2") rm "$FOLDER/runs";;
esac
"""
SYSTEMCTL = """\
#!/bin/sh
case "$1" in daemon-reload) test -z "$LOSES" || touch "$FOLDER/lost";; restart) echo 9 > "$FOLDER/pid";; esac
"""


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("docker", ENGINE), ("podman", ENGINE), ("systemctl", SYSTEMCTL)):
        put(tmp_path, f"bin/{name}", text).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    monkeypatch.setenv("FOLDER", str(tmp_path))
    return tmp_path


def disturb(**keys: str) -> dict[str, Any]:
    arguments = {"engine": "docker", "disturbance": "daemon-reload", "image_of": "ollama", "user": "850:850"}
    return disturbance.observe(arguments | keys)


def test_container_is_started_disturbed_and_removed(engines: Path) -> None:
    found = disturb()

    assert (found["error"], found["same"], found["simulated"]) == ("", True, ["nvidia-smi"])
    assert found["before"] == found["after"] == {"status": 0, "output": "GPU 0: simulated"}
    calls = (engines / "calls").read_text()
    assert "--device=nvidia.com/gpu=all" in calls and "--user=850:850" in calls
    assert not (engines / "runs").exists()


def test_container_that_loses_its_gpu_is_seen(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSES", "1")

    found = disturb(user="")

    assert found["after"] == {"status": 255, "output": "Unknown Error"}
    assert "--user" not in (engines / "calls").read_text()


def test_containers_that_are_restarted_with_the_engine_are_seen(engines: Path) -> None:
    assert disturb(disturbance="engine-restart")["same"] is False


@pytest.mark.parametrize(
    ("image_of", "refused", "said"),
    [("gone", "", "there is no container gone, whose image would be used"), ("a", "1", "unresolvable CDI devices")],
)
def test_container_that_cannot_be_started(
    engines: Path, monkeypatch: pytest.MonkeyPatch, image_of: str, refused: str, said: str
) -> None:
    monkeypatch.setenv("REFUSED", refused)

    assert disturb(image_of=image_of)["error"] == said
    assert not (engines / "runs").exists()


def test_podman_starts_the_guests_own_system(engines: Path) -> None:
    disturb(engine="podman")

    assert "--rootfs /:O sleep 300" in (engines / "calls").read_text()
    assert "docker" not in (engines / "calls").read_text()


# Backups.


@pytest.mark.parametrize("there", [True, False])
def test_jobs_and_backups_are_read_through_pvesh(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    jobs = '[{"id": "gpulab-gpu010"}, {"id": "gpulab-gpu01", "enabled": 1}]'
    stored = '[{"volid": "nas:a", "ctime": 5, "size": 7, "verification": {"state": "failed"}}, {"volid": "nas:b"}]'

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        match words[2].rpartition("/")[2]:
            case "backup":
                return subprocess.CompletedProcess(words, 0, jobs, "")
            case "content" if there:
                assert words[3:7] == ["--content", "backup", "--vmid", "101"]
                return subprocess.CompletedProcess(words, 0, stored, "")
            case "config" if there:
                return subprocess.CompletedProcess(words, 0, '{"meta": "creation-qemu=10.1.2,ctime=9"}', "")
        return subprocess.CompletedProcess(words, 2, "", "Configuration file 'x' does not exist\n")

    monkeypatch.setattr(vm.subprocess, "run", run)
    found = vm.observe("gpulab-gpu01" if there else "gpulab-gpu02", "nas", 101)

    if there:
        assert found["job"] == {"id": "gpulab-gpu01", "enabled": 1}
        assert [(each["size"], each["verification"]) for each in found["backups"]] == [(7, "failed"), (0, None)]
        assert (found["error"], found["meta"]) == ("", "creation-qemu=10.1.2,ctime=9")
    else:
        assert (found["job"], found["backups"], found["meta"]) == (None, [], None)
        assert found["error"] == "Configuration file 'x' does not exist"


# A VM's process.


SMAPS = """7f0000000000-7f0400000000 rw-s 00000000 00:2f 77 /run/hugepages/kvm/1048576kB/qemu_back_mem._objects_ram-node0.x (deleted)
Size:           16777216 kB
KernelPageSize:  1048576 kB
MMUPageSize:     1048576 kB
Rss:                   0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb: 16777216 kB
7f1000000000-7f1000200000 rw-p 00000000 00:00 0
Size:               2048 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                2048 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:       0 kB
7f2000000000-7f2000400000 rw-s 00000000 00:2e 78 /run/hugepages/kvm/2048kB/x
KernelPageSize:     2048 kB
Shared_Hugetlb:     4096 kB
Private_Hugetlb:    2048 kB
"""  # noqa: E501


def test_process_of_a_vm_is_read(tmp_path: Path) -> None:
    put(tmp_path, "run/qemu-server/101.pid", "4711\n")
    put(tmp_path, "proc/4711/cmdline", "/usr/bin/kvm\0-id\x00101\0-name\0gpu01\0")
    put(tmp_path, "proc/4711/smaps", SMAPS)
    for tid, name, allowed in ((4711, "kvm", "0-7"), (4712, "CPU 0/KVM", "2,6")):
        put(tmp_path, f"proc/4711/task/{tid}/comm", f"{name}\n")
        put(
            tmp_path,
            f"proc/4711/task/{tid}/status",
            f"Name:\t{name}\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}\n",
        )
    # One that has ended between two looks.
    (tmp_path / "proc/4711/task/4713").mkdir()

    found = process.observe(101, True, tmp_path)

    assert sorted(found["threads"], key=lambda each: each["name"]) == [
        {"name": "CPU 0/KVM", "cpus": "2,6"},
        {"name": "kvm", "cpus": "0-7"},
    ]
    assert (found["pid"], found["huge_mib"]) == (4711, {"1048576": 16384, "2048": 6})
    assert process.observe(101, False, tmp_path)["huge_mib"] == {}


@pytest.mark.parametrize("pid", [None, "4712\n", "", "1\n", "4713\n"])
def test_vm_without_a_process_is_told(tmp_path: Path, pid: str | None) -> None:
    """Neither is another program that has the number by now, nor another VM."""
    put(tmp_path, "proc/1/cmdline", "/sbin/init\0")
    put(tmp_path, "proc/4713/cmdline", "/usr/bin/kvm\0-id\x00102\0-name\x00101\0")
    if pid is not None:
        put(tmp_path, "run/qemu-server/101.pid", pid)

    assert process.observe(101, True, tmp_path)["pid"] is None


def test_threads_of_a_real_process_are_read(tmp_path: Path) -> None:
    # Called as QEMU would be.
    argv = [sys.executable, "-c", "print(flush=True); input()", "-id", "7"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline()
        put(tmp_path, "run/qemu-server/7.pid", f"{started.pid}\n")
        (tmp_path / "proc").symlink_to("/proc")

        found = process.observe(7, True, tmp_path)

        started.communicate("\n")
    assert found["threads"] and all(cpus(each["cpus"]) for each in found["threads"])
    assert cpus(found["threads"][0]["cpus"]) == os.sched_getaffinity(os.getpid())


# Milvus. What the real server answers: tests/rehearsal/test_milvus_verify.py.


class Metrics(http.server.BaseHTTPRequestHandler):
    """The port of Milvus' metrics."""

    answers: dict[str, tuple[int, str]] = {}

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, text = self.answers.get(self.path, (404, "404 page not found"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(Metrics, "answers", {"/healthz": (200, "OK")})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_milvus_tells_its_health_and_what_else_it_tells_everybody(metrics: int) -> None:
    assert (milvus_remote.health(metrics), milvus_remote.open_without_login(metrics)) == ("OK", [])

    Metrics.answers = {"/healthz": (500, "rootcoord is abnormal"), "/api/v1/collections": (200, "{}")}
    assert milvus_remote.health(metrics) == "rootcoord is abnormal"
    assert milvus_remote.open_without_login(metrics) == ["/api/v1/collections"]

    Metrics.answers = {"/healthz": (503, "")}
    assert milvus_remote.health(metrics) == "HTTP 503"
    assert "refused" in milvus_remote.health(9)


def test_index_parameters_are_texts_in_either_form() -> None:
    def pairs(**keys: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(key=key, value=value) for key, value in keys.items()]

    expected = {"index_type": "HNSW", "M": "16"}
    assert milvus_remote.parameters(pairs(index_type="HNSW", M="16")) == expected
    assert milvus_remote.parameters(pairs(index_type="HNSW", params='{"M": 16}')) == expected
    assert milvus_remote.parameters(pairs(index_type="HNSW", params="none")) == {"index_type": "HNSW"}


@pytest.mark.parametrize(("text", "found"), [('{"sky": {}}', {"sky": {}}), ("[]", None), ("{", None), (None, None)])
def test_profiles_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, found: object) -> None:
    path = tmp_path / "milvus.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(milvus_remote, "PROFILES", str(path))

    assert milvus_remote.profiles() == found


#: Asked nothing, it says what it was started with.
OTHER_PYTHON = """\
#!/bin/sh
printf '{"words": "%s %s", "given": %s}' "$1" "$2" "$(cat)"
"""


def without_driver(folder: Path, tools: Path) -> dict[str, Any]:
    """What the program prints when it is run by a Python that has the standard library alone."""
    script = Path(milvus_remote.__file__).read_text().replace(milvus_remote.TOOLS, str(tools))
    words = [sys.executable, "-I", "-S", "-c", script.replace(milvus_remote.PROFILES, str(folder / "none"))]
    arguments = json.dumps({"port": 9, "metrics_port": 9, "databases": {}})
    done = subprocess.run([*words, arguments], input='{"root": "hidden"}', capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_milvus_is_asked_with_the_tools_own_python(tmp_path: Path) -> None:
    tools = put(tmp_path, "bin/python", OTHER_PYTHON)
    tools.chmod(0o755)

    assert without_driver(tmp_path, tools) == {"words": "-I -S", "given": {"root": "hidden"}}


def test_guest_without_the_tools_says_so(tmp_path: Path) -> None:
    found = without_driver(tmp_path, tmp_path / "bin/python")

    assert found["error"] == f"{tmp_path}/bin/python has no driver of Milvus"
    assert "refused" in found["health"]
    assert (found["strangers"], found["tenants"], found["profiles"]) == ({}, {}, None)


# Ollama's models.


class OllamaAnswers(http.server.BaseHTTPRequestHandler):
    """As much of Ollama as loads models and takes them out again, a moment after it was told."""

    loaded: set[str]
    asked: list[dict[str, Any]]
    leaving: bool
    refuses: bool

    def do_GET(self) -> None:
        self.tell({"models": [{"name": name} for name in sorted(self.loaded)]})
        if type(self).leaving:
            self.loaded.clear()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        if self.refuses:
            self.send_error(500)
            return
        if asked.get("keep_alive") == 0:
            type(self).leaving = True
        else:
            self.loaded.add(f"{asked['model'].removesuffix(':latest')}:latest")
        self.tell({"done": True})

    def tell(self, what: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(what).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ollama() -> Iterator[tuple[type[OllamaAnswers], int]]:
    class Answers(OllamaAnswers):
        loaded, asked, leaving, refuses = set[str](), [], False, False

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Answers, server.server_port
        server.shutdown()


def test_model_that_nobody_had_loaded_is_taken_out_again(ollama: tuple[type[OllamaAnswers], int]) -> None:
    """It would hold the card for minutes, and the benchmarks would find it in use."""
    answers, port = ollama

    found = containers.load_model(port, "tiny", 5)

    assert found["ps"] == {"json": {"models": [{"name": "tiny:latest"}]}}
    assert [each.get("keep_alive") for each in answers.asked] == [None, 0]
    assert answers.loaded == set()


@pytest.mark.parametrize("name", ["tiny", "tiny:latest"])
def test_model_that_somebody_had_loaded_stays(ollama: tuple[type[OllamaAnswers], int], name: str) -> None:
    answers, port = ollama
    answers.loaded.add("tiny:latest")

    containers.load_model(port, name, 5)

    assert [each.get("keep_alive") for each in answers.asked] == [None]
    assert answers.loaded == {"tiny:latest"}


def test_model_that_does_not_load_is_not_taken_out(ollama: tuple[type[OllamaAnswers], int]) -> None:
    answers, port = ollama
    answers.refuses = True

    found = containers.load_model(port, "tiny", 5)

    assert "HTTP 500" in found["load"]["error"]
    assert len(answers.asked) == 1
