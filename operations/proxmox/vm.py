# SPDX-License-Identifier: MIT
"""The GPU VM through the API: preflight, image, create or update, start, first contact."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyinfra import context
from pyinfra.api import Host, QuoteString, State, StringCommand

import inventory
from inventory import GpulabError, Guest, Node
from inventory.secrets import Secrets
from operations import step
from operations.facts import JsonFact
from operations.plan import key_diff
from operations.proxmox import access, config, host_keys
from operations.proxmox.client import ApiError, Client
from operations.proxmox.config import is_ours

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
#: Tasks that change nothing: somebody looks at the VM's screen.
_CONSOLES = ("vncproxy", "vncshell", "termproxy", "spiceproxy", "spiceshell")

#: What several guests share (an image on a storage, a node's SSH connection) is handled one at a time.
_one_at_a_time: defaultdict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True)
class VmState:
    """A VM as the API shows it. `uptime_s`: seconds since its start, 0 when stopped."""

    status: str
    uptime_s: float = 0
    lock: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def read_state(client: Client, vmid: int) -> VmState | None:
    """The VM on the client's node, or None when there is none."""
    where = ("nodes", client.node.name, "qemu", vmid)
    try:
        found = client.get(*where, "config")
    except ApiError as error:
        if error.status == 500 and "does not exist" in error.message:
            return None
        raise
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
    _, guest, node, client = _here()
    major = int(str(client.get("version")["version"]).split(".")[0])
    if major not in (8, 9):
        raise GpulabError(f"{node.name}: Proxmox VE {major}: expected 8 or 9")
    lacking = access.missing(client.get("access", "permissions"), node, major, {guest.disk_storage})
    if lacking:
        raise GpulabError(
            f"{node.name}: the API token lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)),
            "\n".join(f"  {line}" for line in lacking),
            f"make bootstrap LAB=… gives the role {node.api.role} what is missing",
        )
    found = _own_state(client, guest, node)
    stores = {
        item["storage"]: str(item.get("content", "")).split(",") for item in client.get("nodes", node.name, "storage")
    }
    for storage, kinds in ((node.image_storage, ("import", "snippets")), (guest.disk_storage, ("images",))):
        for kind in kinds:
            if kind not in stores.get(storage, []):
                seen = ", ".join(stores[storage]) if storage in stores else "no such storage"
                raise GpulabError(
                    f"{node.name}: storage {storage}: expected content type {kind}, seen: {seen}",
                    resolution="make bootstrap LAB=… enables import and snippets on the image storage",
                )
    running = found is not None and found.status == "running"
    if not running:
        _check_memory(client, guest, node)
    if guest.gpu is not None and not (running and found is not None and _has_gpu(found, guest)):
        _check_gpu_free(client, guest, node)
    step.noop(f"{node.name} can hold VM {guest.vmid}")
    yield from ()


def _own_state(client: Client, guest: Guest, node: Node) -> VmState | None:
    """The guest's VM, or None when there is none yet, or no more of it than a cut-off creation of ours.

    Raises:
        GpulabError: the VM is not ours, or is being created right now.
    """
    found = read_state(client, guest.vmid)
    if found is None or _is_leftover(client, guest, node, found):
        return None
    _check_ownership(guest, node, found)
    return found


def _check_ownership(guest: Guest, node: Node, found: VmState) -> None:
    if is_ours(found.config):
        return
    if found.lock == "create":
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} is a creation that was cut off (lock: create)",
            "The node's task list does not show that it was gpulab's.",
            f"on {node.name}: qm unlock {guest.vmid} && qm destroy {guest.vmid}, then deploy again",
        )
    raise GpulabError(
        f"{guest.name}: vmid = {guest.vmid}: {node.name} has a VM of that id that is not ours",
        f"Its name is {found.config.get('name', '(none)')!r}; it lacks the tag {config.TAG!r}.",
        "choose another vmid in the inventory",
    )


def _is_leftover(client: Client, guest: Guest, node: Node, found: VmState) -> bool:
    """Is it what a killed creation leaves: a lock, no tag, and a task of our own token that made it?

    Raises:
        GpulabError: that task still runs.
    """
    if found.lock != "create" or is_ours(found.config):
        return False
    tasks = client.get("nodes", node.name, "tasks", source="all", typefilter="qmcreate", vmid=guest.vmid)
    # The last creation made what is there; an older one of ours says nothing about it.
    last = max(tasks, key=lambda task: int(task["starttime"]), default=None)
    if last is None or who(last) != own_token(node):
        return False
    if "endtime" not in last and _runs(client, node, last):
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} is being created",
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


