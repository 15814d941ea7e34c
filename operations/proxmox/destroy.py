# SPDX-License-Identifier: MIT
"""A guest's VM deleted and made anew, its data disks with a keeper VM meanwhile: `rebuild.py --data destroy=1`.

As in operations/proxmox/rebuild.py, each step reads what is there and does its part only where it is what comes next
(operations/proxmox/keeper.py), so a run that follows a killed one goes on where that one was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pyinfra import context, logger
from pyinfra.api import Host

import inventory
from inventory import GpulabError, Guest, Node
from operations import step
from operations.proxmox import backup, held, host_keys, keeper, machine, order, vm
from operations.proxmox import config as declared
from operations.proxmox.client import Client, InvalidParameter, NotFound
from operations.proxmox.keeper import Act, Next, Note, Situation
from operations.proxmox.node_shell import NodeShell
from operations.proxmox.order import Order, WayOn
from operations.proxmox.swap import Marker, Subject, data_disks, drives, holder, identity, marker, unused
from operations.proxmox.vm_state import VmState

#: How often the next part of a disk's way is looked for: a repair has four parts, each may have to be decided anew.
PARTS = 12
#: Seconds for the deletion of a VM with large disks.
DELETE_S = 600.0


# Reading.


def _keeper_guest(guest: Guest, vmid: int) -> Guest:
    """The guest under its keeper's id: what works on a VM by a guest's id then works on the keeper."""
    return guest.model_copy(update={"vmid": vmid})


def _situation(client: Client, guest: Guest, node: Node) -> Situation:
    found = machine.found(client, guest)
    if found is not None and found.lock in vm.CUT_OFF:
        found = None
    kept = held.find(client, guest)
    mark = marker(found.config) if found is not None else None
    debris = False
    if kept is not None:
        keeper_id = kept[0]
    elif found is None or (mark is not None and mark.made):
        keeper_id = mark.keeper if mark is not None else 0
        debris = bool(keeper_id) and _is_debris(client, guest, node, keeper_id)
    else:
        keeper_id = _free_id(client, guest, node, mark.keeper if mark is not None else 0)
    storages = {guest.disk_storage}
    noted = keeper.note(kept[1]) if kept is not None else None
    if noted is not None:
        storages |= {volid.partition(":")[0] for volid, _ in noted.disks.values()}
    for config in (found.config if found else {}, kept[1] if kept else {}):
        storages |= {volid.partition(":")[0] for volid in (*drives(config).values(), *unused(config).values())}
    sizes = machine.volumes(client, guest.vmid, storages)
    if keeper_id:
        sizes |= machine.volumes(client, keeper_id, storages)
    return Situation(
        vm=found.config if found is not None else None,
        running=found is not None and found.status == "running",
        keeper=kept[1] if kept is not None else None,
        keeper_id=keeper_id,
        sizes=sizes,
        debris=debris,
    )


def _is_debris(client: Client, guest: Guest, node: Node, vmid: int) -> bool:
    """Is the VM of that id no more than what a cut-off task of ours left of a keeper?"""
    left = vm.read_state(client, vmid)
    return left is not None and vm.is_leftover(client, _keeper_guest(guest, vmid), node, left)


def _free_id(client: Client, guest: Guest, node: Node, noted: int) -> int:
    """The id that the keeper will get. `noted`: the one that an earlier run had chosen; 0: none.

    Raises:
        GpulabError: the declared one is somebody else's.
    """
    taken = {int(item["vmid"]): item for item in client.get("cluster", "resources", type="vm")}
    for wanted in filter(None, (guest.keeper_vmid, noted)):
        if wanted not in taken:
            return wanted
        if taken[wanted].get("node") == node.name and _is_debris(client, guest, node, wanted):
            return wanted
        if wanted == guest.keeper_vmid:
            raise GpulabError(
                f"{guest.name}: keeper_vmid = {wanted}: VM {wanted} on {taken[wanted].get('node')} is not its keeper",
                f"Its name is {taken[wanted].get('name', '(none)')!r}; expected {keeper.name(guest)!r} with the tags "
                f"{declared.TAG} and {keeper.TAG}. Nothing was done.",
                "choose another keeper_vmid in the inventory, or leave it out: then the next free id is taken",
            )
    lab = inventory.of_run(context.ctx_state.get())
    reserved = {each.vmid for each in lab.guests.values()} | {each.keeper_vmid or 0 for each in lab.guests.values()}
    reserved |= {each.backup.spare_vmid for each in lab.guests.values() if each.backup is not None}
    vmid = int(client.get("cluster", "nextid"))
    while vmid in taken or vmid in reserved or not _is_free(client, vmid):
        vmid += 1
    return vmid


def _is_free(client: Client, vmid: int) -> bool:
    """The list above does not show VMs that the token may not see."""
    try:
        client.get("cluster", "nextid", vmid=vmid)
    except InvalidParameter:
        return False
    return True


def _next(now: Situation, guest: Guest, asked: Order) -> Next:
    return keeper.next_step(now, asked.run, guest.backup is not None)


def _ours(now: Situation, guest: Guest, asked: Order) -> None:
    """
    Raises:
        GpulabError: another run took over, or somebody removed our line.
    """
    for line in (now.mark, now.note):
        if line is not None and line.run != asked.run:
            raise machine.not_mine(guest, line.run)
    if now.vm is not None and now.mark is None:
        raise machine.not_mine(guest, "")


def _due(wanted: Next) -> tuple[bool, Guest, Node, Client, Order]:
    """Is this the next thing to do? With whom and what for.

    Raises:
        GpulabError: another run has taken over since this one marked the VM.
    """
    _, guest, node, client, asked = machine.here()
    now = _situation(client, guest, node)
    found = _next(now, guest, asked)
    if found is Next.MARK and wanted not in (Next.STOP, Next.MARK) and machine.executing():
        _ours(now, guest, asked)
    return found is wanted, guest, node, client, asked


def _say(guest: Guest, node: Node, asked: Order, now: Situation) -> None:
    """Once the old VM is gone, a failed step says what there is."""
    if not now.deleted:
        return
    if asked.way_on is None:
        asked.way_on = WayOn()
        context.ctx_state.get().add_callback_handler(asked.way_on)
    asked.way_on.lines = keeper.standing(guest, node, now, asked.lab)


# The steps of rebuild.py with destroy=1.


@step.step
def preflight() -> step.Commands:
    """
    Refuse what could not work, and show all of it in the plan.

    Takes the lock that keeps a second run away. Changes nothing.
    """
    _, guest, node, client, asked = machine.here()
    if machine.executing():
        order.lock(context.ctx_state.get(), guest, asked.run)
    now = _situation(client, guest, node)
    if now.vm is None and now.note is None:
        step.noop(f"there is no VM {guest.vmid}: it will be created")
        return
    runs = [line.run for line in (now.note, now.mark) if line is not None]
    asked.began = " ".join(runs)
    at_work = (now.note.run if now.note is not None else "") or holder(now.mark)
    others = [now.keeper_id] if now.keeper_id else []
    if tasks := machine.check_others(client, guest, node, asked, at_work, *others):
        step.changes(f"wait for {', '.join(str(item['type']) for item in tasks)} of a killed run")
        yield step.call(machine.await_tasks, client, [str(item["upid"]) for item in tasks])
        if machine.executing():
            now = _situation(client, guest, node)
    if machine.executing():
        _say(guest, node, asked, now)
    if now.keeper_id:
        vm.require_rights(client, guest, node, {f"/vms/{now.keeper_id}": keeper.RIGHTS})
    if wrong := _problems(client, guest, node, now):
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} cannot be destroyed and made anew: {wrong[0]}",
            "\n".join(f"  {line}" for line in [*wrong[1:], "Nothing was done."]),
        )
    subject_line, lines = keeper.plan(now, guest, node)
    step.changes(subject_line, lines)
    step.reboots("the VM is made anew")
    yield from ()


def _problems(client: Client, guest: Guest, node: Node, now: Situation) -> list[str]:
    if now.whole or (now.vm is not None and now.note is None and not now.made):
        found = machine.there(client, guest)
        subject = machine.subject(client, guest, node, found)
        if not machine.executing():
            # It is downloaded before anything is stopped.
            subject = replace(subject, image=True)
        return keeper.problems(subject, guest, node)
    locked = [
        f"{what} is locked ({config['lock']})"
        for what, config in (("it", now.vm or {}), (f"its keeper VM {now.keeper_id}", now.keeper or {}))
        if config.get("lock")
    ]
    if now.vm is None and now.note is not None:
        return locked + [f"with its keeper: {line}" for line in keeper.missing(now.keeper or {}, now.note, now.sizes)]
    return locked


@step.step
def stopped() -> step.Commands:
    """Shut the VM down; a guest that takes more than three minutes is switched off. Not one that is complete."""
    due, guest, _, client, asked = _due(Next.STOP)
    if not due:
        step.noop(f"{guest.name} does not have to be stopped")
        return
    yield step.call(_stop, client, guest, asked)


def _stop(client: Client, guest: Guest, asked: Order) -> None:
    found = machine.there(client, guest)
    mark = marker(found.config)
    if mark is not None and mark.archive and not mark.made:
        # It has run since that backup was taken.
        machine.write_mark(client, guest, lambda state: _forget_archive(state, guest, asked))
    machine.stop(client, guest)


def _forget_archive(state: VmState, guest: Guest, asked: Order) -> Marker | None:
    mark = marker(state.config)
    _may_take_over(guest, asked, mark.run if mark is not None else "")
    return replace(mark, archive="") if mark is not None else None


def _may_take_over(guest: Guest, asked: Order, run: str) -> None:
    """
    Raises:
        GpulabError: a line is of a run that was not there when this one began.
    """
    if run and run not in (asked.run, *asked.began.split()):
        raise machine.not_mine(guest, run)


@step.step
def marked() -> step.Commands:
    """Note in the VM, and in its keeper where there is one, which run is at work, and what must not get lost."""
    due, guest, node, client, asked = _due(Next.MARK)
    if not due:
        step.noop(f"VM {guest.vmid} is marked as this run's")
        return
    yield step.call(_mark, client, guest, node, asked)


def _mark(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    now = _situation(client, guest, node)
    _say(guest, node, asked, now)
    if now.vm is not None:

        def wanted(state: VmState) -> Marker:
            mark = marker(state.config)
            _may_take_over(guest, asked, mark.run if mark is not None else "")
            if (not now.made and now.note is None) or now.whole:
                return keeper.begun(Subject(state, sizes=now.sizes), asked.run, now.keeper_id)
            known = mark or Marker(archive=now.note.archive if now.note is not None else "")
            made = (known.made or int(time.time())) if now.made else 0
            return replace(known, run=asked.run, keeper=now.keeper_id or known.keeper, made=made)

        # A run that was killed may have left it without.
        machine.write_mark(client, guest, wanted, protection=1)
    if now.keeper is None:
        return
    now = _situation(client, guest, node)
    if now.whole:
        _write_note(client, guest, now, asked, lambda _: keeper.first_note(now, guest, asked.run))
    else:
        _write_note(client, guest, now, asked, lambda noted: replace(noted, run=asked.run))


def _write_note(client: Client, guest: Guest, now: Situation, asked: Order, wanted: Callable[[Note], Note]) -> None:
    def decide(state: VmState) -> Mapping[str, Any] | None:
        noted = keeper.note(state.config)
        if noted is None:
            raise machine.not_mine(guest, "")
        _may_take_over(guest, asked, noted.run)
        return machine.writing(state, keeper.described(state.config, wanted(noted)), protection=1)

    machine.change(client, _keeper_guest(guest, now.keeper_id), decide)


@step.step
def backed_up() -> step.Commands:
    """Take a backup of the stopped VM where a storage for it is declared; the archive is noted in the VM."""
    due, guest, node, client, asked = _due(Next.BACK_UP)
    if not due:
        step.noop("no backup is declared" if guest.backup is None else "nothing is there that is not backed up")
        return
    yield step.call(_back_up, client, guest, node, asked)


def _back_up(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    _ours(_situation(client, guest, node), guest, asked)
    machine.require_stopped(client, guest)
    archive = backup.back_up(client, guest, node)
    machine.write_mark(client, guest, lambda state: replace(machine.mine(state, guest, asked.run), archive=archive))
    logger.info(f"{guest.name}: backed up to {archive}")


@step.step
def keeper_made() -> step.Commands:
    """Make the keeper VM: 16 MiB, no network, protected, never started. The old VM's identity is noted in it."""
    due, guest, node, client, asked = _due(Next.KEEP)
    if not due:
        step.noop("the keeper VM is there, or no longer needed")
        return
    yield step.call(_make_keeper, client, guest, node, asked)


