# SPDX-License-Identifier: MIT
"""The node's reboot: only when what runs is not what was configured, only when that helps, once, and without guests."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from pyinfra import context, host
from pyinfra.api import Host, StringCommand

from inventory import GpulabError
from operations import step
from operations.facts import python
from operations.hypervisor import boot, edit, facts, goal
from operations.hypervisor.boot import Pending
from operations.hypervisor.devices import VFIO, Wanted
from operations.hypervisor.facts import GRUB_SNIPPET, KERNEL_CMDLINE, SHUT_DOWN, NodeState
from operations.hypervisor.goal import Goal, Loader
from operations.reboot import reboot_and_wait
from operations.remote import program

#: What to do about a node that does not come back.
CONSOLE = (
    "look at its console (docs/hypervisor.md, 'A node that does not come back'): `gpulab_vfio=off` on the kernel's "
    "command line boots it with its own drivers. If it only needs longer, raise `reboot_timeout_s`"
)


#: Two nodes of a cluster that are down at once may cost its quorum.
_one_at_a_time: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def differences(state: NodeState, aim: Goal, due: Pending) -> list[str]:
    """What runs otherwise than configured; empty when nothing does."""
    return [
        *(f"{phrase} is not on the running command line" for phrase in missing_phrases(state, aim)),
        *(f"{word} is still on the running command line" for word in _stale_words(state, aim, due)),
        *_drivers(state, aim),
        *_parameters(state, aim),
        *([f"kernel {state.kernel} runs, not {aim.kernel}"] if aim.kernel not in (None, state.kernel) else []),
    ]


def missing_phrases(state: NodeState, aim: Goal) -> list[str]:
    """The words of ours that the running kernel was booted without."""
    return [phrase for phrase in aim.phrases if not edit.holds(state.words, phrase)]


def _stale_words(state: NodeState, aim: Goal, due: Pending) -> list[str]:
    """Words that gpulab once configured, that still run, and that the next boot will not have."""
    coming = configured_words(state, aim, due)
    return [word for word in goal.words_ever(state) if word in state.words and word not in coming]


def configured_words(state: NodeState, aim: Goal, due: Pending) -> list[str]:
    """The kernel command line of the next boot, what is still due included."""
    declared = [word for phrase in aim.phrases for word in phrase.split()]
    if due.loader is Loader.SYSTEMD_BOOT:
        file = aim.files.get(KERNEL_CMDLINE)
        return edit.words_of(file.content) if file is not None else state.words
    if state.grub_cmdline is not None and not due.entries:
        return state.grub_cmdline.split()
    # Where GRUB's configuration cannot be read, the next boot is this one with what is declared.
    configured = (state.grub_cmdline or state.cmdline).split()
    ever = set(goal.words_ever(state))
    return [word for word in configured if word not in ever] + declared


def _drivers(state: NodeState, aim: Goal) -> Iterator[str]:
    given_before = goal.slots_ever(state)
    for function in state.pci:
        if function.slot in aim.slots and function.driver != VFIO:
            yield f"{function.address} is bound to {function.driver or 'no driver'}, not to {VFIO}"
        if function.slot not in aim.slots and function.slot in given_before and function.driver_override == VFIO:
            yield f"{function.address} is still given to {VFIO}"


def _parameters(state: NodeState, aim: Goal) -> Iterator[str]:
    for parameter, value in aim.parameters.items():
        found = state.parameters.get(parameter)
        if found != value:
            yield f"{parameter} is {found or 'not loaded'}, not {value}"


def configured_since_boot(state: NodeState) -> bool:
    """Was something that the next boot uses made after this boot? Otherwise a reboot would change nothing."""
    made = [entry[0] for entry in state.initrds.values()]
    made += [moment for moment in (state.grub_mtime, state.stamp_mtime) if moment is not None]
    return max(made, default=0.0) > state.boot_time


def needed(state: NodeState, aim: Goal, due: Pending) -> list[str]:
    """Why the node has to be rebooted; empty when it has not, or when that would not help."""
    return differences(state, aim, due) if due or configured_since_boot(state) else []


def not_allowed(name: str, why: list[str]) -> GpulabError:
    """What the run ends with when a reboot waits for its admin."""
    return GpulabError(
        f"{name} needs a reboot: {'; '.join(why)}; allow_reboot is false",
        "",
        "reboot it when it suits you and deploy again, or set `allow_reboot`; its guests wait until then",
    )


def guests_problem(name: str, state: NodeState, why: list[str], allow_guest_shutdown: bool) -> GpulabError | None:
    """Would the reboot cut off guests that may not be?"""
    running = [
        f"{guest}{' with ' + ', '.join(guest.devices) if guest.devices else ''}" for guest in state.running_guests
    ]
    if not running or allow_guest_shutdown:
        return None
    return GpulabError(
        f"{name} needs a reboot: {'; '.join(why)}; it would cut off {', '.join(running)}",
        "Expected no running guest.",
        "shut them down or move them to another node, or set `allow_guest_shutdown`: they are then shut down in "
        "PVE's order and started again",
    )


def unapplied(name: str, state: NodeState, aim: Goal, due: Pending) -> GpulabError | None:
    """Words of ours that update-grub left out: the new boot would be like this one."""
    # proxmox-boot-tool's grub.cfg lies on partitions that are not mounted.
    if not due.loader.is_grub or state.boot_tool_managed or state.grub_cmdline is None:
        return None
    lacking = [phrase for phrase in aim.phrases if not edit.holds(state.grub_cmdline.split(), phrase)]
    if not lacking:
        return None
    return GpulabError(
        f"{name}: update-grub left {' '.join(lacking)} out of /boot/grub/grub.cfg",
        f"Its linux line: {state.grub_cmdline}",
        f"a file after {GRUB_SNIPPET} sets GRUB_CMDLINE_LINUX_DEFAULT anew: append to the variable there",
    )


@step.step
def reboot(
    wanted: Wanted | None,
    allowed: bool,
    timeout_s: int,
    allow_guest_shutdown: bool = False,
    guest_shutdown_timeout_s: int = 180,
    cluster: str = "",
) -> step.Commands:
    """
    Reboot the node when what runs differs from what is configured, and wait until it is back.

    Nodes of one cluster go one after the other. Guests that were shut down for it are started again.

    + wanted: the node's devices and boot settings, see `hypervisor.wanted()`; None: as before gpulab
    + allowed: may it be rebooted?
    + timeout_s: seconds until SSH must answer again
    + allow_guest_shutdown: may running guests be shut down for it?
    + guest_shutdown_timeout_s: seconds that each guest gets for its shutdown
    + cluster: the node's cluster
    """
    state = facts.read()
    name = host.name
    aim = goal.of(name, state, wanted)
    due = boot.pending(name, state, aim)
    why = needed(state, aim, due)
    if not why:
        step.noop(
            "booted with this configuration already; another reboot would not change what differs"
            if differences(state, aim, due)
            else "it runs as configured"
        )
        return
    planning = not context.state.is_executing
    error = None if allowed else not_allowed(name, why)
    error = error or guests_problem(name, state, why, allow_guest_shutdown)
    if not due:
        error = error or unapplied(name, state, aim, due)
    elif not planning:
        error = GpulabError(f"{name}: its boot configuration is not in place", "Expected nothing left to write.")
    if error is None:
        running = [guest.vmid for guest in state.running_guests]
        step.reboots("; ".join(why))
        if running:
            told = ", ".join(str(guest) for guest in state.running_guests)
            step.changes(f"shut down for the reboot and start again: {told}")
        guests = _Guests(running, guest_shutdown_timeout_s)
        yield step.call(_restart, context.ctx_host.get(), cluster, state.boot_id, timeout_s, guests)
    elif due and planning:
        # The configuration is written first: whoever reboots the node by hand then finds it in force.
        step.waits(error.brief, tuple(str(error).splitlines()[1:]))
        yield step.call(_refuse, error)
    else:
        raise error


@dataclass(frozen=True)
class _Guests:
    """Who is shut down for a reboot, and the seconds that each gets for it."""

    running: list[int]
    timeout_s: int

    @property
    def stop(self) -> StringCommand:
        argument = {"root": "/", "note": SHUT_DOWN, "stop": self.running, "timeout_s": self.timeout_s}
        return python(_PROGRAM, argument)

    @property
    def start(self) -> StringCommand:
        return python(_PROGRAM, {"root": "/", "note": SHUT_DOWN, "start": self.running})


_PROGRAM = program(__file__, "guests")


def _restart(host: Host, cluster: str, boot_id: str, timeout_s: float, guests: _Guests) -> None:
    with _one_at_a_time[cluster or host.name]:
        if guests.running:
            _on_node(host, guests.stop, "its guests are not shut down")
        reboot_and_wait(host, boot_id, timeout_s, CONSOLE)
        if guests.running:
            _on_node(host, guests.start, "its guests are not all back")


def _on_node(host: Host, command: StringCommand, failure: str) -> None:
    done, output = host.run_shell_command(command, print_output=False, print_input=False)
    if not done:
        said = [line for line in output.stderr.splitlines() if line.strip()]
        raise GpulabError(f"{host.name}: {failure}: {said[-1] if said else 'no word why'}", "\n".join(said[-20:-1]))


@step.step
def guests_back() -> step.Commands:
    """Start the guests again that a run shut down for a reboot and was killed before it could start them."""
    waiting = facts.read().shut_down_guests
    if not waiting:
        step.noop("no guest waits for the end of a reboot")
        return
    step.changes(f"start again: {', '.join(str(vmid) for vmid in waiting)}")
    yield _Guests(list(waiting), 0).start


def _refuse(error: GpulabError) -> None:
    raise error
