# SPDX-License-Identifier: MIT
"""A backup proven: restored into the spare id, without GPU and network, and its data compared with the guest's.

Nothing is ever written to the guest's own VM. A run that was killed is simply run again: what it left at the spare id
carries our tags and is removed first.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from pyinfra import context, logger
from pyinfra.api import Host, State
from pyinfra.api.state import StateStage

import inventory
from inventory import GpulabError, Guest, Lab, Node
from operations import step
from operations.facts import python
from operations.proxmox import access, backup, config, manifest, order, vm
from operations.proxmox.backup import Archive
from operations.proxmox.client import ApiError, Client
from operations.proxmox.manifest import Manifest
from operations.proxmox.node_shell import NodeShell
from operations.proxmox.vm import VmState
from operations.remote import program

#: Beside our own tag: a VM that a restore made, and that the next one may remove.
RESTORED = "gpulab-restore"
#: Seconds: a restore from a slow storage, reading a whole data disk, a stop.
RESTORE_S, READ_S, STOP_S = 12 * 3600.0, 6 * 3600, 120.0
#: Seconds for which the restored guest's data disk may be late.
MOUNT_S = 60
#: MiB that are enough to boot and to read files.
MEMORY_MIB = 2048
#: What ties a VM to its node's hardware, or runs programs on the node.
_HOST_BOUND = re.compile(r"^((hostpci|usb|parallel|virtiofs|numa)[0-9]+|numa|affinity|hugepages|args|hookscript)$")
#: All that a restore has written until its end; one that failed leaves it without the lock.
_UNFINISHED = {"digest", "lock", "memory", "meta"}
#: What its log says of each volume that it makes.
_MADE = re.compile(r"new volume ID is '([^']+)'")
_PROGRAM = program(__file__, "manifest")


@dataclass
class Asked:
    """What this run of restore.py was asked for. `archive`: a volume id; None: the newest."""

    run: str
    fresh: bool = False
    keep: bool = False
    archive: str | None = None
    #: The backup that was restored in this run.
    chosen: Archive | None = None


_asked: WeakKeyDictionary[State, Asked] = WeakKeyDictionary()


def begun(state: State, lab: Lab) -> bool:
    """Is this a run of restore.py? It is then checked to be about exactly one guest, before any connection.

    Raises:
        CliError: it is about several hosts, none, or a node.
    """
    if order.only_guest(state, lab, "restore.py", "tests the backup of") is None:
        return False
    if state not in _asked:
        words = state.inventory.override_data
        archive = words.get("archive")
        _asked[state] = Asked(
            run=order.this_run(),
            fresh=bool(words.get("fresh")),
            keep=bool(words.get("keep")),
            archive=None if archive is None else str(archive),
        )
    return True


def current() -> Asked:
    """What this run was asked for, for restore.py.

    Raises:
        GpulabError: the file is read in a run that no guest's connector has seen.
    """
    found = _asked.get(context.ctx_state.get())
    if found is None:
        raise GpulabError(
            "restore.py tests the backup of exactly one guest; nothing was done.",
            resolution="pyinfra inventory/lab.py restore.py --limit gpu01",
        )
    return found


# Pure.


def as_spare(guest: Guest) -> Guest:
    """The guest under the spare id, for what reads a VM by a guest."""
    return guest.model_copy(update={"vmid": backup.declared(guest).spare_vmid})


def overriding(guest: Guest, archive: Archive) -> dict[str, Any]:
    """What the restored VM has from its first moment in place of what the archive says."""
    return {
        "name": f"{guest.name}-restored",
        "description": f"Restored by gpulab from {archive.volid}, to compare its data.",
        "tags": f"{config.TAG};{RESTORED}",
        "onboot": 0,
        "protection": 0,
        "memory": min(guest.memory_mib, MEMORY_MIB),
    }


def harmless(found: Mapping[str, Any], guest: Guest) -> tuple[dict[str, str], list[str]]:
    """What has to be set and deleted before the restored VM may start beside the guest: keys to set, keys to delete.

    Without GPU, other devices of the node and scripts; with every network card unplugged, or it would answer at the
    guest's address.
    """
    deleting = [key for key in sorted(found) if _HOST_BOUND.match(key)]
    deleting += [key for key in sorted(found) if re.match(r"serial[0-9]+$", key) and str(found[key]) != "socket"]
    wanted = {"onboot": "0", "protection": "0", "tags": f"{config.TAG};{RESTORED}", "name": f"{guest.name}-restored"}
    wanted["memory"] = str(min(guest.memory_mib, MEMORY_MIB))
    setting = {key: value for key, value in wanted.items() if _differs(key, found.get(key), value)}
    for key, value in found.items():
        if re.match(r"net[0-9]+$", key) and "link_down=1" not in str(value).split(","):
            setting[key] = ",".join(
                [*(part for part in str(value).split(",") if "link_down=" not in part), "link_down=1"]
            )
    disk = str(found.get(config.DATA_DISK, ""))
    # Services of the restored system start too, and would write. A disk that was copied while nothing held it still
    # has a journal to replay first.
    if disk and guest.backup is not None and guest.backup.mode != "suspend" and "ro=1" not in disk.split(","):
        setting[config.DATA_DISK] = f"{disk},ro=1"
    return setting, deleting


def _differs(key: str, found: object, wanted: str) -> bool:
    return config.canonical(key, str(found if found is not None else "0")) != config.canonical(key, wanted)


def is_restored(found: Mapping[str, Any]) -> bool:
    """Did a restore make it? A guest that has left the inventory, or a keeper of data, did not come so."""
    return {config.TAG, RESTORED} <= set(re.split(r"[;, ]+", str(found.get("tags", ""))))


def read_by_agent(answer: str, name: str) -> str:
    """What a program printed that `qm guest exec` ran.

    Raises:
        GpulabError: it failed, was cut short, or the agent's answer is something else.
    """
    try:
        found: Any = json.loads(answer)
        # Without an end there is only the process's number.
        done, status = bool(found.get("exited")), found.get("exitcode")
    except (ValueError, AttributeError):
        raise GpulabError(f"{name}: its agent gave no answer: {answer[:120]!r}") from None
    if not done or status != 0:
        what = "did not end in time" if not done else f"failed (exit status {status})"
        raise GpulabError(f"{name}: reading its data disk {what}", str(found.get("err-data", ""))[-2000:])
    if found.get("out-truncated"):
        raise GpulabError(
            f"{name}: its agent cut the list of files short: it holds 16 MiB",
            "A data disk with some hundred thousand files is more than this comparison can take.",
        )
    return str(found.get("out-data", ""))


# Reading.


def _here() -> tuple[Host, Guest, Node, Client]:
    host: Host = context.ctx_host.get()
    lab = inventory.of_run(context.ctx_state.get())
    guest = lab.guests[host.name]
    node = lab.node_of(guest)
    return host, guest, node, Client(node, host=host)


def _shell(node: Node) -> NodeShell:
    return NodeShell(context.ctx_state.get(), node)


def _executing() -> bool:
    return context.state.current_stage >= StateStage.Execute


def _choose(client: Client, guest: Guest, node: Node, asked: Asked) -> Archive:
    found = backup.read_archives(client, guest, node)
    storage = backup.declared(guest).storage
    listed = ", ".join(each.volid for each in found[:5]) or "none"
    if asked.archive is not None:
        for each in found:
            if each.volid == asked.archive:
                return each
        raise GpulabError(
            f"{guest.name}: archive = {asked.archive!r}: {storage} has no such backup of VM {guest.vmid}",
            f"It has {listed}.",
        )
    if not found:
        raise GpulabError(
            f"{guest.name}: {storage} on {node.name} has no backup of VM {guest.vmid}; nothing was done",
            resolution="--data fresh=1 takes one first",
        )
    return found[0]


def _read_spare(client: Client, guest: Guest, node: Node) -> VmState | None:
    """What an earlier restore left at the spare id, None when the id is free.

    Raises:
        GpulabError: the id is somebody else's, or of a task that runs right now.
    """
    spare = as_spare(guest)
    for item in client.get("cluster", "resources", type="vm"):
        if int(item["vmid"]) == spare.vmid and (item.get("node") != node.name or item.get("type") != "qemu"):
            what = f"{item.get('type')} {spare.vmid} ({item.get('name', 'no name')}) on {item.get('node')}"
            raise _taken(guest, f"{what} has it")
    found = vm.read_state(client, spare.vmid)
    if found is None or is_restored(found.config):
        return found
    if set(found.config) <= _UNFINISHED and _own_restore(client, spare, node) is not None:
        return found
    name, tags = found.config.get("name", "(none)"), found.config.get("tags", "(none)")
    raise _taken(guest, f"{node.name} has a VM of that id that no restore made: its name is {name!r}, its tags {tags}")


def _own_restore(client: Client, spare: Guest, node: Node) -> str | None:
    """The last restore into the spare id, if it was ours."""
    tasks = client.get("nodes", node.name, "tasks", source="all", typefilter="qmrestore", vmid=spare.vmid)
    last = max(tasks, key=lambda task: int(task["starttime"]), default=None)
    return str(last["upid"]) if last is not None and vm.who(last) == vm.own_token(node) else None


def _orphans(client: Client, guest: Guest, node: Node) -> list[str]:
    """The volumes that a killed restore of ours had made: those that its log names and that are still the spare id's.

    Left behind, they would be in the way of the next one.
    """
    spare = as_spare(guest)
    upid = _own_restore(client, spare, node)
    made = _MADE.findall("\n".join(client.log(upid))) if upid is not None else []
    where = ("nodes", node.name, "storage", guest.disk_storage, "content")
    listed = {str(item["volid"]) for item in client.get(*where, content="images", vmid=spare.vmid)}
    return [volid for volid in made if volid in listed]


def _taken(guest: Guest, why: str) -> GpulabError:
    return GpulabError(
        f"{guest.name}: backup.spare_vmid = {as_spare(guest).vmid}: the id is not free",
        f"{why[0].upper()}{why[1:]}. Nothing was done.",
        "choose another spare_vmid in the inventory",
    )


def _check_space(client: Client, guest: Guest, node: Node, archive: Archive | None) -> None:
    """Thin storages hold more than they have: the archive's size is the least that it takes, the disks' the most."""
    free = int(client.get("nodes", node.name, "storage", guest.disk_storage, "status")["avail"])
    if archive is not None and free < archive.size:
        raise GpulabError(
            f"{guest.name}: {guest.disk_storage} on {node.name} has {free / 2**30:.1f} GiB free; "
            f"{archive.volid} takes more than {archive.size / 2**30:.1f} GiB"
        )
    whole = (guest.system_disk_gib + guest.data_disk.size_gib) * 2**30
    if free < whole:
        logger.warning(
            f"{guest.name}: {guest.disk_storage} on {node.name} has {free / 2**30:.0f} GiB free; full, the restored "
            f"disks would take {whole / 2**30:.0f} GiB"
        )


def _check_memory(client: Client, guest: Guest, node: Node) -> None:
    memory = client.get("nodes", node.name, "status")["memory"]
    free = (int(memory["total"]) - int(memory["used"])) // 2**20 - round(node.passthrough.headroom_gib * 1024)
    needed = min(guest.memory_mib, MEMORY_MIB)
    if free < needed:
        raise GpulabError(
            f"{guest.name}: {node.name} has {max(free, 0)} MiB of memory for the restored VM, which takes {needed} MiB",
            f"The host keeps headroom_gib = {node.passthrough.headroom_gib}.",
            "stop another VM, or lower the node's `headroom_gib`",
        )


# The steps of restore.py.


@step.step
def preflight() -> step.Commands:
    """
    Refuse what cannot prove anything, and show all of it in the plan. Changes nothing.

    Takes the lock that keeps a second restore, or a rebuild of this guest, away.
    """
    _, guest, node, client = _here()
    asked, spare = current(), as_spare(guest)
    storage = backup.declared(guest).storage
    if not guest.data_disk.backup:
        raise GpulabError(
            f"{guest.name}: data_disk.backup = False: its backups hold no data disk, so there is nothing to compare",
            "Nothing was done.",
        )
    if _executing():
        order.lock(context.ctx_state.get(), guest, asked.run)
    major = int(str(client.get("version")["version"]).split(".")[0])
    lacking = access.missing(client.get("access", "permissions"), node, major, {guest.disk_storage}, storage)
    if lacking:
        raise GpulabError(
            f"{node.name}: the API token lacks {lacking[0]}",
            "\n".join(f"  {line}" for line in lacking),
            f"make bootstrap LAB=… gives the role {node.api.role} what is missing",
        )
    if step.assumed():
        raise GpulabError(
            f"{guest.name} does not run: there is nothing to compare a backup with; nothing was done",
            resolution="docs/backup.md says how to restore a guest that is lost",
        )
    archive = None if asked.fresh and asked.archive is None else _choose(client, guest, node, asked)
    left = _read_spare(client, guest, node)
    if left is None or left.status != "running":
        _check_memory(client, guest, node)
    _check_space(client, guest, node, archive)
    where = f"VM {spare.vmid} on {node.name}"
    step.changes(
        f"test a backup of {guest.name} in {where}",
        (
            *([f"remove {where}, which an earlier test left"] if left is not None else []),
            *([f"back VM {guest.vmid} up to {storage}"] if archive is None else []),
            f"restore {archive.volid if archive else 'that backup'} to {guest.disk_storage}",
            f"start it without GPU and network, compare {guest.data_disk.mount} with {guest.name}'s",
            f"{'stop and keep' if asked.keep else 'remove'} it; VM {guest.vmid} is not touched",
        ),
    )
    yield from ()


@step.step
def cleared() -> step.Commands:
    """Remove what an earlier test left at the spare id."""
    _, guest, node, client = _here()
    if _read_spare(client, guest, node) is None:
        step.noop(f"VM {as_spare(guest).vmid} does not exist")
        return
    yield step.call(_remove, client, guest, node, _shell(node))


def _remove(client: Client, guest: Guest, node: Node, shell: NodeShell) -> None:
    """Stop and delete the VM at the spare id, whatever a killed run left there."""
    spare = as_spare(guest)
    _await_restore(client, guest, node)
    found = _read_spare(client, guest, node)
    if found is None:
        return
    if not is_restored(found.config):
        orphans = _orphans(client, guest, node)
        # First what nobody could tell from somebody's data later. PVE lets only root take the lock away; one command:
        # cut off between the two, an unlocked VM without tag would look like somebody else's.
        freeing = [("pvesm", "free", volid) for volid in orphans]
        shell.run(*freeing, ("qm", "unlock", str(spare.vmid)), ("qm", "destroy", str(spare.vmid)))
        return
    _stop(client, guest, node)
    where = ("nodes", node.name, "qemu", spare.vmid)
    if str(found.config.get("protection", 0)) == "1":
        client.change("PUT", *where, "config", protection=0, digest=found.config["digest"])
    client.run_task("DELETE", *where, task="qmdestroy", deadline_s=600, purge=1)


def _await_restore(client: Client, guest: Guest, node: Node) -> None:
    """A restore goes on when the run that asked for it is killed."""
    for task in vm.at_work(client, as_spare(guest), node):
        if vm.who(task) == vm.own_token(node) and task["type"] == "qmrestore":
            logger.info(f"{guest.name}: waits for {vm.described(task)}")
            try:
                client.wait(str(task["upid"]), RESTORE_S)
            except GpulabError as error:
                # How it ended is seen in the VM itself.
                logger.info(error.brief)
    vm.await_idle(client, as_spare(guest), node)


def _stop(client: Client, guest: Guest, node: Node) -> None:
    status = ("nodes", node.name, "qemu", as_spare(guest).vmid, "status")
    if client.get(*status, "current")["status"] != "stopped":
        client.run_task("POST", *status, "stop", task="qmstop", deadline_s=STOP_S)


@step.step
def restored() -> step.Commands:
    """Restore the backup into the spare id, and take from it what could disturb the guest or the node."""
    _, guest, node, client = _here()
    yield step.call(_restore, client, guest, node, _shell(node), current())


def _restore(client: Client, guest: Guest, node: Node, shell: NodeShell, asked: Asked) -> None:
    spare, archive = as_spare(guest), _choose(client, guest, node, asked)
    asked.chosen = archive
    if _read_spare(client, guest, node) is not None:
        raise GpulabError(f"{guest.name}: VM {spare.vmid} was made meanwhile", resolution="run again")
    client.run_task(
        "POST",
        *("nodes", node.name, "qemu"),
        task="qmrestore",
        deadline_s=RESTORE_S,
        vmid=spare.vmid,
        archive=archive.volid,
        storage=guest.disk_storage,
        unique=1,
        **overriding(guest, archive),
    )
    setting, deleting = harmless(_restored_config(client, guest, node), guest)
    words = [word for key, value in setting.items() for word in (f"--{key}", value)]
    if deleting:
        words += ["--delete", ",".join(deleting)]
    if words:
        # As root: an archive may hold keys that no token may change.
        shell.run(("qm", "set", str(spare.vmid), *words))


def _restored_config(client: Client, guest: Guest, node: Node) -> Mapping[str, Any]:
    spare = as_spare(guest)
    found = vm.read_state(client, spare.vmid)
    if found is None or not is_restored(found.config):
        raise GpulabError(
            f"{guest.name}: VM {spare.vmid} on {node.name} is not the one that was restored",
            f"Its tags are {found.config.get('tags', '(none)') if found else 'gone with it'}. Nothing more was done.",
        )
    return found.config


@step.step
def started() -> step.Commands:
    """Start the restored VM, once it can do no harm, and wait for its agent."""
    _, guest, node, client = _here()
    yield step.call(_start, client, guest, node)


def _start(client: Client, guest: Guest, node: Node) -> None:
    spare = as_spare(guest)
    found = _restored_config(client, guest, node)
    setting, deleting = harmless(found, guest)
    if setting or deleting:
        raise GpulabError(
            f"{guest.name}: VM {spare.vmid} is not started: it still has {', '.join([*setting, *deleting])}",
            "It could take the guest's GPU or answer at its address.",
        )
    if config.DATA_DISK not in found:
        raise GpulabError(f"{guest.name}: the backup holds no data disk: VM {spare.vmid} has no {config.DATA_DISK}")
    where = ("nodes", node.name, "qemu", spare.vmid)
    client.run_task("POST", *where, "status", "start", task="qmstart", deadline_s=vm.START_S)
    deadline = time.monotonic() + guest.boot_timeout_s
    while True:
        try:
            client.get(*where, "agent", "file-read", file="/proc/self/mountinfo")
            return
        except ApiError as error:
            if time.monotonic() >= deadline:
                _stop(client, guest, node)
                raise GpulabError(
                    f"{guest.name}: the restored system's agent has not answered after {guest.boot_timeout_s} s",
                    f"Last answer: {error.message}",
                    f"VM {spare.vmid} is left, stopped; start it and look at its console: qm terminal {spare.vmid}",
                ) from None
        time.sleep(0.5)


@step.step
def compared() -> step.Commands:
    """Compare the data disk of the restored VM with the guest's, file by file."""
    host, guest, node, client = _here()
    yield step.call(_compare, host, client, guest, node, _shell(node), current())


