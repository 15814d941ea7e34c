# SPDX-License-Identifier: MIT
"""The GPU VM through the API: preflight, image, create or update, start, first contact."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyinfra import context, logger
from pyinfra.api import Host, State, StringCommand

import inventory
from inventory import GpulabError, Guest, Node
from inventory.secrets import Secrets
from operations import step
from operations.facts import JsonFact
from operations.plan import key_diff
from operations.proxmox import access, config, held, host_keys, order
from operations.proxmox.client import Client
from operations.proxmox.config import is_ours
from operations.proxmox.errors import DigestMismatch, NotFound, TaskFailed, kind_of
from operations.proxmox.node_shell import NodeShell
from operations.proxmox.vm_state import VmState

__all__ = ["VmState", "create_or_update", "image", "is_ours", "pin_host_keys", "preflight", "read_state", "started"]

#: Seconds for an import: some tens of GiB on a slow disk.
CREATE_S = 1800.0
DOWNLOAD_S = 3600.0
#: Seconds until a start has ended. PVE's own limit: the memory in GiB, four times that with hostpci, and a rest.
START_S = 900.0

#: Seconds that somebody else's task on the VM may take before a change of ours is refused.
BUSY_S = 60.0
#: How often a configuration that somebody else has just changed is read again.
TRIES = 3
#: Locks of a VM that is no more than what a killed task left, and the task that leaves it.
CUT_OFF = {"create": "qmcreate", "destroyed": "qmdestroy"}
#: Tasks that change nothing: somebody looks at the VM's screen.
_CONSOLES = ("vncproxy", "vncshell", "termproxy", "spiceproxy", "spiceshell")

#: What several guests share (an image on a storage) is handled one at a time.
_one_at_a_time: defaultdict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)


def read_state(client: Client, vmid: int) -> VmState | None:
    """The VM on the client's node, or None when there is none."""
    where = ("nodes", client.node.name, "qemu", vmid)
    try:
        found = client.get(*where, "config")
    except NotFound:
        return None
    now = client.get(*where, "status", "current")
    return VmState(now["status"], float(now.get("uptime", 0)), found.get("lock"), found)


def pin_host_keys(client: Client, guest: Guest, state: Path) -> None:
    """Read the guest's SSH host key through its agent, a path that the network cannot change, and pin it.

    Raises:
        GpulabError: the agent does not answer or the file is not there yet.
    """
    answer = client.get(
        *("nodes", client.node.name, "qemu", guest.vmid, "agent", "file-read"),
        file="/etc/ssh/ssh_host_ed25519_key.pub",
    )
    key = str(answer["content"]).strip()
    if not key.startswith("ssh-ed25519 "):
        raise GpulabError(f"{guest.name}: no host key in /etc/ssh/ssh_host_ed25519_key.pub yet")
    host_keys.pin(state, guest.ssh_hostname, guest.ssh_port, [key])


def _here() -> tuple[Host, Guest, Node, Client]:
    """The guest that this operation is for, its node and the API."""
    host: Host = context.ctx_host.get()
    lab = inventory.of_run(context.ctx_state.get())
    guest = lab.guests[host.name]
    node = lab.node_of(guest)
    return host, guest, node, Client(node, host=host)


