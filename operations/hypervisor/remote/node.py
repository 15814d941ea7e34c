# SPDX-License-Identifier: MIT
"""Runs on the node: what it is, how it was booted and how it will boot. Paths are relative to the root folder."""

import base64
import os
import platform
import re
import stat
import struct
import time
from collections.abc import Iterator
from glob import glob
from typing import Any

from operations.remote.common import answer, packages, run, text

VERSIONS = "var/lib/gpulab/versions"
PARAMETERS = ("vfio_pci/parameters/disable_idle_d3", "vfio_iommu_type1/parameters/allow_unsafe_interrupts")
#: Bytes where a FAT32 boot sector says: bytes a sector, sectors a cluster, sector of the file system's own figures.
_SECTOR, _CLUSTER, _FIGURES = 11, 13, 48


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


def kept(root: str) -> dict[str, Any]:
    """What `operations.files` keeps of each file that it wrote, beside what is there now.

    `original`: before the first write. `written`: every version that was written, in order, `found`: what each of them
    replaced. `touched`: the time of the last write.
    """
    found = {}
    for folder, _, names in os.walk(root):
        # An empty file `NAME.absent` stands for no file.
        series = {name: own_file(f"{folder}/{name}") for name in names if not name.endswith(".absent")}
        writes = sorted(number_of(name) for name in names if name.startswith("after-"))
        path = folder.removeprefix(root)
        if any(name.startswith("before-1") for name in names):
            found[path] = {
                "current": own_file(path.lstrip("/")),
                "original": series.get("before-1"),
                "written": [series.get(f"after-{number}") for number in writes],
                "found": [series.get(f"before-{number}") for number in writes],
                "touched": os.stat(folder).st_mtime,
            }
    return found


def number_of(name: str) -> int:
    return int(re.sub(r"\D", "", name) or 0)


def function(folder: str) -> dict[str, Any]:
    """One function of the PCI tree."""

    def number(name: str) -> str:
        return word(f"{folder}/{name}").removeprefix("0x")

    def link(name: str) -> str | None:
        # The link's own words: its target may lie outside of what is visible here.
        path = f"{folder}/{name}"
        return os.path.basename(os.readlink(path)) if os.path.islink(path) else None

    def speed(prefix: str) -> tuple[str, int] | None:
        width = word(f"{folder}/{prefix}_link_width")
        return (word(f"{folder}/{prefix}_link_speed"), int(width)) if width.isdigit() else None

    group = link("iommu_group")
    override = word(f"{folder}/driver_override")
    return {
        "address": os.path.basename(folder),
        "id": f"{number('vendor')}:{number('device')}",
        "subsystem": f"{number('subsystem_vendor')}:{number('subsystem_device')}",
        "pci_class": number("class")[:4],
        "driver": link("driver"),
        "driver_override": None if override in ("", "(null)") else override,
        "iommu_group": None if group is None else int(group),
        "boot_vga": word(f"{folder}/boot_vga") == "1",
        "bridge": os.path.isdir(f"{folder}/pci_bus"),
        "reset_methods": word(f"{folder}/reset_method").split(),
        "bars": bars(text(f"{folder}/resource") or ""),
        "link": speed("current"),
        "max_link": speed("max"),
    }


def bars(resource: str) -> list[int]:
    """The sizes of a function's base address registers: the first six lines are `start end flags`."""
    sizes = []
    for line in resource.splitlines()[:6]:
        start, end, _ = (int(value, 16) for value in line.split())
        if end > start:
            sizes.append(end - start + 1)
    return sizes


