# SPDX-License-Identifier: MIT
"""What a node shall boot with: as declared, or as it was before gpulab. Pure: no host is asked here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from inventory import GpulabError
from operations import files
from operations.files import File
from operations.hypervisor import edit
from operations.hypervisor.devices import Device, Wanted, located
from operations.hypervisor.facts import (
    BIND_SCRIPT,
    GRUB_SNIPPET,
    INITRAMFS_HOOK,
    KERNEL_CMDLINE,
    KERNEL_PIN,
    MODPROBE,
    MODULES_LOAD,
    HostedGuest,
    NodeState,
)

PASSTHROUGH_MODE = "iommu=pt"
#: From 6.8 on the PVE kernel turns Intel's IOMMU on by itself, as every kernel does AMD's (PVE manual).
INTEL_ON = "intel_iommu=on"
_ON_BY_DEFAULT = (6, 8)


class Loader(Enum):
    """What started the node. The shim loads GRUB; GRUB is configured alike in all three."""

    GRUB_BIOS = "GRUB (BIOS)"
    GRUB_UEFI = "GRUB (UEFI)"
    SHIM = "GRUB (UEFI, through shim)"
    SYSTEMD_BOOT = "systemd-boot"

    @property
    def is_grub(self) -> bool:
        return self is not Loader.SYSTEMD_BOOT


@dataclass(frozen=True)
class Goal:
    """What a node shall boot with.

    `files`: path to content, None: absent. `phrases`: words of ours on the kernel's command line. `slots`: the devices
    of vfio-pci. `parameters`: `module.parameter` to value. `kernel`: None: whichever is due.
    """

    files: Mapping[str, File | None]
    phrases: list[str] = field(default_factory=list)
    slots: list[str] = field(default_factory=list)
    parameters: Mapping[str, str] = field(default_factory=dict)
    kernel: str | None = None


def of(name: str, state: NodeState, wanted: Wanted | None) -> Goal:
    """As declared, or as before gpulab when nothing is wanted.

    Raises:
        GpulabError: as `as_declared()` and `devices.located()`.
    """
    return as_before(state) if wanted is None else as_declared(name, state, located(name, state, wanted))


def boot_loader(name: str, state: NodeState) -> Loader:
    """The boot loader that really started the node `name`.

    That /etc/kernel/cmdline exists proves nothing: a ZFS installation that boots GRUB through shim has it too. So
    the loader's own EFI variable is asked, then the firmware's current entry, then proxmox-boot-tool.

    Raises:
        GpulabError: nothing tells.
    """
    if not state.efi_directory or "not supported" in (state.efibootmgr or ""):
        return Loader.GRUB_BIOS
    entry = _current_entry(state.efibootmgr or "")
    for words in ((state.loader_info or "").lower(), entry.lower()):
        if "systemd-boot" in words:
            return Loader.SYSTEMD_BOOT
        if re.search(r"\bgrub|\\grub|\\shim", words):
            # GRUB names itself and not the shim that loaded it.
            return Loader.SHIM if "\\shim" in entry.lower() else Loader.GRUB_UEFI
    if not state.boot_tool_managed:
        # Installations on ext4, xfs or LVM have GRUB and no partitions under proxmox-boot-tool.
        return Loader.GRUB_UEFI
    partitions = re.findall(r"configured with: (.*)", state.boot_tool_status or "")
    # Its word for systemd-boot is `uefi`. A partition can be made for both.
    kinds = {kind for line in partitions for kind in re.findall(r"\b(uefi|grub)\b", line)}
    if len(kinds) == 1:
        return Loader.SYSTEMD_BOOT if kinds == {"uefi"} else Loader.GRUB_UEFI
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


def next_kernel(state: NodeState, wanted: Wanted | None = None) -> str:
    """The kernel that the node will boot: the declared one, the pinned one, or the newest."""
    if wanted is not None and wanted.kernel:
        return wanted.kernel
    if pinned := _pinned(state):
        return pinned
    versions = [kernel.version for kernel in state.kernels] or [state.kernel]
    return max(versions, key=_by_version)


def _pinned(state: NodeState) -> str | None:
    """The kernel that is pinned once a pin of ours is gone."""
    file = _pin_before(state) if _pin_is_ours(state) else files.kept_file(state.files.get(KERNEL_PIN))
    words = file.content.split() if file is not None else []
    return words[0] if words else None


def _pin_is_ours(state: NodeState) -> bool:
    kept = state.kept.get(KERNEL_PIN)
    return kept is not None and any(_same(kept["current"], one) for one in kept["written"])


def _pin_before(state: NodeState) -> File | None:
    return files.kept_file(state.kept[KERNEL_PIN]["original"])


def _by_version(version: str) -> list[tuple[int, str]]:
    # As `sort --version-sort`, for the names that kernels have.
    return [(int(number or 0), rest) for number, rest in re.findall(r"(\d*)(\D*)", version)]


def phrases(state: NodeState, wanted: Wanted) -> list[str]:
    """The words of ours that the kernel's command line must have; those of one phrase stand next to each other."""
    found = []
    version = re.match(r"(\d+)\.(\d+)", next_kernel(state, wanted))
    kernel = (int(version[1]), int(version[2])) if version else (0, 0)
    if state.cpu_vendor == "GenuineIntel" and kernel < _ON_BY_DEFAULT:
        found.append(INTEL_ON)
    if wanted.iommu_pt:
        found.append(PASSTHROUGH_MODE)
    if wanted.pcie_acs_override:
        found.append(f"pcie_acs_override={wanted.pcie_acs_override}")
    if wanted.initcall_blacklist:
        found.append(f"initcall_blacklist={','.join(wanted.initcall_blacklist)}")
    if wanted.hugepages:
        size, count = wanted.hugepages
        found.append(f"hugepagesz={size} hugepages={count}")
    return found