@step.step
def preflight() -> step.Commands:
    """
    Refuse what cannot work before anything has changed: version, rights, storage, ownership, memory, GPU.

    Never changes anything.
    """
    host, guest, node, client = _here()
    require_rights(client, guest, node)
    backups = guest.backup.storage if guest.backup is not None else None
    found = _own_state(client, guest, node)
    if not order.destroying(context.ctx_state.get()):
        held.refuse(client, guest, found.config if found is not None else None)
    listed = {str(item["storage"]): item for item in client.get("nodes", node.name, "storage")}
    stores = {storage: str(item.get("content", "")).split(",") for storage, item in listed.items()}
    needed = [(node.image_storage, "import"), (node.image_storage, "snippets"), (guest.disk_storage, "images")]
    if backups is not None:
        needed.append((backups, "backup"))
    for storage, kind in needed:
        if kind not in stores.get(storage, []):
            seen = ", ".join(stores[storage]) if storage in stores else "no such storage"
            by_bootstrap = "make bootstrap LAB=… enables import and snippets on the image storage"
            by_hand = f"on {node.name}: pvesm set {storage} --content TYPE,…,{kind}, or choose another storage"
            raise GpulabError(
                f"{node.name}: storage {storage}: expected content type {kind}, seen: {seen}",
                resolution=by_bootstrap if storage == node.image_storage and kind != "backup" else by_hand,
            )
    if found is None:
        _check_space(listed[guest.disk_storage], guest, node)
    else:
        # Said here, it is said before anything has changed.
        config.growth(_staying(host, found.config), guest)
    running = found is not None and found.status == "running"
    if not running:
        _check_memory(client, guest, node)
    if guest.gpu is not None and not (running and found is not None and _has_gpu(found, guest)):
        _check_gpu_free(client, guest, node)
    step.noop(f"{node.name} can hold VM {guest.vmid}")
    yield from ()


def _staying(host: Host, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of a VM's configuration a deploy finds. A rebuild makes the system disk anew before, in whatever size."""
    anew = {config.SYSTEM_DISK} if getattr(host.connector, "closed", False) else set()
    return {key: value for key, value in found.items() if key not in anew}


def require_rights(client: Client, guest: Guest, node: Node, more: Mapping[str, tuple[str, ...]] | None = None) -> None:
    """
    Raises:
        GpulabError: the token lacks a right that the deploy of this guest needs, or one of `more`, by path.
    """
    major = int(str(client.get("version")["version"]).split(".")[0])
    if major not in (8, 9):
        raise GpulabError(f"{node.name}: Proxmox VE {major}: expected 8 or 9")
    backups = guest.backup.storage if guest.backup is not None else None
    granted = client.get("access", "permissions")
    lacking = access.missing(granted, node, major, {guest.disk_storage}, backups)
    lacking += [
        f"{right} on {path}"
        for path, rights in (more or {}).items()
        for right in rights
        if not access.has(granted, path, right)
    ]
    if lacking:
        raise GpulabError(
            f"{node.name}: the API token lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)),
            "\n".join(f"  {line}" for line in lacking),
            f"make bootstrap LAB=… gives the role {node.api.role} what is missing",
        )


def _own_state(client: Client, guest: Guest, node: Node) -> VmState | None:
    """The guest's VM, or None when there is none yet, or no more of it than a cut-off creation of ours.

    Raises:
        GpulabError: the VM is not ours, or is being created right now.
    """
    found = read_state(client, guest.vmid)
    if found is None or is_leftover(client, guest, node, found):
        return None
    _check_ownership(guest, node, found)
    return found


def _check_ownership(guest: Guest, node: Node, found: VmState) -> None:
    if is_ours(found.config):
        return
    if found.lock in CUT_OFF:
        what = "creation" if found.lock == "create" else "deletion"
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} is a {what} that was cut off (lock: {found.lock})",
            "The node's task list does not show that it was gpulab's.",
            f"on {node.name}: qm unlock {guest.vmid} && qm destroy {guest.vmid}, then deploy again",
        )
    raise GpulabError(
        f"{guest.name}: vmid = {guest.vmid}: {node.name} has a VM of that id that is not ours",
        f"Its name is {found.config.get('name', '(none)')!r}; it lacks the tag {config.TAG!r}.",
        "choose another vmid in the inventory",
    )