def _make_keeper(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    now = _situation(client, guest, node)
    _ours(now, guest, asked)
    machine.require_stopped(client, guest)
    noted = keeper.first_note(now, guest, asked.run)
    mark = now.mark
    if mark is None or (mark.uuid, mark.mac, mark.data) != (noted.uuid, noted.mac, noted.data):
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} is not as it was when it was marked",
            f"Marked: {mark.data if mark else 'nothing'}. Seen: {noted.data}. Nothing was moved.",
            "see in the node's task list who changed it, then run again",
        )
    shell = NodeShell(context.ctx_state.get(), node)
    vm.make(client, _keeper_guest(guest, now.keeper_id), node, shell, keeper.keeper_keys(guest, noted))


@step.step
def disks_away() -> step.Commands:
    """Move each data disk to the keeper."""
    due, guest, node, client, asked = _due(Next.MOVE_AWAY)
    if not due:
        step.noop(f"no data disk is with VM {guest.vmid}")
        return
    yield step.call(_move_all, client, guest, node, asked, True)


@step.step
def disks_back() -> step.Commands:
    """Move each data disk from the keeper to the new VM, to the key that it had, before the VM is first started."""
    due, guest, node, client, asked = _due(Next.MOVE_BACK)
    if not due:
        step.noop(f"VM {guest.vmid} has its data disks")
        return
    yield step.call(_move_all, client, guest, node, asked, False)


