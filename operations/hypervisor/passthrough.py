# SPDX-License-Identifier: MIT
"""The two ends of a node's preparation: can it be done, and is it so?"""

from __future__ import annotations

from pyinfra import context, host

from inventory import GpulabError
from operations import step
from operations.hypervisor import boot, facts, goal, restart
from operations.hypervisor.boot import Pending
from operations.hypervisor.devices import (
    Wanted,
    group_problems,
    identity_problems,
    located,
    refuse,
    reset_problems,
    unbound,
)
from operations.hypervisor.facts import BIND_SCRIPT, NodeState
from operations.hypervisor.goal import INTEL_ON, Goal

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


def preflight_problems(
    name: str,
    state: NodeState,
    wanted: Wanted,
    guests_mib: int = 0,
    allow_reboot: bool = True,
    allow_guest_shutdown: bool = False,
) -> list[GpulabError]:
    """All that is known to be wrong before anything has changed. `wanted`: its devices located.

    What only a running IOMMU shows (group members) is looked at again by the script that binds, before it does.

    Raises:
        GpulabError: the boot loader is unknown, or its command line could not boot.
    """
    aim = goal.as_declared(name, state, wanted)
    due = boot.pending(name, state, aim)
    problems = group_problems(name, state, wanted)
    problems += [
        problem
        for problem in (iommu_problem(name, state, aim), memory_problem(name, state, wanted, guests_mib))
        if problem
    ]
    problems += space_problems(name, state, due) + kernel_problems(name, state, wanted)
    why = restart.needed(state, aim, due)
    if why and allow_reboot and (problem := restart.guests_problem(name, state, why, allow_guest_shutdown)):
        problems.append(problem)
    return problems


def iommu_problem(name: str, state: NodeState, aim: Goal) -> GpulabError | None:
    """Is the IOMMU on, or about to be with the words that are still missing on the command line?"""
    if state.iommu:
        return None
    off = [word for word in state.words if word in _OFF]
    if not off and state.firmware_iommu and INTEL_ON in aim.phrases and INTEL_ON not in state.words:
        return None
    if off:
        found, remedy = f"The command line has {' '.join(off)}.", f"take {' '.join(off)} off the kernel command line"
    elif state.firmware_iommu:
        found = f"The firmware describes one ({', '.join(state.firmware_iommu)}) that the kernel does not use."
        remedy = "`dmesg | grep -e DMAR -e IOMMU -e AMD-Vi` says why; a newer firmware often helps"
    else:
        found = "The firmware describes none: no ACPI table DMAR (Intel) or IVRS (AMD)."
        remedy = "turn VT-d (Intel) or AMD-Vi, also called IOMMU (AMD), on in the firmware setup"
    return GpulabError(f"{name}: the IOMMU is off", found, remedy)


def memory_problem(name: str, state: NodeState, wanted: Wanted, guests_mib: int) -> GpulabError | None:
    """Does the node keep its headroom beside its guests and its huge pages?"""
    left = state.memory_mib - wanted.headroom_mib
    asked = {"its guests": guests_mib, "hugepages": wanted.hugepages_mib}
    too_much = {what: mib for what, mib in asked.items() if mib > left}
    if not too_much:
        return None
    told = " and ".join(f"{mib} MiB for {what}" for what, mib in too_much.items())
    return GpulabError(
        f"{name}: {told} of {state.memory_mib} MiB leave less than the headroom of {wanted.headroom_mib} MiB",
        f"Expected at most {left} MiB: passthrough pins all of a guest's memory from its start.",
        "lower `memory_mib` of its guests, `hugepages` or `headroom_gib`",
    )


def space_problems(name: str, state: NodeState, due: Pending) -> list[GpulabError]:
    """Can a new initramfs be written beside the old one, in /boot and on each EFI partition?"""
    need = max((entry[1] for entry in state.initrds.values()), default=0) + _SPARE_BYTES
    if not due.initramfs:
        return []
    places = {"/boot": state.boot_free_bytes}
    for partition in state.boot_partitions:
        if partition.free_bytes is not None:
            places[f"the EFI partition {partition.name}"] = partition.free_bytes
    return [
        GpulabError(
            f"{name}: {place} has {free // _MIB} MiB free",
            f"Expected {need // _MIB} MiB for a new initramfs.",
            "remove old kernels: apt autoremove --purge",
        )
        for place, free in places.items()
        if free < need
    ]