def is_leftover(client: Client, guest: Guest, node: Node, found: VmState) -> bool:
    """Is it what a killed creation or deletion leaves: a lock, no tag, and a task of our own token that did it?

    Raises:
        GpulabError: that task still runs.
    """
    if found.lock not in CUT_OFF or is_ours(found.config):
        return False
    kind = CUT_OFF[found.lock]
    tasks = client.get("nodes", node.name, "tasks", source="all", typefilter=kind, vmid=guest.vmid)
    # The last one made what is there; an older one of ours says nothing about it.
    last = max(tasks, key=lambda task: int(task["starttime"]), default=None)
    if last is None or who(last) != own_token(node):
        return False
    if "endtime" not in last and _runs(client, node, last):
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} is being {'created' if kind == 'qmcreate' else 'deleted'}",
            f"At work: {described(last)}",
            "deploy again when that has ended",
        )
    return True


def _runs(client: Client, node: Node, task: Mapping[str, Any]) -> bool:
    """Does the task still run? The list does not know that of one that was killed a moment ago."""
    return bool(client.get("nodes", node.name, "tasks", task["upid"], "status")["status"] == "running")


def own_token(node: Node) -> str:
    """`user@realm!name` of the lab's token."""
    return (Secrets(node.state).get(node.cluster_name, "api_token") or "").partition("=")[0]


def who(task: Mapping[str, Any]) -> str:
    """The user or token that began a task."""
    return f"{task['user']}!{task['tokenid']}" if task.get("tokenid") else str(task["user"])


