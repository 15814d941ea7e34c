# SPDX-License-Identifier: MIT
"""Faults of which there is one each: locks, other people, full storages, dead workers, silent guests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from operations.proxmox import vm
from rehearsal.pve.state import GIB
from tests.api.sites import DATA, OLD, add_task

from .table import Verdict
from .world import Case, World

S, R, H = Verdict.SURVIVED, Verdict.REFUSED, Verdict.HEALED
#: Requests that a fault waits for.
CREATE, CONFIG, START, IMPORT = (
    ("POST", "/qemu$"),
    ("PUT", "/101/config$"),
    ("POST", "/status/start$"),
    (
        "POST",
        "/101/config$",
    ),
)
MOVE = ("POST", "/move_disk$")
Act = Callable[[World], object]


def both(*acts: Act) -> Act:
    """One after the other."""
    return lambda world: [act(world) for act in acts]


def at(call: tuple[str, str], act: Act, times: int = 1, skip: int = 0) -> Act:
    """Just before such a request is looked at."""
    return lambda world: world.api.meanwhile(*call, lambda: act(world), times=times, skip=skip)


def soon(act: Act, seconds: float = 0.4) -> Act:
    return lambda world: threading.Timer(seconds, act, [world]).start()


def hasty(world: World) -> None:
    """Nobody waits for long."""
    world.patience_s = 0.2
    world.set(vm, "BUSY_S", 0.0)


def config(world: World, vmid: int = 101) -> dict[str, Any]:
    """The VM's own configuration, to be changed."""
    found: dict[str, Any] = world.api.state.vms[vmid].config
    return found


# Locks and other people's tasks.


def lock(world: World) -> None:
    world.api.lock_vm(101)


def unlock(world: World) -> None:
    world.api.lock_vm(101, "")


def backup(world: World) -> None:
    """A vzdump of root's holds the VM."""
    lock(world)
    world.theirs = add_task(world.api, "vzdump", user="root@pam")


def backup_over(world: World, status: str = "OK") -> None:
    world.theirs.exitstatus, world.theirs.endtime = status, int(time.time())
    unlock(world)


def backup_failed(world: World) -> None:
    """A vzdump that was killed leaves its lock."""
    backup(world)
    backup_over(world, "job errors")
    lock(world)


def changed_by_somebody(world: World) -> None:
    with world.api.lock:
        config(world)["cpulimit"] = int(config(world).get("cpulimit", 0)) % 8 + 1


