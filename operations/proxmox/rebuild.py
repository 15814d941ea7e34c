# SPDX-License-Identifier: MIT
"""A guest's system disk made anew: the image imported over `scsi0`, the old disk kept by PVE as `unusedN`.

Each step reads the VM and does its part only where it is what comes next (operations/proxmox/swap.py), so a run
that follows a killed one goes on where that one was.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pyinfra import context, logger
from pyinfra.api import Host

from inventory import GpulabError, Guest, Node
from operations import step
from operations.proxmox import config as declared
from operations.proxmox import host_keys, machine, order, vm
from operations.proxmox.client import Client
from operations.proxmox.order import Order, WayBack
from operations.proxmox.swap import (
    ADOPTED,
    SYSTEM,
    Marker,
    Next,
    Stage,
    Subject,
    changed_identity,
    data_disks,
    drives,
    first_mark,
    going_back,
    holder,
    identity,
    leftovers,
    marker,
    new_disk,
    next_step,
    problems,
    stage,
    taken_over,
    unused,
    without_old,
)
from operations.proxmox.vm_state import VmState

#: Seconds for verify; its benchmarks take two minutes, and services may stop and start around them.
VERIFY_S = 1800.0
DAY_S = 86400
ROOT = Path(__file__).parents[2]


def _offer_way_back(guest: Guest, asked: Order, found: VmState) -> None:
    """From now on a failed step says how to go back, if the old disk is there."""
    mark = marker(found.config)
    swapped = stage(found.config) in (Stage.SWAPPED, Stage.VERIFIED)
    if mark is not None and swapped and asked.way_back is None and not asked.rollback:
        asked.way_back = WayBack(guest, asked.lab, mark.old)
        context.ctx_state.get().add_callback_handler(asked.way_back)


def _free(client: Client, guest: Guest, volid: str, run: str, allowed: Callable[[VmState], bool]) -> None:
    """Free one volume. Protection is lifted around it, and is back whatever happens.

    `allowed` is asked of the newest configuration before every write: only a volume that it still names as idle goes.
    """

    def wanted(found: VmState) -> Mapping[str, Any] | None:
        machine.mine(found, guest, run)
        if not allowed(found):
            return None
        key = next((key for key, known in unused(found.config).items() if known == volid), None)
        if key is None and drives(found.config).get(ADOPTED) == volid:
            key = ADOPTED
        if key is not None:
            return {"delete": key}
        return {ADOPTED: volid} if volid in machine.sizes(client, guest, found.config) else None

    if wanted(machine.there(client, guest)) is None:
        return
    try:
        machine.protect(client, guest, 0)
        machine.change(client, guest, wanted)
    finally:
        machine.protect(client, guest, 1)


# The steps of rebuild.py.


@step.step
def preflight() -> step.Commands:
    """
    Refuse a rebuild that could not work, and show all of it in the plan.

    Takes the lock that keeps a second run away. Changes nothing.
    """
    _, guest, node, client, asked = machine.here()
    found = machine.found(client, guest)
    if machine.executing():
        order.lock(context.ctx_state.get(), guest, asked.run)
    if found is None or found.lock in vm.CUT_OFF:
        step.noop(f"there is no VM {guest.vmid}: it will be created")
        return
    mark = marker(found.config)
    asked.began = mark.run if mark else ""
    if tasks := machine.check_others(client, guest, node, asked, holder(mark)):
        step.changes(f"wait for {', '.join(str(item['type']) for item in tasks)} of a killed run")
        yield step.call(machine.await_tasks, client, [str(item["upid"]) for item in tasks])
        if machine.executing():
            found = machine.there(client, guest)
    subject = machine.subject(client, guest, node, found)
    if not machine.executing():
        # It is downloaded before anything is stopped.
        subject = replace(subject, image=True)
    _refuse_kept(guest, asked, subject)
    if wrong := problems(subject, guest, node):
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} cannot be rebuilt: {wrong[0]}",
            "\n".join(f"  {line}" for line in wrong[1:]),
        )
    subject_line, lines = _plan(subject, guest, node, asked)
    step.changes(subject_line, lines)
    step.reboots("the system disk is replaced")
    yield from ()


def _refuse_kept(guest: Guest, asked: Order, subject: Subject) -> None:
    mark = marker(subject.config)
    if mark is None or subject.stage is not Stage.VERIFIED or mark.until <= time.time() or asked.keep_old == 0:
        return
    raise GpulabError(
        f"{guest.name}: rebuilt and verified on {_day(mark.verified)}; the old system disk {mark.old} is kept until "
        f"{_day(mark.until)}",
        "Nothing was done.",
        f"`pyinfra {asked.lab} rebuild.py --limit {guest.name} --data keep_old=0` deletes it now, then the guest can "
        "be rebuilt again; with `--data rollback=1` it comes back",
    )


def _day(moment: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def _plan(subject: Subject, guest: Guest, node: Node, asked: Order) -> tuple[str, tuple[str, ...]]:
    """The whole rebuild as one entry of the plan, from where it stands."""
    config, mark = subject.config, marker(subject.config)
    name, image = f"VM {guest.vmid} on {node.name}", declared.image_volume(guest, node)
    data = tuple(f"{key}: {volid} stays as it is" for key, volid in data_disks(config).items())
    days = asked.keep_old or 0
    if subject.stage in (Stage.IDLE, Stage.BEFORE):
        old = drives(config)[SYSTEM]
        waste = leftovers(config, subject.sizes, guest.disk_storage, guest.vmid)
        subject_line = f"rebuild {name}"
        lines: tuple[str, ...] = (
            *(["shut down"] if subject.running else []),
            *(f"delete {volid}, which an earlier rebuild left" for volid in waste),
            f"{SYSTEM}: {old} -> a new disk of {guest.system_disk_gib} GiB from {image}",
        )
    else:
        old = mark.old if mark else ""
        subject_line, lines = f"go on with the rebuild of {name}", (f"it is there: {subject.stage.value}",)
    end = f"kept for {days} days" if days else "deleted"
    last = () if subject.stage is Stage.DELETED else (f"when verify passes: the old disk {old} is {end}",)
    return subject_line, (*lines, *data, "deploy, as listed below", *last)


def _next(client: Client, guest: Guest, asked: Order, found: VmState | None) -> Next:
    """Where this run stands. A creation that was cut off counts as no VM: the deploy says what to do with it."""
    if found is None or found.lock in vm.CUT_OFF:
        return Next.CREATE
    waste: list[str] = []
    if stage(found.config) is Stage.BEFORE and found.status != "running":
        waste = leftovers(found.config, machine.sizes(client, guest, found.config), guest.disk_storage, guest.vmid)
    return next_step(found.config, found.status == "running", asked.run, waste, asked.rollback)


@step.step
def stopped() -> step.Commands:
    """Shut the VM down; a guest that takes more than three minutes is switched off. Not one with the new system."""
    _, guest, _, client, asked = machine.here()
    if _next(client, guest, asked, machine.found(client, guest)) is not Next.STOP:
        step.noop(f"{guest.name} does not have to be stopped")
        return
    yield step.call(machine.stop, client, guest)


@step.step
def marked() -> step.Commands:
    """Note in the VM's description, alone in its call, which volume is the old one and which run is at work."""
    _, guest, _, client, asked = machine.here()
    if _next(client, guest, asked, machine.found(client, guest)) is not Next.MARK:
        step.noop(f"VM {guest.vmid} is marked as this run's")
        return
    yield step.call(_mark, client, guest, asked)