def described(task: Mapping[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(int(task["starttime"])))
    return f"{task['type']} of {who(task)} since {since}"


def at_work(client: Client, guest: Guest, node: Node) -> list[Mapping[str, Any]]:
    """The tasks that work on the VM right now, whoever began them."""
    active = client.get("nodes", node.name, "tasks", source="active", vmid=guest.vmid)
    # The list keeps some for a moment that have ended.
    return [task for task in active if "endtime" not in task and task["type"] not in _CONSOLES]


def await_idle(client: Client, guest: Guest, node: Node) -> None:
    """Wait until no task works on the VM: an import of another run sets no lock.

    Raises:
        GpulabError: one still does after BUSY_S; it says which and whose.
    """
    deadline = time.monotonic() + BUSY_S
    while True:
        busy = at_work(client, guest, node)
        if not busy:
            return
        if time.monotonic() >= deadline:
            raise GpulabError(
                f"{guest.name}: somebody else is at work on VM {guest.vmid} on {node.name}; nothing was changed",
                "\n".join(f"  {described(task)}" for task in busy),
                "deploy again when that has ended",
            )
        time.sleep(1)


def _check_space(storage: Mapping[str, Any], guest: Guest, node: Node) -> None:
    """Room for a new VM's system disk. Its data disk may be thin: it takes what is written to it."""
    # A storage that is not active has no figures; the creation then says so in its own words.
    left = int(storage["avail"]) / 2**30 if storage.get("active", 1) and "avail" in storage else None
    if left is not None and left < guest.system_disk_gib:
        raise GpulabError(
            f"{node.name}: storage {guest.disk_storage} has {left:.0f} GiB left; the system disk of {guest.name} "
            f"needs {guest.system_disk_gib} GiB",
            resolution="make room there, or lower `system_disk_gib`, or choose another `disk_storage`",
        )


def _check_memory(client: Client, guest: Guest, node: Node) -> None:
    memory = client.get("nodes", node.name, "status")["memory"]
    headroom = round(node.passthrough.headroom_gib * 1024)
    others = sum(
        int(other.get("maxmem", 0))
        for other in client.get("nodes", node.name, "qemu")
        if int(other["vmid"]) != guest.vmid and other.get("status") == "running"
    )
    unused = (int(memory["total"]) - int(memory["used"])) // 2**20
    if guest.hugepages is not None and node.passthrough.hugepages is not None:
        # Pages set aside at boot count as used, and are what this guest will take.
        unused += node.passthrough.hugepages.mib
    free = min(unused, (int(memory["total"]) - others) // 2**20 - headroom)
    if free < guest.memory_mib:
        raise GpulabError(
            f"{guest.name}: memory_mib = {guest.memory_mib}: {node.name} has {free} MiB for it",
            f"{unused} MiB are unused; running VMs may take {others // 2**20} MiB, the host keeps {headroom} MiB. "
            "Passthrough pins all of a guest's memory from its start.",
            "lower `memory_mib` or the node's `headroom_gib`, or stop another VM",
        )


def _has_gpu(found: VmState, guest: Guest) -> bool:
    words = str(found.config.get("hostpci0", "")).split(",")
    return f"mapping={guest.gpu}" in words


def _check_gpu_free(client: Client, guest: Guest, node: Node) -> None:
    places = _mapped_addresses(client, node)
    address = node.device(str(guest.gpu)).address or places.get(str(guest.gpu))
    # Another name may lead to the same card.
    names = {str(guest.gpu), *(name for name, place in places.items() if address is not None and place == address)}
    for other in client.get("nodes", node.name, "qemu"):
        if int(other["vmid"]) == guest.vmid or other.get("status") != "running":
            continue
        keys = client.get("nodes", node.name, "qemu", other["vmid"], "config")
        for key, value in keys.items():
            if key.startswith("hostpci") and any(_uses(str(value), name, address) for name in names):
                raise GpulabError(
                    f"{guest.name}: gpu = {guest.gpu!r}: VM {other['vmid']} ({other.get('name')}) is using it",
                    f"Its {key} is {value}.",
                    f"stop VM {other['vmid']}, or choose another device",
                )


def _mapped_addresses(client: Client, node: Node) -> dict[str, str]:
    """Where each of the cluster's mappings leads to on the node (`0000:01:00`)."""
    places = {}
    for found in client.get("cluster", "mapping", "pci"):
        for entry in found["map"]:
            options = dict(part.partition("=")[::2] for part in entry.split(","))
            if options.get("node") == node.name:
                places[str(found["id"])] = options.get("path", "").partition(".")[0]
    return places


def _uses(value: str, mapping: str, address: str | None) -> bool:
    words = value.split(",")
    return f"mapping={mapping}" in words or any(
        address is not None and word.removeprefix("host=").startswith((address, address.removeprefix("0000:")))
        for word in words
    )


@step.step
def image() -> step.Commands:
    """Ensure that the cloud image is on the node's image storage; PVE downloads it and checks its checksum."""
    _, guest, node, client = _here()
    wanted = config.image_volume(guest, node)
    if _has_image(client, guest, node):
        step.noop(f"{wanted} is there")
        return
    step.changes(f"download {wanted}", (f"from {guest.image.url}", guest.image.checksum[:23] + "…"))
    yield step.call(_download, client, guest, node)


def _has_image(client: Client, guest: Guest, node: Node) -> bool:
    content = client.get("nodes", node.name, "storage", node.image_storage, "content", content="import")
    return config.image_volume(guest, node) in [item["volid"] for item in content]


def _download(client: Client, guest: Guest, node: Node) -> None:
    algorithm, _, checksum = guest.image.checksum.partition(":")
    with _one_at_a_time[node.name, node.image_storage, guest.image.filename]:
        if _has_image(client, guest, node):
            return
        client.run_task(
            "POST",
            *("nodes", node.name, "storage", node.image_storage, "download-url"),
            task="download",
            deadline_s=DOWNLOAD_S,
            content="import",
            filename=guest.image.filename,
            url=guest.image.url,
            **{"checksum": checksum, "checksum-algorithm": algorithm},
        )


@step.step
def create_or_update() -> step.Commands:
    """
    Ensure that the VM exists and is configured as declared.

    Reads the VM's configuration, pending values included; creates it, or sets and deletes only the keys that differ.
    Keys that nobody declares stay, disks are never removed. What a running VM cannot take becomes pending;
    `started` then restarts it. Keys that no token may set go over the node's SSH connection.
    """
    host, guest, node, client = _here()
    shell = NodeShell(context.ctx_state.get(), node)
    found = _own_state(client, guest, node)
    state: State = context.ctx_state.get()
    if found is None and not context.state.is_executing and order.destroying(state) and held.find(client, guest):
        step.noop(f"VM {guest.vmid} is made anew before, and gets its data disks back")
        return
    if found is None:
        left = read_state(client, guest.vmid)
        if left is not None:
            orphans, others = _orphans(client, guest, node, left)
            lines = (*_removed(orphans), *_left_alone(others))
            step.changes(f"clear VM {guest.vmid} on {node.name}, a creation of ours that was cut off", lines)
        new = {**config.declared(guest, node), **config.volumes(guest, node), **config.root_declared(guest)}
        step.changes(f"create VM {guest.vmid} on {node.name}", key_diff({}, _readable(new)))
        yield step.call(_create, client, guest, node, shell)
        return
    change = config.change(_staying(host, found.config), guest, node)
    if not change:
        step.noop(f"VM {guest.vmid} is configured as declared")
        return
    current = {key: str(found.config[key]) for key in change.keys if key in found.config}
    lines = key_diff(_readable(current), _readable(change.keys))
    sizes = tuple(f"{disk}: grows to {size}" for disk, size in change.growing.items())
    step.changes(f"change VM {guest.vmid} on {node.name}", lines + sizes)
    yield step.call(_update, client, guest, node, shell)


def _readable(keys: Mapping[str, str | None]) -> dict[str, str | None]:
    return {key: value if key != "sshkeys" or value is None else "(public key)" for key, value in keys.items()}


def _create(client: Client, guest: Guest, node: Node, shell: NodeShell) -> None:
    held.refuse(client, guest, None)
    make(client, guest, node, shell, {**config.declared(guest, node), **config.volumes(guest, node)})
    _update(client, guest, node, shell)


def make(client: Client, guest: Guest, node: Node, shell: NodeShell, keys: Mapping[str, str]) -> None:
    """Create the VM with this configuration, in place of what a cut-off creation or deletion of ours left.

    Raises:
        GpulabError: there is a VM of that id.
    """
    await_idle(client, guest, node)
    left = read_state(client, guest.vmid)
    if left is not None:
        if not is_leftover(client, guest, node, left):
            _check_ownership(guest, node, left)
            raise GpulabError(f"{guest.name}: VM {guest.vmid} was created meanwhile", resolution="deploy again")
        orphans, others = _orphans(client, guest, node, left)
        for line in (*_removed(orphans), *_left_alone(others)):
            logger.info(f"{context.ctx_host.get().print_prefix}{line}")
        # PVE lets only root take the lock away, and a token without Datastore.Allocate free no volume. One command, the
        # unlocking last: cut off before, it is known what is left; an unlocked VM without tag would look like somebody
        # else's.
        free = [("pvesm", "free", volume) for volume in orphans]
        shell.run(*free, ("qm", "unlock", str(guest.vmid)), ("qm", "destroy", str(guest.vmid)))
    client.run_task("POST", "nodes", node.name, "qemu", task="qmcreate", deadline_s=CREATE_S, vmid=guest.vmid, **keys)


def _orphans(client: Client, guest: Guest, node: Node, left: VmState) -> tuple[list[str], dict[str, str]]:
    """The volumes that a cut-off creation of ours left, and others of the VM's name with why they are not taken for it.

    Its own are those on the declared storage that are not older than its task and that no configuration names: the
    one of the VM that it was making has nothing but the lock, and another's may have been given one.
    """
    if left.lock != "create":
        return [], {}
    tasks = client.get("nodes", node.name, "tasks", source="all", typefilter="qmcreate", vmid=guest.vmid)
    began = max(int(task["starttime"]) for task in tasks)
    where = ("nodes", node.name, "storage", guest.disk_storage, "content")
    named = re.compile(rf"(?:{guest.vmid}/)?vm-{guest.vmid}-(?:disk-[0-9]+|cloudinit)(?:\.(?:raw|qcow2|vmdk))?")
    found = {
        str(item["volid"]): item
        for item in client.get(*where, content="images", vmid=guest.vmid)
        if named.fullmatch(str(item["volid"]).partition(":")[2])
    }
    if not found:
        return [], {}
    users = _users_of(client, set(found))
    orphans, others = [], {}
    for volume, item in sorted(found.items()):
        if volume in users:
            others[volume] = users[volume]
        elif "ctime" not in item:
            others[volume] = f"storage {guest.disk_storage} does not say when it was made"
        elif int(item["ctime"]) < began:
            others[volume] = "it is older than the creation"
        else:
            orphans.append(volume)
    return orphans, others


def _users_of(client: Client, volumes: Set[str]) -> dict[str, str]:
    """Which VM of the cluster has a volume in its configuration or in that of a snapshot, or may have."""
    users: dict[str, str] = {}
    for entry in client.get("cluster", "resources", type="vm"):
        if entry.get("type") != "qemu":
            continue
        if entry.get("status") == "unknown":
            # Its node is down.
            return dict.fromkeys(volumes, f"VM {entry['vmid']} on {entry['node']} may have it, which does not answer")
        where = ("nodes", entry["node"], "qemu", entry["vmid"])
        configs = [client.get(*where, "config"), client.get(*where, "config", current=1)]
        for snapshot in client.get(*where, "snapshot"):
            if snapshot["name"] != "current":
                configs.append(client.get(*where, "config", snapshot=snapshot["name"]))
        words = {word for keys in configs for value in keys.values() for word in re.split(r"[,=]", str(value))}
        users |= dict.fromkeys(volumes & words, f"VM {entry['vmid']} has it")
    return users


def _removed(orphans: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"remove {volume}, which it left" for volume in orphans)


def _left_alone(others: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"leave {volume}: {why}" for volume, why in others.items())


def _update(client: Client, guest: Guest, node: Node, shell: NodeShell) -> None:
    """Make the VM as declared, from what its configuration says now."""
    await_idle(client, guest, node)
    for left in reversed(range(TRIES)):
        try:
            _send(client, guest, node, shell)
            return
        except GpulabError as error:
            # What separates the VM from the declaration is another now.
            if not _changed_meanwhile(error) or not left:
                raise


def _changed_meanwhile(error: GpulabError) -> bool:
    """Did somebody change the VM after it was read? `qm` says so in the words of the API."""
    if isinstance(error, TaskFailed):
        return error.reason is DigestMismatch
    return isinstance(error, DigestMismatch) or kind_of(500, str(error)) is DigestMismatch


def _send(client: Client, guest: Guest, node: Node, shell: NodeShell) -> None:
    found, change = _read_change(client, guest, node)
    if change.setting or change.deleting:
        changes: dict[str, Any] = {**change.setting, "digest": found.config["digest"]}
        if change.deleting:
            changes["delete"] = ",".join(change.deleting)

        def in_force() -> bool:
            left = _read_change(client, guest, node)[1]
            return not (left.setting or left.deleting)

        client.change("PUT", "nodes", node.name, "qemu", guest.vmid, "config", applied=in_force, **changes)
        found, change = _read_change(client, guest, node)
    for disk, size in change.growing.items():
        _resize(client, guest, node, disk, size, found.config["digest"])
        found, _ = _read_change(client, guest, node)
    # After that: a value that waits for a restart would keep the size of before.
    found, change = _read_change(client, guest, node)
    if change.disks:
        _require_same_volumes(client, guest, node, change.disks)

        def disks_in_force() -> bool:
            return not _read_change(client, guest, node)[1].disks

        digest = found.config["digest"]
        where = ("nodes", node.name, "qemu", guest.vmid, "config")
        client.change("PUT", *where, applied=disks_in_force, **change.disks, digest=digest)
        found, change = _read_change(client, guest, node)
    if change.root_setting or change.root_deleting:
        words = [word for key, value in change.root_setting.items() for word in (f"--{key}", value)]
        if change.root_deleting:
            words += ["--delete", ",".join(change.root_deleting)]
        shell.run(("qm", "set", str(guest.vmid), *words, "--digest", found.config["digest"]))


def _require_same_volumes(client: Client, guest: Guest, node: Node, disks: Mapping[str, str]) -> None:
    """A running VM whose disk is sent with another volume has it unplugged.

    Raises:
        GpulabError: another volume than the one in use waits in the configuration, for the next start.
    """
    now = client.get("nodes", node.name, "qemu", guest.vmid, "config", current=1)
    for disk, value in disks.items():
        used, wanted = config.volume(str(now.get(disk, ""))), config.volume(value)
        if used != wanted:
            raise GpulabError(
                f"{guest.name}: {disk} of VM {guest.vmid} is {used or 'absent'}, and {wanted} waits to take its place",
                "Its options are not as declared, and can't be set without setting the volume, too.",
                f"on {node.name}: qm revert {guest.vmid} {disk}, or stop and start the VM; then deploy again",
            )


def _there(client: Client, guest: Guest, node: Node) -> VmState:
    """
    Raises:
        GpulabError: the VM has gone, or is not ours any more.
    """
    found = read_state(client, guest.vmid)
    if found is None:
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} was deleted meanwhile", resolution="deploy again"
        )
    _check_ownership(guest, node, found)
    return found