LOCKS = [
    Case("update", "VM 101", "lock: backup, released in time", S, both(lock, at(CONFIG, unlock, skip=2))),
    Case(
        "update",
        "VM 101",
        "lock: backup, never released",
        R,
        both(hasty, lock),
        r"^pve1: PUT /nodes/pve1/qemu/101/config: 500 VM is locked \(backup\)\nStill so after \d+ s\. No task is at "
        r"work on the node\.\nhint: when nothing holds it any more: qm unlock 101 on pve1, then deploy again",
        unlock,
    ),
    Case(
        "update",
        "VM 101",
        "locked before its start, never released",
        H,
        both(hasty, at(START, lock)),
        r"^pve1: .*VM is locked \(backup\)",
        unlock,
    ),
    Case(
        "update",
        "VM 101",
        "locked before its start, released in time",
        S,
        both(at(START, lock), at(START, unlock, skip=2)),
    ),
    Case(
        "rebuild",
        "VM 101",
        "lock: backup",
        R,
        lock,
        r"^gpu01: VM 101 on pve1 cannot be rebuilt: it is locked \(backup\)",
        unlock,
    ),
    Case(
        "rebuild",
        "VM 101",
        "locked before the import, released in time",
        S,
        both(at(IMPORT, lock), at(IMPORT, unlock, skip=2)),
    ),
    Case(
        "rebuild",
        "VM 101",
        "locked before the import, never released",
        H,
        both(hasty, at(IMPORT, lock)),
        r"^pve1: POST /nodes/pve1/qemu/101/config: 500 VM is locked \(backup\)",
        unlock,
    ),
    Case("rollback", "VM 101", "lock: backup", R, lock, r"^gpu01: VM 101 on pve1 is locked \(backup\)", unlock),
    Case(
        "update",
        "VM 101",
        "a backup is being taken",
        R,
        both(hasty, backup),
        r"^gpu01: somebody else is at work on VM 101 on pve1; nothing was changed\n  vzdump of root@pam since .*\n"
        r"hint: deploy again when that has ended",
        backup_over,
    ),
    Case("update", "VM 101", "a backup is being taken, and ends in time", S, both(backup, soon(backup_over))),
    Case(
        "update",
        "VM 101",
        "a backup is being taken, and fails",
        S,
        both(backup, soon(lambda w: backup_over(w, "job errors"))),
    ),
    Case(
        "update",
        "VM 101",
        "a backup was killed and left its lock",
        R,
        both(hasty, backup_failed),
        r"VM is locked \(backup\)\n.*No task is at work on the node\.\nhint: .*qm unlock 101 on pve1",
        unlock,
    ),
    Case(
        "rebuild",
        "VM 101",
        "a backup is being taken",
        R,
        backup,
        r"^gpu01: somebody is at work on VM 101: task vzdump of root@pam since .*\nNothing was done\.\nhint",
        backup_over,
    ),
    Case(
        "update",
        "VM 101",
        "changed by somebody before each try",
        R,
        at(CONFIG, changed_by_somebody, times=10**6),
        r"^pve1: PUT /nodes/pve1/qemu/101/config: 500 checksum mismatch .*\n.*nothing of ours was applied\.\nhint",
    ),
    Case(
        "rebuild",
        "VM 101",
        "changed by somebody before each try",
        H,
        at(CONFIG, changed_by_somebody, times=10**6),
        r"^gpu01: the configuration of VM 101 changes faster than it can be written\nhint: see in the node's task list",
    ),
]


# The token.


def expire(world: World) -> None:
    world.api.state.users[world.api.user].tokens[world.api.token_name].expire = 1


def renew(world: World) -> None:
    world.api.state.users[world.api.user].tokens[world.api.token_name].expire = 0


def only_on_the_vm(world: World) -> None:
    """The token's rights sit on /vms/101, and PVE forgot them with the VM."""
    rights = next(entry for entry in world.api.state.acl if (entry.path, entry.who) == ("/vms", world.api.user))
    world.api.add_vm(101, name="old", tags="gpulab")
    world.api.grant(world.api.user, "/vms/101", " ".join(world.api.state.roles[rights.role]))
    world.api.state.acl[:] = [entry for entry in world.api.state.acl if entry is not rights and entry.path != "/vms"]
    destroy(world)


def on_both(world: World) -> None:
    world.api.add_vm(101, name="old", tags="gpulab")
    world.api.grant(world.api.user, "/vms/101", "VM.Audit VM.Allocate")
    destroy(world)


def destroy(world: World) -> None:
    """Somebody destroys the VM."""
    assert world.api.wait(world.api.root().nodes("pve1").qemu(101).delete(purge=1)) == "OK"


def no_right(privilege: str) -> Act:
    return lambda world: world.api.take_away(privilege)