def _mark(client: Client, guest: Guest, asked: Order) -> None:
    def wanted(found: VmState) -> Marker:
        mark = marker(found.config)
        if mark is not None and mark.run not in (asked.run, asked.began):
            machine.mine(found, guest, asked.run)
        sizes = machine.sizes(client, guest, found.config)
        if mark is None or stage(found.config, sizes) is Stage.IDLE:
            return first_mark(Subject(found, sizes=sizes), guest, asked.run)
        mark = taken_over(mark, found.config, asked.run)
        return going_back(mark, found.config, sizes) if asked.rollback else mark

    machine.write_mark(client, guest, wanted)


@step.step
def leftovers_removed() -> step.Commands:
    """Free what a cut-off or rolled back rebuild left: noted waste, and the orphan of a killed import."""
    _, guest, _, client, asked = machine.here()
    if _next(client, guest, asked, machine.found(client, guest)) is not Next.CLEAN:
        step.noop("no earlier rebuild left anything")
        return
    yield step.call(_clean, client, guest, asked)


def _clean(client: Client, guest: Guest, asked: Order) -> None:
    found = machine.there(client, guest)
    mark = machine.mine(found, guest, asked.run)
    machine.require_stopped(client, guest)
    sizes = machine.sizes(client, guest, found.config)
    waste = leftovers(found.config, sizes, guest.disk_storage, guest.vmid)
    # Noted first: an orphan that is attached, to be freed, must not be taken for a data disk after a crash.
    noted = replace(mark, waste=tuple(f"{volid}@{sizes[volid]}" for volid in waste))
    machine.write_mark(client, guest, lambda _: noted)
    for volid in waste:
        _free(client, guest, volid, asked.run, partial(_is_waste, volid, sizes, guest))
    machine.write_mark(client, guest, lambda _: replace(noted, waste=()))


