# SPDX-License-Identifier: MIT
"""Runs on the node, as root, with the standard library alone: prints what is there as JSON and changes nothing."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from verify.grub import grub_entry

#: Where modprobe looks, the strongest folder first: a file hides those of the same name in later folders.
MODPROBE_FOLDERS = (
    "etc/modprobe.d",
    "run/modprobe.d",
    "usr/local/lib/modprobe.d",
    "usr/lib/modprobe.d",
    "lib/modprobe.d",
)
PARAMETERS = ("vfio_pci.disable_idle_d3", "vfio_iommu_type1.allow_unsafe_interrupts")
#: proxmox-boot-tool's notes of the kernel that is to boot, the stronger one first.
PINS = ("etc/kernel/next-boot-pin", "etc/kernel/proxmox-boot-pin")
#: vfio-pci as a file of modules or as a line about one; not vfio-pci-core.
VFIO_PCI = r"vfio[-_]pci(?![-\w])"
#: A function's address and the id that is expected there, side by side.
CLAIM = re.compile(r"\b([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\s+([0-9a-f]{4}:[0-9a-f]{4})\b")
#: What an initramfs runs before udev loads any driver.
EARLY_SCRIPTS = "scripts/init-top"
#: First bytes of a compressed initramfs, and what unpacks it.
COMPRESSIONS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x04\x22\x4d\x18": "lz4",
    b"BZh": "bzip2",
}


def observe(root: Path) -> dict[str, Any]:
    """The node below `root`."""
    cmdline = word(root / "proc/cmdline") or ""
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", word(root / "proc/cpuinfo") or "", re.MULTILINE)
    version = output(["pveversion"]) if root == Path("/") else ""
    return {
        "pve_version": version.strip(),
        "cmdline": cmdline,
        "kernel": booted_kernel(cmdline) or word(root / "proc/sys/kernel/osrelease") or "",
        "cpu": vendor[1] if vendor else None,
        "iommus": names(root / "sys/class/iommu"),
        "groups": {path.name: word(path / "type") for path in entries(root / "sys/kernel/iommu_groups")},
        "devices": {path.name: device(path) for path in entries(root / "sys/bus/pci/devices")},
        # A part of the kernel has no `initstate`.
        "modules": [path.name for path in entries(root / "sys/module") if (path / "initstate").exists()],
        "parameters": {name: parameter(root, name) for name in PARAMETERS},
        "hugepages": hugepages(root),
        "modprobe": effective(modprobe_files(root)),
        "next_boot": next_boot(root, cmdline),
        "simulated": ["pveversion"] if "simulated" in version.lower() else [],
    }


def booted_kernel(cmdline: str) -> str:
    """The release of the booted kernel, from what the boot loader loaded; empty when it does not say."""
    found = re.search(r"(?:vmlinuz|initrd\.img)-([^\s\\/]+)", cmdline)
    return found[1] if found else ""


def device(path: Path) -> dict[str, Any]:
    """One PCI function: ids as `10de:24b0`, class and subclass as `0300`, None for what it does not have."""
    ids = [(word(path / name) or "").removeprefix("0x") for name in ("vendor", "device")]
    class_ = (word(path / "class") or "").removeprefix("0x")[:4]
    resets = word(path / "reset_method")
    return {
        "id": ":".join(ids),
        "class": class_,
        "driver": link(path / "driver"),
        "group": link(path / "iommu_group"),
        # A bridge stays with the host. One between PCI buses has buses of its own; 0600 is a host bridge.
        "bridge": (path / "pci_bus").exists() or class_ in ("0600", "0604"),
        "reset_methods": None if resets is None else resets.split(),
    }


def parameter(root: Path, name: str) -> str | None:
    """The value of a loaded module's parameter; None: not loaded, or it has none of that name."""
    module, _, key = name.partition(".")
    return word(root / "sys/module" / module / "parameters" / key)


def hugepages(root: Path) -> dict[str, int]:
    """Size in KiB to the number of huge pages of that size."""
    found = {}
    for path in entries(root / "sys/kernel/mm/hugepages"):
        size, number = re.fullmatch(r"hugepages-(\d+)kB", path.name), word(path / "nr_hugepages")
        if size and number:
            found[size[1]] = int(number)
    return found