def _move_all(client: Client, guest: Guest, node: Node, asked: Order, away: bool) -> None:
    now = _situation(client, guest, node)
    _say(guest, node, asked, now)
    noted = now.note.disks if now.note is not None else {}
    for key in sorted({*noted, *data_disks((now.vm if away else now.keeper) or {})}):
        _move(client, guest, node, asked, key, away)
    now = _situation(client, guest, node)
    _say(guest, node, asked, now)


def _move(client: Client, guest: Guest, node: Node, asked: Order, key: str, away: bool) -> None:
    for _ in range(PARTS):
        now = _situation(client, guest, node)
        _ours(now, guest, asked)
        noted, old, kept = now.note, now.vm, now.keeper
        if noted is None or old is None or kept is None or (now.made is away and keeper.holds(kept)):
            raise GpulabError(
                f"{guest.name}: VM {guest.vmid} or its keeper VM {now.keeper_id} has changed while a disk was moved",
                "Nothing more was done.",
                "see in the node's task list who changed it, then run again",
            )
        ends = (guest, old), (_keeper_guest(guest, now.keeper_id), kept)
        (source, source_config), (target, target_config) = ends if away else ends[::-1]
        try:
            what = keeper.move(key, source_config, target_config, noted, now.sizes, target.vmid)
        except ValueError as error:
            raise GpulabError(
                f"{guest.name}: between VM {guest.vmid} and its keeper VM {now.keeper_id} on {node.name}: {error}",
                "Nothing more was done; nothing was deleted.",
                f"compare `qm config {guest.vmid}`, `qm config {now.keeper_id}` and the storage's list",
            ) from None
        if what.act is Act.DONE:
            return
        machine.require_stopped(client, guest)
        if what.act is Act.DROP:
            _drop(client, source, what.key, what.volid)
        elif what.act is Act.ATTACH:
            value = keeper.attached(noted, key, what.volid)
            change: dict[str, Any] = {key: value, "digest": target_config["digest"]}
            with machine.unless_outdated():
                client.change("PUT", *machine.where(client, target, "config"), **change)
        elif keeper.before_move(now, noted) != noted:
            _write_note(client, guest, now, asked, partial(keeper.before_move, now))
        else:
            digests = {"digest": source_config["digest"], "target-digest": target_config["digest"]}
            move: dict[str, Any] = {"disk": key, "target-vmid": target.vmid, "target-disk": key, **digests}
            where = machine.where(client, source, "move_disk")
            with machine.unless_outdated():
                client.run_task("POST", *where, task="qmmove", deadline_s=machine.DISK_S, **move)
    raise machine.restless(guest)