EXPIRED = (
    r"^{0}pve1: the API refuses the token \(token expired - access denied\)\nhint: make bootstrap LAB=… makes a new one"
)
TOKEN = [
    Case("create", "token", "expired", R, expire, EXPIRED.format("waits for "), renew),
    Case("create", "token", "expires before the VM is created", H, at(CREATE, expire), EXPIRED.format(""), renew),
    Case("rebuild", "token", "expired", R, expire, EXPIRED.format(""), renew),
    Case("rebuild", "token", "expires before the import", H, at(IMPORT, expire), EXPIRED.format(""), renew),
    Case(
        "create",
        "token",
        "rights on /vms/101 alone, gone with the VM",
        R,
        only_on_the_vm,
        r"^(waits for )?pve1: the API token lacks VM\.A\w+ on /vms",
        World.rights,
    ),
    Case("create", "token", "rights on /vms/101 gone with the VM, those on /vms left", S, on_both),
    Case(
        "rebuild",
        "token",
        "loses VM.Config.Disk before the import",
        H,
        at(IMPORT, no_right("VM.Config.Disk")),
        r"^pve1: the API token lacks VM.Config.Disk on /vms/101\n",
        World.rights,
    ),
    Case(
        "mapping",
        "token",
        "lacks Mapping.Modify, in a run that is limited to the node",
        R,
        no_right("Mapping.Modify"),
        r"^pve1: the API token lacks Mapping.Modify on /mapping/pci/a4000\n",
        World.rights,
    ),
]


# Workers that die, and what they leave.


def killed(kind: str) -> Act:
    return lambda world: world.api.kill_task(kind, "successfully created disk")


def creation_of_somebody(world: World) -> None:
    """A cut-off creation, and no task of our token for it."""
    world.api.add_vm(101, lock="create")


def cleared_by_root(world: World) -> None:
    with world.api.lock:
        del world.api.state.vms[101]


def orphan(world: World) -> None:
    """A volume under the name that the VM's first disk would get."""
    volume = next(iter(world.api.state.volumes)).model_copy(update={"name": "vm-101-disk-0", "vmid": 101, "ctime": 9})
    with world.api.lock:
        world.api.state.volumes.append(volume)


def still_there(name: str, born: int) -> Callable[[World], bool]:
    return lambda world: world.volumes().get(f"local-lvm:{name}") == born


def under_the_old_name(world: World) -> None:
    """A rebuild was killed right after it had deleted the old disk; its name then went to a disk of somebody's."""
    world.kill_when = lambda words: "delete" in (words[-1] if isinstance(words[-1], dict) else {})
    assert world.run().killed
    world.calm()
    volume = next(volume for volume in world.api.state.volumes if volume.volid == DATA)
    new = volume.model_copy(update={"name": OLD.partition(":")[2], "ctime": 9, "size": 8 * GIB})
    with world.api.lock:
        world.api.state.volumes.append(new)
        config(world)["unused7"] = OLD
    world.besides.add(OLD)
    world.verified = True


def reassigned(world: World) -> None:
    """The data disk has been given to VM 901; the move was killed before a configuration said so."""
    _rename(DATA, "vm-901-disk-0", 901)(world)


def reassigned_back(world: World) -> None:
    _rename("local-lvm:vm-901-disk-0", DATA.partition(":")[2], 101)(world)


def _rename(volid: str, name: str, vmid: int) -> Act:
    def rename(world: World) -> None:
        with world.api.lock:
            volume = next(volume for volume in world.api.state.volumes if volume.volid == volid)
            volume.name, volume.vmid = name, vmid

    return rename


def never_ends(kind: str, limit: str) -> Act:
    def hold(world: World) -> None:
        world.steady = False
        world.set(vm, limit, 0.3)
        world.api.hold_task(kind, log=["transferred 0.0 B of 3.0 GiB (0.00%)"])

    return hold


def still_creating(world: World) -> None:
    """The run before was killed while its creation goes on."""
    world.steady = False
    world.api.hold_task("qmcreate")
    world.kill_when = lambda words: len(words) > 1 and words[0] == "POST" and words[1][-1] == "qemu"
    assert world.run().killed
    world.kill_when = lambda words: False
    world.dead = False


def still_importing(world: World) -> None:
    """The run before was killed while its import goes on; it ends soon."""
    world.steady = False
    let_go = world.api.hold_task("qmconfig")
    world.kill_when = lambda words: len(words) > 1 and words[0] == "POST" and words[1][-1] == "config"
    assert world.run().killed
    world.kill_when = lambda words: False
    world.dead = False
    threading.Timer(0.4, let_go).start()


