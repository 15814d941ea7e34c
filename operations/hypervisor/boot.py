# SPDX-License-Identifier: MIT
"""From the files that a node boots from to its next boot: write them, then make initramfs and boot loader anew."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand

from operations import files, step
from operations.files import File
from operations.hypervisor import facts, goal
from operations.hypervisor.devices import Wanted
from operations.hypervisor.facts import GRUB_SNIPPET, IN_INITRAMFS, KERNEL_CMDLINE, KERNEL_PIN, STAMP, NodeState
from operations.hypervisor.goal import Goal, Loader, boot_loader


@dataclass(frozen=True)
class Pending:
    """What has to happen on disk: files to write, an initramfs and boot loader entries to make from them."""

    loader: Loader
    files: Mapping[str, File | None]
    initramfs: bool
    entries: bool
    pin: bool = False

    def __bool__(self) -> bool:
        return bool(self.files) or self.initramfs or self.entries


def pending(name: str, state: NodeState, aim: Goal) -> Pending:
    """What has to be written and made anew. From times alone, so that a run killed in between is finished later.

    Raises:
        GpulabError: the boot loader is unknown.
    """
    changing = files.differing(found_files(state), aim.files)
    loader = boot_loader(name, state)
    sources = [GRUB_SNIPPET if loader.is_grub else KERNEL_CMDLINE, KERNEL_PIN]
    stamp = state.stamp_mtime or 0.0
    # An initrd that update-initramfs no longer looks after stays old for ever: the stamp speaks for it.
    initramfs_made = max(stamp, min((entry[0] for entry in state.initrds.values()), default=0.0))
    entries_made = max(stamp, (state.grub_mtime or 0.0) if loader.is_grub else 0.0)
    initramfs = any(path in changing for path in IN_INITRAMFS) or _newest(state, IN_INITRAMFS) > initramfs_made
    entries = any(path in changing for path in sources) or _newest(state, sources) > entries_made
    # PVE's tool writes its note once more, and GRUB's configuration after it.
    pin = KERNEL_PIN in changing or (KERNEL_PIN in aim.files and _newest(state, [KERNEL_PIN]) > entries_made)
    # What proxmox-boot-tool looks after is started from copies on the EFI partitions, the initramfs included.
    return Pending(loader, changing, initramfs, entries or (initramfs and state.boot_tool_managed), pin)


def found_files(state: NodeState) -> dict[str, Mapping[str, Any] | None]:
    """Every file that gpulab may write here or ever wrote, as it is."""
    return {path: kept["current"] for path, kept in state.kept.items()} | dict(state.files)


def _newest(state: NodeState, paths: Iterable[str]) -> float:
    """When those files were written last. A file that was removed leaves only the time of its kept versions."""
    paths = list(paths)
    removed = [kept["touched"] for path in paths if (kept := state.kept.get(path)) is not None]
    return max([files.newest(state.files, paths), *removed])


@step.step
def boot_configuration(wanted: Wanted) -> step.Commands:
    """
    Ensure the node's own boot files: modules, the script that binds the devices, kernel command line, pinned kernel.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    """
    state = facts.read()
    changing = pending(host.name, state, goal.of(host.name, state, wanted)).files
    if not changing:
        step.noop("modules, binding script and kernel command line are as declared")
        return
    files.record(found_files(state), changing)
    yield files.write(changing)


@step.step
def refresh_boot(wanted: Wanted | None) -> step.Commands:
    """
    Make initramfs and boot loader configuration anew when they are older than the files they are made from.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`; None: as before gpulab
    """
    state = facts.read()
    aim = goal.of(host.name, state, wanted)
    commands = refresh_commands(state, aim, pending(host.name, state, aim))
    if not commands:
        step.noop("initramfs and boot loader are newer than their sources")
        return
    for command in commands:
        step.changes(command)
    # The stamp carries the time before the work: a file that changes meanwhile is found newer.
    before = [f"mkdir -p {STAMP.rpartition('/')[0]}", f"touch {STAMP}.new"]
    script = "\n".join(["set -e", *before, *commands, f"mv {STAMP}.new {STAMP}"])
    yield StringCommand("sh", "-c", QuoteString(script))


def refresh_commands(state: NodeState, aim: Goal, due: Pending) -> list[str]:
    """The commands that bring the files into the next boot."""
    commands = []
    if due.initramfs:
        commands.append("update-initramfs -u -k all")
    if due.pin and not state.boot_tool_managed:
        # It sets GRUB's default entry and runs update-grub; on EFI partitions its note and a refresh do the same.
        pin = aim.files[KERNEL_PIN]
        kernel = pin.content.split()[0] if pin is not None and pin.content.split() else None
        commands.append(f"proxmox-boot-tool kernel {f'pin {shlex.quote(kernel)}' if kernel else 'unpin'}")
    if due.entries and due.loader.is_grub:
        commands.append("update-grub")
    if due.entries and state.boot_tool_managed:
        commands.append("proxmox-boot-tool refresh")
    return commands