def kernel_problems(name: str, state: NodeState, wanted: Wanted) -> list[GpulabError]:
    """Is the kernel of the next boot installed, with vfio-pci?"""
    version = goal.next_kernel(state, wanted)
    found = next((kernel for kernel in state.kernels if kernel.version == version), None)
    installed = ", ".join(kernel.version for kernel in state.kernels) or "none in /boot"
    if found is None:
        return [
            GpulabError(
                f"{name}: the next boot's kernel {version} is not installed",
                f"Installed: {installed}.",
                "correct `kernel` in the inventory, or install it: apt install proxmox-kernel-…"
                if wanted.kernel
                else "`proxmox-boot-tool kernel list` shows what is pinned",
            )
        ]
    if not found.vfio:
        return [
            GpulabError(
                f"{name}: the next boot's kernel {version} has no vfio-pci",
                f"Expected it among its modules. Installed: {installed}.",
                "apt install --reinstall the kernel's package, or name another one in `kernel`",
            )
        ]
    return []


def running_problems(name: str, state: NodeState, wanted: Wanted, aim: Goal) -> list[GpulabError]:
    """What differs though the node was booted with its configuration."""
    problems = [
        GpulabError(
            f"{name}: booted without {phrase}",
            f"/proc/cmdline: {state.cmdline}",
            f"it is configured for {goal.boot_loader(name, state).value}: see `efibootmgr -v` and "
            "`proxmox-boot-tool status` for what really boots, and whether an older kernel was chosen",
        )
        for phrase in restart.missing_phrases(state, aim)
    ]
    problems += [
        GpulabError(
            f"{name}: {function.address} is bound to {function.driver or 'no driver'}",
            f"Expected vfio-pci, as {BIND_SCRIPT} had it since before this boot.",
            "`dmesg | grep -e gpulab -e vfio` says why the host kept it; was it unbound by hand, reboot the node",
        )
        for function in unbound(state, wanted)
    ]
    problems += [
        GpulabError(f"{name}: {parameter} is {state.parameters.get(parameter, 'not there')}", f"Expected {value}.")
        for parameter, value in aim.parameters.items()
        if state.parameters.get(parameter) != value
    ]
    if aim.kernel is not None and state.kernel != aim.kernel:
        problems.append(
            GpulabError(
                f"{name}: runs kernel {state.kernel}",
                f"Expected {aim.kernel}, which is pinned.",
                "was another one chosen at the console? `proxmox-boot-tool kernel list` shows the pin",
            )
        )
    return problems + hugepages_problems(name, state, wanted)


def hugepages_problems(name: str, state: NodeState, wanted: Wanted) -> list[GpulabError]:
    """Did the kernel find the memory for all huge pages?"""
    if wanted.hugepages is None:
        return []
    size, count = wanted.hugepages
    found = state.hugepages.get({"2M": "2048", "1G": "1048576"}[size], 0)
    if found >= count:
        return []
    return [
        GpulabError(
            f"{name}: {found} huge pages of {size}",
            f"Expected {count}.",
            "the kernel found no more memory in one piece: lower `hugepages`, or add memory",
        )
    ]


@step.step
def preflight(
    wanted: Wanted, guests_mib: int = 0, allow_reboot: bool = True, allow_guest_shutdown: bool = False
) -> step.Commands:
    """
    Refuse a node that cannot hand over its devices, before anything is changed. Changes nothing.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    + guests_mib: memory of all guests that the inventory places on this node, MiB
    + allow_reboot: may it be rebooted?
    + allow_guest_shutdown: may running guests be shut down for that?
    """
    state = facts.read()
    name = host.name
    refuse(host_problems(name, state), name)
    found = located(name, state, wanted)
    refuse(identity_problems(name, state, found), name)
    refuse(preflight_problems(name, state, found, guests_mib, allow_reboot, allow_guest_shutdown), name)
    loader = goal.boot_loader(name, state).value
    told = f"PVE {state.pve_version}, {loader}, {_count(wanted)} as declared"
    step.noop(told if state.iommu else f"{told}; IOMMU still off: its groups are looked at after the reboot")
    yield from ()


@step.step
def ready(wanted: Wanted) -> step.Commands:
    """
    Refuse to go on unless the node runs as declared: command line, groups, drivers, reset methods. Changes nothing.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    """
    state = facts.read()
    name = host.name
    found = located(name, state, wanted)
    aim = goal.as_declared(name, state, found)
    if not context.state.is_executing and restart.needed(state, aim, boot.pending(name, state, aim)):
        step.noop("looked at after the reboot")
        return
    iommu = iommu_problem(name, state, aim)
    problems = [iommu] if iommu else []
    problems += identity_problems(name, state, found)
    problems += group_problems(name, state, found)
    problems += running_problems(name, state, found, aim)
    problems += reset_problems(name, state, found)
    refuse(problems, name)
    step.noop(f"{_count(wanted)} bound to vfio-pci, isolated")
    yield from ()


def _count(wanted: Wanted) -> str:
    number = len(wanted.devices)
    return f"{number} device" + ("" if number == 1 else "s")
