# SPDX-License-Identifier: MIT
"""The GPU VM through the API: preflight, image, create or update, start, first contact."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyinfra import context
from pyinfra.api import Host, StringCommand

import inventory
from inventory import GpulabError, Guest, Node
from operations import step
from operations.facts import JsonFact
from operations.plan import key_diff
from operations.proxmox import access, config, host_keys, mapping
from operations.proxmox.client import ApiError, Client
from operations.proxmox.config import is_ours

__all__ = ["VmState", "create_or_update", "image", "is_ours", "pin_host_keys", "preflight", "read_state", "started"]

#: Seconds for an import: some tens of GiB on a slow disk.
CREATE_S = 1800.0
DOWNLOAD_S = 3600.0
#: Seconds until a start has ended. PVE's own limit: the memory in GiB, four times that with hostpci, and a rest.
START_S = 900.0

#: What several guests share (an image on a storage) is handled one at a time.
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
    found = read_state(client, guest.vmid)
    if found is not None:
        _check_ownership(guest, node, found)
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
    if found is None or found.status != "running":
        _check_memory(client, guest, node)
        if guest.gpu is not None:
            _check_gpu_free(client, guest, node)
    step.noop(f"{node.name} can hold VM {guest.vmid}")
    yield from ()


def _check_ownership(guest: Guest, node: Node, found: VmState) -> None:
    if is_ours(found.config):
        return
    if found.lock == "create":
        raise GpulabError(
            f"{guest.name}: VM {guest.vmid} on {node.name} is a creation that was cut off (lock: create)",
            resolution=f"on {node.name}: qm unlock {guest.vmid} && qm destroy {guest.vmid}, then deploy again",
        )
    raise GpulabError(
        f"{guest.name}: vmid = {guest.vmid}: {node.name} has a VM of that id that is not ours",
        f"Its name is {found.config.get('name', '(none)')!r}; it lacks the tag {config.TAG!r}.",
        "choose another vmid in the inventory",
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
    free = min(unused, (int(memory["total"]) - others) // 2**20 - headroom)
    if free < guest.memory_mib:
        raise GpulabError(
            f"{guest.name}: memory_mib = {guest.memory_mib}: {node.name} has {free} MiB for it",
            f"{unused} MiB are unused; running VMs may take {others // 2**20} MiB, the host keeps {headroom} MiB. "
            "Passthrough pins all of a guest's memory from its start.",
            "lower `memory_mib` or the node's `headroom_gib`, or stop another VM",
        )


def _check_gpu_free(client: Client, guest: Guest, node: Node) -> None:
    address = node.device(str(guest.gpu)).address or _mapped_address(client, str(guest.gpu), node)
    for other in client.get("nodes", node.name, "qemu"):
        if int(other["vmid"]) == guest.vmid or other.get("status") != "running":
            continue
        keys = client.get("nodes", node.name, "qemu", other["vmid"], "config")
        for key, value in keys.items():
            if key.startswith("hostpci") and _uses(str(value), str(guest.gpu), address):
                raise GpulabError(
                    f"{guest.name}: gpu = {guest.gpu!r}: VM {other['vmid']} ({other.get('name')}) is using it",
                    f"Its {key} is {value}.",
                    f"stop VM {other['vmid']}, or choose another device",
                )


def _mapped_address(client: Client, name: str, node: Node) -> str | None:
    """Where the mapping leads to on the node, or None before it has been made."""
    found = mapping.read(client, name)
    entries = [dict(part.split("=", 1) for part in entry.split(",")) for entry in (found or {"map": []})["map"]]
    return next((entry["path"] for entry in entries if entry.get("node") == node.name), None)


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

    Reads the VM's configuration; creates it, or sets and deletes only the keys that differ. Keys that nobody declares
    stay, disks are never removed. What a running VM cannot take becomes pending; `started` then restarts it.
    """
    _, guest, node, client = _here()
    found = read_state(client, guest.vmid)
    wanted = config.declared(guest, node)
    if found is None:
        new = {**wanted, **config.volumes(guest, node)}
        step.changes(f"create VM {guest.vmid} on {node.name}", key_diff({}, _readable(new)))
        yield step.call(_create, client, guest, node, new)
        return
    _check_ownership(guest, node, found)
    setting, deleting = config.difference(found.config, wanted)
    growing = config.growth(found.config, guest)
    if not (setting or deleting or growing):
        step.noop(f"VM {guest.vmid} is configured as declared")
        return
    current = {key: str(found.config[key]) for key in [*setting, *deleting] if key in found.config}
    lines = key_diff(_readable(current), {**_readable(setting), **dict.fromkeys(deleting)})
    sizes = tuple(f"{disk}: grows to {size}" for disk, size in growing.items())
    step.changes(f"change VM {guest.vmid} on {node.name}", lines + sizes)
    yield step.call(_update, client, guest, node, found, setting, deleting, growing)


def _readable(keys: Mapping[str, str]) -> dict[str, str | None]:
    return {key: value if key != "sshkeys" else "(public key)" for key, value in keys.items()}


def _create(client: Client, guest: Guest, node: Node, keys: Mapping[str, str]) -> None:
    client.run_task("POST", "nodes", node.name, "qemu", task="qmcreate", deadline_s=CREATE_S, vmid=guest.vmid, **keys)
    found = read_state(client, guest.vmid)
    for disk, size in (config.growth(found.config, guest) if found else {}).items():
        _resize(client, guest, node, disk, size)


def _update(
    client: Client,
    guest: Guest,
    node: Node,
    found: VmState,
    setting: Mapping[str, str],
    deleting: list[str],
    growing: Mapping[str, str],
) -> None:
    if setting or deleting:
        changes: dict[str, Any] = {**setting, "digest": found.config["digest"]}
        if deleting:
            changes["delete"] = ",".join(deleting)
        client.change("PUT", "nodes", node.name, "qemu", guest.vmid, "config", **changes)
    for disk, size in growing.items():
        _resize(client, guest, node, disk, size)


def _resize(client: Client, guest: Guest, node: Node, disk: str, size: str) -> None:
    where = ("nodes", node.name, "qemu", guest.vmid, "resize")
    client.run_task("PUT", *where, task="resize", deadline_s=300, disk=disk, size=size)


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

    A guest with pending changes is shut down and started when `allow_reboot` says so. The SSH host key of a guest
    that has none pinned is read through the guest agent.
    """
    host, guest, node, client = _here()
    found = read_state(client, guest.vmid)
    pending = _pending(client, guest, node) if found is not None and found.status == "running" else []
    if found is not None and found.status == "running" and not pending:
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
        step.noop(f"{guest.name} runs")
        return
    if pending:
        if not guest.allow_reboot:
            raise GpulabError(
                f"{guest.name} needs a restart for {', '.join(pending)}; allow_reboot is false",
                resolution="set allow_reboot, or stop and start the VM when it suits its users",
            )
        step.reboots(f"pending: {', '.join(pending)}")
    step.changes(f"{'restart' if pending else 'start'} {guest.name}")
    yield step.call(_start, client, guest, node, bool(pending))
    yield step.call(_first_contact, host, client, guest, found is not None)


def _pending(client: Client, guest: Guest, node: Node) -> list[str]:
    items = client.get("nodes", node.name, "qemu", guest.vmid, "pending")
    return sorted(str(item["key"]) for item in items if "pending" in item or item.get("delete"))


def _start(client: Client, guest: Guest, node: Node, running: bool) -> None:
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
