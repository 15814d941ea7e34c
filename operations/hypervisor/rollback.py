# SPDX-License-Identifier: MIT
"""The way back: the node's files as they were before gpulab, then a boot without it."""

from __future__ import annotations

from pyinfra import context, host, logger
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import files, step
from operations.files import VERSIONS
from operations.hypervisor import boot, facts, goal
from operations.hypervisor.facts import STAMP, NodeState
from operations.hypervisor.goal import Goal
from operations.hypervisor.restart import differences, guests_problem, needed
from operations.plan import file_diff

#: Where the kept versions go when the node is as before: they may hold what somebody wrote by hand.
ASIDE = "/var/lib/gpulab/rolled-back"


@step.step
def restore(allowed: bool, allow_guest_shutdown: bool) -> step.Commands:
    """
    Ensure that every file that gpulab wrote or edited on the node is as it was before.

    Byte for byte, unless it was changed by hand since: then only our words go, and the difference is shown.

    + allowed: may the node be rebooted?
    + allow_guest_shutdown: may running guests be shut down for it?
    """
    state = facts.read()
    name = host.name
    if not state.kept:
        step.noop("no file of this node was written by gpulab")
        return
    aim = goal.as_before(state)
    due = boot.pending(name, state, aim)
    why = needed(state, aim, due)
    if why and allowed and (problem := guests_problem(name, state, why, allow_guest_shutdown)):
        raise problem
    if context.state.is_executing:
        for path, guest in goal.still_used(state).items():
            logger.warning(f"{host.print_prefix}{path} stays: {guest} names it in its cicustom")
    if not due.files:
        step.noop(f"{len(aim.files)} files are as before gpulab")
        return
    files.record(boot.found_files(state), due.files)
    if context.state.is_executing:
        _show_hand_made(state, aim)
    yield files.write(due.files, ours=False)


def _show_hand_made(state: NodeState, aim: Goal) -> None:
    for path in goal.by_hand(state):
        if path not in aim.files:
            continue
        current, kept = files.content_of(boot.found_files(state), path), aim.files[path]
        logger.warning(f"{host.print_prefix}{path} was changed by hand since gpulab wrote it; only gpulab's words go:")
        for line in file_diff(current, None if kept is None else kept.content):
            logger.warning(f"{host.print_prefix}    {line}")


@step.step
def restored() -> step.Commands:
    """Refuse to end unless the node runs as before gpulab; then put the kept versions aside."""
    state = facts.read()
    name = host.name
    if not state.kept:
        step.noop("nothing of gpulab's is kept on this node")
        return
    aim = goal.as_before(state)
    due = boot.pending(name, state, aim)
    if context.state.is_executing:
        left = [f"remains to be written: {path}" for path in due.files] + differences(state, aim, due)
        if left:
            raise GpulabError(f"{name}: not as before gpulab", "\n".join(left), "roll back again")
    if used := goal.still_used(state):
        step.noop(", ".join(f"{path} stays: {guest} names it in its cicustom" for path, guest in used.items()))
        return
    step.changes("put gpulab's kept versions aside", (f"{VERSIONS} -> {ASIDE}",))
    script = f"""set -e
mkdir -p {ASIDE}
mv {VERSIONS} {ASIDE}/$(date +%Y%m%dT%H%M%S)
rm -f {STAMP}"""
    yield StringCommand("sh", "-c", QuoteString(script))