def as_declared(name: str, state: NodeState, wanted: Wanted) -> Goal:
    """What the node `name` shall boot with. `wanted`: its devices located.

    Raises:
        GpulabError: the boot loader is unknown, or its command line could not boot.
    """
    ours = phrases(state, wanted)
    parameters = {}
    if wanted.disable_idle_d3:
        parameters["vfio_pci.disable_idle_d3"] = "Y"
    if wanted.allow_unsafe_interrupts:
        parameters["vfio_iommu_type1.allow_unsafe_interrupts"] = "Y"
    return Goal(
        files=_files(name, state, wanted, ours, parameters),
        phrases=ours,
        slots=[device.address for device in wanted.devices],
        parameters=parameters,
        kernel=wanted.kernel,
    )


def _files(
    name: str, state: NodeState, wanted: Wanted, ours: list[str], parameters: Mapping[str, str]
) -> dict[str, File | None]:
    bound = [_script_entry(state, device) for device in wanted.devices]
    options = [f"options {key.replace('.', ' ')}=1" for key in parameters]
    statements = [*options, *(f"blacklist {module}" for module in wanted.blacklist)]
    result: dict[str, File | None] = {
        MODULES_LOAD: File(files.render("hypervisor/modules-load.d/gpulab-vfio.conf.j2")),
        MODPROBE: File(files.render("hypervisor/modprobe.d/gpulab-vfio.conf.j2", statements=statements))
        if statements
        else None,
        INITRAMFS_HOOK: File(files.render("hypervisor/initramfs-tools/hooks/gpulab-vfio.j2"), 0o755),
        BIND_SCRIPT: File(
            files.render("hypervisor/initramfs-tools/scripts/init-top/gpulab-vfio.j2", devices=bound), 0o755
        ),
    }
    if boot_loader(name, state).is_grub:
        snippet = File(files.render("hypervisor/default/grub.d/gpulab.cfg.j2", words=ours)) if ours else None
        result[GRUB_SNIPPET] = snippet
    else:
        entry = state.files.get(KERNEL_CMDLINE)
        mode = entry["mode"] if entry is not None else 0o644
        result[KERNEL_CMDLINE] = File(_kernel_cmdline(name, state, ours), mode)
    if wanted.kernel:
        result[KERNEL_PIN] = File(wanted.kernel + "\n")
    elif _pin_is_ours(state):
        result[KERNEL_PIN] = _pin_before(state)
    return result


def _script_entry(state: NodeState, device: Device) -> dict[str, object]:
    return {
        "name": device.name,
        "address": device.address,
        "allow_shared_group": device.allow_shared_group,
        "functions": [{"address": each.address, "id": each.id} for each in state.functions_of(device.address)],
    }


