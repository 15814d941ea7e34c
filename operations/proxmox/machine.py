# SPDX-License-Identifier: MIT
"""One VM in the hands of one run of rebuild.py: read under the guard of our tag, written with its digest."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyinfra import context, logger
from pyinfra.api import Host
from pyinfra.api.state import StateStage

import inventory
from inventory import GpulabError, Guest, Node
from operations.proxmox import config as declared
from operations.proxmox import order, vm
from operations.proxmox.client import Client, DigestMismatch, TaskFailed
from operations.proxmox.order import Order, busy
from operations.proxmox.swap import Marker, Subject, described, drives, marker, unused
from operations.proxmox.vm_state import VmState

#: Seconds that a guest gets to shut down before it is switched off, and for a task that copies or moves a disk.
SHUTDOWN_S, DISK_S = 180, 1800.0
#: How often a configuration that somebody else has just changed is read again.
TRIES = 5


# Reading.


def here() -> tuple[Host, Guest, Node, Client, Order]:
    """The guest that a step of rebuild.py is for, its node, the API and what the run was asked for."""
    host: Host = context.ctx_host.get()
    lab = inventory.of_run(context.ctx_state.get())
    guest = lab.guests[host.name]
    node = lab.node_of(guest)
    return host, guest, node, Client(node, host=host), order.current()


def executing() -> bool:
    return context.state.current_stage >= StateStage.Execute


def where(client: Client, guest: Guest, *rest: str) -> tuple[str | int, ...]:
    return ("nodes", client.node.name, "qemu", guest.vmid, *rest)


def found(client: Client, guest: Guest) -> VmState | None:
    """The VM, or None when there is none.

    Raises:
        GpulabError: it does not carry our tag: nothing of it is touched.
    """
    state = vm.read_state(client, guest.vmid)
    # What a cut-off creation or deletion leaves says nothing; the deploy says what to do with it.
    if state is not None and not declared.is_ours(state.config) and state.lock not in vm.CUT_OFF:
        raise GpulabError(
            f"{guest.name}: vmid = {guest.vmid}: {client.node.name} has a VM of that id that is not ours",
            f"Its name is {state.config.get('name', '(none)')!r}; it lacks the tag {declared.TAG!r}.",
            "choose another vmid in the inventory",
        )
    return state


def there(client: Client, guest: Guest) -> VmState:
    """
    Raises:
        GpulabError: it is not ours, or no longer there.
    """
    state = found(client, guest)
    if state is None:
        raise GpulabError(f"{guest.name}: VM {guest.vmid} on {client.node.name} has gone while it was rebuilt")
    return state


def volumes(client: Client, vmid: int, storages: Iterable[str]) -> dict[str, int]:
    """Bytes of each volume that these storages list as this VM's."""
    sizes = {}
    for storage in sorted(set(storages)):
        for item in client.get(
            *("nodes", client.node.name, "storage", storage, "content"), content="images", vmid=vmid
        ):
            sizes[str(item["volid"])] = int(item["size"])
    return sizes