WORKERS = [
    Case(
        "rebuild",
        "task qmconfig",
        "the import's worker is killed, its volume stays",
        H,
        killed("qmconfig"),
        "unexpected status",
    ),
    Case("create", "task qmcreate", "the worker is killed (lock: create)", H, killed("qmcreate"), "unexpected status"),
    Case(
        "create",
        "VM 101",
        "a creation that somebody else's token cut off",
        R,
        creation_of_somebody,
        r"^gpu01: VM 101 on pve1 is a creation that was cut off \(lock: create\)\nThe node's task list does not show .*"
        r"\nhint: on pve1: qm unlock 101 && qm destroy 101, then deploy again",
        cleared_by_root,
    ),
    Case(
        "create",
        "VM 101",
        "the creation of a killed run still goes on",
        R,
        still_creating,
        r"^gpu01: VM 101 on pve1 is being created\nAt work: qmcreate of gpulab@pve!deploy since",
    ),
    Case("rebuild", "VM 101", "the import of a killed run still goes on", S, still_importing),
    Case(
        "create",
        "task qmcreate",
        "never ends",
        H,
        never_ends("qmcreate", "CREATE_S"),
        r"^pve1: task qmcreate has not ended after \d+ s\nTask: UPID:.*\nLast: transferred 0\.0 B.*\nhint: it may",
    ),
    Case(
        "create",
        "task download",
        "never ends",
        H,
        never_ends("download", "DOWNLOAD_S"),
        r"^pve1: task download has not ended after \d+ s",
    ),
    Case(
        "create", "volume vm-101-disk-0", "its name is in use already", S, orphan, holds=still_there("vm-101-disk-0", 9)
    ),
    Case(
        "rebuild",
        f"volume {OLD}",
        "a new disk got the old one's name",
        S,
        under_the_old_name,
        holds=still_there(OLD.partition(":")[2], 9),
    ),
    Case(
        "rebuild",
        f"volume {DATA}",
        "move_disk was killed after the rename",
        R,
        reassigned,
        rf"^gpu01: VM 101 on pve1 cannot be rebuilt: scsi1 is {DATA}, which its storage does not list",
        reassigned_back,
    ),
    Case(
        "update",
        f"volume {DATA}",
        "move_disk was killed after the rename",
        H,
        reassigned,
        f"{DATA}",
        reassigned_back,
    ),
]


# Space, the image, the node.


def full(gib: int, storage: str = "local-lvm") -> Act:
    """So many GiB are left."""

    def fill(world: World) -> None:
        used = sum(volume.size for volume in world.api.state.volumes if volume.storage == storage)
        world.api.state.storages[storage].total = used + gib * GIB

    return fill


def roomy(world: World) -> None:
    for storage in world.api.state.storages.values():
        storage.total = 4000 * GIB


def other_image(world: World) -> None:
    world.server.content = b"something else"


def without_image(world: World) -> None:
    with world.api.lock:
        world.api.state.volumes = [volume for volume in world.api.state.volumes if volume.content != "import"]
    world._image_file().unlink()


def offline(times: int) -> Act:
    return lambda world: world.api.answer(595, times)


def used_gpu(world: World) -> None:
    """Somebody's VM has taken our card while ours was not there."""
    world.api.state.mappings["ours-too"] = world.api.state.mappings["theirs"].model_copy(
        update={"map": ["id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"]}
    )
    world.api.add_vm(300, running=True, name="render", hostpci0="mapping=ours-too,pcie=1")


def gpu_free(world: World) -> None:
    world.api.power.stop(300)


def somebodys_vm(tags: str, running: bool) -> Act:
    def make(world: World) -> None:
        world.api.add_vm(101, running=running, name="mail", memory=512, **({"tags": tags} if tags else {}))
        world.foreign[101] = dict(config(world))
        world.snapshots["create"].started.update({101: None} if running else {})

    return make


def elsewhere(world: World) -> None:
    """Its owner has given it another id."""
    world.foreign.pop(101)
    world.snapshots["create"].started.pop(101, None)
    world.api.power.stop(101)
    with world.api.lock:
        del world.api.state.vms[101]


