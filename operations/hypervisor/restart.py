# SPDX-License-Identifier: MIT
"""The node's reboot: only when the running kernel is not what was configured, and only when a reboot changes that."""

from __future__ import annotations

from pyinfra import context, host

from inventory import GpulabError
from operations import files, step
from operations.hypervisor import boot, facts
from operations.hypervisor.boot import PASSTHROUGH_MODE, Loader, Pending
from operations.hypervisor.devices import Wanted, unbound
from operations.hypervisor.facts import GRUB_SNIPPET, NodeState
from operations.reboot import reboot_and_wait

#: The tag of our VMs (operations.proxmox.config.TAG).
OWN_TAG = "gpulab"

#: What to do about a node that does not come back.
CONSOLE = (
    "look at its console; changed files have their previous version under /var/lib/gpulab/previous. "
    "If it only needs longer, raise `reboot_timeout_s`"
)


def differences(state: NodeState, wanted: Wanted, due: Pending) -> list[str]:
    """What runs otherwise than configured; empty when nothing does."""
    lacking = [word for word in boot.command_line_words(state, wanted) if word not in state.words]
    lines = [f"{word} is not on the running command line" for word in lacking]
    if not wanted.iommu_pt and PASSTHROUGH_MODE in state.words and not _stays(state, due):
        lines.append(f"{PASSTHROUGH_MODE} is still on the running command line")
    lines += [
        f"{function.address} is bound to {function.driver or 'no driver'}, not to vfio-pci"
        for function in unbound(state, wanted)
    ]
    return lines


def _stays(state: NodeState, due: Pending) -> bool:
    """Would `iommu=pt` be on the command line of the next boot, though it is not ours any more?"""
    if due.loader is Loader.SYSTEMD_BOOT:
        return False
    if due.entries:
        return PASSTHROUGH_MODE not in (files.content_of(state.files, GRUB_SNIPPET) or "")
    return PASSTHROUGH_MODE in (state.grub_cmdline or "").split()


def configured_since_boot(state: NodeState) -> bool:
    """Was something that the next boot uses made after this boot? Otherwise a reboot would change nothing."""
    made = [entry[0] for entry in state.initrds.values()]
    made += [moment for moment in (state.grub_mtime, state.stamp_mtime) if moment is not None]
    return max(made, default=0.0) > state.boot_time


def needed(state: NodeState, wanted: Wanted, due: Pending) -> list[str]:
    """Why the node has to be rebooted; empty when it has not, or when that would not help."""
    return differences(state, wanted, due) if due or configured_since_boot(state) else []


def obstacle(name: str, state: NodeState, why: list[str], allowed: bool) -> GpulabError | None:
    """What forbids the reboot of the node `name`."""
    reason = "; ".join(why)
    if not allowed:
        return GpulabError(
            f"{name} needs a reboot: {reason}; allow_reboot is false",
            "",
            "reboot it when it suits you and deploy again, or set `allow_reboot`; its guests wait until then",
        )
    others = [str(guest) for guest in state.guests if OWN_TAG not in guest.tags]
    if others:
        return GpulabError(
            f"{name} needs a reboot: {reason}; it runs guests that are not gpulab's: {', '.join(others)}",
            f"Expected only guests tagged {OWN_TAG} to be running.",
            "shut them down or move them to another node, then deploy again",
        )
    return None


def unapplied(name: str, state: NodeState, wanted: Wanted, due: Pending) -> GpulabError | None:
    """Words of ours that update-grub left out: the new boot would be like this one."""
    # proxmox-boot-tool's grub.cfg lies on partitions that are not mounted.
    if due.loader is not Loader.GRUB or state.boot_tool_managed or state.grub_cmdline is None:
        return None
    configured = state.grub_cmdline.split()
    lacking = [word for word in boot.command_line_words(state, wanted) if word not in configured]
    if not lacking:
        return None
    return GpulabError(
        f"{name}: update-grub left {' '.join(lacking)} out of /boot/grub/grub.cfg",
        f"Its linux line: {state.grub_cmdline}",
        f"a file after {GRUB_SNIPPET} sets GRUB_CMDLINE_LINUX_DEFAULT anew: append to the variable there",
    )


@step.step
def reboot(wanted: Wanted, allowed: bool, timeout_s: int) -> step.Commands:
    """
    Reboot the node when what runs differs from what is configured, and wait until it is back.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`
    + allowed: may it be rebooted?
    + timeout_s: seconds until SSH must answer again
    """
    state = facts.read()
    due = boot.pending(host.name, state, wanted)
    why = needed(state, wanted, due)
    if not why:
        step.noop(
            "booted with this configuration already; another reboot would not change what differs"
            if differences(state, wanted, due)
            else "it runs as configured"
        )
        return
    error = obstacle(host.name, state, why, allowed)
    if not due:
        error = error or unapplied(host.name, state, wanted, due)
    elif context.state.is_executing:
        error = GpulabError(f"{host.name}: its boot configuration is not in place", "Expected nothing left to write.")
    if error is None:
        step.reboots("; ".join(why))
        yield step.call(reboot_and_wait, context.ctx_host.get(), state.boot_id, timeout_s, CONSOLE)
    elif due and not context.state.is_executing:
        # The configuration is written first: whoever reboots the node by hand then finds it in force.
        step.waits(error.brief, tuple(str(error).splitlines()[1:]))
        yield step.call(_refuse, error)
    else:
        raise error


def _refuse(error: GpulabError) -> None:
    raise error