def _read_change(client: Client, guest: Guest, node: Node) -> tuple[VmState, config.Change]:
    found = _there(client, guest, node)
    return found, config.change(found.config, guest, node)


def _resize(client: Client, guest: Guest, node: Node, disk: str, size: str, digest: str) -> None:
    where = ("nodes", node.name, "qemu", guest.vmid, "resize")
    client.run_task("PUT", *where, task="resize", deadline_s=300, disk=disk, size=size, digest=digest)


class CloudInit(JsonFact):
    """`{finished: bool}`: has cloud-init come to its end in this guest? A killed run can leave one in the middle."""

    absent = {"finished": True}
    script = """
import json, os
print(json.dumps({"finished": os.path.exists("/var/lib/cloud/instance/boot-finished")}))
"""


@step.step
def started() -> step.Commands:
    """
    Ensure that the guest runs with its configuration and that its cloud-init has finished.

    A guest with changes of ours that a running VM cannot take is shut down and started when `allow_restart` says so;
    otherwise it says what waits, and ends there. Pending changes of others and of cloud-init are named and never a
    reason for a restart. The SSH host key of a guest that has none pinned is read through the guest agent.
    """
    host, guest, node, client = _here()
    found = _own_state(client, guest, node)
    running = found is not None and found.status == "running"
    waiting = _waiting(client, guest, node, found) if running and found is not None else _Waiting()
    if running and found is not None and not waiting.restart:
        if waiting.told:
            step.waits(f"{guest.name}: takes effect when it is next restarted", waiting.told)
        if getattr(host.connector, "assumed", False):
            yield step.call(_first_contact, host, client, guest, True)
            return
        if context.state.is_executing and found.uptime_s < guest.boot_timeout_s:
            # It may have been started again since its facts were read: its node was rebooted in this run.
            host.connector.await_usable(guest.boot_timeout_s - found.uptime_s)
        if not step.read(CloudInit)["finished"]:
            step.changes(f"wait for cloud-init of {guest.name}")
            yield step.call(_first_contact, host, client, guest, True)
            return
        step.noop("; ".join([f"{guest.name} runs", *waiting.told]))
        return
    if waiting.restart:
        if not guest.allow_restart:
            error = GpulabError(
                f"{guest.name} needs a restart for {', '.join(waiting.restart)}; allow_restart is false",
                resolution="set allow_restart, or stop and start the VM when it suits its users",
            )
            step.waits(error.brief, tuple(str(error).splitlines()[1:]))
            yield step.call(_refuse, error)
            return
        step.reboots(f"a running VM cannot take {', '.join(waiting.restart)}")
    step.changes(f"{'restart' if waiting.restart else 'start'} {guest.name}")
    yield step.call(_start, client, guest, node, bool(waiting.restart))
    yield step.call(_first_contact, host, client, guest, found is not None)


