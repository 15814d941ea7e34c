# SPDX-License-Identifier: MIT
"""Runs on the node: what it is, how it was booted and how it will boot. Paths are relative to the root folder."""

import base64
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from glob import glob
from typing import Any

from operations.remote.common import answer, packages, run, text


def word(path: str) -> str:
    """A small file without the space around it, empty when it is absent."""
    return (text(path) or "").strip()


def mtime(path: str) -> float | None:
    return os.stat(path).st_mtime if os.path.exists(path) else None


def said(*argv: str) -> str | None:
    """What a command says on either stream, None when there is no such command."""
    status, stdout, stderr = run(*argv)
    return None if status == 127 else (stdout + stderr).strip()


def own_file(path: str) -> dict[str, Any] | None:
    """As `operations.files` reads it."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    return {"content": base64.b64encode(content).decode(), "mode": mode, "mtime": status.st_mtime}


def function(folder: str) -> dict[str, Any]:
    """One function of the PCI tree."""

    def number(name: str) -> str:
        return word(f"{folder}/{name}").removeprefix("0x")

    def link(name: str) -> str | None:
        # The link's own words: its target may lie outside of what is visible here.
        path = f"{folder}/{name}"
        return os.path.basename(os.readlink(path)) if os.path.islink(path) else None

    group = link("iommu_group")
    return {
        "address": os.path.basename(folder),
        "id": f"{number('vendor')}:{number('device')}",
        "subsystem": f"{number('subsystem_vendor')}:{number('subsystem_device')}",
        "pci_class": number("class")[:4],
        "driver": link("driver"),
        "iommu_group": None if group is None else int(group),
        "boot_vga": word(f"{folder}/boot_vga") == "1",
        "bridge": os.path.isdir(f"{folder}/pci_bus"),
    }


def guest(kind: str, vmid: str, path: str, name_key: str) -> dict[str, Any]:
    # What follows the first section header belongs to snapshots.
    config = (text(path) or "").split("\n[")[0]
    keys = dict(line.split(": ", 1) for line in config.splitlines() if ": " in line and not line.startswith("#"))
    tags = re.findall(r"[^;, ]+", keys.get("tags", ""))
    return {"kind": kind, "vmid": int(vmid), "name": keys.get(name_key, ""), "tags": tags}


def running_guests() -> Iterator[dict[str, Any]]:
    """VMs whose QEMU process lives, and containers with processes. `qm list` would take a second for the same."""
    for path in sorted(glob("run/qemu-server/*.pid")):
        vmid, process = os.path.basename(path).removesuffix(".pid"), word(path)
        if vmid.isdigit() and process and os.path.exists(f"proc/{process}"):
            yield guest("VM", vmid, f"etc/pve/qemu-server/{vmid}.conf", "name")
    for path in sorted(glob("sys/fs/cgroup/lxc/*/cgroup.events")):
        vmid = os.path.basename(os.path.dirname(path))
        if vmid.isdigit() and "populated 1" in word(path):
            yield guest("CT", vmid, f"etc/pve/lxc/{vmid}.conf", "hostname")


def boot_time() -> float:
    """When process 1 started. /proc/stat's btime is that of the physical machine, also inside a container."""
    ticks = int(word("proc/1/stat").rpartition(")")[2].split()[19])
    uptime = float(word("proc/uptime").split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def loader_info() -> str | None:
    """The EFI variable in which a boot loader names itself: four bytes of attributes, then UTF-16."""
    for path in glob("sys/firmware/efi/efivars/LoaderInfo-4a67b082-*"):
        with open(path, "rb") as variable:
            return variable.read()[4:].decode("utf-16-le", "replace").rstrip("\0")
    return None


def pve_version() -> str | None:
    # dpkg answers in a few ms; pveversion loads much of PVE first.
    return packages(["pve-manager"])["pve-manager"] or first(r"^pve-manager/([^/ ]+)", said("pveversion"))


def first(pattern: str, content: str | None) -> str | None:
    """What the first line that matches `pattern` holds in its group."""
    found = re.search(pattern, content or "", re.MULTILINE)
    return found[1] if found else None


def read(root: str, stamp: str, files: list[str]) -> dict[str, Any]:
    """The node as `operations.hypervisor.facts.NodeState` describes it."""
    os.chdir(root)
    # The tools' folder may be missing from a non-login shell's PATH.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    managed = os.path.exists("etc/kernel/proxmox-boot-uuids")
    efi = os.path.isdir("sys/firmware/efi")
    boot = os.statvfs("boot")
    initrds = {f"/{path}": os.stat(path) for path in sorted(glob("boot/initrd.img-*"))}
    return {
        "pve_version": pve_version(),
        "machine": platform.machine(),
        "kernel": word("proc/sys/kernel/osrelease"),
        "cpu_vendor": first(r"^vendor_id\s*:\s*(\S+)", text("proc/cpuinfo")),
        "cmdline": word("proc/cmdline"),
        "boot_id": word("proc/sys/kernel/random/boot_id"),
        "boot_time": boot_time(),
        "efi_directory": efi,
        "efibootmgr": said("efibootmgr", "-v"),
        "loader_info": loader_info(),
        "boot_tool_managed": managed,
        # It mounts every EFI partition to answer: only where the question can arise.
        "boot_tool_status": said("proxmox-boot-tool", "status") if managed and efi else None,
        "grub_cmdline": first(r"^\s*linux\S*\s+(.*)", text("boot/grub/grub.cfg")),
        "grub_mtime": mtime("boot/grub/grub.cfg"),
        "stamp_mtime": mtime(stamp.lstrip("/")),
        "initrds": {path: [status.st_mtime, status.st_size] for path, status in initrds.items()},
        "boot_free_bytes": boot.f_bavail * boot.f_frsize,
        "iommu": bool(glob("sys/class/iommu/*")),
        "pci": [function(folder) for folder in sorted(glob("sys/bus/pci/devices/*"))],
        "guests": list(running_guests()),
        "files": {path: own_file(path.lstrip("/")) for path in files},
    }


if __name__ == "__main__":
    answer(read)