def _compare(host: Host, client: Client, guest: Guest, node: Node, shell: NodeShell, asked: Asked) -> None:
    spare = as_spare(guest)
    if asked.chosen is None:
        raise GpulabError(f"{guest.name}: no backup was restored in this run")
    try:
        sent = time.time()
        live = _read_live(host, guest)
        restored = _read_restored(shell, guest)
        # The archive's time is by the node's clock, the files' by the guest's; ours stands between.
        before = asked.chosen.began - client.clock_ahead + (live.now - sent) - manifest.CLOCK_S
        outcome = manifest.compare(live, restored, before)
        wrong = manifest.verdict(outcome, live)
        if wrong is not None:
            raise GpulabError(f"{guest.name}: {asked.chosen.volid}: {wrong.brief}", wrong.details, wrong.resolution)
    except GpulabError as error:
        _stop(client, guest, node)
        left = f"VM {spare.vmid} is left, stopped, to be looked at; the next run removes it"
        raise GpulabError(error.brief, error.details, "; ".join(filter(None, [error.resolution, left]))) from None
    logger.info(f"{host.print_prefix}{asked.chosen.volid}: {outcome.line}")


def _read_live(host: Host, guest: Guest) -> Manifest:
    command = python(_PROGRAM, {"mount": guest.data_disk.mount})
    done, output = host.run_shell_command(
        command, print_output=False, print_input=False, _sudo=guest.ssh_user != "root"
    )
    if not done:
        raise GpulabError(f"{guest.name}: reading its data disk failed", output.stderr.strip()[-2000:])
    found = manifest.parse(output.stdout, guest.name)
    if not found.mounted:
        raise GpulabError(f"{guest.name}: nothing is mounted at {guest.data_disk.mount}")
    return found


def _read_restored(shell: NodeShell, guest: Guest) -> Manifest:
    """Over the agent: the restored VM has no network. As root on the node: a token that may run programs in a guest
    (VM.GuestAgent.Unrestricted, VM.Monitor) is root in every guest, and the lab's is not."""
    spare, mount = as_spare(guest), guest.data_disk.mount
    argument = json.dumps({"mount": mount, "wait_s": MOUNT_S})
    answer = shell.output(
        *("qm", "guest", "exec", str(spare.vmid), "--timeout", str(READ_S), "--"),
        *("python3", "-I", "-c", _PROGRAM, argument),
    )
    name = f"VM {spare.vmid}"
    found = manifest.parse(read_by_agent(answer, name), name)
    if not found.mounted:
        raise GpulabError(
            f"{guest.name}: nothing is mounted at {mount} in the restored system: its data disk is not readable",
        )
    return found


@step.step
def removed() -> step.Commands:
    """Stop the restored VM and delete it, or keep it stopped (`--data keep=1`)."""
    _, guest, node, client = _here()
    if current().keep:
        yield step.call(_stop, client, guest, node)
        return
    yield step.call(_remove, client, guest, node, _shell(node))
