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

#: Where modprobe looks, the strongest folder first: a file hides those of the same name in later folders.
MODPROBE_FOLDERS = (
    "etc/modprobe.d",
    "run/modprobe.d",
    "usr/local/lib/modprobe.d",
    "usr/lib/modprobe.d",
    "lib/modprobe.d",
)
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
    kernel = booted_kernel(cmdline) or word(root / "proc/sys/kernel/osrelease") or ""
    version = output(["pveversion"]) if root == Path("/") else ""
    return {
        "pve_version": version.strip(),
        "cmdline": cmdline,
        "kernel": kernel,
        "iommus": names(root / "sys/class/iommu"),
        "groups": names(root / "sys/kernel/iommu_groups"),
        "devices": {path.name: device(path) for path in entries(root / "sys/bus/pci/devices")},
        "modprobe": effective(modprobe_files(root)),
        "initramfs": initramfs(root / f"boot/initrd.img-{kernel}"),
        "simulated": ["pveversion"] if "simulated" in version.lower() else [],
    }


def booted_kernel(cmdline: str) -> str:
    """The release of the booted kernel, from what the boot loader loaded; empty when it does not say."""
    found = re.search(r"(?:vmlinuz|initrd\.img)-([^\s\\/]+)", cmdline)
    return found[1] if found else ""


def device(path: Path) -> dict[str, Any]:
    """One PCI function: ids as `10de:24b0`, None for what it does not have."""
    ids = [(word(path / name) or "").removeprefix("0x") for name in ("vendor", "device")]
    return {
        "id": ":".join(ids),
        "driver": link(path / "driver"),
        "group": link(path / "iommu_group"),
        # A PCI bridge has buses of its own; it stays with the host.
        "bridge": (path / "pci_bus").exists() or (word(path / "class") or "").startswith("0x0604"),
    }


def modprobe_files(root: Path) -> dict[str, str]:
    """The texts that modprobe would read, by file name."""
    files: dict[str, str] = {}
    for folder in MODPROBE_FOLDERS:
        for path in entries(root / folder):
            if path.suffix == ".conf" and path.name not in files:
                files[path.name] = path.read_text(errors="replace")
    return files


def effective(files: dict[str, str]) -> dict[str, Any]:
    """What modprobe's files come to: the ids that vfio-pci takes and the blacklisted modules.

    Files are read in the order of their names. Options of a module add up; of a parameter given twice the kernel
    takes the last.
    """
    ids: list[str] = []
    blacklist: set[str] = set()
    for name in sorted(files):
        for line in re.sub(r"\\\n", " ", files[name]).splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "blacklist":
                blacklist.add(words[1].replace("-", "_"))
            if len(words) >= 3 and words[0] == "options" and words[1].replace("-", "_") == "vfio_pci":
                for option in words[2:]:
                    if option.startswith("ids="):
                        ids = [value.lower() for value in option.removeprefix("ids=").strip('"').split(",")]
    return {"vfio_ids": ids, "blacklist": sorted(blacklist)}


def initramfs(path: Path) -> dict[str, Any]:
    """What modprobe's files inside an initramfs come to, or `error`."""
    files: dict[str, str] = {}
    try:
        found = dict(initramfs_files(path))
        for folder in MODPROBE_FOLDERS:
            for name, text in found.items():
                if Path(name).parent.as_posix() == folder:
                    files.setdefault(Path(name).name, text)
    except (OSError, ValueError, tarfile.TarError) as error:
        return {"path": str(path), "error": str(error)}
    return {"path": str(path), **effective(files)}


def initramfs_files(path: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each modprobe file in an initramfs: plain archives first, one packed one last."""
    with open(path, "rb") as file:
        while True:
            start = skip_padding(file)
            if start.startswith(b"07070"):
                yield from cpio_files(file)
                continue
            break
        if not start:
            return
        tool = next((tool for magic, tool in COMPRESSIONS.items() if start.startswith(magic)), None)
        if tool is None:
            yield from tar_files(file)
            return
        # The child reads the descriptor, which stands further on than Python's buffer does.
        os.lseek(file.fileno(), file.tell(), os.SEEK_SET)
        with subprocess.Popen([tool, "-dc"], stdin=file, stdout=subprocess.PIPE) as unpacked:
            stream = io.BufferedReader(unpacked.stdout, 2**20)  # type: ignore[type-var]
            if stream.peek(6)[:5] == b"07070":
                yield from cpio_files(stream)
            else:
                yield from tar_files(stream)
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


def is_modprobe_file(name: str) -> bool:
    """Is a member of an archive (`./etc/modprobe.d/x.conf`) one that modprobe reads?"""
    path = Path(name)
    return path.parent.as_posix() in MODPROBE_FOLDERS and path.suffix == ".conf"


def cpio_files(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """The modprobe files in one archive of the kind `newc`; the stream then stands behind it."""
    while True:
        header = stream.read(110)
        if not header.startswith(b"07070") or len(header) < 110:
            raise ValueError("not a cpio archive")
        fields = [int(header[6 + 8 * number : 14 + 8 * number], 16) for number in range(13)]
        size, name_size = fields[6], fields[11]
        name = stream.read(name_size + -(110 + name_size) % 4)[: name_size - 1].decode(errors="replace")
        if name == "TRAILER!!!":
            return
        padding = -size % 4
        if is_modprobe_file(name):
            yield Path(name).as_posix(), stream.read(size + padding)[:size].decode(errors="replace")
            continue
        left = size + padding
        while left > 0:
            chunk = stream.read(min(left, 2**20))
            if not chunk:
                raise ValueError("the archive ends in the middle of a file")
            left -= len(chunk)


def tar_files(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """The same for a tar archive."""
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            content = archive.extractfile(member) if is_modprobe_file(member.name) else None
            if content:
                yield Path(member.name).as_posix(), content.read().decode(errors="replace")


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
