# SPDX-License-Identifier: MIT
"""How a node boots: the kernel's command line, the vfio modules, and the boot loader and initramfs made from them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import files, step
from operations.files import File
from operations.hypervisor import facts
from operations.hypervisor.devices import Wanted
from operations.hypervisor.facts import GRUB_SNIPPET, KERNEL_CMDLINE, MODPROBE, MODULES_LOAD, STAMP, NodeState

PASSTHROUGH_MODE = "iommu=pt"
#: From 6.8 on the PVE kernel turns Intel's IOMMU on by itself, as every kernel does AMD's (PVE manual).
INTEL_ON = "intel_iommu=on"
_ON_BY_DEFAULT = (6, 8)


class Loader(Enum):
    GRUB = "GRUB"
    SYSTEMD_BOOT = "systemd-boot"


@dataclass(frozen=True)
class Pending:
    """What has to happen on disk: files to write, an initramfs and boot loader entries to make from them."""

    loader: Loader
    files: dict[str, File | None]
    initramfs: bool
    entries: bool

    def __bool__(self) -> bool:
        return bool(self.files) or self.initramfs or self.entries


def boot_loader(name: str, state: NodeState) -> Loader:
    """The boot loader that really started the node `name`.

    That /etc/kernel/cmdline exists proves nothing: a ZFS installation that boots GRUB through shim has it too. So
    the loader's own EFI variable is asked, then the firmware's current entry, then proxmox-boot-tool.

    Raises:
        GpulabError: nothing tells.
    """
    if not state.efi_directory or "not supported" in (state.efibootmgr or ""):
        return Loader.GRUB
    entry = _current_entry(state.efibootmgr or "")
    for words in (state.loader_info or "", entry):
        if "systemd-boot" in words.lower():
            return Loader.SYSTEMD_BOOT
        if re.search(r"\bgrub|\\shim|\\grub", words.lower()):
            return Loader.GRUB
    if not state.boot_tool_managed:
        # Installations on ext4, xfs or LVM have GRUB and no partitions under proxmox-boot-tool.
        return Loader.GRUB
    partitions = re.findall(r"configured with: (.*)", state.boot_tool_status or "")
    # Its word for systemd-boot is `uefi`. A partition can be made for both.
    kinds = {kind for line in partitions for kind in re.findall(r"\b(uefi|grub)\b", line)}
    if len(kinds) == 1:
        return Loader.SYSTEMD_BOOT if kinds == {"uefi"} else Loader.GRUB
    raise GpulabError(
        f"{name}: cannot tell which boot loader started it",
        f"The firmware's current entry: {entry or 'none'}; proxmox-boot-tool: {state.boot_tool_status or 'no answer'}.",
        "`efibootmgr -v` should name systemd-bootx64.efi, grubx64.efi or shimx64.efi: boot through such an entry once",
    )


def _current_entry(output: str) -> str:
    """The line of the entry that `BootCurrent` names in efibootmgr's output, or nothing."""
    number = re.search(r"^BootCurrent:\s*([0-9A-Fa-f]{4})", output, re.MULTILINE)
    if number is None:
        return ""
    line = re.search(rf"^Boot{number[1]}\*?\s.*", output, re.MULTILINE)
    return line[0] if line else ""


def command_line_words(state: NodeState, wanted: Wanted) -> list[str]:
    """The words of ours that the kernel's command line must have."""
    words = []
    version = re.match(r"(\d+)\.(\d+)", state.kernel)
    kernel = (int(version[1]), int(version[2])) if version else (0, 0)
    if state.cpu_vendor == "GenuineIntel" and kernel < _ON_BY_DEFAULT:
        words.append(INTEL_ON)
    if wanted.iommu_pt:
        words.append(PASSTHROUGH_MODE)
    return words


def edit_command_line(line: str, add: Iterable[str], drop: Iterable[str] = ()) -> str:
    """The command line as one line, with the words of `add` and without those of `drop`; all others are kept.

    A line that is right already stays as it is, odd spacing included.
    """
    wanted = list(dict.fromkeys(add))
    dropped = set(drop) - set(wanted)
    # A quoted value may hold spaces: module.option="a b".
    words = re.findall(r'(?:[^\s"]|"[^"\n]*"|")+', line)
    kept = [word for word in words if word not in dropped]
    added = [word for word in wanted if word not in kept]
    if kept == words and not added and len(line.splitlines()) == 1:
        return line
    return " ".join([*kept, *added]) + "\n"