def guests() -> Iterator[dict[str, Any]]:
    """The node's VMs and containers. A VM runs when its QEMU lives, a container when its cgroup has processes.

    `qm list` would take a second for the same.
    """
    mappings = mapped(word_list("etc/pve/mapping/pci.cfg"), os.path.basename(real("etc/pve/local")) or platform.node())
    for path in sorted(glob("etc/pve/qemu-server/*.conf")):
        vmid = os.path.basename(path).removesuffix(".conf")
        process = word(f"run/qemu-server/{vmid}.pid")
        running = bool(process) and os.path.exists(f"proc/{process}")
        yield {**guest("VM", vmid, path, "name", mappings), "running": running}
    for path in sorted(glob("etc/pve/lxc/*.conf")):
        vmid = os.path.basename(path).removesuffix(".conf")
        running = "populated 1" in word(f"sys/fs/cgroup/lxc/{vmid}/cgroup.events")
        yield {**guest("CT", vmid, path, "hostname", mappings), "running": running}


def guest(kind: str, vmid: str, path: str, name_key: str, mappings: dict[str, str]) -> dict[str, Any]:
    # What follows the first section header belongs to snapshots.
    config = (text(path) or "").split("\n[")[0]
    keys = dict(line.split(": ", 1) for line in config.splitlines() if ": " in line and not line.startswith("#"))
    tags = re.findall(r"[^;, ]+", keys.get("tags", ""))
    devices = [device for key in sorted(keys) if key.startswith("hostpci") for device in handed(keys[key], mappings)]
    snippets = re.findall(r"=([^,]+)", keys.get("cicustom", ""))
    named = {"kind": kind, "vmid": int(vmid), "name": keys.get(name_key, ""), "tags": tags}
    return {**named, "devices": devices, "uses_snippet": snippets}


def handed(value: str, mappings: dict[str, str]) -> list[str]:
    """The addresses that a `hostpciN` hands over, a mapping followed; without a domain it is 0000."""
    places = []
    for part in value.split(","):
        key, equals, rest = part.partition("=")
        if key == "mapping":
            places += mappings.get(rest, "").split(";")
        elif key == "host" or not equals:
            places += (rest or key).split(";")
    return [place if place.count(":") == 2 else f"0000:{place}" for place in places if place]


def mapped(lines: list[str], node: str) -> dict[str, str]:
    """Resource mapping to the path of this node's device, from `mapping/pci.cfg`."""
    found, name = {}, ""
    for line in lines:
        if line[:1].strip():
            name = line.split()[-1]
            continue
        keys = dict(part.split("=", 1) for part in line.strip().removeprefix("map ").split(",") if "=" in part)
        if keys.get("node") == node:
            found[name] = keys.get("path", "")
    return found


def word_list(path: str) -> list[str]:
    return [line for line in (text(path) or "").splitlines() if line.strip()]


def real(path: str) -> str:
    return os.readlink(path) if os.path.islink(path) else ""


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


def grub_cmdline(config: str | None, pinned: str) -> str | None:
    """The `linux` line of the kernel that is pinned, or of the first entry."""
    line = r"^\s*linux\S*\s+"
    return (pinned and first(rf"{line}(\S*vmlinuz-{re.escape(pinned)}\s.*)", config)) or first(f"{line}(.*)", config)


def kernels() -> Iterator[dict[str, Any]]:
    """The installed kernels, and whether each has vfio-pci."""
    for path in sorted(glob("boot/vmlinuz-*")):
        version = path.removeprefix("boot/vmlinuz-")
        lists = [f"usr/lib/modules/{version}/{name}" for name in ("modules.dep", "modules.builtin")]
        yield {"version": version, "vfio": any(re.search(r"/vfio[-_]pci\.ko", text(name) or "") for name in lists)}


def modules_configured() -> list[str]:
    """The modules that are loaded at every boot because a list names them."""
    lists = ["etc/modules", *sorted(glob("etc/modules-load.d/*.conf")), *sorted(glob("usr/lib/modules-load.d/*.conf"))]
    lines = [line.strip() for path in lists for line in word_list(path)]
    return [line.split()[0] for line in lines if line[:1] not in "#;"]


def boot_partitions() -> Iterator[dict[str, Any]]:
    """The EFI partitions that proxmox-boot-tool copies kernels to. They are not mounted, and are not to be for this."""
    for uuid in word("etc/kernel/proxmox-boot-uuids").split():
        try:
            with open(f"dev/disk/by-uuid/{uuid}", "rb") as device:
                yield {"name": uuid, "free_bytes": free_on_fat32(device.read(512 * 128))}
        except OSError:
            yield {"name": uuid, "free_bytes": None}