def _is_waste(volid: str, sizes: Mapping[str, int], guest: Guest, found: VmState) -> bool:
    return volid in leftovers(found.config, sizes, guest.disk_storage, guest.vmid)


@step.step
def swapped() -> step.Commands:
    """Import the image over `scsi0`, alone in its call and only while the VM is stopped; PVE keeps the old disk."""
    _, guest, node, client, asked = machine.here()
    if _next(client, guest, asked, machine.found(client, guest)) is not Next.IMPORT:
        step.noop(f"VM {guest.vmid} has its new system disk")
        return
    yield step.call(_swap, client, guest, node, asked)


def _swap(client: Client, guest: Guest, node: Node, asked: Order) -> None:
    for _ in range(machine.TRIES):
        found = machine.there(client, guest)
        mark = machine.mine(found, guest, asked.run)
        if stage(found.config) is not Stage.BEFORE:
            break
        machine.require_stopped(client, guest)
        with machine.unless_outdated():
            client.run_task(
                "POST",
                *machine.where(client, guest, "config"),
                task="qmconfig",
                deadline_s=machine.DISK_S,
                **{SYSTEM: new_disk(found.config, guest, node)},
                digest=found.config["digest"],
            )
    after = machine.there(client, guest)
    _offer_way_back(guest, asked, after)
    if stage(after.config) is not Stage.SWAPPED or mark.old not in unused(after.config).values():
        raise GpulabError(f"{guest.name}: after the import VM {guest.vmid} is not swapped: {stage(after.config).value}")
    _check_identity(after.config, guest)


def _check_identity(config: Mapping[str, Any], guest: Guest) -> None:
    if wrong := changed_identity(config):
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} is not the VM whose rebuild began: {wrong[0]}",
            "\n".join(f"  {line}" for line in wrong[1:]),
            "nothing more was done; see in the node's task list who changed it",
        )


@step.step
def prepared() -> step.Commands:
    """Give the new disk its size and have PVE write cloud-init's drive anew, while the VM is still stopped."""
    _, guest, _, client, asked = machine.here()
    if _next(client, guest, asked, machine.found(client, guest)) is not Next.PREPARE:
        step.noop(f"{guest.name} has its new system")
        return
    yield step.call(_prepare, client, guest, asked)


def _prepare(client: Client, guest: Guest, asked: Order) -> None:
    _offer_way_back(guest, asked, machine.there(client, guest))
    for _ in range(machine.TRIES):
        found = machine.there(client, guest)
        size = declared.growth(found.config, guest).get(SYSTEM)
        if size is None:
            break
        resize = {"disk": SYSTEM, "size": size, "digest": found.config["digest"]}
        with machine.unless_outdated():
            client.run_task("PUT", *machine.where(client, guest, "resize"), task="resize", deadline_s=300, **resize)
    client.change("PUT", *machine.where(client, guest, "cloudinit"))