def untagged(world: World) -> None:
    config(world)["tags"] = "theirs"


def tagged(world: World) -> None:
    config(world)["tags"] = "gpulab"


def mute(world: World) -> None:
    world.api.power.mute.add(101)
    world.boot_s = 1.0


def no_snippet(world: World) -> None:
    world.snippets = dict(world.api.power.snippets)
    world.api.power.snippets.clear()


def snippet_back(world: World) -> None:
    world.api.power.snippets.update(world.snippets)


def pending(key: str, value: str) -> Act:
    def put(world: World) -> None:
        world.api.state.vms[101].pending[key] = value

    return put


def reverted(world: World) -> None:
    world.api.state.vms[101].pending.clear()


def slow_shutdown(world: World) -> None:
    world.steady = False
    let_go = world.api.hold_task("qmshutdown")
    threading.Timer(0.5, let_go).start()


NOT_OURS = (
    r"^gpu01: vmid = 101: pve1 has a VM of that id that is not ours\nIts name is '\w+'; it lacks the tag 'gpulab'"
)
PLACES = [
    Case(
        "create",
        "storage local-lvm",
        "full before the VM is created",
        R,
        full(10),
        r"^pve1: storage local-lvm has 10 GiB left; the system disk of gpu01 needs 64 GiB",
        roomy,
    ),
    Case(
        "rebuild",
        "storage local-lvm",
        "full before the rebuild",
        R,
        full(10),
        r"^gpu01: VM 101 on pve1 cannot be rebuilt: storage local-lvm has 10 GiB left; a second system disk needs 64",
        roomy,
    ),
    Case(
        "create",
        "image",
        "another file than its checksum says",
        H,
        other_image,
        r"^pve1: task download failed: checksum mismatch: got '\w+' != expect '\w+'",
    ),
    Case(
        "rebuild",
        "image",
        "not there, and another file than its checksum says",
        R,
        both(without_image, other_image),
        r"^pve1: task download failed: checksum mismatch",
    ),
    Case("rebuild", "image", "not there: it is downloaded before anything is stopped", S, without_image),
    Case("create", "node pve1", "offline for a while (595)", S, offline(4)),
    Case(
        "create",
        "node pve1",
        "offline for good (595)",
        R,
        both(hasty, offline(10**6)),
        r"^waits for pve1: .*595 No route to host",
    ),
    Case("rebuild", "node pve1", "offline for a while (595)", S, offline(4)),
    Case(
        "rebuild",
        "node pve1",
        "offline for good (595)",
        R,
        both(hasty, offline(10**6)),
        r"^pve1: GET .*595 No route to host",
    ),
    Case(
        "create",
        "connection",
        "closed three times when reused",
        S,
        lambda world: world.api.hang_up("GET", "/", times=3),
    ),
    Case(
        "create",
        "GPU a4000",
        "somebody's VM runs with it, under another mapping",
        R,
        used_gpu,
        r"^gpu01: gpu = 'a4000': VM 300 \(render\) is using it\n.*\nhint: stop VM 300",
        gpu_free,
    ),
    Case("create", "VM 101", "a VM without a tag has the id", R, somebodys_vm("", True), NOT_OURS, elsewhere),
    Case(
        "create", "VM 101", "a VM of another tool has the id", R, somebodys_vm("terraform", False), NOT_OURS, elsewhere
    ),
    Case("update", "VM 101", "it has lost our tag", R, untagged, NOT_OURS, tagged),
    Case("rebuild", "VM 101", "it has lost our tag", R, untagged, NOT_OURS, tagged),
    Case(
        "update",
        "VM 101",
        "it loses our tag before it is shut down",
        H,
        at(("GET", "/101/pending$"), untagged),
        NOT_OURS,
        tagged,
    ),
    Case("update", "guest", "ignores the shutdown", S, lambda world: world.api.power.stubborn.add(101)),
    Case("rebuild", "guest", "ignores the shutdown", S, lambda world: world.api.power.stubborn.add(101)),
    Case("update", "guest", "takes its time to shut down", S, slow_shutdown),
    Case("rebuild", "guest", "takes its time to shut down", S, slow_shutdown),
    Case(
        "create",
        "guest agent",
        "never answers",
        H,
        mute,
        r"^gpu01: its agent has not shown a host key after 1(\.0)? s\nLast answer: .*QEMU guest agent is not running\n"
        r"hint: look at its console: qm terminal 101 on pve1",
    ),
    Case("rebuild", "guest agent", "never answers", H, mute, r"^gpu01: its agent has not shown a host key after 1"),
    Case(
        "create",
        "guest agent",
        "answers late",
        S,
        both(lambda world: world.api.power.mute.add(101), soon(lambda world: world.api.power.mute.clear(), 0.8)),
    ),
    Case(
        "create",
        "vendor snippet",
        "not on the node",
        H,
        no_snippet,
        r"^pve1: task qmstart failed: volume 'local:snippets/gpulab-vendor\.yaml' does not exist",
        snippet_back,
    ),
    Case("update", "VM 101", "a pending key of somebody else's", S, pending("balloon", "512")),
    Case(
        "rebuild",
        "VM 101",
        "stale pending keys",
        R,
        pending("cores", "1"),
        r"^gpu01: VM 101 on pve1 cannot be rebuilt: it has pending changes \(cores\); restart it or revert them first",
        reverted,
    ),
    Case("update", "VM 101", "keys of ours that a killed run left pending", S, pending("cores", "4")),
    Case(
        "rebuild",
        "verify",
        "fails on the new system",
        H,
        lambda world: world.verify(1, "FAIL nvidia.driver.loaded[gpu01]: no driver"),
        r"^gpu01: the new system does not pass verify \(exit status 1\)\n  FAIL nvidia\.driver\.loaded\[gpu01\]",
    ),
]