def _drop(client: Client, source: Guest, key: str, volid: str) -> None:
    """Remove a key whose volume is gone. Protection is lifted around it, and is back whatever happens."""

    def wanted(state: VmState) -> Mapping[str, Any] | None:
        if keeper.holds(state.config).get(key) != volid:
            return None
        if volid in machine.volumes(client, source.vmid, [volid.partition(":")[0]]):
            raise GpulabError(f"{source.name}: {key} of VM {source.vmid} is {volid}, which is there after all")
        return {"delete": key}

    try:
        machine.protect(client, source, 0)
        machine.change(client, source, wanted)
    finally:
        machine.protect(client, source, 1)


@step.step
def deleted() -> step.Commands:
    """Delete the VM, only once the keeper has every data disk and the VM none. Protection is lifted for this call."""
    due, guest, node, client, asked = _due(Next.DELETE)
    if not due:
        step.noop(f"the old VM {guest.vmid} is gone")
        return
    yield step.call(_delete_old, client, guest, node, asked)


def _delete_old(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    def check(now: Situation) -> list[str]:
        return ["it is the new one"] if now.made else keeper.not_deletable(now)

    machine.require_stopped(client, guest)
    _delete(client, guest, guest, node, asked, check)
    _say(guest, node, asked, _situation(client, guest, node))


def _delete(
    client: Client, target: Guest, guest: Guest, node: Node, asked: Order, check: Callable[[Situation], list[str]]
) -> None:
    """Delete `target`, which is the guest's VM or its keeper, with all that it names.

    `check` says why not, of what is there right before protection is lifted: a DELETE takes no digest.
    """

    def lift(state: VmState) -> Mapping[str, Any] | None:
        now = _situation(client, guest, node)
        _ours(now, guest, asked)
        if wrong := check(now):
            raise GpulabError(
                f"{guest.name}: VM {target.vmid} on {node.name} is not deleted: {wrong[0]}",
                "\n".join(f"  {line}" for line in wrong[1:]),
            )
        if str(state.config.get("protection", 0)) == "0":
            return None
        return {"protection": 0}

    try:
        machine.change(client, target, lift)
        client.run_task("DELETE", *machine.where(client, target), task="qmdestroy", deadline_s=DELETE_S, purge=1)
    except NotFound:
        # A lost answer, and the node's list does not show whose task it was.
        logger.info(f"{guest.name}: VM {target.vmid} is gone")
    finally:
        left = machine.found(client, target)
        if left is not None and left.lock not in vm.CUT_OFF:
            machine.protect(client, target, 1)
    if left is not None and left.lock not in vm.CUT_OFF:
        raise GpulabError(f"{guest.name}: VM {target.vmid} on {node.name} is still there after its deletion")


@step.step
def created() -> step.Commands:
    """
    Create the VM as declared, with the old one's id, SMBIOS UUID and MAC addresses, and without a data disk.

    PVE forgets access rules on the VM's own path when it deletes it: the token's rights are compared again first.
    """
    due, guest, node, client, asked = _due(Next.CREATE)
    if not due:
        step.noop(f"VM {guest.vmid} is there, or the deploy creates it")
        return
    yield step.call(_create, client, guest, node, asked)


def _create(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    now = _situation(client, guest, node)
    _ours(now, guest, asked)
    _say(guest, node, asked, now)
    noted = now.note
    wrong = keeper.missing(now.keeper or {}, noted, now.sizes) if noted is not None else ["there is none"]
    if noted is None or wrong:
        raise GpulabError(f"{guest.name}: VM {guest.vmid} is not created: with its keeper: {wrong[0]}")
    own_path = {f"/vms/{guest.vmid}": ("VM.Allocate", "VM.Audit", "VM.Config.Disk")}
    vm.require_rights(client, guest, node, own_path)
    mark = Marker(run=asked.run, keeper=now.keeper_id, archive=noted.archive, made=int(time.time()))
    keys = keeper.new_keys(guest, node, noted, mark)
    vm.make(client, guest, node, NodeShell(context.ctx_state.get(), node), keys)
    now = _situation(client, guest, node)
    _say(guest, node, asked, now)
    if identity(now.vm or {})["uuid"] != noted.uuid:
        raise GpulabError(f"{guest.name}: the new VM {guest.vmid} has not the SMBIOS UUID {noted.uuid}")


@step.step
def keeper_removed() -> step.Commands:
    """Delete the keeper, only when it holds no disk at all and the VM has each of its own."""
    due, guest, node, client, asked = _due(Next.REMOVE)
    if not due:
        step.noop("no keeper VM is left")
        return
    yield step.call(_remove_keeper, client, guest, node, asked)


def _remove_keeper(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    now = _situation(client, guest, node)
    _ours(now, guest, asked)
    _say(guest, node, asked, now)
    if now.note is None:
        if now.debris:
            shell = NodeShell(context.ctx_state.get(), node)
            shell.run(("qm", "unlock", str(now.keeper_id)), ("qm", "destroy", str(now.keeper_id)))
        return
    _delete(client, _keeper_guest(guest, now.keeper_id), guest, node, asked, keeper.not_removable)


@step.step
def connection_opened() -> step.Commands:
    """Forget the SSH host key of the system that went with the old VM, and let the guest's connection be opened."""
    host, guest, node, client, asked = machine.here()
    now = _situation(client, guest, node)
    if not machine.executing():
        return
    if _next(now, guest, asked) is not Next.DEPLOY:
        _ours(now, guest, asked)
        raise GpulabError(f"{guest.name}: VM {guest.vmid} on {node.name} has not come to its deploy")
    yield step.call(_open, host, guest, node, asked, now)


def _open(host: Host, guest: Guest, node: Node, asked: Order, now: Situation) -> None:
    if now.made:
        _say(guest, node, asked, now)
        host_keys.pin(guest.state, guest.ssh_hostname, guest.ssh_port, [])
    host.connector.closed = False


@step.step
def finished() -> step.Commands:
    """Forget the destruction, once verify has passed."""
    _, guest, node, client, asked = machine.here()
    found = machine.found(client, guest)
    mark = marker(found.config) if found is not None else None
    if mark is None or not mark.made or not machine.executing():
        step.noop("the VM carries no note")
        return
    yield step.call(_finish, client, guest, node, asked)


def _finish(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    now = _situation(client, guest, node)
    mark = now.mark
    if mark is None or not mark.verified:
        raise GpulabError(f"{guest.name}: VM {guest.vmid} has not passed verify")
    if left := [volid for volid in now.unnamed if "cloudinit" not in volid]:
        logger.warning(
            f"{guest.name}: no VM names {', '.join(left)} on {node.name}; a cut-off creation may have left it"
        )
    machine.write_mark(client, guest, lambda state: _without(state, guest, asked))
    if asked.way_on is not None:
        asked.way_on.lines = []


def _without(state: VmState, guest: Guest, asked: Order) -> None:
    if marker(state.config) is not None:
        machine.mine(state, guest, asked.run)