def _refuse(error: GpulabError) -> None:
    raise error


@dataclass(frozen=True)
class _Waiting:
    """What waits for a restart of the VM: keys of ours that are a reason for one, and lines about what is none."""

    restart: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


def _waiting(client: Client, guest: Guest, node: Node, found: VmState) -> _Waiting:
    where = ("nodes", node.name, "qemu", guest.vmid)
    items = client.get(*where, "pending")
    pending = config.waiting(items)
    # While a run is planned, its changes have not been sent yet.
    ours = {key for key in pending if config.is_declared(key, guest, node)}
    ours |= set(config.own_disks_waiting(items))
    ours |= set(config.change(_staying(context.ctx_host.get(), found.config), guest, node).restart)
    others = [key for key in pending if key not in ours]
    # These never stand in `pending`: cloud-init's drive is made anew at each start.
    seed = config.waiting(client.get(*where, "cloudinit"))
    told = []
    if others:
        told.append(f"pending, set by somebody else: {', '.join(others)}")
    if seed:
        told.append(f"cloud-init has not seen yet: {', '.join(seed)}")
    return _Waiting(tuple(sorted(ours)), tuple(told))


def _start(client: Client, guest: Guest, node: Node, running: bool) -> None:
    await_idle(client, guest, node)
    # It may have become somebody else's since it was looked at; no digest goes with a start.
    _there(client, guest, node)
    status = ("nodes", node.name, "qemu", guest.vmid, "status")
    if running:
        client.run_task("POST", *status, "shutdown", task="qmshutdown", deadline_s=300, forceStop=1, timeout=120)
    if client.get(*status, "current")["status"] != "running":
        client.run_task("POST", *status, "start", task="qmstart", deadline_s=START_S)