DESTROYED = [
    Case(
        "destroy",
        "task qmmove",
        "killed after the rename (move_disk)",
        H,
        lambda world: world.api.kill_task("qmmove", "removing disk"),
        r"^(pve1|gpu01): .*unexpected status",
    ),
    Case(
        "destroy",
        "task qmmove",
        "killed after the rename, on the way back",
        H,
        lambda world: world.api.kill_task("qmmove", "removing disk", skip=1),
        r"^(pve1|gpu01): .*unexpected status",
    ),
    Case(
        "destroy",
        "task qmdestroy",
        "killed in the middle",
        H,
        lambda world: world.api.kill_task("qmdestroy", "removing the configuration"),
        r"^(pve1|gpu01): .*unexpected status",
    ),
    Case(
        "destroy",
        "task qmcreate",
        "killed while the VM is made anew",
        H,
        lambda world: world.api.kill_task("qmcreate", "successfully created disk", skip=1),
        r"^(pve1|gpu01): .*unexpected status",
    ),
    Case("destroy", "VM 101", "lock: backup", R, lock, r"^gpu01: .*it is locked \(backup\)", unlock),
    Case("destroy", "VM 101", "it has lost our tag", R, untagged, NOT_OURS, tagged),
    Case("destroy", "guest", "ignores the shutdown", S, lambda world: world.api.power.stubborn.add(101)),
    Case("destroy", "guest agent", "never answers", H, mute, r"^gpu01: its agent has not shown a host key after 1"),
    Case("destroy", "token", "expires before the data disk is moved", H, at(MOVE, expire), EXPIRED.format(""), renew),
    Case(
        "destroy",
        "verify",
        "fails on the new system",
        H,
        lambda world: world.verify(1, "FAIL nvidia.driver.loaded[gpu01]: no driver"),
        r"^gpu01: the new system does not pass verify",
    ),
]

CASES = [*DESTROYED, *LOCKS, *TOKEN, *WORKERS, *PLACES]
