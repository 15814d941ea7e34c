# SPDX-License-Identifier: MIT
"""The two ends of a node's preparation: can it be done, and is it so?"""

from __future__ import annotations

from pyinfra import context, host

from inventory import GpulabError
from operations import step
from operations.hypervisor import boot, facts
from operations.hypervisor.boot import INTEL_ON, Pending
from operations.hypervisor.devices import Wanted, group_problems, identity_problems, refuse, unbound
from operations.hypervisor.facts import MODPROBE, NodeState
from operations.hypervisor.restart import needed

SUPPORTED_PVE = ("8", "9")
_OFF = ("iommu=off", "intel_iommu=off", "amd_iommu=off")
_MIB = 1024 * 1024
#: What update-initramfs needs beside the new image: its compressor's and dpkg's small change.
_SPARE_BYTES = 16 * _MIB


def host_problems(name: str, state: NodeState) -> list[GpulabError]:
    """Is it a Proxmox VE host that this package knows?"""
    if state.pve_version is None:
        return [
            GpulabError(
                f"{name}: not a Proxmox VE host",
                "Expected the package pve-manager.",
                "its `ssh_hostname` must be a node's",
            )
        ]
    problems = []
    if state.pve_version.split(".")[0] not in SUPPORTED_PVE:
        problems.append(
            GpulabError(f"{name}: Proxmox VE {state.pve_version}", f"Expected {' or '.join(SUPPORTED_PVE)}.")
        )
    if state.machine != "x86_64":
        problems.append(GpulabError(f"{name}: a {state.machine} machine", "Expected x86_64."))
    return problems


def iommu_problem(name: str, state: NodeState, wanted: Wanted) -> GpulabError | None:
    """Is the IOMMU on, or about to be with the words that are still missing on the command line?"""
    words = boot.command_line_words(state, wanted)
    if state.iommu or (INTEL_ON in words and INTEL_ON not in state.words):
        return None
    off = [word for word in state.words if word in _OFF]
    return GpulabError(
        f"{name}: the IOMMU is off",
        "Expected entries in /sys/class/iommu, found none.",
        f"take {' '.join(off)} off the kernel command line"
        if off
        else "turn VT-d (Intel) or AMD-Vi, also called IOMMU (AMD), on in the firmware setup",
    )


def space_problem(name: str, state: NodeState, due: Pending) -> GpulabError | None:
    """Can a new initramfs be written beside the old one?"""
    need = max((entry[1] for entry in state.initrds.values()), default=0) + _SPARE_BYTES
    if not due.initramfs or state.boot_free_bytes >= need:
        return None
    return GpulabError(
        f"{name}: /boot has {state.boot_free_bytes // _MIB} MiB free",
        f"Expected {need // _MIB} MiB for a new initramfs.",
        "remove old kernels: apt autoremove --purge",
    )


def running_problems(name: str, state: NodeState, wanted: Wanted) -> list[GpulabError]:
    """What differs though the node was booted with its configuration."""
    problems = [
        GpulabError(
            f"{name}: booted without {word}",
            f"/proc/cmdline: {state.cmdline}",
            f"it is configured for {boot.boot_loader(name, state).value}: see `efibootmgr -v` and "
            "`proxmox-boot-tool status` for what really boots, and whether an older kernel was chosen",
        )
        for word in boot.command_line_words(state, wanted)
        if word not in state.words
    ]
    problems += [
        GpulabError(
            f"{name}: {function.address} is bound to {function.driver or 'no driver'}",
            f"Expected vfio-pci, as {MODPROBE} says since before this boot.",
            f"`dmesg | grep {function.address}` shows who claimed it first: add that driver to `blacklist`; "
            "was it bound by hand, reboot the node",
        )
        for function in unbound(state, wanted)
    ]
    return problems


@step.step
def preflight(wanted: Wanted) -> step.Commands:
    """
    Refuse a node that cannot hand over its devices, before anything is changed. Changes nothing.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    """
    state = facts.read()
    name = host.name
    refuse(host_problems(name, state), name)
    refuse(identity_problems(name, state, wanted), name)
    problems = group_problems(name, state, wanted)
    due = boot.pending(name, state, wanted)
    problems += [found for found in (iommu_problem(name, state, wanted), space_problem(name, state, due)) if found]
    refuse(problems, name)
    step.noop(f"PVE {state.pve_version}, {_count(wanted)} as declared" + ("" if state.iommu else "; IOMMU still off"))
    yield from ()


@step.step
def ready(wanted: Wanted) -> step.Commands:
    """
    Refuse to go on unless the node's devices are in vfio-pci's hands, in groups of their own. Changes nothing.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    """
    state = facts.read()
    name = host.name
    if not context.state.is_executing and needed(state, wanted, boot.pending(name, state, wanted)):
        step.noop("looked at after the reboot")
        return
    iommu = iommu_problem(name, state, wanted)
    problems = [iommu] if iommu else []
    problems += identity_problems(name, state, wanted)
    problems += running_problems(name, state, wanted)
    problems += group_problems(name, state, wanted)
    refuse(problems, name)
    step.noop(f"{_count(wanted)} bound to vfio-pci, isolated")
    yield from ()


def _count(wanted: Wanted) -> str:
    number = len(wanted.devices)
    return f"{number} device" + ("" if number == 1 else "s")