def wanted_files(name: str, state: NodeState, wanted: Wanted) -> dict[str, File | None]:
    """Every file of ours that the node `name` boots from.

    Raises:
        GpulabError: the boot loader is unknown, or its command line could not boot.
    """
    words = command_line_words(state, wanted)
    result: dict[str, File | None] = {
        MODULES_LOAD: File(files.render("hypervisor/modules-load.d/gpulab-vfio.conf.j2")),
        MODPROBE: File(
            files.render("hypervisor/modprobe.d/gpulab-vfio.conf.j2", ids=wanted.ids, blacklist=wanted.blacklist)
        ),
    }
    if boot_loader(name, state) is Loader.GRUB:
        result[GRUB_SNIPPET] = File(files.render("hypervisor/default/grub.d/gpulab.cfg.j2", words=words))
    else:
        entry = state.files.get(KERNEL_CMDLINE)
        result[KERNEL_CMDLINE] = File(
            _kernel_cmdline(name, state, words), entry["mode"] if entry is not None else 0o644
        )
    return result


def _kernel_cmdline(name: str, state: NodeState, words: list[str]) -> str:
    current = files.content_of(state.files, KERNEL_CMDLINE)
    if current is None:
        # proxmox-boot-tool falls back to the running command line, whose first words are the loader's own.
        loaders_own = [word for word in state.words if word.startswith(("initrd=", "BOOT_IMAGE="))]
        current = edit_command_line(state.cmdline, [], loaders_own)
    # An `intel_iommu=on` that is no longer needed does no harm and may be the user's.
    drop = [PASSTHROUGH_MODE] if PASSTHROUGH_MODE not in words else []
    line = edit_command_line(current, words, drop)
    if not any(word.startswith("root=") for word in line.split()):
        raise GpulabError(
            f"{name}: {KERNEL_CMDLINE} names no root file system",
            f"Expected a word root=…, found: {line.strip()}",
            "write the line that the node boots with (see /proc/cmdline) into it",
        )
    return line


def pending(name: str, state: NodeState, wanted: Wanted) -> Pending:
    """What has to be written and made anew. From times alone, so that a run killed in between is finished later.

    Raises:
        GpulabError: as `wanted_files()`.
    """
    changing = files.differing(state.files, wanted_files(name, state, wanted))
    loader = boot_loader(name, state)
    source = GRUB_SNIPPET if loader is Loader.GRUB else KERNEL_CMDLINE
    stamp = state.stamp_mtime or 0.0
    # An initrd that update-initramfs no longer looks after stays old for ever: the stamp speaks for it.
    initramfs_made = max(stamp, min((entry[0] for entry in state.initrds.values()), default=0.0))
    entries_made = max(stamp, (state.grub_mtime or 0.0) if loader is Loader.GRUB else 0.0)
    modules = (MODULES_LOAD, MODPROBE)
    initramfs = any(path in changing for path in modules) or files.newest(state.files, modules) > initramfs_made
    entries = source in changing or files.newest(state.files, [source]) > entries_made
    # systemd-boot starts the kernel from copies on the EFI partitions, the initramfs included.
    return Pending(loader, changing, initramfs, entries or (initramfs and loader is Loader.SYSTEMD_BOOT))


@step.step
def boot_configuration(wanted: Wanted) -> step.Commands:
    """
    Ensure the node's own boot files: modules, vfio ids, blacklist, kernel command line.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    """
    state = facts.read()
    changing = pending(host.name, state, wanted).files
    if not changing:
        step.noop("modules, vfio ids and kernel command line are as declared")
        return
    files.record(state.files, changing)
    yield files.write(changing)


@step.step
def refresh_boot(wanted: Wanted) -> step.Commands:
    """
    Make initramfs and boot loader configuration anew when they are older than the files they are made from.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    """
    state = facts.read()
    due = pending(host.name, state, wanted)
    commands = []
    if due.initramfs:
        commands.append("update-initramfs -u -k all")
    if due.entries:
        commands.append("update-grub" if due.loader is Loader.GRUB else "proxmox-boot-tool refresh")
    if not commands:
        step.noop("initramfs and boot loader are newer than their sources")
        return
    for command in commands:
        step.changes(command)
    # The stamp carries the time before the work: a file that changes meanwhile is found newer.
    before = [f"mkdir -p {STAMP.rpartition('/')[0]}", f"touch {STAMP}.new"]
    script = "\n".join(["set -e", *before, *commands, f"mv {STAMP}.new {STAMP}"])
    yield StringCommand("sh", "-c", QuoteString(script))
