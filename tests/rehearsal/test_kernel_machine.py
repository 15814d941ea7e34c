# SPDX-License-Identifier: MIT
"""What a kernel machine is made and started from; nothing here starts QEMU."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from inventory import GpulabError
from rehearsal.kernel import image, qemu, supervisor
from rehearsal.kernel.machine import Ssh
from rehearsal.kernel.qemu import Spec
from rehearsal.nvidia import deb


@pytest.fixture
def spec(tmp_path):
    return Spec(disk=tmp_path / "disk.qcow2", serial=tmp_path / "serial.log", port=20022)


def test_command_line_gives_each_function_its_socket(spec):
    words = qemu.command(spec, 7, [11, 12, 13, 14, 15, 16])
    proxies = [word for word in words if word.startswith("x-pci-proxy-dev")]
    assert proxies[0] == "x-pci-proxy-dev,fd=11,bus=pcie.0,addr=2.0"
    assert proxies[1] == "x-pci-proxy-dev,fd=12,bus=port1,addr=0.0,multifunction=on"
    assert proxies[2] == "x-pci-proxy-dev,fd=13,bus=port1,addr=0.1"
    assert [word.split(",")[1] for word in proxies] == [f"fd={number}" for number in range(11, 17)]
    assert len(spec.functions()) == 6


def test_iommu_stands_before_what_it_translates(spec):
    words = qemu.command(spec, 7, range(11, 17))
    devices = [words[index + 1] for index, word in enumerate(words) if word == "-device"]
    assert devices[0] == "intel-iommu,intremap=on,caching-mode=on"


@pytest.mark.parametrize(("iommu", "vendor"), [("intel", "GenuineIntel"), ("amd", "AuthenticAMD")])
def test_processor_is_of_the_iommus_maker(spec, iommu, vendor):
    changed = Spec(**{**vars(spec), "iommu": iommu})
    words = qemu.command(changed, 7, range(11, 17))
    assert words[words.index("-cpu") + 1] == f"qemu64,vendor={vendor}"


def test_spec_survives_json(spec):
    assert Spec.from_plain(json.loads(json.dumps(spec.plain()))) == spec


def test_missing_program_is_said_with_its_package(monkeypatch):
    monkeypatch.setattr(
        shutil, "which", lambda name, path: None if name in ("sgdisk", qemu.QEMU) else f"/usr/bin/{name}"
    )
    assert qemu.missing() == (
        "no qemu-system-x86_64, sgdisk here; `apt-get install --no-install-recommends qemu-system-x86 gdisk`"
    )


def test_other_architecture_is_said(monkeypatch):
    monkeypatch.setattr(qemu.platform, "machine", lambda: "aarch64")
    assert qemu.missing() == "the kernel machines' disk is built on x86_64 alone, this is aarch64"


def test_each_program_is_in_a_package_of_the_list():
    assert set(qemu.PROGRAMS.values()) <= set(qemu.PACKAGES)


def test_probe_rom_jumps_from_the_reset_vector_to_its_code():
    rom = qemu.probe_rom()
    (distance,) = struct.unpack_from("<h", rom, 0xFFF1)
    assert len(rom) == 0x10000
    assert rom[0xFFF0] == 0xE9
    assert rom[0xFFF3 + distance :][:2] == b"\x66\xb9"


def test_known_hosts_line_names_the_port(tmp_path):
    ssh = Ssh("127.0.0.1", 20022, tmp_path / "key", "ssh-ed25519 AAAA")
    assert ssh.known_hosts_line == "[127.0.0.1]:20022 ssh-ed25519 AAAA\n"


MODULES_DEP = [
    "vfio/pci/vfio-pci.ko.xz: vfio/pci/vfio-pci-core.ko.xz vfio/vfio.ko.xz",
    "vfio/pci/vfio-pci-core.ko.xz: vfio/vfio.ko.xz",
    "vfio/vfio.ko.xz:",
    "net/dummy.ko.xz:",
]


def test_kept_modules_are_those_named_and_what_they_need():
    assert image.needed_modules(MODULES_DEP, ("vfio_pci", "vfio")) == [
        "vfio/pci/vfio-pci.ko.xz",
        "vfio/pci/vfio-pci-core.ko.xz",
        "vfio/vfio.ko.xz",
    ]


def test_module_that_a_newer_kernel_lacks_is_named():
    with pytest.raises(GpulabError, match="The kernel has no module nouveau"):
        image.needed_modules(MODULES_DEP, ("vfio", "nouveau"))


def test_boot_sector_keeps_the_partition_table():
    sector = image.boot_sector(b"\x11" * 512, b"\x22" * 512)
    assert len(sector) == 512
    assert sector[440:] == b"\x22" * 72
    assert struct.unpack_from("<Q", sector, 0x5C) == (image.GRUB_LBA,)
    assert sector[0x66:0x68] == b"\x90\x90"


def test_core_image_finds_its_rest_behind_its_first_sector():
    assert struct.unpack_from("<Q", image.core_image(bytes(2048)), 0x1F4) == (image.GRUB_LBA + 1,)


def test_stand_in_for_proxmox_ve_says_simulated():
    text = deb.control(image.PVE_MANAGER)
    assert "Package: pve-manager\n" in text
    assert "Version: 9.1.2+simulated\n" in text
    assert "(simulated)" in text


def test_first_command_line_is_that_of_the_grub_settings():
    settings = image.shell_assignments((image.FILES / "etc/default/grub").read_text())
    assert settings["GRUB_CMDLINE_LINUX_DEFAULT"] == "quiet"
    assert settings["GRUB_CMDLINE_LINUX"].startswith("console=ttyS0 ")


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([("guest-reset", 0), ("guest-shutdown", 0)], 0),
        # A fault of QEMU's own is a power failure, twice.
        ([("", -11), ("guest-reset", 0), ("", -11), ("guest-shutdown", 0)], 0),
        ([("", -11), ("", -11), ("", -11)], -11),
        ([("stopped", -15)], -15),
        # It refuses its command line.
        ([("", 1)], 1),
    ],
)
def test_machine_goes_on_after_a_reboot_and_after_a_crash_of_qemu(
    monkeypatch: pytest.MonkeyPatch, ends: list[tuple[str, int]], status: int
) -> None:
    left = list(ends)
    monkeypatch.setattr(supervisor, "_run", lambda _: left.pop(0))

    assert supervisor.supervise(None) == status
    assert left == []