def free_on_fat32(start: bytes) -> int | None:
    """The free bytes that a FAT32 file system notes in its FSInfo sector, from its first sectors; None: it does not."""
    if len(start) < 512 or start[510:512] != b"\x55\xaa":
        return None
    (sector,), (figures,) = struct.unpack_from("<H", start, _SECTOR), struct.unpack_from("<H", start, _FIGURES)
    note = start[figures * sector :]
    if note[:4] != b"RRaA" or note[484:488] != b"rrAa":
        return None
    (clusters,) = struct.unpack_from("<I", note, 488)
    return None if clusters == 0xFFFFFFFF else clusters * start[_CLUSTER] * sector


def read(root: str, files: list[str], stamp: str, shut_down: str) -> dict[str, Any]:
    """The node as `operations.hypervisor.facts.NodeState` describes it."""
    os.chdir(root)
    # The tools' folder may be missing from a non-login shell's PATH.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    managed = os.path.exists("etc/kernel/proxmox-boot-uuids")
    efi = os.path.isdir("sys/firmware/efi")
    boot = os.statvfs("boot")
    initrds = {f"/{path}": os.stat(path) for path in sorted(glob("boot/initrd.img-*"))}
    pinned = word("etc/kernel/proxmox-boot-pin").split()
    tables = ("DMAR", "IVRS")
    pages = glob("sys/kernel/mm/hugepages/hugepages-*kB/nr_hugepages")
    return {
        "pve_version": pve_version(),
        "machine": platform.machine(),
        "kernel": word("proc/sys/kernel/osrelease"),
        "cpu_vendor": first(r"^vendor_id\s*:\s*(\S+)", text("proc/cpuinfo")),
        "memory_mib": int(first(r"^MemTotal:\s*(\d+) kB", text("proc/meminfo")) or 0) // 1024,
        "cmdline": word("proc/cmdline"),
        "boot_id": word("proc/sys/kernel/random/boot_id"),
        "boot_time": boot_time(),
        "efi_directory": efi,
        "efibootmgr": said("efibootmgr", "-v"),
        "loader_info": loader_info(),
        "boot_tool_managed": managed,
        # It mounts every EFI partition to answer: only where the question can arise.
        "boot_tool_status": said("proxmox-boot-tool", "status") if managed and efi else None,
        "grub_cmdline": grub_cmdline(text("boot/grub/grub.cfg"), pinned[0] if pinned else ""),
        "grub_mtime": mtime("boot/grub/grub.cfg"),
        "stamp_mtime": mtime(stamp.lstrip("/")),
        "initrds": {path: [status.st_mtime, status.st_size] for path, status in initrds.items()},
        "kernels": list(kernels()),
        "boot_free_bytes": boot.f_bavail * boot.f_frsize,
        "boot_partitions": list(boot_partitions()),
        "iommus": sorted(os.path.basename(path) for path in glob("sys/class/iommu/*")),
        "firmware_iommu": [name for name in tables if os.path.exists(f"sys/firmware/acpi/tables/{name}")],
        "pci": [function(folder) for folder in sorted(glob("sys/bus/pci/devices/*"))],
        "modules_loaded": sorted(line.split()[0] for line in word_list("proc/modules")),
        "modules_configured": modules_configured(),
        "parameters": {
            path.replace("/parameters/", "."): word(f"sys/module/{path}")
            for path in PARAMETERS
            if os.path.exists(f"sys/module/{path}")
        },
        "hugepages": {first(r"hugepages-(\d+)kB", path) or "": int(word(path) or 0) for path in sorted(pages)},
        "guests": list(guests()),
        "shut_down_guests": [int(vmid) for vmid in word(shut_down.lstrip("/")).split(",") if vmid.isdigit()],
        "files": {path: own_file(path.lstrip("/")) for path in files},
        "kept": kept(VERSIONS),
    }


if __name__ == "__main__":
    answer(read)