@step.step
def connection_opened() -> step.Commands:
    """
    Forget the SSH host key of the system that has just been replaced, and let the guest's connection be opened.

    The key of the system that boots now is read through the guest agent.
    """
    host, guest, _, client, asked = machine.here()
    found = machine.found(client, guest)
    if not machine.executing():
        return
    if _next(client, guest, asked, found) not in (Next.CREATE, Next.DEPLOY, Next.PREPARE, Next.START):
        raise GpulabError(f"{guest.name}: VM {guest.vmid} still has the system that was to be replaced")
    yield step.call(_open, host, guest, asked, found)


def _open(host: Host, guest: Guest, asked: Order, found: VmState | None) -> None:
    mark = marker(found.config) if found else None
    if found is not None and mark is not None and mark.old:
        _offer_way_back(guest, asked, found)
        host_keys.pin(guest.state, guest.ssh_hostname, guest.ssh_port, [])
    host.connector.closed = False


@step.step
def verified() -> step.Commands:
    """Run `pytest verify` for this guest; a status other than 0 fails the host, so that the old disk stays."""
    _, guest, _, client, asked = machine.here()
    found = machine.found(client, guest)
    if not machine.executing():
        return
    yield step.call(_verify, client, guest, asked, found is not None and marker(found.config) is not None)


def verify_command(guest: Guest, asked: Order, report: Path) -> list[str]:
    """What checks this guest from outside, its card measured in full. A service that already holds the card stops for
    it: nobody relies on the new system yet, and the old disk's deletion does.
    """
    words = ["--benchmarks", "full", "--drain", *(word for pair in asked.data for word in ("--data", pair))]
    lab = str(Path(asked.lab).resolve())
    only = ["--lab", lab, "--limit", guest.name, "--report", str(report)]
    return [sys.executable, "-m", "pytest", "verify", *only, *words]


def _verify(client: Client, guest: Guest, asked: Order, rebuilding: bool) -> None:
    report = (Path("reports") / "rebuild" / guest.name).resolve()
    report.mkdir(parents=True, exist_ok=True)
    log = report / "verify.log"
    with open(log, "w") as output:
        try:
            status = subprocess.run(
                verify_command(guest, asked, report),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=VERIFY_S,
            ).returncode
        except subprocess.TimeoutExpired:
            raise GpulabError(f"{guest.name}: verify has not ended after {VERIFY_S:.0f} s", f"See {log}.") from None
    if status != 0:
        tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-8:]
        raise GpulabError(
            f"{guest.name}: the new system does not pass verify (exit status {status})",
            "\n".join(f"  {line}" for line in tail),
            f"the whole output is in {log}",
        )
    if rebuilding:
        now = int(time.time())
        machine.write_mark(client, guest, lambda found: _passed(machine.mine(found, guest, asked.run), now))


def _passed(mark: Marker, now: int) -> Marker:
    return replace(mark, verified=mark.verified or now)


@step.step
def old_disk_deleted() -> step.Commands:
    """
    Delete the old system disk by its volume id, or keep it as long as `keep_old` says.

    Only after a passed verify, only an idle volume of the size noted, only while the VM is the one that it was.
    """
    _, guest, _, client, asked = machine.here()
    found = machine.found(client, guest)
    if found is None or marker(found.config) is None or not machine.executing():
        step.noop("no old system disk is there")
        return
    yield step.call(_finish, client, guest, asked)


def _finish(client: Client, guest: Guest, asked: Order) -> None:
    found = machine.there(client, guest)
    mark = machine.mine(found, guest, asked.run)
    sizes = machine.sizes(client, guest, found.config)
    now = stage(found.config, sizes)
    if now not in (Stage.VERIFIED, Stage.DELETED):
        raise GpulabError(f"{guest.name}: the old system disk {mark.old} stays: the rebuild is {now.value}")
    if now is Stage.VERIFIED:
        _check_identity(found.config, guest)
    until = mark.verified + (asked.keep_old or 0) * DAY_S
    if now is Stage.VERIFIED and until > time.time():
        kept = replace(mark, until=until)
        machine.write_mark(client, guest, lambda _: kept, protection=1)
        logger.info(f"{guest.name}: the old system disk {mark.old} is kept until {_day(until)}")
        return
    if now is Stage.VERIFIED:
        idle: Callable[[VmState], bool] = lambda latest: (  # noqa: E731
            stage(latest.config, sizes) is Stage.VERIFIED and not changed_identity(latest.config)
        )
        if asked.way_back:
            asked.way_back.old = ""
        _free(client, guest, mark.old, asked.run, idle)
    rest = without_old(mark)
    machine.write_mark(client, guest, lambda _: rest, protection=1)


