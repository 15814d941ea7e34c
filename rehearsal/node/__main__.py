# SPDX-License-Identifier: MIT
"""Runs on a node of the lab: boots it (simulated) and shows the result to it by bind mounts.

`pack FOLDER ARCHIVE` instead writes an archive, for update-initramfs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rehearsal.node import initramfs
from rehearsal.node.hardware import Booted, lay_out, read_boot

#: What was laid out at this boot; the control machine reads it too.
LAID_OUT = "/var/lib/lab-hardware"
#: Misc device 196 is /dev/vfio/vfio (devices.txt). The groups' major is dynamic on a real machine; this one is of the
#: range for local and experimental use, where no driver of the control machine answers.
VFIO_CONTAINER = (10, 196)
VFIO_GROUP_MAJOR = 120
#: What is shown of /sys, beside the huge pages, and of /proc.
_SYS = ("bus/pci", "kernel/iommu_groups", "class/iommu", "module", "firmware")
_PROC = ("cmdline", "cpuinfo", "meminfo", "sys/kernel/osrelease", "modules")


def main(words: list[str]) -> None:
    if words[:1] == ["pack"]:
        initramfs.pack_folder(Path(words[1]), Path(words[2]))
        return
    if not Path("/boot/grub/grub.cfg").exists():
        # The first boot: what the installer would have left.
        for command in (["update-initramfs", "-c", "-k", "all"], ["update-grub"]):
            subprocess.run(command, check=True)
    booted = read_boot(Path("/"))
    lay_out(Path(LAID_OUT), booted)
    _show(Path(LAID_OUT), booted)
    _make_vfio_nodes(booted)
    print(f"simulated: booted {booted.machine.kernel} with: {booted.cmdline}")
    for line in booted.messages:
        print(f"simulated: kernel: {line}")
    for device in booted.machine.devices:
        driver = booted.drivers.get(device.address, "no driver")
        print(f"simulated: {device.address} {device.vendor}:{device.device} {driver}")


def _show(folder: Path, booted: Booted) -> None:
    """Bind what was laid out over what the container's kernel shows."""
    missing = [name for name in ("module", "firmware") if not Path("/sys", name).exists()]
    if missing:
        # The container's /sys is a small read-only tmpfs with the real folders mounted in it.
        _mount("-o", "remount,rw", "/sys")
        for name in missing:
            Path("/sys", name).mkdir()
        _mount("-o", "remount,ro", "/sys")
    for name in _SYS:
        _mount("--bind", str(folder / "sys" / name), f"/sys/{name}")
    # A kernel without huge pages has no folder of them to bind over.
    pages = "kernel/mm/hugepages" if Path("/sys/kernel/mm/hugepages").exists() else "kernel/mm"
    if Path("/sys", pages).exists():
        _mount("--bind", str(folder / "sys" / pages), f"/sys/{pages}")
    for name in _PROC:
        # A kernel without loadable modules has no /proc/modules to bind over; lsmod's stand-in reads ours either way.
        # The real memory changes all the time, a file that was laid out does not.
        if Path("/proc", name).exists() and (name != "meminfo" or booted.machine.memory_mib is not None):
            _mount("--bind", str(folder / "proc" / name), f"/proc/{name}")
    _make_module_index(Path("/usr/lib/modules", os.uname().release))


def _make_module_index(folder: Path) -> None:
    """An empty index for the kernel that really runs: lspci and modprobe complain where there is none."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        (folder / name).touch()
    subprocess.run(["depmod"], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _make_vfio_nodes(booted: Booted) -> None:
    if "vfio" not in booted.modules:
        return
    Path("/dev/vfio").mkdir(exist_ok=True)
    _make_node("/dev/vfio/vfio", 0o666, VFIO_CONTAINER)
    for group in booted.vfio_groups:
        _make_node(f"/dev/vfio/{group}", 0o600, (VFIO_GROUP_MAJOR, group))


def _make_node(path: str, mode: int, numbers: tuple[int, int]) -> None:
    if not os.path.exists(path):
        os.mknod(path, mode | 0o020000, os.makedev(*numbers))
        os.chmod(path, mode)


if __name__ == "__main__":
    main(sys.argv[1:])