def _same(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    return one is not None and other is not None and one["content"] == other["content"]


def _kernel_cmdline(name: str, state: NodeState, ours: list[str]) -> str:
    current = files.content_of(state.files, KERNEL_CMDLINE)
    if current is None:
        # proxmox-boot-tool falls back to the running command line, whose first words are the loader's own.
        loaders_own = [word for word in state.words if word.startswith(("initrd=", "BOOT_IMAGE="))]
        current = edit.edit_command_line(state.cmdline, [], loaders_own)
    ever = words_ever(state)
    declared = {word for phrase in ours for word in phrase.split()}
    line = current
    if set(ever) & set(edit.words_of(current)) - declared or not all(
        edit.holds(edit.words_of(current), phrase) for phrase in ours
    ):
        line = edit.edit_command_line(edit.edit_command_line(current, [], ever), ours)
    if not any(word.startswith("root=") for word in line.split()):
        raise GpulabError(
            f"{name}: {KERNEL_CMDLINE} names no root file system",
            f"Expected a word root=…, found: {line.strip()}",
            "write the line that the node boots with (see /proc/cmdline) into it",
        )
    return line


def words_ever(state: NodeState) -> list[str]:
    """The words that gpulab ever put on this node's command line, and that were not there before it did."""
    found: list[str] = []
    for path, words in ((GRUB_SNIPPET, edit.grub_words), (KERNEL_CMDLINE, edit.words_of)):
        if (kept := state.kept.get(path)) is not None:
            found += _added(kept, words)
    return list(dict.fromkeys(found))


def _added(kept: Mapping[str, Any], words: Callable[[str], list[str]]) -> list[str]:
    """What each write brought beside what it found: what somebody added between two of them is not ours."""
    pairs = zip(kept["found"], kept["written"], strict=True)
    texts = [(files.text_of(before) or "", files.text_of(after) or "") for before, after in pairs]
    original = words(files.text_of(kept["original"]) or "")
    return [
        word for before, after in texts for word in words(after) if word not in words(before) and word not in original
    ]


def slots_ever(state: NodeState) -> set[str]:
    """The devices that gpulab ever gave to vfio-pci on this node."""
    kept = state.kept.get(BIND_SCRIPT, {"written": []})
    written = "\n".join(files.text_of(one) or "" for one in kept["written"])
    return {address.rpartition(".")[0] for address in re.findall(r"^\s*give (\S+)$", written, re.MULTILINE)}


def as_before(state: NodeState) -> Goal:
    """Every file that gpulab wrote or edited as it was before, unless it was changed by hand since.

    Of such a file only our words go. A script of ours is one piece: changed or not, it goes as a whole. What a guest
    still uses stays.
    """
    used = still_used(state)
    return Goal(
        files={path: _before(path, kept) for path, kept in state.kept.items() if path not in used},
        kernel=next_kernel(state) if KERNEL_PIN in state.kept else None,
    )


def still_used(state: NodeState) -> dict[str, HostedGuest]:
    """The files of ours that stay because a guest names them in `cicustom`: without its snippet a VM does not start."""
    return {
        path: guest
        for path, kept in state.kept.items()
        for guest in state.guests
        if kept["current"] is not None
        and any(path.endswith("/" + volume.partition(":")[2]) for volume in guest.uses_snippet)
    }


def by_hand(state: NodeState) -> list[str]:
    """The files that somebody changed after gpulab wrote them."""
    return [path for path, kept in state.kept.items() if _changed_by_hand(path, kept)]


def _changed_by_hand(path: str, kept: Mapping[str, Any]) -> bool:
    current, written = kept["current"], kept["written"]
    if path == KERNEL_CMDLINE and any(
        not _same(after, before) and not _same(earlier, before)
        for after, earlier, before in zip(written, kept["found"], kept["found"][1:], strict=False)
    ):
        # Between two writes; a file that is edited keeps such a change, one that is all ours has lost it by then.
        return True
    return current is not None and not any(_same(current, one) for one in [kept["original"], *written])


def _before(path: str, kept: Mapping[str, Any]) -> File | None:
    current, original = files.kept_file(kept["current"]), files.kept_file(kept["original"])
    if current is None and kept["written"][-1:] != [None]:
        # Somebody removed it: there is nothing of ours in it.
        return None
    if current is None or not _changed_by_hand(path, kept):
        return original
    written = next((text for one in reversed(kept["written"]) if (text := files.text_of(one)) is not None), "")
    if path in (BIND_SCRIPT, INITRAMFS_HOOK):
        return original
    if path == KERNEL_PIN:
        return current
    if path == KERNEL_CMDLINE:
        ours = _added(kept, edit.words_of)
        left = edit.edit_command_line(current.content, [], ours) if ours else current.content
    elif path == GRUB_SNIPPET:
        left = edit.grub_without(current.content, written)
    elif path == MODPROBE:
        left = edit.modprobe_without(current.content, written)
    else:
        left = edit.lines_without(current.content, written)
    return None if original is None and not left.strip() else File(left, current.mode)