def next_boot(root: Path, cmdline: str) -> dict[str, Any]:
    """What the next boot will load: kernel, command line and initramfs.

    Where GRUB reads /boot, the default entry of its grub.cfg decides. Copies on EFI partitions that proxmox-boot-tool
    looks after are not read: what they are made from stands in for them.
    """
    entry, words, source = None, word(root / "etc/kernel/cmdline"), "/etc/kernel/cmdline"
    copied = (root / "etc/kernel/proxmox-boot-uuids").exists()
    config = word(root / "boot/grub/grub.cfg")
    if "BOOT_IMAGE=" in cmdline or (config and "initrd=" not in cmdline):
        environment = word(root / "boot/grub/grubenv") or ""
        entry = None if copied else grub_entry(config or "", environment)
        words = entry["words"] if entry else grub_settings(root)
        source = "/boot/grub/grub.cfg" if entry else "/etc/default/grub"
    elif words is None:
        # What proxmox-boot-tool falls back to.
        words, source = cmdline, "/proc/cmdline"
    pins = [(pinned.split()[0], f"/{path}") for path in PINS if (pinned := word(root / path))]
    kernel, by = installed_kernel(root), "the newest kernel in /boot"
    if entry:
        kernel, by = entry["kernel"], source
    elif pins:
        kernel, by = pins[0]
    return {
        "kernel": kernel,
        "by": by,
        "pinned": pins[0][0] if pins else None,
        "installed": kernel is not None and (root / f"boot/vmlinuz-{kernel}").exists(),
        "vfio": vfio_pci(root / f"usr/lib/modules/{kernel}"),
        "cmdline": words,
        "cmdline_source": source,
        "copied": copied,
        "initramfs": initramfs(root / f"boot/initrd.img-{kernel}"),
    }