def sizes(client: Client, guest: Guest, config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each volume of this VM, on the storages where it is known to have some."""
    volids = [*drives(config).values(), *unused(config).values()]
    return volumes(client, guest.vmid, [guest.disk_storage, *(volid.partition(":")[0] for volid in volids)])


def pending(client: Client, guest: Guest) -> tuple[str, ...]:
    """The keys that wait for a restart."""
    items = client.get(*where(client, guest, "pending"))
    return tuple(sorted(str(item["key"]) for item in items if "pending" in item or item.get("delete")))


def snapshots(client: Client, guest: Guest) -> tuple[str, ...]:
    items = client.get(*where(client, guest, "snapshot"))
    return tuple(str(item["name"]) for item in items if item["name"] != "current")


def subject(client: Client, guest: Guest, node: Node, state: VmState) -> Subject:
    """The VM and what a rebuild needs to know about its surroundings."""
    images = client.get("nodes", node.name, "storage", node.image_storage, "content", content="import")
    return Subject(
        vm=state,
        pending=pending(client, guest),
        snapshots=snapshots(client, guest),
        sizes=sizes(client, guest, state.config),
        free=int(client.get("nodes", node.name, "storage", guest.disk_storage, "status")["avail"]),
        image=declared.image_volume(guest, node) in [item["volid"] for item in images],
    )


# Changing.


def change(client: Client, guest: Guest, decide: Callable[[VmState], Mapping[str, Any] | None]) -> VmState:
    """Write to the configuration what `decide` says of its newest state, until it says None.

    The digest goes with every write; a refused one, and one whose answer was lost, is decided anew.
    """
    for _ in range(TRIES):
        state = there(client, guest)
        wanted = decide(state)
        if wanted is None:
            return state
        with unless_outdated():
            client.change("PUT", *where(client, guest, "config"), **wanted, digest=state.config["digest"])
    state = there(client, guest)
    if decide(state) is None:
        return state
    raise restless(guest)


@contextmanager
def unless_outdated() -> Iterator[None]:
    """Let a change go by that somebody else (or itself, when its answer was lost) was faster than; read again then."""
    try:
        yield
    except DigestMismatch:
        pass
    except TaskFailed as error:
        if not issubclass(error.reason, DigestMismatch):
            raise


def restless(guest: Guest) -> GpulabError:
    return GpulabError(
        f"{guest.name}: the configuration of VM {guest.vmid} changes faster than it can be written",
        resolution="see in the node's task list who works on it, then run again",
    )


def mine(state: VmState, guest: Guest, run: str) -> Marker:
    """The marker, when this run wrote it.

    Raises:
        GpulabError: another run took over, or somebody removed our line.
    """
    mark = marker(state.config)
    if mark is None or mark.run != run:
        raise not_mine(guest, mark.run if mark else "")
    return mark


def not_mine(guest: Guest, run: str) -> GpulabError:
    """`run`: the one that is at work in our place; empty: our line is gone."""
    who = f"the run {run} has taken over" if run else "somebody removed gpulab's line of its description"
    return GpulabError(f"{guest.name}: VM {guest.vmid} is no longer this run's: {who}", "Nothing more was done.")


def write_mark(client: Client, guest: Guest, wanted: Callable[[VmState], Marker | None], **also: Any) -> VmState:
    """Write the marker, and the keys of `also` in the same call."""

    def decide(state: VmState) -> Mapping[str, Any] | None:
        return writing(state, described(state.config, wanted(state)), **also)

    return change(client, guest, decide)


def writing(state: VmState, text: str, **also: Any) -> Mapping[str, Any] | None:
    """The keys that give a VM this description and the keys of `also`; None when it has them."""
    keys = {key: value for key, value in also.items() if str(state.config.get(key, "")) != str(value)}
    # PVE cuts white space at the end.
    if text.rstrip() == str(state.config.get("description", "")).rstrip() and not keys:
        return None
    return {"description": text, **keys}


def protect(client: Client, guest: Guest, value: int) -> None:
    """Lift or set the VM's protection: a write of its own, so that a lost answer can be sent again."""
    change(
        client,
        guest,
        lambda state: None if str(state.config.get("protection", 0)) == str(value) else {"protection": value},
    )


def stop(client: Client, guest: Guest) -> None:
    """Shut the VM down; one that takes too long is switched off."""
    status = where(client, guest, "status")
    try:
        client.run_task(
            "POST",
            *status,
            "shutdown",
            task="qmshutdown",
            deadline_s=SHUTDOWN_S + 120,
            forceStop=1,
            timeout=SHUTDOWN_S,
        )
    except GpulabError:
        if client.get(*status, "current")["status"] == "running":
            raise
    require_stopped(client, guest)


def require_stopped(client: Client, guest: Guest) -> None:
    """With another volume on scsi0, PVE would try to unplug the system disk of a running VM.

    Raises:
        GpulabError: the VM runs.
    """
    if client.get(*where(client, guest, "status", "current"))["status"] == "running":
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} runs; its disks are only touched while it is stopped",
            resolution="see who started it, then run again",
        )


# Others.


def check_others(
    client: Client, guest: Guest, node: Node, asked: Order, holder: str, *others: int
) -> list[Mapping[str, Any]]:
    """The tasks of a dead run of ours that have to end first, on the VM and those with the ids `others`.

    `holder`: the run in whose middle the VM is; empty: none has begun. Before a run has written its marker, only the
    token tells that a task is ours: a shutdown goes on when the run that asked for it is killed. Should that run be
    alive on another machine, its marker stops this one.

    Raises:
        GpulabError: the VM is somebody else's right now.
    """
    host = holder.rpartition("@")[2].partition(":")[0]
    if host and host != socket.gethostname() and not asked.take_over:
        raise busy(
            guest,
            f"the run {holder}, as its description says",
            f"ask on {host}; when that run is dead, --data take_over=1 goes on in its place",
        )
    tasks = [
        task
        for vmid in dict.fromkeys((guest.vmid, *others))
        for task in vm.at_work(client, guest.model_copy(update={"vmid": vmid}), node)
    ]
    theirs = [task for task in tasks if vm.who(task) != vm.own_token(node)]
    if theirs and not host:
        raise busy(guest, f"task {vm.described(theirs[0])}")
    return tasks


def await_tasks(client: Client, upids: list[str]) -> None:
    for upid in upids:
        try:
            client.wait(upid, DISK_S)
        except TaskFailed as error:
            # How it ended is seen in the VM itself.
            logger.info(error.brief)