def _await_idle(client: Client, guest: Guest, node: Node) -> None:
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
    _, guest, node, client = _here()
    shell = _NodeShell(context.ctx_state.get(), node)
    found = _own_state(client, guest, node)
    if found is None:
        if read_state(client, guest.vmid) is not None:
            step.changes(f"clear VM {guest.vmid} on {node.name}, a creation of ours that was cut off")
        new = {**config.declared(guest, node), **config.volumes(guest, node), **config.root_declared(guest)}
        step.changes(f"create VM {guest.vmid} on {node.name}", key_diff({}, _readable(new)))
        yield step.call(_create, client, guest, node, shell)
        return
    change = config.change(found.config, guest, node)
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


class _NodeShell:
    """Root on the guest's node, over the node's own SSH connection. It opens in a run that is limited to guests too."""

    def __init__(self, state: State, node: Node) -> None:
        self.node = node
        self.host: Host = state.inventory.get_host(node.name)

    def run(self, *commands: Sequence[str]) -> None:
        """Run the commands as one, each if the one before it went well.

        Raises:
            GpulabError: the node does not answer or a command failed.
        """
        lines = [StringCommand(*(QuoteString(word) for word in words)) for words in commands]
        command = StringCommand(*lines[:1], *(part for line in lines[1:] for part in ("&&", line)))
        with _one_at_a_time["ssh", self.node.name]:
            done, output = self.host.run_shell_command(command, print_output=False, print_input=False)
        if not done:
            what = " ".join(commands[0][:3])
            raise GpulabError(f"{self.node.name}: {what} failed over SSH", output.stderr.strip()[-2000:])


def _create(client: Client, guest: Guest, node: Node, shell: _NodeShell) -> None:
    _await_idle(client, guest, node)
    left = read_state(client, guest.vmid)
    if left is not None:
        if not _is_leftover(client, guest, node, left):
            _check_ownership(guest, node, left)
            raise GpulabError(f"{guest.name}: VM {guest.vmid} was created meanwhile", resolution="deploy again")
        # PVE lets only root take the lock away. Volumes that no configuration names stay: they may hold data.
        # One command: cut off between the two, an unlocked VM without tag would look like somebody else's.
        shell.run(("qm", "unlock", str(guest.vmid)), ("qm", "destroy", str(guest.vmid)))
    keys = {**config.declared(guest, node), **config.volumes(guest, node)}
    client.run_task("POST", "nodes", node.name, "qemu", task="qmcreate", deadline_s=CREATE_S, vmid=guest.vmid, **keys)
    _update(client, guest, node, shell)


def _update(client: Client, guest: Guest, node: Node, shell: _NodeShell) -> None:
    """Make the VM as declared, from what its configuration says now."""
    _await_idle(client, guest, node)
    for left in reversed(range(TRIES)):
        try:
            _send(client, guest, node, shell)
            return
        except GpulabError as error:
            # Somebody changed the VM after it was read: what separates it from the declaration is another now. The
            # API, its tasks and `qm` say so in the same words.
            if "checksum mismatch" not in str(error) or not left:
                raise


def _send(client: Client, guest: Guest, node: Node, shell: _NodeShell) -> None:
    found, change = _read_change(client, guest, node)
    if change.setting or change.deleting:
        changes: dict[str, Any] = {**change.setting, "digest": found.config["digest"]}
        if change.deleting:
            changes["delete"] = ",".join(change.deleting)
        client.change("PUT", "nodes", node.name, "qemu", guest.vmid, "config", **changes)
        found, change = _read_change(client, guest, node)
    for disk, size in change.growing.items():
        _resize(client, guest, node, disk, size, found.config["digest"])
        found, _ = _read_change(client, guest, node)
    if change.root_setting or change.root_deleting:
        words = [word for key, value in change.root_setting.items() for word in (f"--{key}", value)]
        if change.root_deleting:
            words += ["--delete", ",".join(change.root_deleting)]
        shell.run(("qm", "set", str(guest.vmid), *words, "--digest", found.config["digest"]))


def _read_change(client: Client, guest: Guest, node: Node) -> tuple[VmState, config.Change]:
    found = read_state(client, guest.vmid)
    if found is None:
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} was deleted meanwhile", resolution="deploy again"
        )
    _check_ownership(guest, node, found)
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

    A guest with changes of ours that a running VM cannot take is shut down and started when `allow_reboot` says so;
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
        if not guest.allow_reboot:
            error = GpulabError(
                f"{guest.name} needs a restart for {', '.join(waiting.restart)}; allow_reboot is false",
                resolution="set allow_reboot, or stop and start the VM when it suits its users",
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
    pending = config.waiting(client.get(*where, "pending"))
    # While a run is planned, its changes have not been sent yet.
    ours = {key for key in pending if config.is_declared(key, guest, node)}
    ours |= set(config.change(found.config, guest, node).restart)
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
    _await_idle(client, guest, node)
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