def _first_contact(host: Host, client: Client, guest: Guest, existed: bool) -> None:
    """Wait for the agent, pin the host key of a new guest, open SSH, wait for cloud-init."""
    deadline = time.monotonic() + guest.boot_timeout_s
    connector = host.connector
    state = guest.state
    while not (existed and host_keys.known(state, guest.ssh_hostname, guest.ssh_port)):
        try:
            pin_host_keys(client, guest, state)
            break
        except GpulabError as error:
            if time.monotonic() >= deadline:
                raise GpulabError(
                    f"{guest.name}: its agent has not shown a host key after {guest.boot_timeout_s} s",
                    f"Last answer: {error.brief}",
                    f"look at its console: qm terminal {guest.vmid} on {client.node.name}",
                ) from None
        time.sleep(0.5)
    connector.reconnect(max(5.0, deadline - time.monotonic()))
    connector.assumed = False
    # Exit status 2 is "done, with recoverable errors"; the words say more than the status.
    left = max(5, int(deadline - time.monotonic()))
    wait = StringCommand("timeout", str(left), "cloud-init", "status", "--wait", "--long")
    done, output = host.run_shell_command(wait, print_output=False, print_input=False)
    if not done and "status: done" not in output.stdout:
        raise GpulabError(
            f"{guest.name}: cloud-init failed, or did not end within {guest.boot_timeout_s} s of the start",
            output.output[-2000:],
            "/var/log/cloud-init-output.log on the guest says what it did",
        )