# The way back.


@step.step
def rollback_preflight() -> step.Commands:
    """Refuse to go back where there is nothing to go back to. Takes the lock; changes nothing."""
    _, guest, node, client, asked = machine.here()
    found = machine.found(client, guest)
    if machine.executing():
        order.lock(context.ctx_state.get(), guest, asked.run)
    mark = marker(found.config) if found else None
    sizes = machine.sizes(client, guest, found.config) if found else {}
    if found is None or mark is None or stage(found.config, sizes) in (Stage.IDLE, Stage.DELETED):
        raise GpulabError(
            f"{guest.name}: there is no old system disk to go back to",
            f"VM {guest.vmid} on {node.name} is not in the middle of a rebuild. Nothing was done.",
        )
    asked.began = mark.run
    tasks = machine.check_others(client, guest, node, asked, holder(mark))
    if found.lock:
        raise GpulabError(f"{guest.name}: VM {guest.vmid} on {node.name} is locked ({found.lock})")
    new = drives(found.config).get(SYSTEM, "none")
    step.changes(
        f"go back to the old system of VM {guest.vmid} on {node.name}",
        (f"{SYSTEM}: {new} -> {mark.old}", f"{new} stays beside it until the next rebuild"),
    )
    step.reboots("the system disk is replaced")
    if tasks:
        yield step.call(machine.await_tasks, client, [str(item["upid"]) for item in tasks])


@step.step
def old_disk_back() -> step.Commands:
    """Put the old volume back on `scsi0`, only while the VM is stopped; PVE keeps the new disk."""
    _, guest, _, client, asked = machine.here()
    if _next(client, guest, asked, machine.found(client, guest)) is not Next.PUT_BACK:
        step.noop(f"VM {guest.vmid} has its old system disk")
        return
    yield step.call(_put_back, client, guest, asked)


def _put_back(client: Client, guest: Guest, asked: Order) -> None:
    machine.require_stopped(client, guest)

    def decide(found: VmState) -> Mapping[str, Any] | None:
        mark = machine.mine(found, guest, asked.run)
        if stage(found.config) is Stage.BEFORE:
            return None
        if mark.old not in unused(found.config).values():
            raise GpulabError(f"{guest.name}: the old system disk {mark.old} is no longer there")
        return {SYSTEM: ",".join(filter(None, [mark.old, mark.options]))}

    before = identity(machine.there(client, guest).config)
    after = identity(machine.change(client, guest, decide).config)
    if before != after:
        raise GpulabError(f"{guest.name}: VM {guest.vmid} has changed while its disk was put back: {before} -> {after}")


@step.step
def rollback_finished() -> step.Commands:
    """Forget the rebuild, once the old system answers; the new disk is noted, for the next rebuild to remove."""
    _, guest, _, client, _ = machine.here()
    found = machine.found(client, guest)
    if not machine.executing() or found is None:
        return
    yield step.call(_forget, client, guest)


def _forget(client: Client, guest: Guest) -> None:
    found = machine.there(client, guest)
    mark = marker(found.config)
    if mark is None:
        return
    # The orphan of a killed import, which only this marker tells from volumes that were there before.
    sizes = machine.sizes(client, guest, found.config)
    waste = leftovers(found.config, sizes, guest.disk_storage, guest.vmid)
    rest = without_old(mark, [f"{volid}@{sizes[volid]}" for volid in waste])
    machine.write_mark(client, guest, lambda _: rest, protection=1)