def installed_kernel(root: Path) -> str | None:
    """The newest kernel in /boot."""
    found = [path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*")]
    whole = [name for name in found if not re.search(r"\.(old|bak|dpkg-\w+)$", name)]
    return max(whole, default=None, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


def vfio_pci(folder: Path) -> str | None:
    """How the kernel with that folder of modules has vfio-pci: `module`, `built in`, or not at all."""
    for list_, how in (("modules.builtin", "built in"), ("modules.dep", "module")):
        if re.search(rf"^\S*/{VFIO_PCI}", word(folder / list_) or "", re.MULTILINE):
            return how
    return None


def grub_settings(root: Path) -> str:
    """The words that update-grub would give every entry."""
    read = '. "$1/etc/default/grub"; for file in "$1"/etc/default/grub.d/*.cfg; do [ ! -e "$file" ] || . "$file"; done'
    say = 'echo "$GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"'
    return output(["sh", "-c", f"{read}; {say}", "sh", str(root).rstrip("/")]).strip()


def modprobe_files(root: Path) -> dict[str, str]:
    """The texts that modprobe would read, by file name."""
    files: dict[str, str] = {}
    for folder in MODPROBE_FOLDERS:
        for path in entries(root / folder):
            if path.suffix == ".conf" and path.name not in files:
                files[path.name] = path.read_text(errors="replace")
    return files


def effective(files: dict[str, str]) -> dict[str, Any]:
    """What modprobe's files come to: the parameters of each module and the blacklisted modules.

    Files are read in the order of their names. Options of a module add up; of a parameter given twice the kernel
    takes the last.
    """
    options: dict[str, dict[str, str]] = {}
    blacklist: set[str] = set()
    for name in sorted(files):
        for line in re.sub(r"\\\n", " ", files[name]).splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "blacklist":
                blacklist.add(words[1].replace("-", "_"))
            if len(words) >= 3 and words[0] == "options":
                for option in words[2:]:
                    key, _, value = option.partition("=")
                    options.setdefault(words[1].replace("-", "_"), {})[key] = value.strip('"')
    return {"options": options, "blacklist": sorted(blacklist)}


def initramfs(path: Path) -> dict[str, Any]:
    """What an initramfs does about vfio-pci, or `error`. `missing`: there is no such file.

    `claims`: function address to id, as scripts name them that run before udev and know vfio-pci.
    """
    texts: dict[str, str] = {}
    vfio = False
    try:
        for name, text in initramfs_members(path):
            if text is not None:
                texts[name] = text
            elif re.search(VFIO_PCI, name):
                vfio = True
    except (OSError, ValueError, tarfile.TarError) as error:
        return {"path": str(path), "error": str(error), "missing": isinstance(error, FileNotFoundError)}
    files: dict[str, str] = {}
    for folder in MODPROBE_FOLDERS:
        for name, text in texts.items():
            if Path(name).parent.as_posix() == folder:
                files.setdefault(Path(name).name, text)
    return {"path": str(path), "vfio": vfio, "claims": claims(texts), **effective(files)}


def claims(texts: dict[str, str]) -> dict[str, str]:
    """The functions that the scripts of an initramfs give to vfio-pci, with the ids that they expect there."""
    # initramfs-tools runs what this file names; a script that is not executable is not in it.
    order = texts.get(f"{EARLY_SCRIPTS}/ORDER")
    found: dict[str, str] = {}
    for name, text in texts.items():
        folder, _, script = name.rpartition("/")
        runs = order is None or re.search(rf"/{re.escape(script)}(\s|$)", order, re.MULTILINE)
        if folder == EARLY_SCRIPTS and script != "ORDER" and "vfio-pci" in text and runs:
            commands = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
            found |= dict(CLAIM.findall("\n".join(commands)))
    return found


def initramfs_members(path: Path) -> Iterator[tuple[str, str | None]]:
    """Path of each file in an initramfs: plain archives first, one packed one last. Text: of those that are judged.

    Debian 13 puts the microcode into a first archive, modules that are compressed themselves into a second one, and
    packs all the rest.
    """
    with open(path, "rb") as file:
        while True:
            start = skip_padding(file)
            if start.startswith(b"07070"):
                yield from cpio_members(file)
                continue
            break
        if not start:
            return
        tool = next((tool for magic, tool in COMPRESSIONS.items() if start.startswith(magic)), None)
        if tool is None:
            yield from tar_members(file)
            return
        # The child reads the descriptor, which stands further on than Python's buffer does.
        os.lseek(file.fileno(), file.tell(), os.SEEK_SET)
        with subprocess.Popen([tool, "-dc"], stdin=file, stdout=subprocess.PIPE) as unpacked:
            stream = io.BufferedReader(unpacked.stdout, 2**20)  # type: ignore[type-var]
            if stream.peek(6)[:5] == b"07070":
                yield from cpio_members(stream)
            else:
                yield from tar_members(stream)
            # The tool would die of a closed pipe.
            while stream.read(2**20):
                pass
        if unpacked.returncode not in (0, 2):  # zstd and gzip: 2 is a warning about what follows the archive
            raise ValueError(f"{tool} ended with status {unpacked.returncode}")


def skip_padding(file: IO[bytes]) -> bytes:
    """Move to the next archive and return its first bytes, empty at the end of the file."""
    while True:
        position = file.tell()
        chunk = file.read(512)
        rest = chunk.lstrip(b"\0")
        if rest or not chunk:
            position += len(chunk) - len(rest)
            file.seek(position)
            start = file.read(6)
            file.seek(position)
            return start


def judged(name: str) -> bool:
    """Is a member of an archive one that modprobe reads, or a script that runs before udev?"""
    path = Path(name)
    folder = path.parent.as_posix()
    return folder == EARLY_SCRIPTS or (folder in MODPROBE_FOLDERS and path.suffix == ".conf")


def cpio_members(stream: IO[bytes]) -> Iterator[tuple[str, str | None]]:
    """The members of one archive of the kind `newc`; the stream then stands behind it."""
    while True:
        header = stream.read(110)
        if not header.startswith(b"07070") or len(header) < 110:
            raise ValueError("not a cpio archive")
        fields = [int(header[6 + 8 * number : 14 + 8 * number], 16) for number in range(13)]
        size, name_size = fields[6], fields[11]
        name = stream.read(name_size + -(110 + name_size) % 4)[: name_size - 1].decode(errors="replace")
        if name == "TRAILER!!!":
            return
        left, kept = size + -size % 4, []
        while left > 0:
            chunk = stream.read(min(left, 2**20))
            if not chunk:
                raise ValueError("the archive ends in the middle of a file")
            left -= len(chunk)
            if judged(name):
                kept.append(chunk)
        yield Path(name).as_posix(), b"".join(kept)[:size].decode(errors="replace") if judged(name) else None


def tar_members(stream: IO[bytes]) -> Iterator[tuple[str, str | None]]:
    """The same for a tar archive."""
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            content = archive.extractfile(member) if judged(member.name) else None
            yield Path(member.name).as_posix(), content.read().decode(errors="replace") if content else None


def word(path: Path) -> str | None:
    """A file's text without white space around it; None: no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def link(path: Path) -> str | None:
    """Where a link points to, its last part; None: no such link."""
    return os.path.basename(os.path.realpath(path)) if path.exists() else None


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; empty when there is no such folder."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def names(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return [path.name for path in entries(folder)]


def output(command: list[str]) -> str:
    """What a command prints; empty when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    json.dump(observe(Path("/")), sys.stdout)
